"""The variables of the trained model that a run begins with."""

from pathlib import Path

from checkpoint.store import latest_step
from configs.base import RunConfig
from configs.checks import UserError
from infer.sources import open_source
from model.transformer import Variables
from scripts.reading import reading
from train.initial import initial_variables


def first_variables(run: RunConfig, run_dir: Path) -> Variables | None:
    """What a new run begins with; None where it goes on, or draws its weights from its seed.

    Raises:
      UserError: as beginning.
    """
    if run.init.source is None or latest_step(run_dir / "checkpoints") is not None:
        return None
    print(f"beginning with the weights of {run.init.source}", flush=True)
    return beginning(run)


def beginning(run: RunConfig) -> Variables:
    """The variables that run.init says.

    Raises:
      UserError: init.source is not set, can't be read, or is no beginning of the run's model.
    """
    if run.init.source is None:
        raise UserError(f"{run.name} began with random weights: it has no init.source")
    source = open_source(run.init.source)
    with reading(source) as progress:
        _, variables = source.load(progress=progress)
    return initial_variables(run, source.config, variables)
