"""The training state: what a checkpoint holds besides the data iterator."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.base import RunConfig
from model.model_state import ModelState, init_memory
from model.transformer import Transformer, Variables, abstract_variables, init_variables
from parallel.sharding import LogicalAxes, tree_shardings
from train.consolidation import keeping
from train.matching import Matching, projection_optimizer
from train.optim import make_optimizer, make_schedule, state_shardings


class TrainState(struct.PyTreeNode):
    step: Any
    """Optimiser steps done, int32."""
    params: Any
    """Float32 masters."""
    router_state: Any
    """What routers learn without gradients; empty where none has any."""
    opt_state: Any
    memory: Any = None
    """What a model with memory keeps of each row's stream (model/cache.py); None for others."""
    projections: Any = None
    """What an objective that compares layers trains beside the model (train/matching.py): "params"
    and their "opt_state"; None for others."""

    @property
    def variables(self) -> Variables:
        return {"params": self.params, "router_state": self.router_state}

    def to_dict(self) -> dict[str, Any]:
        """The parts by name, as they lie in a checkpoint: without memory or projections where there
        are none, so that such checkpoints have one form, whichever version wrote them.
        """
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        optional = ("memory", "projections")
        return {n: part for n, part in parts.items() if n not in optional or part is not None}


class TrainSetup(struct.PyTreeNode):
    """A model, its optimiser, and the shapes and shardings of its state; nothing is allocated."""

    model: Transformer = struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = struct.field(pytree_node=False)
    schedule: optax.Schedule = struct.field(pytree_node=False)
    abstract_state: TrainState
    """ShapeDtypeStructs."""
    shardings: TrainState
    """NamedShardings on the mesh."""
    begin_memory: Callable[[], ModelState | None] = struct.field(pytree_node=False)
    """Makes the empty memory."""
    begin_projections: Callable[[], Any] = struct.field(pytree_node=False, default=lambda: None)
    """Makes the projections of a new run."""


def make_train_setup(
    run: RunConfig,
    mesh: Mesh | jax.sharding.AbstractMesh,
    matching: Matching | None = None,
) -> TrainSetup:
    """The run's model and optimiser, and where each array of its state goes on the mesh.

    The mesh is an argument: none need be in use.

    Args:
      matching: of an objective that compares layers.
    Raises:
      UserError: the mesh does not divide a dimension it splits.
    """
    model = Transformer(run.model, run.execution)
    variables, logical_axes = abstract_variables(model)
    shardings = tree_shardings(mesh, logical_axes, variables)
    params = variables["params"]
    schedule = make_schedule(run.optimizer, run.steps)
    optimizer = make_optimizer(run.optimizer, schedule, logical_axes["params"])
    optimizer = keeping(run.further, optimizer)
    replicated = NamedSharding(mesh, PartitionSpec())
    begin_memory = partial(init_memory, run.model, run.batch_size, run.execution.compute_dtype)
    memory = jax.eval_shape(begin_memory)
    begin_projections = partial(_begin_projections, matching, schedule, run.seed)
    projections = jax.eval_shape(begin_projections)
    return TrainSetup(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        abstract_state=TrainState(
            step=jax.ShapeDtypeStruct((), jnp.int32),
            **variables,
            opt_state=jax.eval_shape(optimizer.init, params),
            memory=memory,
            projections=projections,
        ),
        shardings=TrainState(
            step=replicated,
            **shardings,
            opt_state=state_shardings(optimizer, params, shardings["params"], replicated),
            memory=tree_shardings(mesh, _memory_axes(memory), memory),
            projections=jax.tree.map(lambda _: replicated, projections),
        ),
        begin_memory=begin_memory,
        begin_projections=begin_projections,
    )


def _begin_projections(matching: Matching | None, schedule: optax.Schedule, seed: int) -> Any:
    if matching is None:
        return None
    params = matching.init(seed)
    return {"params": params, "opt_state": projection_optimizer(schedule).init(params)}


def _memory_axes(memory: ModelState | None) -> ModelState | None:
    """Logical axes of the memory's arrays: its rows lie where the batch's rows do."""
    if memory is None:
        return None

    def axes(stack: LogicalAxes, part: Any) -> Any:
        return jax.tree.map(lambda x: (*stack, "batch", *[None] * (x.ndim - len(stack) - 1)), part)

    return ModelState(prefix=axes((), memory.prefix), periods=axes(("layers",), memory.periods))


def init_state(
    setup: TrainSetup, seed: int, variables: Variables | None = None, opt_state: Any = None
) -> TrainState:
    """These variables, or ones drawn from the seed, and this optimiser state, or a fresh one.

    Each part is made on the device that keeps it; what is given is moved there. Of several
    processes each gives the same variables, and no optimiser state.
    """

    def begin(variables: Variables) -> TrainState:
        opt_state = setup.optimizer.init(variables["params"])
        return TrainState(
            step=jnp.int32(0),
            **variables,
            opt_state=opt_state,
            memory=setup.begin_memory(),
            projections=setup.begin_projections(),
        )

    if variables is None:
        draw = jax.jit(
            lambda: begin(init_variables(setup.model, seed)), out_shardings=setup.shardings
        )
        return draw()
    if opt_state is None:
        placed = _on_mesh(variables, setup.shardings.variables)
        return jax.jit(begin, out_shardings=setup.shardings)(placed)
    state = TrainState(step=jnp.int32(0), **variables, opt_state=opt_state)
    # Copies: training reuses the buffers of its state, and these are the caller's.
    return jax.device_put(state, setup.shardings, may_alias=False)


def _on_mesh(variables: Variables, shardings: Any) -> Variables:
    """The variables where the shardings say; of several processes, each brings its own part."""
    if jax.process_count() == 1:
        return jax.device_put(variables, shardings)

    def own_part(x: Any, sharding: NamedSharding) -> jax.Array:
        whole = jax.device_get(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(own_part, variables, shardings)
