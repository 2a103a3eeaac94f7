"""Distils a model into a student, or goes on with it: the same command resumes.

    python -m scripts.distill v31_nano_student --teacher runs/v31_nano
    python -m scripts.distill smollm2_student --teacher smollm2 --teacher-weights int8
    python -m scripts.distill runs/v31_nano_student            goes on, with the teacher it had

The teacher is anything that scripts.generate reads: a run, a folder in Hugging Face form, a GGUF
file. The two must number tokens alike: the student's corpus is made with the teacher's tokenizer
(--data.tokenizer).
"""

from pathlib import Path

from jax.sharding import Mesh
from tokenizers import Tokenizer

from checkpoint.orbax_store import latest_step
from checkpoint.provenance import read_provenance
from configs.architecture import ModelConfig
from configs.checks import require
from infer.sources import open_source
from infer.weights import FORMATS, WeightFormat, check_format
from planning.available import require_memory
from scripts import command
from scripts.named_runs import chosen_run, experiment_text
from scripts.reading import reading
from scripts.sources import initial_weights
from scripts.train import describe, finish
from train.distill import LoadTeacher, Teacher, distill


def main(argv: list[str]) -> int:
    parser = command.add_process_options(command.parser(__doc__, run=True))
    parser.add_argument(
        "--teacher", help="a run, a model's folder or file; of a run's folder, the one it had"
    )
    parser.add_argument(
        "--teacher-weights",
        choices=FORMATS,
        default="float32",
        help="format of the teacher's weights in memory (float32)",
    )
    arguments, overrides = command.split_run_arguments(parser, argv)
    run = chosen_run(arguments, overrides)
    command.start_processes(arguments, run.mesh.num_devices)
    name = arguments.teacher or _known_teacher(arguments.run_dir)
    teacher = teacher_of(name, arguments.teacher_weights)
    require_memory(run, teacher[0])
    describe(run)
    begin, experiment = initial_weights(run, arguments.run_dir), experiment_text(arguments)
    options = {"variables": begin.take(), "initial": begin.origin, "experiment": experiment}
    result = distill(run, arguments.run_dir, *teacher, **options)
    return finish(run, arguments.run_dir, result)


def _known_teacher(run_dir: Path) -> str:
    """The teacher that a run which goes on has learned from."""
    known = read_provenance(run_dir)
    require(
        known is not None and known.teacher is not None,
        f"--teacher is missing, and {run_dir} holds no run that notes one: name a run, a model's "
        "folder or file",
    )
    assert known is not None
    assert known.teacher is not None
    return known.teacher.name


def teacher_of(
    name: str | Path, weights: WeightFormat = "float32"
) -> tuple[ModelConfig, LoadTeacher, Tokenizer]:
    """The teacher's config, how to load it onto the student's mesh, and its tokenizer.

    Args:
      weights: the format of its weights in memory.
    Raises:
      UserError: nothing that can be read, or a source without a tokenizer.
    """
    source = open_source(str(name))

    def load(mesh: Mesh) -> Teacher:
        is_run = source.kind == "run"
        step = latest_step(source.path / "checkpoints") or 0 if is_run else None
        with reading(source) as progress:
            model, variables = source.load(
                mesh=mesh, weights=check_format(weights), progress=progress
            )
        return Teacher(model, variables, step, source.name)

    return source.config, load, source.tokenizer().tokenizer


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
