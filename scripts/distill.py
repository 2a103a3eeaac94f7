"""Distils a trained run into a student, or goes on with it: the same command resumes.

python -m scripts.distill v31_nano_student --teacher runs/v31_nano
"""

from pathlib import Path

from jax.sharding import Mesh

from checkpoint.run_directory import read_run
from checkpoint.store import latest_step
from configs.cli import load_run
from infer.load import load_model
from scripts import command
from scripts.train import describe, finish
from train.distill import Teacher, distill
from train.report import write_report


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__, run=True)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the teacher's run")
    arguments, overrides = command.split_run_arguments(parser, argv)
    run = load_run(arguments.run, overrides, arguments.own_options)
    command.use_host_devices(run.mesh.num_devices)
    describe(run)
    result = distill(run, arguments.run_dir, *teacher_of(arguments.teacher))
    write_report(arguments.run_dir)
    return finish(run, arguments.run_dir, result)


def teacher_of(run_dir: Path):
    """The teacher's config, and how to load it onto the student's mesh."""
    teacher_run = read_run(run_dir)

    def load(mesh: Mesh) -> Teacher:
        model, variables = load_model(teacher_run, run_dir, mesh)
        return Teacher(model, variables, teacher_run, latest_step(run_dir / "checkpoints") or 0)

    return teacher_run, load


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
