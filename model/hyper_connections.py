"""Manifold-constrained hyper-connections (Xie et al. 2026; DeepSeek-V4): several residual streams.

A token has N streams X [N, D] instead of one. Around each branch f (attention, or feed-forward),

    [a; b; c] = (vec(X) / rms(vec(X)) F) * scale + bias            of widths N, N, N^2
    x = sum_i (sigmoid(a_i) + eps) X_i        X' = 2 sigmoid(b) f(x)^T + C^T X

C is softmax(c) over its rows plus eps, scaled until rows and columns sum to 1 (Sinkhorn and Knopp
1967), so that what streams hold is shared out and never grows. One scale each for a, b and c. What
the last layer leaves is summed with weights of its own. Weights and C are float32.

B batch, L length, N streams, D d_model, K mixing weights of a token: 2 N + N^2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.architecture import HyperConnectionConfig
from model.layers import parameter, unscaled_rms_norm, weight

START_SCALE = 0.01
"""Of what a token says of its mixing, when training begins (the paper's alpha)."""
STAYS = 4.0
"""Logit by which a stream goes on as itself, when training begins."""


class Mixing(NamedTuple):
    """How a token's streams are read, written and shared out; float32."""

    read_BLN: jax.Array
    write_BLN: jax.Array
    share_BLNN: jax.Array
    """C: [.., i, j] is how much of stream i goes into stream j."""


def spread(x_BLD: jax.Array, config: HyperConnectionConfig) -> jax.Array:
    """The streams that the first layer reads, all of them the token's embedding, [B, L, N, D]."""
    shape = (*x_BLD.shape[:2], config.num_streams, x_BLD.shape[-1])
    return jnp.broadcast_to(x_BLD[:, :, None], shape)


def read(x_BLND: jax.Array, read_BLN: jax.Array) -> jax.Array:
    """The weighted sum of the streams, [B, L, D], in their dtype."""
    summed = jnp.einsum("BLN,BLND->BLD", read_BLN, x_BLND.astype(jnp.float32))
    return summed.astype(x_BLND.dtype)


def written(x_BLND: jax.Array, update_BLD: jax.Array, mixing: Mixing) -> jax.Array:
    """The streams after a branch, X' of the module's first lines, in their dtype."""
    kept = jnp.einsum("BLij,BLiD->BLjD", mixing.share_BLNN, x_BLND.astype(jnp.float32))
    added = mixing.write_BLN[..., None] * update_BLD[:, :, None].astype(jnp.float32)
    return (kept + added).astype(x_BLND.dtype)


class StreamMixer(nn.Module):
    """The mixing of one branch, from the streams before it."""

    config: HyperConnectionConfig
    norm_eps: float

    @nn.compact
    def __call__(self, x_BLND: jax.Array) -> Mixing:
        n, eps = self.config.num_streams, self.config.eps
        start_K = np.concatenate(
            [np.full(n, _even(n)), np.zeros(n), STAYS * np.eye(n).reshape(-1)]
        ).astype(np.float32)
        logits = _logits(self, x_BLND, self.norm_eps, (n, n, n * n), start_K)
        a_BLN, b_BLN, c_BLK = jnp.split(logits, [n, 2 * n], axis=-1)
        c_BLNN = jax.nn.softmax(c_BLK.reshape(*c_BLK.shape[:2], n, n), axis=-1) + eps
        return Mixing(
            jax.nn.sigmoid(a_BLN) + eps,
            2 * jax.nn.sigmoid(b_BLN),
            doubly_stochastic(c_BLNN, self.config.sinkhorn_steps, eps),
        )


class StreamReader(nn.Module):
    """The sum of the streams that the last norm reads."""

    config: HyperConnectionConfig
    norm_eps: float

    @nn.compact
    def __call__(self, x_BLND: jax.Array) -> jax.Array:
        n = self.config.num_streams
        start_K = np.full(n, _even(n), np.float32)
        logits_BLN = _logits(self, x_BLND, self.norm_eps, (n,), start_K)
        return read(x_BLND, jax.nn.sigmoid(logits_BLN) + self.config.eps)


def doubly_stochastic(c_BLNN: jax.Array, steps: int, eps: float) -> jax.Array:
    """Positive matrices scaled towards rows and columns that sum to 1; the columns come first and
    last, so that they do, to eps."""

    def scaled(c_BLNN: jax.Array, axis: int) -> jax.Array:
        return c_BLNN / (c_BLNN.sum(axis=axis, keepdims=True) + eps)

    def step(_: jax.Array, c_BLNN: jax.Array) -> jax.Array:
        return scaled(scaled(c_BLNN, -1), -2)

    # A loop: XLA takes minutes to fuse twenty of these steps with their gradients.
    return jax.lax.fori_loop(0, steps - 1, step, scaled(c_BLNN, -2))


def _even(num_streams: int) -> float:
    """The logit at which each of the streams counts 1 / N."""
    return -float(np.log(num_streams - 1))


def _logits(
    module: nn.Module,
    x_BLND: jax.Array,
    norm_eps: float,
    widths: tuple[int, ...],
    start_K: np.ndarray,
) -> jax.Array:
    """(vec(X) / rms(vec(X)) F) * scale + bias, float32 [B, L, K].

    Args:
      widths: of the parts of K, each of which has a scale of its own.
      start_K: the bias when training begins.
    """
    streams, d_model = x_BLND.shape[2:]
    total = sum(widths)
    shape, stddev = (streams, d_model, total), (streams * d_model) ** -0.5
    w_NDK = weight(module, "mix", shape, (None, "embed", None), stddev)
    start: Callable[..., jax.Array] = lambda *_: jnp.asarray(start_K)  # noqa: E731
    bias_K = parameter(module, "bias", _boxed(start), (total,))
    small = nn.initializers.constant(START_SCALE)
    scale = parameter(module, "scale", _boxed(small), (len(widths),))
    flat = x_BLND.astype(jnp.float32).reshape(*x_BLND.shape[:2], -1)
    normed_BLND = unscaled_rms_norm(flat, norm_eps).reshape(x_BLND.shape)
    scale_K = jnp.repeat(scale, np.array(widths), total_repeat_length=total)
    return (
        jnp.einsum("BLND,NDK->BLK", normed_BLND, w_NDK) * scale_K[None, None] + bias_K[None, None]
    )


def _boxed(draw: Callable[..., jax.Array]) -> Callable[..., Any]:
    return nn.with_logical_partitioning(draw, (None,))
