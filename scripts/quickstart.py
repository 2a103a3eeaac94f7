"""The whole story: corpus, training with expert parallelism, distillation, evaluation, report.

    python -m scripts.quickstart            # a few minutes on two CPU cores
    python -m scripts.quickstart --short    # the same road in a few steps, to see that it works

Interrupted, it goes on where it was when started again.
"""

import dataclasses
import resource
from pathlib import Path

from configs.base import RunConfig
from configs.cli import load_run
from data.pipeline import prepare_corpus
from evals.compare import complete, evaluate_run, print_story, summarize, write_comparison
from evals.page import print_results
from scripts import command
from scripts.distill import teacher_of
from scripts.train import describe
from train.distill import distill
from train.loop import fit
from train.progress import Stopwatch

PROMPTS = ("def parse_args(", "class Node:\n    def __init__(self", "import os\nimport sys\n")
SHORT = ("--steps", "25", "--optimizer.warmup-steps", "5")


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("--short", action="store_true", help="few steps: a check, not a result")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))
    arguments = parser.parse_args(argv)
    teacher_dir, student_dir = (arguments.run_dir / name for name in ("teacher", "student"))
    overrides = SHORT if arguments.short else ()
    names = ("v31_nano", "v31_nano_student")
    teacher, student = (_measured_often(load_run(name, overrides)) for name in names)
    command.use_host_devices(max(teacher.mesh.num_devices, student.mesh.num_devices))

    watch = Stopwatch()
    describe(teacher)
    prepare_corpus(teacher.data, teacher.model.vocab_size)
    watch.lap("corpus")
    results = [fit(teacher, teacher_dir)]
    watch.lap("teacher")
    if results[-1].interrupted is None:
        describe(student)
        results.append(distill(student, student_dir, *teacher_of(teacher_dir)))
        watch.lap("student")
    if results[-1].interrupted is not None:
        print("stopped and saved; the same command goes on from there")
        return 128 + results[-1].interrupted
    best, learner = (evaluate_run(folder) for folder in (teacher_dir, student_dir))
    watch.lap("evaluation")
    completions = complete(teacher_dir, PROMPTS, max_new_tokens=48)
    watch.lap("completions")
    for title, contender in (("teacher", best), ("student", learner)):
        print_results(title, contender.results.values())
    peak_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    summary = summarize(best, learner, watch.seconds, peak_rss_mb)
    write_comparison(arguments.run_dir, best, learner, summary, completions)
    print_story(arguments.run_dir, summary, completions)
    return 0


def _measured_often(run: RunConfig) -> RunConfig:
    """With the validation loss ten times, for the picture."""
    validation = dataclasses.replace(run.validation, every=max(run.steps // 10, 1))
    return dataclasses.replace(run, validation=validation)


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
