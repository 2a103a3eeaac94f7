"""A teacher and its student side by side: summary.json, pictures and one page."""

import dataclasses
import html
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.run_corpus import read_run_tokenizer
from checkpoint.run_directory import read_run
from configs.checks import UserError
from configs.serialization import finite_json
from data.tokenizers.tokenizer import end_of_text_id
from evals.opening import load_run, run_evaluation
from evals.results import Result, headline
from evals.run import evaluate
from evals.task_list import HELD_OUT, find_tasks
from evals.tasks.base import Skipped
from infer.generate import generate
from infer.run_weights import load_model
from infer.sampling import Sampling
from train.metrics import read_lines
from train.report import (
    COLUMNS,
    OPTIONAL,
    draw_bars,
    draw_load,
    draw_validation,
    table,
    write_page,
)

SAMPLING = Sampling(temperature=0.7, top_p=0.9)
"""Of the completions: greedy decoding of a model this small repeats itself."""


@dataclass(frozen=True)
class EvaluatedRun:
    """One of the two: where its run lies and what the benchmarks said."""

    run_dir: Path
    results: dict[str, Result]
    """By task name: stdlib_bpb and line_completion."""


def evaluate_run(run_dir: Path) -> EvaluatedRun:
    """Runs the benchmarks of held-out text on a trained run.

    Raises:
      UserError: one does not apply to it.
    """
    results: dict[str, Result] = {}
    loaded = load_run(run_dir)
    output = run_dir / "evaluation"
    evaluation = run_evaluation(run_dir, loaded, output=output, may_set_aside=True)
    for found in evaluate(evaluation, find_tasks(HELD_OUT)):
        if isinstance(found, Skipped):
            raise UserError(f"{found.task} does not apply to {run_dir}: {found.reason}")
        results[found.task.name] = headline(found, loaded.weights)
    return EvaluatedRun(run_dir, results)


def complete(run_dir: Path, prompts: Sequence[str], *, max_new_tokens: int) -> dict[str, str]:
    """The run's continuation of each prompt, sampled with a fixed seed."""
    run = read_run(run_dir)
    model, variables = load_model(run, run_dir)
    tokenizer = read_run_tokenizer(run, run_dir)
    end = end_of_text_id(tokenizer)
    tokens = [[end, *tokenizer.encode(prompt).ids] for prompt in prompts]
    stop_ids = frozenset({end})
    result = generate(
        model,
        variables,
        tokens,
        max_new_tokens=max_new_tokens,
        sampling=SAMPLING,
        stop_ids=stop_ids,
    )
    pairs = zip(tokens, result.tokens, strict=True)
    # Together with its prompt: decoded alone, some tokenizers' text loses the space it begins with.
    texts = [
        tokenizer.decode([*before, *after])[len(tokenizer.decode(before)) :]
        for before, after in pairs
    ]
    return dict(zip(prompts, texts, strict=True))


def summarize(
    teacher: EvaluatedRun, student: EvaluatedRun, seconds: dict[str, float], peak_rss_mb: float
) -> dict[str, Any]:
    """The numbers of the story, as summary.json holds them."""
    bits, lines = "stdlib_bpb", "line_completion"
    beside = teacher.results[bits].details
    summary: dict[str, Any] = {
        "teacher_bpb": teacher.results[bits].value,
        "student_bpb": student.results[bits].value,
        "gzip_bpb": beside["gzip_bpb"],
        "xz_bpb": beside["xz_bpb"],
        "unigram_bpb": beside["unigram_bpb"],
        "teacher_line_accuracy": teacher.results[lines].value,
        "student_line_accuracy": student.results[lines].value,
    }
    gain = beside["unigram_bpb"] - summary["teacher_bpb"]
    summary["student_share_of_gain"] = (beside["unigram_bpb"] - summary["student_bpb"]) / gain
    for name, contender in (("teacher", teacher), ("student", student)):
        model = read_run(contender.run_dir).model
        summary[f"{name}_bpb_standard_error"] = contender.results[bits].standard_error
        summary[f"{name}_line_standard_error"] = contender.results[lines].standard_error
        summary[f"{name}_parameters"] = model.num_parameters
        summary[f"{name}_active_parameters"] = model.num_active_parameters
        weights = contender.results[bits].weights
        summary[f"{name}_weights"] = weights and dataclasses.asdict(weights)
    return summary | {"seconds": seconds, "peak_rss_mb": peak_rss_mb}


def write_comparison(
    directory: Path,
    teacher: EvaluatedRun,
    student: EvaluatedRun,
    summary: dict[str, Any],
    completions: dict[str, str],
) -> Path:
    """Writes summary.json, the pictures and report.html; returns the page's path.

    Args:
      completions: the teacher's continuation of each prompt.
    """
    (directory / "summary.json").write_text(finite_json(summary, indent=2) + "\n")
    names = {"teacher": teacher, "student": student}
    bits = {
        "unigram model": summary["unigram_bpb"],
        "gzip -9": summary["gzip_bpb"],
        "xz -9e": summary["xz_bpb"],
    } | {name: c.results["stdlib_bpb"].value for name, c in names.items()}
    bit_errors = {name: c.results["stdlib_bpb"].standard_error for name, c in names.items()}
    lines = {name: c.results["line_completion"].value for name, c in names.items()}
    line_errors = {name: c.results["line_completion"].standard_error for name, c in names.items()}
    logs = {
        name: read_lines(c.run_dir / "metrics.jsonl", COLUMNS, OPTIONAL)
        for name, c in names.items()
    }
    drawn = (draw_validation(logs), draw_load(logs["teacher"]))
    pictures = [
        draw_bars(
            "bits_per_byte",
            "Held-out files: fewer bits are better.",
            bits,
            bit_errors,
            "bits per byte",
        ),
        draw_bars(
            "line_completion",
            "Held-out lines completed exactly.",
            lines,
            line_errors,
            "share of lines",
        ),
        *(picture for picture in drawn if picture is not None),
    ]
    settings = {name: dataclasses.asdict(read_run(c.run_dir)) for name, c in names.items()}
    sections = [_metrics(summary), *(_completion(p, text) for p, text in completions.items())]
    title = "Moesaic: a mixture of experts trained on this Python's library, and its student"
    return write_page(directory, title, sections, pictures, settings)


def _metrics(summary: dict[str, Any]) -> str:
    def models(name: str) -> str:
        total, active = summary[f"{name}_parameters"], summary[f"{name}_active_parameters"]
        return f"{total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active per token"

    stages = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    rows = {"teacher": models("teacher"), "student": models("student")}
    rows["the student keeps"] = f"{summary['student_share_of_gain']:.1%} of the gain over unigrams"
    rows["time"] = stages
    rows["peak memory"] = f"{summary['peak_rss_mb']:.0f} MB"
    return table(rows)


def _completion(prompt: str, text: str) -> str:
    return f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>"


def print_story(directory: Path, summary: dict[str, Any], completions: dict[str, str]) -> None:
    """Says on the terminal what came out, where it lies and what to try next."""
    for prompt, text in completions.items():
        print(f"\n--- the teacher goes on after {prompt!r}:\n{prompt}{text}")
    print(
        f"\nbits per byte on held-out files: teacher {summary['teacher_bpb']:.3f}, "
        f"student {summary['student_bpb']:.3f}; unigrams {summary['unigram_bpb']:.3f}, "
        f"gzip -9 {summary['gzip_bpb']:.3f}, xz -9e {summary['xz_bpb']:.3f}"
    )
    print(f"the student keeps {summary['student_share_of_gain']:.1%} of the gain over unigrams")
    print(f"{directory}/report.html shows it; {directory}/summary.json has the numbers.")
    print("Next, with the environment active (source .venv/bin/activate):")
    teacher, student = (shlex.quote(str(directory / name)) for name in ("teacher", "student"))
    print(f'  python -m scripts.generate {teacher} --prompt "class Stack:"')
    print(f"  python -m scripts.convert {student} exported --to huggingface")
    print("  python -m scripts.train v31_nano --steps 1000 --mesh.expert 4")
