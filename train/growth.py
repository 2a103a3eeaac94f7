"""The optimiser's state of a model that grew (the recipe of Drop-Upcycling, 2025).

Second moments grow as the weights do: a twin's gradients are of its parent's size, and Adam divides
by them from the first step. First moments of new experts begin at zero, because the direction
of the parent's last steps would be taken twice; under `split` no expert is new, so the parts keep
theirs. Adam's step counts go on (its moments are those of many steps); the schedule's begins again
with the new run's schedule.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

from checkpoint.orbax_store import restore_variables
from configs.base import RunConfig
from model.growth import Operator, grow_leaf
from parallel.mesh import make_mesh
from train.state import make_train_setup

FIRST_MOMENT, SECOND_MOMENT = "mu", "nu"  # optax's names, of Muon's momentum too


def grow_optimizer_state(
    opt_state: Any, abstract_params: Any, operator: Operator, factor: int = 2
) -> Any:
    """The state for the parameters that model.growth.grow makes of these.

    Args:
      opt_state: of train.optim.make_optimizer; arrays anywhere.
      abstract_params: the parameters before growth, shapes are enough.
    Raises:
      NotImplementedError: the optimiser keeps something of each parameter that is no moment of
        Adam's or Muon's.
    """
    known = {path for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params)}

    def grow(path: tuple[Any, ...], x: Any) -> Any:
        if isinstance(x, optax.ScaleByScheduleState):
            return x._replace(count=jnp.zeros_like(x.count))
        start = next((i for i in range(len(path)) if path[i:] in known), None)
        if start is None:
            return x
        moment = getattr(path[start - 1], "name", None) if start else None
        if moment not in (FIRST_MOMENT, SECOND_MOMENT):
            raise NotImplementedError(
                f"growth knows the moments mu and nu of each parameter, this optimiser keeps "
                f"{jax.tree_util.keystr(path)}: begin with a fresh state"
            )
        names = tuple(key.key for key in path[start:])
        new_scale = 0.0 if moment == FIRST_MOMENT else 1.0
        return grow_leaf(names, x, operator, factor, new_scale=new_scale)

    def is_whole(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    return jax.tree_util.tree_map_with_path(grow, opt_state, is_leaf=is_whole)


def load_grown_optimizer_state(
    parent: RunConfig, run_dir: Path, operator: Operator, factor: int = 2
) -> Any:
    """`grow_optimizer_state` of a trained run's newest checkpoint, on the first device.

    Raises:
      UserError: no checkpoint, or one that can't be read.
    """
    state = make_train_setup(parent, make_mesh(1, 1, 1)).abstract_state
    here = SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state.opt_state
    )
    loaded, _ = restore_variables(run_dir / "checkpoints", {"opt_state": wanted})
    return grow_optimizer_state(loaded["opt_state"], state.params, operator, factor)
