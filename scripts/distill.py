"""Distils a trained run into a student, or goes on with it: the same command resumes.

python -m scripts.distill v31_nano_student --teacher runs/v31_nano
"""

from pathlib import Path

from jax.sharding import Mesh
from tokenizers import Tokenizer

from checkpoint.orbax_store import latest_step
from checkpoint.run_corpus import read_run_tokenizer
from checkpoint.run_directory import read_run
from configs.base import RunConfig
from configs.cli import load_run
from infer.load import load_model
from planning.available import require_memory
from scripts import command
from scripts.train import describe, finish
from train.distill import LoadTeacher, Teacher, distill


def main(argv: list[str]) -> int:
    parser = command.add_process_options(command.parser(__doc__, run=True))
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the teacher's run")
    arguments, overrides = command.split_run_arguments(parser, argv)
    run = load_run(arguments.run, overrides, arguments.own_options)
    command.start_processes(arguments, run.mesh.num_devices)
    teacher = teacher_of(arguments.teacher)
    require_memory(run, teacher[0].model)
    describe(run)
    result = distill(run, arguments.run_dir, *teacher)
    return finish(run, arguments.run_dir, result)


def teacher_of(run_dir: Path) -> tuple[RunConfig, LoadTeacher, Tokenizer]:
    """The teacher's config, how to load it onto the student's mesh, and its tokenizer."""
    teacher_run = read_run(run_dir)

    def load(mesh: Mesh) -> Teacher:
        step = latest_step(run_dir / "checkpoints") or 0
        model, variables = load_model(teacher_run, run_dir, mesh)
        return Teacher(model, variables, teacher_run, step, str(run_dir))

    return teacher_run, load, read_run_tokenizer(teacher_run, run_dir)


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
