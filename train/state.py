"""The training state: what a checkpoint holds besides the data iterator."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.base import RunConfig
from model.transformer import Transformer, Variables, abstract_variables, init_variables
from parallel.sharding import tree_shardings
from train.optim import make_optimizer, make_schedule, state_shardings


class TrainState(struct.PyTreeNode):
    step: Any
    """Optimiser steps done, int32."""
    params: Any
    """Float32 masters."""
    router_state: Any
    """What routers learn without gradients; empty where none has any."""
    opt_state: Any

    @property
    def variables(self) -> Variables:
        return {"params": self.params, "router_state": self.router_state}


class Trainee(struct.PyTreeNode):
    """A model, its optimiser, and the shapes and shardings of its state; nothing is allocated."""

    model: Transformer = struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = struct.field(pytree_node=False)
    schedule: optax.Schedule = struct.field(pytree_node=False)
    abstract_state: TrainState
    """ShapeDtypeStructs."""
    shardings: TrainState
    """NamedShardings on the mesh."""


def plan_state(run: RunConfig, mesh: Mesh | jax.sharding.AbstractMesh) -> Trainee:
    """The run's model and optimiser, and where each array of its state goes on the mesh.

    The mesh is an argument: none need be in use.

    Raises:
      UserError: the mesh does not divide a dimension it splits.
    """
    model = Transformer(run.model, run.execution)
    variables, logical_axes = abstract_variables(model)
    shardings = tree_shardings(mesh, logical_axes, variables)
    params = variables["params"]
    schedule = make_schedule(run.optimizer, run.steps)
    optimizer = make_optimizer(run.optimizer, schedule, logical_axes["params"])
    replicated = NamedSharding(mesh, PartitionSpec())
    return Trainee(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        abstract_state=TrainState(
            step=jax.ShapeDtypeStruct((), jnp.int32),
            **variables,
            opt_state=jax.eval_shape(optimizer.init, params),
        ),
        shardings=TrainState(
            step=replicated,
            **shardings,
            opt_state=state_shardings(optimizer, params, shardings["params"], replicated),
        ),
    )


def init_state(
    trainee: Trainee, seed: int, variables: Variables | None = None, opt_state: Any = None
) -> TrainState:
    """These variables, or ones drawn from the seed, and this optimiser state, or a fresh one.

    Each part is made on the device that keeps it; what is given is moved there.
    """

    def begin(variables: Variables) -> TrainState:
        opt_state = trainee.optimizer.init(variables["params"])
        return TrainState(step=jnp.int32(0), **variables, opt_state=opt_state)

    if variables is None:
        draw = jax.jit(
            lambda: begin(init_variables(trainee.model, seed)), out_shardings=trainee.shardings
        )
        return draw()
    if opt_state is None:
        placed = jax.device_put(variables, trainee.shardings.variables)
        return jax.jit(begin, out_shardings=trainee.shardings)(placed)
    state = TrainState(step=jnp.int32(0), **variables, opt_state=opt_state)
    # Copies: training reuses the buffers of its state, and these are the caller's.
    return jax.device_put(state, trainee.shardings, may_alias=False)
