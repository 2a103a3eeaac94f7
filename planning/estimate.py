"""A training step's memory and time by formulas, without compiling: good for ranking, not for more.

What a compiled program would tell (fusion, the peak of its buffers, which collectives the
partitioner chooses) is left out; planning/search.py compiles the best candidates for that.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from configs.accelerators import Accelerator
from configs.architecture import LayerSpec
from configs.base import RunConfig
from configs.feed_forward import DenseConfig, MoEConfig, num_parts
from model.flops import training_flops_per_token, visible_keys
from model.transformer import Transformer, abstract_variables
from parallel.expert import rows_per_peer
from parallel.mesh import AXES, DATA, EXPERT, TENSOR
from parallel.sharding import tree_shardings
from planning.collectives import Collective
from planning.groups import groups_by_axes
from train.optim import make_optimizer, make_schedule

BACKWARD = 3.0
"""What a layer's backward pass holds over what its forward pass makes: gradients and float32 copies
beside the values. Steps of DeepSeek-V3 and Mixtral had 2.9 and 4, compiled without our kernels;
what the estimate is off by with them stands in docs/planner.md.
"""


@dataclass(frozen=True)
class Estimate:
    memory: float
    """Bytes on one device."""
    seconds: float
    """Arithmetic at the peak rate, then collectives at their links' bandwidth."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device."""

    state: float
    """Parameters, gradients and optimiser."""
    activations: float

    @property
    def total(self) -> float:
        return self.state + self.activations


@dataclass(frozen=True)
class Weights:
    """A model's parameters by shape and logical axes, and its optimiser's bytes over theirs."""

    abstract: Any
    logical_axes: Any
    optimiser_ratio: float


def weights_of(run: RunConfig) -> Weights:
    """The same for every mesh; nothing is allocated."""
    variables, axes = abstract_variables(Transformer(run.model, run.execution))
    params = variables["params"]
    schedule = make_schedule(run.optimizer, run.steps)
    width = run.model.d_model
    optimizer = make_optimizer(run.optimizer, schedule, axes["params"], width=width)
    state = jax.eval_shape(optimizer.init, params)
    return Weights(params, axes["params"], _num_bytes(state) / _num_bytes(params))


def estimate(run: RunConfig, weights: Weights, accelerator: Accelerator) -> Estimate:
    """
    Raises:
      UserError: the mesh does not divide a dimension it splits.
    """
    mesh = _mesh(run)
    local = _local_sizes(weights, mesh)
    flops = run.tokens_per_step * training_flops_per_token(run.model, run.data.seq_len)
    repeated = 4 / 3 if run.execution.remat == "full" else 1.0
    compute = repeated * flops / run.mesh.num_devices / accelerator.flops_16
    network = sum(c.times * c.seconds(accelerator) for c in _traffic(run, local, mesh))
    return Estimate(estimate_memory(run, weights).total, compute + network)


def estimate_memory(run: RunConfig, weights: Weights) -> MemoryEstimate:
    """
    Raises:
      UserError: the mesh does not divide a dimension it splits.
    """
    masters = 4.0 * sum(size for size, _ in _local_sizes(weights, _mesh(run)))
    state = masters * (2.0 + weights.optimiser_ratio)  # parameters, gradients, optimiser
    return MemoryEstimate(state, _activations(run))


def _mesh(run: RunConfig) -> AbstractMesh:
    return AbstractMesh(_sizes(run), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _local_sizes(weights: Weights, mesh: AbstractMesh) -> list[tuple[int, Any]]:
    """Elements of each parameter on one device, and how it is split."""
    shardings = tree_shardings(mesh, weights.logical_axes, weights.abstract)
    return [
        (int(np.prod(s.shard_shape(x.shape))), s.spec)
        for x, s in zip(jax.tree.leaves(weights.abstract), jax.tree.leaves(shardings), strict=True)
    ]


def _sizes(run: RunConfig) -> tuple[int, int, int]:
    return run.mesh.data, run.mesh.expert, run.mesh.tensor


def _num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _width(run: RunConfig) -> int:
    """Bytes of a number in the compute dtype."""
    return jnp.dtype(run.execution.compute_dtype).itemsize


def _local_tokens(run: RunConfig) -> float:
    """Of a micro-batch on one device."""
    return run.tokens_per_step / run.accumulation / (run.mesh.data * run.mesh.expert)


# --- Memory ---------------------------------------------------------------------------------------


def _activations(run: RunConfig) -> float:
    """What is kept for the backward pass, one layer at work, the whole embedding and output layer
    with their gradients, and a chunk of logits.
    """
    tokens, width = _local_tokens(run), _width(run)
    layers = [_layer_bytes(run, spec) for spec in run.model.pattern]
    if run.execution.remat == "full":
        kept = run.model.num_periods * tokens * run.model.d_model * width
        working = sum(layers)  # a period is computed again as a whole
    elif run.execution.remat == "none":
        kept, working = run.model.num_periods * sum(layers), max(layers)
    else:
        assert_never(run.execution.remat)
    vocab = run.model.vocab_size / run.mesh.tensor
    logits = tokens / run.execution.logits_chunks * vocab * 8
    return kept + BACKWARD * working + 2 * vocab * run.model.d_model * (4 + width) + logits


def _layer_bytes(run: RunConfig, spec: LayerSpec) -> float:
    """What the forward pass of a layer makes, roughly."""
    tokens, width, tensor = _local_tokens(run), _width(run), run.mesh.tensor
    attention, d_model = spec.attention, run.model.d_model
    places = np.arange(1, run.data.seq_len + 1)
    keys = float(visible_keys(attention, places).mean())
    scores = tokens * keys * attention.num_heads / tensor * (4 + width)
    if run.execution.window_attention in ("auto", "triton"):
        scores = 0.0  # they stay in the kernel
    heads = 4 * tokens * attention.out_width / tensor * width
    if isinstance(spec.ffn, MoEConfig):
        hidden = (num_parts(spec.ffn.activation) + 1) * spec.ffn.d_ff / tensor
        moved = 2 * (spec.ffn.latent_width or d_model)
        ffn = _expert_rows(run, spec.ffn) * (moved + hidden) * width
    elif isinstance(spec.ffn, DenseConfig):
        ffn = (num_parts(spec.ffn.activation) + 1) * tokens * spec.ffn.d_ff / tensor * width
    else:
        ffn = 0.0
    return scores + heads + ffn + 4 * tokens * d_model * width


def _expert_rows(run: RunConfig, ffn: MoEConfig) -> float:
    """Of the largest buffer for experts: for the tokens of all peers where they are gathered."""
    tokens, shards, top_k = _local_tokens(run), run.mesh.expert, ffn.router.top_k
    if run.execution.transport == "gather":
        return tokens * shards * top_k
    if run.execution.transport == "all_to_all":
        assert run.execution.capacity_factor is not None
        return shards * rows_per_peer(int(tokens), top_k, run.execution.capacity_factor, shards)
    assert_never(run.execution.transport)


# --- Network --------------------------------------------------------------------------------------


def _traffic(
    run: RunConfig, local: list[tuple[int, Any]], mesh: AbstractMesh
) -> Iterator[Collective]:
    """The collectives that the mathematics of a step needs."""
    groups = groups_by_axes(mesh)

    def collect(kind: str, axis: str, payload: float, times: float) -> Iterator[Collective]:
        if mesh.shape[axis] > 1:
            yield Collective(kind, "", round(payload), groups[axis,], (axis,), times)

    for size, spec in local:
        axes = {axis for entry in spec for axis in np.atleast_1d(entry or [])}
        if DATA in axes:  # gathered forward and backward, gradients scattered
            yield from collect("all-gather", DATA, size * _width(run), 2 * run.accumulation)
            yield from collect("all-gather", DATA, size * 4, run.accumulation)
        if EXPERT not in axes:
            yield from collect("all-reduce", EXPERT, 4 * size, run.accumulation)
    passes = (3 if run.execution.remat == "full" else 2) * run.accumulation * run.model.num_periods
    tokens, d_model = _local_tokens(run), run.model.d_model
    for spec in run.model.pattern:
        branches = int(spec.has_attention) + int(spec.has_feed_forward)
        yield from collect("all-reduce", TENSOR, tokens * d_model * _width(run), branches * passes)
        if isinstance(spec.ffn, MoEConfig):
            row = spec.ffn.latent_width or d_model
            yield from _dispatch(run, spec.ffn, collect, tokens, row, passes)


def _dispatch(run, ffn, collect, tokens, row, passes) -> Iterator[Collective]:
    """Tokens of width `row` to experts and back, for each pass through the layer."""
    execution, shards, top_k = run.execution, run.mesh.expert, ffn.router.top_k
    if execution.transport == "all_to_all":
        rows = rows_per_peer(int(tokens), top_k, execution.capacity_factor, shards) * shards
        yield from collect("all-to-all", EXPERT, rows * row * _width(run), 2 * passes)
    elif execution.transport == "gather":
        yield from collect("all-gather", EXPERT, tokens * row * _width(run), passes)
        yield from collect("reduce-scatter", EXPERT, tokens * shards * row * 4, passes)
    else:
        assert_never(execution.transport)
