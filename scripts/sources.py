"""What init.source names: a trained model's config and variables."""

from pathlib import Path

import jax
from jax.sharding import SingleDeviceSharding

from checkpoint.model_folder import VARIABLES, is_model_folder, read_model_config
from checkpoint.run_directory import read_run
from checkpoint.store import latest_step, restore_variables
from configs.architecture import ModelConfig
from configs.base import RunConfig
from configs.checks import UserError
from model.transformer import Transformer, Variables, abstract_variables
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
    return initial_variables(run, *load_source(run.init.source))


def load_source(name: str) -> tuple[ModelConfig, Variables]:
    """The config and float32 variables of a model folder or a run directory, on the first device.

    Raises:
      UserError: the name is neither.
    """
    folder = Path(name)
    is_model = is_model_folder(folder)
    config = read_model_config(folder) if is_model else read_run(folder).model
    checkpoints = folder / VARIABLES
    abstract, _ = abstract_variables(Transformer(config))
    here = SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
    variables, _ = restore_variables(checkpoints.parent, wanted)
    return config, variables
