"""SmolLM2's scores three ways: our own, and lm-evaluation-harness's with our models and with
transformers.

    python -m tests.evals.parity.scores --limit 50     # in a Python that has all of them

The Python needs this project, lm-evaluation-harness and the parity extra with gguf. Each task's
samples become a task of the harness on a local file, so that all three are asked the same. Prints
a table; exits with 1 where two scores of a task differ by 0.1 points or more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.smollm2 import packaged_gguf
from evals.samples import Choices, Load, Prompt, Task, Text
from evals.task_list import find_tasks

TASKS = "winogrande_ni,multiemo_en,exams_es,gsm8k"
MOST_POINTS = 0.1
METRICS = {  # ours, and the harness's
    "acc,none": "acc,none",
    "acc_norm,none": "acc_bytes,none",
    "bits_per_byte,none": "bits_per_byte,none",
    "exact_match,strict-match": "exact_match,strict-match",
    "exact_match,flexible-extract": "exact_match,flexible-extract",
}
EXACT = {
    "metric": "exact_match",
    "ignore_case": True,
    "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
}
NUMBERS = {
    "strict-match": (r"#### (\-?[0-9\.\,]+)", 0),
    "flexible-extract": ("(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
}


def harness_task(task: Task, limit: int, folder: Path) -> None:
    """Writes NAME.jsonl with the task's samples and NAME.yaml, which asks for them (JSON is YAML).

    Raises:
      NotImplementedError: samples that the harness has no form for.
    """
    samples = list(task.load(Load(task.num_fewshot, 0, limit)))[:limit]
    first, path = samples[0], folder / f"{task.name}.jsonl"
    settings: dict[str, Any] = {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(path)},
        "test_split": "train",
        "target_delimiter": "",
    }
    if isinstance(first, Choices):
        rows = [{"context": s.context, "choices": s.choices, "answer": s.answer} for s in samples]
        metrics = [{"metric": name} for name in ("acc", "acc_bytes")]
        settings |= {"output_type": "multiple_choice", "metric_list": metrics}
        settings |= {"doc_to_text": "{{context}}", "doc_to_target": "answer"}
        settings |= {"doc_to_choice": "choices"}
    elif isinstance(first, Text):
        rows = [{"text": s.text} for s in samples]
        settings |= {"output_type": "loglikelihood_rolling", "doc_to_text": ""}
        settings |= {"doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]}
    elif isinstance(first, Prompt) and task.name == "gsm8k":
        rows = [{"prompt": s.prompt, "answer": s.reference} for s in samples]
        asked = {"until": list(first.stops), "max_gen_toks": first.max_new_tokens}
        settings |= {"output_type": "generate_until", "doc_to_text": "{{prompt}}"}
        settings |= {"doc_to_target": "{{answer}}", "metric_list": [EXACT]}
        settings |= {"generation_kwargs": {**asked, "do_sample": False}}
        settings["filter_list"] = [
            {"name": name, "filter": [_found(*number), {"function": "take_first"}]}
            for name, number in NUMBERS.items()
        ]
    else:
        raise NotImplementedError(f"{task.name} asks what the harness has no form for here")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{task.name}.yaml").write_text(json.dumps(settings, indent=1))


def _found(pattern: str, which: int) -> dict[str, Any]:
    return {"function": "regex", "regex_pattern": pattern, "group_select": which}


def run(*command: str) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-m", *command], check=True, env=env)


def ours(tasks: Sequence[Task], limit: int, folder: Path) -> dict[str, Any]:
    names = ",".join(task.name for task in tasks)
    output = folder / "ours"
    given = ("--limit", str(limit), "--output", str(output))
    run("scripts.evaluate", "smollm2", "--tasks", names, *given)
    return json.loads((output / "results.json").read_text())["results"]


def harness(tasks: Sequence[Task], folder: Path, model: str, arguments: str) -> dict[str, Any]:
    names = ",".join(task.name for task in tasks)
    output = folder / model
    given = ("--model", model, "--model_args", arguments, "--tasks", names)
    more = ("--include_path", str(folder), "--output_path", str(output), "--batch_size", "1")
    run("scripts.lm_eval", "run", *given, *more)
    (path,) = output.rglob("results_*.json")
    return json.loads(path.read_text())["results"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=50, help="samples of each task (50)")
    given = parser.parse_args()
    tasks, file = find_tasks(given.tasks.split(",")), packaged_gguf()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in tasks:
            harness_task(task, given.limit, folder)
        peer = f"pretrained={file.parent},gguf_file={file.name},dtype=float32"
        found = [
            ours(tasks, given.limit, folder),
            harness(tasks, folder, "moesaic", "source=smollm2"),
            harness(tasks, folder, "hf", peer),
        ]
    worst = 0.0
    print("| task | metric | ours | harness, our model | harness, transformers |")
    print("|" + "---|" * 5)
    for task in tasks:
        for mine, theirs in METRICS.items():
            if mine not in found[0][task.name]:
                continue
            scores = [found[0][task.name][mine], *(x[task.name][theirs] for x in found[1:])]
            worst = max(worst, 100 * (max(scores) - min(scores)))
            shown = " | ".join(f"{score:.4f}" for score in scores)
            print(f"| {task.name} | {mine.replace(',none', '')} | {shown} |")
    print(f"largest difference: {worst:.3f} points")
    return 0 if worst < MOST_POINTS else 1


if __name__ == "__main__":
    raise SystemExit(main())
