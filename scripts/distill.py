"""Distils a model into a student, or goes on with it: the same command resumes.

    python -m scripts.distill v31_nano_student --teacher runs/v31_nano
    python -m scripts.distill smollm2_student --teacher smollm2 --teacher-weights int8
    python -m scripts.distill runs/v31_nano_student            goes on, with the teacher it had

A teacher is anything that scripts.generate reads: a run, a folder in Hugging Face form, a GGUF
file; --teacher given several times names several. Or it is the address of an OpenAI-compatible
server, http://host:8000/v1 or http://host:8000/v1#MODEL (its key: OPENAI_API_KEY). It must number
tokens as the student does: the student's corpus is made with the teacher's tokenizer
(--data.tokenizer); another vocabulary needs --distill.vocabulary bytes.

What teachers say can be made ahead, for any number of students:

    python -m scripts.distill v31_nano_student --distill.top-k 64 --teacher runs/v31_nano \\
        --make-cache runs/caches/v31_nano
    python -m scripts.distill v31_nano_student --distill.top-k 64 \\
        --distill.cache-directory runs/caches/v31_nano
"""

import argparse
import shlex
from functools import partial
from pathlib import Path

from checkpoint.provenance import read_provenance
from configs.base import RunConfig
from configs.checks import require
from infer.weights import FORMATS
from parallel.distributed import is_first
from planning.available import distillation_memory, require_memory
from scripts import command
from scripts.named_runs import chosen_run, experiment_text
from scripts.samples import sampler
from scripts.sources import initial_weights
from scripts.teachers import (
    cache_ahead,
    cache_answers,
    is_server,
    make_writer,
    server_teacher,
    teacher_of,
)
from scripts.train import describe, finish
from train.distill import (
    check_vocabulary_size,
    distill,
    distill_by_view,
    distill_from_cache,
)
from train.server_teacher import server_view
from train.teachers import BETWEEN_NAMES


def main(argv: list[str]) -> int:
    arguments, overrides = command.split_run_arguments(_parser(), argv)
    run = chosen_run(arguments, overrides)
    command.start_processes(arguments, run.mesh.num_devices)
    if run.distill is not None and run.distill.cache_directory and not arguments.make_cache:
        require(not arguments.teacher, "--teacher has no effect beside distill.cache_directory")
        require_memory(run)
        describe(run)
        options = _options(run, arguments)
        return finish(run, arguments.run_dir, distill_from_cache(run, arguments.run_dir, **options))
    names = arguments.teacher or _known_teachers(arguments.run_dir)
    if any(is_server(name) for name in names):
        return _by_server(run, arguments, names)
    teachers = [teacher_of(name, arguments.teacher_weights) for name in names]
    configs, weights = [teacher.config for teacher in teachers], arguments.teacher_weights
    if run.distill is not None and run.distill.vocabulary != "bytes":
        for config in configs:  # before memory is counted, which takes seconds
            check_vocabulary_size(run, config)
    require_memory(run, *configs, weights=weights)
    if arguments.make_cache:
        cache_ahead(run, arguments.make_cache, teachers)
        return 0
    describe(run)
    if is_first():
        print(distillation_memory(run, configs, weights))
    (first, *others), options = teachers, _options(run, arguments)
    writer = make_writer(run)
    result = distill(run, arguments.run_dir, *first, *others, make_writer=writer, **options)
    code = finish(run, arguments.run_dir, result)
    if code == 0 and run.distill is not None and run.distill.drafter and is_first():
        print(f"  python -m scripts.acceptance {shlex.quote(str(arguments.run_dir))}")
    return code


def _by_server(run: RunConfig, arguments: argparse.Namespace, names: list[str]) -> int:
    require(len(names) == 1, "a teacher behind a server stands alone: name no other --teacher")
    require_memory(run)
    teacher = server_teacher(run, names[0])
    view = partial(server_view, run, teacher)
    if arguments.make_cache:
        cache_answers(run, arguments.make_cache, teacher.origin, view)
        return 0
    describe(run)
    options, folder = _options(run, arguments), arguments.run_dir
    writer = make_writer(run)
    result = distill_by_view(run, folder, teacher.origin, view, writer, **options)
    return finish(run, folder, result)


def _parser() -> argparse.ArgumentParser:
    parser = command.add_process_options(command.parser(__doc__, run=True))
    parser.add_argument(
        "--teacher",
        action="append",
        help="a run, a model's folder or file, a server; of a run's folder, the one it had",
    )
    parser.add_argument(
        "--teacher-weights",
        choices=FORMATS,
        default="float32",
        help="format of the teachers' weights in memory (float32)",
    )
    parser.add_argument(
        "--make-cache", type=Path, help="folder for what the teachers say; nothing is trained"
    )
    return parser


def _options(run: RunConfig, arguments: argparse.Namespace) -> dict:
    begin = initial_weights(run, arguments.run_dir)
    experiment = experiment_text(arguments)
    return {
        "variables": begin.take(),
        "initial": begin.origin,
        "experiment": experiment,
        "sample": sampler(run, arguments.run_dir),
    }


def _known_teachers(run_dir: Path) -> list[str]:
    """The teachers that a run which goes on has learned from."""
    known = read_provenance(run_dir)
    require(
        known is not None and known.teacher is not None,
        f"--teacher is missing, and {run_dir} holds no run that notes one: name a run, a model's "
        "folder or file",
    )
    assert known is not None
    assert known.teacher is not None
    return known.teacher.name.split(BETWEEN_NAMES)


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
