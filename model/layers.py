"""Small parts that every model uses: parameters with named axes, RMSNorm, RoPE, the dense SwiGLU.

B batch, L length, D d_model, F d_ff, H heads, C head_dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, assert_never, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from configs.feed_forward import DenseActivation, DenseConfig, num_parts
from configs.rope import LinearRopeConfig, Llama3RopeConfig, RopeScaling, YarnConfig
from kernels.matmul import matmul, reads_as_stored, takes_rows
from kernels.quantize import MatrixDims, QTensor, take_outputs
from kernels.sines import cosines_and_sines
from parallel.recompute import recomputed
from parallel.sharding import constrain, on_parts


class Declared(nn.LogicallyPartitioned):
    """A parameter in its box: the names of its dimensions, and which of them make its matrix."""

    dims: MatrixDims | None = struct.field(default=None, pytree_node=False)
    """None: the parameter stays in floats, whatever format the weights have."""


class SplitWeight(struct.PyTreeNode):
    """A weight of few bits whose parts the devices of the mesh axis "tensor" hold, each rounded and
    packed by itself."""

    parts: QTensor
    """The parts are its last stacked dimension, which the mesh splits."""
    dim: int = struct.field(pytree_node=False)
    """Which of the matrix's dimensions the parts lie along."""

    def own(self) -> QTensor:
        """The one part that a device sees inside shard_map."""
        at = (slice(None),) * (len(self.parts.stack) - 1)
        return jax.tree.map(lambda array: array[(*at, 0)], self.parts)


class AdaptedWeight(struct.PyTreeNode):
    """A weight with its low-rank adapter (model/adapters.py), which `project` multiplies by both
    of."""

    weight: Any
    a: jax.Array
    """[I..., P..., r], float32."""
    b: jax.Array
    """[P..., r, O...], the factor alpha / rank in it."""


def weight(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    logical_axes: tuple[str | None, ...],
    stddev: float,
    dims: MatrixDims | None = None,
) -> Any:
    """A float32 parameter drawn from normal(0, stddev); `logical_axes` names its dimensions.

    Dimensions named None only stack matrices (gate and up); see parallel/sharding.py for the names.

    Args:
      dims: which dimensions a product sums over and which it gives, for a weight that may be held
        in few bits; it is then a QTensor or SplitWeight, which `project` and its like multiply by.
    Returns:
      The weight; an AdaptedWeight where the collection "adapters" has one for it, or without dims
      the sum of both.
    Raises:
      ValueError: a QTensor of another shape, or of a weight without dims.
    """
    held = _held_weight(module, name, shape, logical_axes, stddev, dims)
    if not module.has_variable("adapters", name):
        return held
    adapter = module.get_variable("adapters", name)
    a, b = adapter["a"], adapter["b"]
    if dims is None:
        return held + jnp.tensordot(a, b, 1).astype(held.dtype)
    return AdaptedWeight(held, a, b)


def _held_weight(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    logical_axes: tuple[str | None, ...],
    stddev: float,
    dims: MatrixDims | None,
) -> Any:
    """The weight by itself: see `weight`."""
    if module.has_variable("params", name):
        held = module.get_variable("params", name)
        if isinstance(held, QTensor):
            split = _split_dim(held, shape, dims)
            if split is not None:
                return SplitWeight(held, split)
            if dims is None or held.shape != shape:
                raise ValueError(f"{name} {shape} can't be a QTensor of shape {held.shape}")
            return held
    is_drawn = not module.has_rng(SHAPES_ALONE)
    draw = nn.initializers.normal(stddev) if is_drawn else nn.initializers.zeros

    def init(*arguments: Any) -> Declared:
        return Declared(draw(*arguments), logical_axes, dims=dims)

    return parameter(module, name, init, shape)


SHAPES_ALONE = "shapes_alone"
"""A key of this name says that what initialisation draws is thrown away."""


def parameter(
    module: nn.Module, name: str, init: Callable[..., Any], shape: tuple[int, ...]
) -> Any:
    """A float32 parameter that starts as `init` says. One that is there is taken if it has this
    shape: `module.param` traces init to learn its shape, once for each use of a weight.
    """
    if module.has_variable("params", name):
        held = nn.unbox(module.get_variable("params", name))
        if np.shape(held) == shape:
            return held
    if module.has_rng(SHAPES_ALONE):  # making a key for each takes a tenth of tracing
        key = cast(Any, module.scope).rngs[SHAPES_ALONE].rng
        return module.variable("params", name, init, key, shape, jnp.float32).value
    return module.param(name, init, shape, jnp.float32)


def _split_dim(held: QTensor, shape: tuple[int, ...], dims: MatrixDims | None) -> int | None:
    """The matrix's dimension along which this is the weight in parts; None: it is whole."""
    if dims is None or held.ndim != len(shape) + 1:
        return None
    num_stack = len(held.stack) - 1
    local, count = held.shape[num_stack + 1 :], held.stack[-1]
    for dim, size in enumerate(local):
        whole = (*local[:dim], size * count, *local[dim + 1 :])
        if (*held.stack[:-1], *whole) == shape:
            return dim
    return None


def project(
    equation: str,
    x: jax.Array,
    w: "Weight",
    *,
    is_flat: bool = False,
) -> jax.Array:
    """The product of rows of x with a weight, in x's dtype: where the model multiplies by weights.

    Args:
      equation: as of jnp.einsum, x first: "BLD,DHC->BLHC". The weight's dimensions that x has are
        summed over; of a QTensor they are those it was declared with.
      is_flat: whether several dimensions that are summed over ("BLHC,HCD->BLD") become one first.
        XLA turns them round in the weight otherwise, a copy for each token that is decoded; and
        sums in another order.
    """
    if isinstance(w, AdaptedWeight):
        return project(equation, x, w.weight, is_flat=is_flat) + _adapted(equation, x, w)
    if isinstance(w, SplitWeight):
        return _project_by_parts(equation, x, w)
    if isinstance(w, QTensor) or reads_as_stored(w.dtype, x.dtype) or takes_rows(x, w, equation):
        return matmul(x, w, equation)
    of_x, _, of_w = equation.partition("->")[0].partition(",")
    num_inputs = sum(letter in of_x for letter in of_w)
    if is_flat and of_x.endswith(of_w[:num_inputs]):
        x, w = x.reshape(*x.shape[:-num_inputs], -1), w.reshape(-1, *w.shape[num_inputs:])
        rows, outputs = of_x[:-num_inputs], of_w[num_inputs:]
        equation = f"{rows}k,k{outputs}->{rows}{outputs}"
    return jnp.einsum(equation, x, w.astype(x.dtype))


def _adapted(equation: str, x: jax.Array, w: AdaptedWeight) -> jax.Array:
    """What the adapter adds to the product: two small ones, in x's dtype."""
    operands, _, result = equation.partition("->")
    of_x, _, of_w = operands.partition(",")
    num_inputs = sum(letter in of_x for letter in of_w)
    inputs, num_parts = of_w[:num_inputs], w.a.ndim - num_inputs - 1
    parts, outputs = of_w[num_inputs:][:num_parts], of_w[num_inputs + num_parts :]
    rows = of_x.removesuffix(inputs)
    a, b = w.a.astype(x.dtype), w.b.astype(x.dtype)
    h = jnp.einsum(f"{of_x},{inputs}{parts}z->{rows}{parts}z", x, a)
    return jnp.einsum(f"{rows}{parts}z,{parts}z{outputs}->{result}", h, b)


def _project_by_parts(equation: str, x: jax.Array, w: SplitWeight) -> jax.Array:
    """Each device multiplies by its part; parts of the inputs give parts of a sum."""
    operands, _, result = equation.partition("->")
    of_x, _, of_w = operands.partition(",")
    letter = of_w[w.dim]
    names = {"B": "batch", letter: "mlp"}
    return on_parts(
        lambda x, w: matmul(x, w.own(), equation),
        x,
        w,
        [names.get(axis) for axis in of_x],
        [names.get(axis) for axis in result],
        is_sum=letter in of_x,
    )


Weight = jax.Array | QTensor | SplitWeight | AdaptedWeight


def in_dtype(w: Weight, dtype: jnp.dtype) -> Weight:
    """A weight as its product with rows of the dtype takes it: as it is where kernels read it so
    (`kernels.matmul.reads_as_stored`; one of few bits always), else an array in this dtype."""
    if isinstance(w, QTensor | SplitWeight | AdaptedWeight) or reads_as_stored(w.dtype, dtype):
        return w
    return w.astype(dtype)


def look_up(table_VD: jax.Array | QTensor, tokens_BL: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The table's rows of these tokens, [B, L, D] in this dtype."""
    if isinstance(table_VD, QTensor):
        return take_outputs(table_VD, tokens_BL, dtype.name)
    table_VD = constrain(table_VD.astype(dtype), "vocab", None)  # whole rows to look up
    return constrain(table_VD[tokens_BL], "batch", "length", None)


class OutputsFirst(NamedTuple):
    """A tied output layer as the embedding is stored: XLA would turn it round at every step."""

    w_VD: jax.Array


class CappedOutput(struct.PyTreeNode):
    """An output layer whose logits are bounded (ModelConfig.logit_cap)."""

    weight: Any
    """As `output_weights` gives it without a bound."""
    cap: float = struct.field(pytree_node=False)

    def bounded(self, logits: jax.Array) -> jax.Array:
        """cap * tanh(logits / cap), float32."""
        return self.cap * jnp.tanh(logits / self.cap)


def rows_for(hidden: jax.Array, w: Any) -> jax.Array:
    """Hidden states in the output layer's dtype; as they are where that is of few bits."""
    weight = w.weight if isinstance(w, CappedOutput) else w
    return hidden if isinstance(weight, QTensor) else hidden.astype(weight.dtype)


def unembed(hidden: jax.Array, w: jax.Array | QTensor | OutputsFirst | CappedOutput) -> jax.Array:
    """Logits of hidden states, float32 [..., V].

    Args:
      hidden: [..., D].
      w: what `output_weights` gives: [D, V], or a QTensor of it or of the embedding's [V, D], or
        the embedding itself, or one of them with a bound.
    """
    if isinstance(w, CappedOutput):
        return w.bounded(unembed(hidden, w.weight))
    is_embedding = isinstance(w, OutputsFirst) or (isinstance(w, QTensor) and w.outputs_first)
    weight = w.w_VD if isinstance(w, OutputsFirst) else w
    rows, of_rows = hidden.reshape(-1, hidden.shape[-1]), f"TD,{'VD' if is_embedding else 'DV'}->TV"
    # Rows of bfloat16 would be multiplied to bfloat16, and logits are float32.
    is_thin = hidden.dtype == jnp.float32 and takes_rows(rows, weight, of_rows)
    if is_thin or isinstance(weight, QTensor) or reads_as_stored(weight.dtype, hidden.dtype):
        logits = matmul(rows, weight, of_rows).astype(jnp.float32)
        return logits.reshape(*hidden.shape[:-1], -1)
    equation = "...D,VD->...V" if is_embedding else "...D,DV->...V"
    return jnp.einsum(equation, hidden, weight, preferred_element_type=jnp.float32)


def zero_weight(
    module: nn.Module, name: str, shape: tuple[int, ...], logical_axes: tuple[str | None, ...]
) -> jax.Array:
    """A float32 parameter that starts at zero: a bias."""
    init = nn.with_logical_partitioning(nn.initializers.zeros, logical_axes)
    return parameter(module, name, init, shape)


def one_weight(
    module: nn.Module, name: str, shape: tuple[int, ...], logical_axes: tuple[str | None, ...]
) -> jax.Array:
    """A float32 parameter that starts at one: a factor."""
    init = nn.with_logical_partitioning(nn.initializers.ones, logical_axes)
    return parameter(module, name, init, shape)


def newest(_: Any, new: Any) -> Any:
    """For `sow`: keeps the value of the last call."""
    return new


def unscaled_rms_norm(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last dim, in x's dtype; statistics in float32."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang & Sennrich 2019); statistics in float32.

    The mean is over the last dimensions, as many as `logical_axes` names; scale has their shape. A
    zero-centered norm multiplies by 1 + scale.
    """

    eps: float
    logical_axes: tuple[str, ...] = ("embed",)
    is_zero_centered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        count = len(self.logical_axes)
        start = nn.initializers.zeros if self.is_zero_centered else nn.initializers.ones
        init = nn.with_logical_partitioning(start, self.logical_axes)
        scale = parameter(self, "scale", init, x.shape[-count:])
        if self.is_zero_centered:
            scale = 1.0 + scale
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=tuple(range(-count, 0)), keepdims=True)
        scale = jnp.expand_dims(scale, tuple(range(x.ndim - count)))
        return (x32 * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias (Ba et al. 2016); statistics in float32."""

    eps: float

    @nn.compact
    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        shape = x_BLC.shape[-1:]
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("head_dim",))
        scale_C = parameter(self, "scale", ones, shape)
        bias_C = zero_weight(self, "bias", shape, ("head_dim",))
        x32_BLC = x_BLC.astype(jnp.float32)
        x32_BLC -= x32_BLC.mean(axis=-1, keepdims=True)
        variance = jnp.mean(x32_BLC * x32_BLC, axis=-1, keepdims=True)
        normed_BLC = x32_BLC * jax.lax.rsqrt(variance + self.eps)
        return (normed_BLC * scale_C[None, None] + bias_C[None, None]).astype(x_BLC.dtype)


def rope_frequencies(width: int, base: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each pair, base^(-2d/C), stretched; float32 [C/2]."""
    frequency = base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if isinstance(scaling, YarnConfig):
        kept = 1 - _yarn_ramp(width, base, scaling)
        frequency *= kept + (1 - kept) / scaling.factor
    elif isinstance(scaling, Llama3RopeConfig):
        turns = scaling.original_length * frequency / (2 * np.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        frequency *= kept + (1 - kept) / scaling.factor
    elif isinstance(scaling, LinearRopeConfig):
        frequency /= scaling.factor
    elif scaling is not None:
        assert_never(scaling)
    return frequency.astype(np.float32)


def _yarn_ramp(width: int, base: float, yarn: YarnConfig) -> np.ndarray:
    """How much of each pair is stretched, 0 to 1, [C/2]: linear in the pair's index between those
    that turn beta_fast and beta_slow times. Ends are clipped as the published code clips them.
    """

    def pair_that_turns(times: float) -> float:
        return width * np.log(yarn.original_length / (2 * np.pi * times)) / (2 * np.log(base))

    first, last = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0.0), min(last, width - 1.0)
    if first == last:
        last += 0.001  # a step
    return np.clip((np.arange(width // 2) - first) / (last - first), 0.0, 1.0)


def rope(
    x_BLHC: jax.Array,
    positions_BL: jax.Array,
    base: float,
    scaling: RopeScaling | None = None,
    num_pairs: int | None = None,
) -> jax.Array:
    """Turns each pair (x[d], x[d + C/2]) by position * base^(-2d/C) (RoFormer, 2021; half-split),
    and scales it by YaRN's rotary_scale.

    Args:
      x_BLHC: float [B, L, H, C], C even.
      positions_BL: int32 [B, L].
      num_pairs: the first that are turned; None: all.
    Returns:
      [B, L, H, C] in x's dtype; angles and rotation in float32.
    """
    frequency_C = rope_frequencies(x_BLHC.shape[-1], base, scaling)
    if num_pairs is not None:
        frequency_C[num_pairs:] = 0.0
    frequency_C = jnp.asarray(frequency_C)
    angle_BL1C = positions_BL[:, :, None, None].astype(jnp.float32) * frequency_C[None, None, None]
    return _turned(
        x_BLHC, angle_BL1C, scaling.rotary_scale if isinstance(scaling, YarnConfig) else 1.0
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _turned(x_BLHC: jax.Array, angle_BL1C: jax.Array, scale: float) -> jax.Array:
    """Pairs turned by their angles; where a gradient is asked for, XLA's own sines turn them."""
    return _turned_by(x_BLHC, *cosines_and_sines(angle_BL1C), scale)


def _turned_by(x_BLHC: jax.Array, cos: jax.Array, sin: jax.Array, scale: float) -> jax.Array:
    if scale != 1.0:
        cos, sin = scale * cos, scale * sin
    first, second = jnp.split(x_BLHC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLHC.dtype)


def _turned_forward(x_BLHC: jax.Array, angle_BL1C: jax.Array, scale: float) -> Any:
    cos, sin = jnp.cos(angle_BL1C), jnp.sin(angle_BL1C)
    return jax.vjp(lambda x_BLHC: _turned_by(x_BLHC, cos, sin, scale), x_BLHC)


def _turned_backward(scale: float, pullback: Any, dy_BLHC: jax.Array) -> Any:
    del scale
    return (*pullback(dy_BLHC), None)


_turned.defvjp(_turned_forward, _turned_backward)


def gated(
    gate: jax.Array, up: jax.Array, activation: DenseActivation, limit: float | None = None
) -> jax.Array:
    """silu(gate) * up, or gelu(gate) * up (Shazeer 2020); GELU in its tanh form. relu2: relu(up)^2
    (So et al. 2021), whatever the gate.

    Args:
      limit: bounded_swiglu's: of the gate above, of up both ways.
    """
    if activation == "relu2":
        return jnp.square(jax.nn.relu(up))
    if activation == "swiglu":
        return jax.nn.silu(gate) * up
    if activation == "bounded_swiglu":
        assert limit is not None
        return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)
    if activation == "geglu":
        return jax.nn.gelu(gate, approximate=True) * up
    assert_never(activation)


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) * W_up x) (Shazeer 2020), or with GELU, or W_down relu(W_up x)^2: a
    dense layer, and the shared experts. With config.bias each product has one added. The backward
    pass computes the activation again: it would fill as much memory as gate and up, and half of it.

    I parts of gate_up: gate and up, or up alone.
    """

    config: DenseConfig
    out_stddev: float

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        d_model, d_ff, dtype = x_BLD.shape[-1], self.config.d_ff, x_BLD.dtype
        parts = num_parts(self.config.activation)
        w_gate_up_DIF = weight(
            self,
            "gate_up",
            (d_model, parts, d_ff),
            ("embed", None, "mlp"),
            d_model**-0.5,
            MatrixDims(1, 2),
        )
        w_down_FD = weight(
            self, "down", (d_ff, d_model), ("mlp", "embed"), self.out_stddev, MatrixDims(1, 1)
        )
        h_BLIF = project("BLD,DIF->BLIF", x_BLD, w_gate_up_DIF)
        if self.config.bias:
            bias_IF = zero_weight(self, "gate_up_bias", (parts, d_ff), (None, "mlp"))
            h_BLIF += bias_IF.astype(dtype)[None, None]
        out_BLD = recomputed(partial(_gated_product, self.config))(h_BLIF, w_down_FD)
        if self.config.bias:
            bias_D = zero_weight(self, "down_bias", (d_model,), ("embed",))
            out_BLD += bias_D.astype(dtype)[None, None]
        return out_BLD


def _gated_product(config: DenseConfig, h_BLIF: jax.Array, w_down_FD: Weight) -> jax.Array:
    """W_down of the activation, [B, L, D]."""
    gate_BLF, up_BLF = h_BLIF[:, :, 0], h_BLIF[:, :, -1]
    h_BLF = gated(gate_BLF, up_BLF, config.activation, config.swiglu_limit)
    return project("BLF,FD->BLD", h_BLF, w_down_FD)
