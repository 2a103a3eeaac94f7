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
from model.adapters import abstract_adapters, init_adapters, scaled, target_of
from model.model_state import ModelState, init_memory
from model.transformer import Transformer, Variables, abstract_variables, init_variables
from parallel.sharding import LogicalAxes, tree_shardings
from train.compiled import compile_ahead
from train.consolidation import keeping
from train.matching import Matching, projection_optimizer
from train.optim import make_optimizer, make_schedule, state_shardings
from train.spikes import no_means


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
    adapters: Any = None
    """Low-rank adapters (model/adapters.py); with them, params and router_state stay what they
    were, and no checkpoint holds them."""
    reference: Any = None
    """The variables that a run on preferences began with, where params move; never saved."""
    averaged: Any = None
    """The moving average of `trained` (OptimizerConfig.average); None without."""
    means: Any = None
    """Running means of loss and gradient norm (train/spikes.py); None where no step is skipped."""
    scale: float = struct.field(pytree_node=False, default=1.0)
    """Factor of the adapters' products."""

    @property
    def trained(self) -> Any:
        """What the optimiser changes."""
        return self.params if self.adapters is None else self.adapters

    @property
    def variables(self) -> Variables:
        return self.variables_with(self.trained)

    @property
    def measured_variables(self) -> Variables:
        """What validation and samples look at: the average, where there is one."""
        return self.variables if self.averaged is None else self.variables_with(self.averaged)

    def variables_with(self, trained: Any) -> Variables:
        """The model's variables with others in place of `trained`."""
        if self.adapters is None:
            return {"params": trained, "router_state": self.router_state}
        return self.variables_alone | {"adapters": scaled(trained, self.scale)}

    @property
    def variables_alone(self) -> Variables:
        """Without adapters."""
        return {"params": self.params, "router_state": self.router_state}

    @property
    def reference_variables(self) -> Variables:
        """What preferences are measured against: with adapters, the model without them."""
        return self.reference if self.adapters is None else self.variables_alone

    def to_dict(self) -> dict[str, Any]:
        """The parts by name, as they lie in a checkpoint: those that there are, so that such
        checkpoints have one form, whichever version wrote them, and none that a run's initial
        weights give again.
        """
        left_out = {"reference", "scale"}
        if self.adapters is not None:
            left_out |= {"params", "router_state"}
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        optional = ("memory", "projections", "adapters", "averaged", "means")
        left_out |= {name for name in optional if parts[name] is None}
        return {name: part for name, part in parts.items() if name not in left_out}


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
    begin_adapters: Callable[[int], Any] = struct.field(pytree_node=False)
    """Draws the adapters from a seed; None of a run without."""
    begin_projections: Callable[[], Any] = struct.field(pytree_node=False)
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
    adapters, adapter_axes = _adapters(run, model)
    adapter_shardings = tree_shardings(mesh, adapter_axes, adapters)
    trained, axes = variables["params"], logical_axes["params"]
    trained_shardings = shardings["params"]
    if run.lora is not None:
        trained, trained_shardings, axes = adapters, adapter_shardings, adapter_axes
    schedule = make_schedule(run.optimizer, run.steps)
    optimizer = make_optimizer(
        run.optimizer,
        schedule,
        axes,
        width=run.model.d_model,
        is_trained=is_trained(run, trained),
        decays_all=run.lora is not None,
    )
    optimizer = keeping(run.further, optimizer)
    replicated = NamedSharding(mesh, PartitionSpec())
    begin_memory = partial(init_memory, run.model, run.batch_size, run.execution.compute_dtype)
    memory = jax.eval_shape(begin_memory)
    has_reference = run.preference is not None and run.lora is None
    means = None if run.optimizer.skip_above is None else jax.eval_shape(no_means)
    scale = 1.0 if run.lora is None else run.lora.scale
    begin_projections = partial(_begin_projections, matching, schedule, run.seed)
    projections = jax.eval_shape(begin_projections)
    return TrainSetup(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        abstract_state=TrainState(
            step=jax.ShapeDtypeStruct((), jnp.int32),
            **variables,
            opt_state=jax.eval_shape(optimizer.init, trained),
            memory=memory,
            projections=projections,
            adapters=adapters,
            reference=variables if has_reference else None,
            averaged=trained if run.optimizer.average is not None else None,
            means=means,
            scale=scale,
        ),
        shardings=TrainState(
            step=replicated,
            **shardings,
            opt_state=state_shardings(optimizer, trained, trained_shardings, replicated),
            memory=tree_shardings(mesh, _memory_axes(memory), memory),
            projections=jax.tree.map(lambda _: replicated, projections),
            adapters=adapter_shardings,
            reference=shardings if has_reference else None,
            averaged=trained_shardings if run.optimizer.average is not None else None,
            means=jax.tree.map(lambda _: replicated, means),
            scale=scale,
        ),
        begin_memory=begin_memory,
        begin_projections=begin_projections,
        begin_adapters=partial(_draw_adapters, run, model),
    )


def _begin_projections(matching: Matching | None, schedule: optax.Schedule, seed: int) -> Any:
    if matching is None:
        return None
    params = matching.init(seed)
    return {"params": params, "opt_state": projection_optimizer(schedule).init(params)}


def _adapters(run: RunConfig, model: Transformer) -> tuple[Any, Any]:
    """The run's adapters and their axes, abstract; None without."""
    return (None, None) if run.lora is None else abstract_adapters(model, run.lora)


def _draw_adapters(run: RunConfig, model: Transformer, seed: int) -> Any:
    return None if run.lora is None else init_adapters(model, run.lora, seed)


def is_trained(run: RunConfig, params: Any) -> Any:
    """Whether each parameter is trained, in a tree of its own; None: all are."""
    if run.trained == "all":
        return None

    def is_experts(path: Any, _: Any) -> bool:
        return target_of(tuple(key.key for key in path)) == "experts"

    return jax.tree_util.tree_map_with_path(is_experts, params)


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

    abstract = setup.abstract_state

    def begin(variables: Variables) -> TrainState:
        adapters = setup.begin_adapters(seed)
        trained = variables["params"] if adapters is None else adapters
        return TrainState(
            step=jnp.int32(0),
            **variables,
            opt_state=setup.optimizer.init(trained),
            memory=setup.begin_memory(),
            projections=setup.begin_projections(),
            adapters=adapters,
            reference=None if abstract.reference is None else variables,
            averaged=None if abstract.averaged is None else trained,
            means=None if abstract.means is None else no_means(),
            scale=abstract.scale,
        )

    if variables is None:
        draw = jax.jit(
            lambda: begin(init_variables(setup.model, seed)), out_shardings=setup.shardings
        )
        compile_ahead(draw)
        return draw()
    if opt_state is None:
        placed = _on_mesh(variables, setup.shardings.variables_alone)
        return jax.jit(begin, out_shardings=setup.shardings)(placed)
    assert setup.abstract_state.to_dict().keys() <= {"step", "params", "router_state", "opt_state"}
    state = TrainState(step=jnp.int32(0), **variables, opt_state=opt_state)
    # Copies: training reuses the buffers of its state, and these are the caller's.
    return jax.device_put(state, setup.shardings, may_alias=False)


def restored_state(
    setup: TrainSetup, restored: dict[str, Any], initial: Variables | None
) -> TrainState:
    """The state of a checkpoint's parts, and of the weights that no checkpoint holds.

    Args:
      initial: the variables that the run began with, where it needs them.
    """
    abstract = setup.abstract_state
    kept = {"scale": abstract.scale}
    if abstract.adapters is not None or abstract.reference is not None:
        assert initial is not None, "the caller has read them"
        placed = _on_mesh(initial, setup.shardings.variables_alone)
        # Copies: training reuses the buffers of its state, and these are the caller's.
        placed = jax.tree.map(jnp.copy, placed)
        kept |= {"reference": placed} if abstract.adapters is None else placed
    return TrainState(**restored, **kept)


def _on_mesh(variables: Variables, shardings: Any) -> Variables:
    """The variables where the shardings say; of several processes, each brings its own part."""
    if jax.process_count() == 1:
        return jax.device_put(variables, shardings)

    def own_part(x: Any, sharding: NamedSharding) -> jax.Array:
        whole = jax.device_get(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(own_part, variables, shardings)
