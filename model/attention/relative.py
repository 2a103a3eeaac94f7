"""Attention by relative position over a memory of earlier segments (Transformer-XL, 2019).

    score_ij = ((q_i + u) . k_j + (q_i + w) . r_(i-j)) / sqrt(C),    0 <= i - j <= M

r_d is a projection of sines and cosines of the distance d; u and w are learned, one for each head.
Only distances enter, so positions may count from anywhere. Every query sees itself and the M tokens
before it in its document ("same_length" in the authors' code): hence training by segments, scoring
by segments, prefill and decode compute one function, wherever the text is cut.

B batch, L queries, R queries of a block, P past tokens, S = P + L keys (or the keys of a block, or
slots of a cache), N distances, M memory_length, D d_model, H heads, C head_dim.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from configs.attention import RelativeAttentionConfig
from configs.checks import UserError
from kernels.quantize import MatrixDims
from kernels.window_attention import visible
from kernels.window_attention.reference import MASKED
from kernels.window_attention.xla import block_rows
from model.layer_state import KeyValueState, RowsFirst, StateShape, key_value_state
from model.layers import project, weight
from model.step import Step, document_segments

BIAS_STDDEV = 0.02  # of u and w at the start, as in the authors' code


NO_PAGES = "relative attention scores slots by their distance, and reads no pages"


class RelativeState(KeyValueState):
    """Keys and values of the tokens that a query still sees, without position."""

    unpageable_reason: ClassVar[str | None] = NO_PAGES
    unmixable_reason: ClassVar[str | None] = NO_PAGES


class SegmentMemory(RowsFirst, struct.PyTreeNode):
    """One layer's normed attention inputs of the last M tokens of a stream (Transformer-XL, 2019),
    and their positions; position -1 is an empty slot or padding. No gradient flows into it.
    """

    unrewindable_reason: ClassVar[str | None] = "a memory of segments keeps the last tokens alone"
    unpageable_reason: ClassVar[str | None] = NO_PAGES
    unmixable_reason: ClassVar[str | None] = "a stream's segments have a row to themselves"

    x_BMD: jax.Array
    positions_BM: jax.Array

    def rewind(self, length_R: jax.Array) -> "SegmentMemory":
        raise NotImplementedError(self.unrewindable_reason)

    def logical_axes(self) -> Any:
        return self.replace(x_BMD=("batch", None, None), positions_BM=("batch", None))


def init_state(config: RelativeAttentionConfig, shape: StateShape) -> Any:
    """A ring of the tokens that a query still sees, for reading token by token."""
    if shape.dtype == "int8":
        raise UserError("relative attention has no int8 keys: leave --kv at bfloat16 or float32")
    return key_value_state(
        shape._replace(num_pages=None),
        heads=config.num_heads,
        widths=(config.head_dim, config.head_dim),
        window_size=config.window_size,
        kind=RelativeState,
    )


def init_memory(
    config: RelativeAttentionConfig, dims: tuple[int, ...], d_model: int, dtype: str
) -> SegmentMemory:
    """An empty memory, [*dims, M, ...], for reading segment by segment."""
    slots = (*dims, config.memory_length)
    return SegmentMemory(
        x_BMD=jnp.zeros((*slots, d_model), dtype), positions_BM=jnp.full(slots, -1, jnp.int32)
    )


def visible_keys(config: RelativeAttentionConfig, places: np.ndarray) -> np.ndarray:
    """Those of the memory, and the query's own."""
    return np.minimum(places, config.window_size)


def mixing_flops(config: RelativeAttentionConfig, places: np.ndarray) -> float:
    """Without the scores of distances, which other attentions' positions have no like of."""
    keys = float(visible_keys(config, places).mean())
    return 2.0 * (keys * config.num_heads * 2 * config.head_dim)


class RelativeAttention(nn.Module):
    """Attention over the segment's own tokens, after a memory of earlier ones, or over a state."""

    config: RelativeAttentionConfig
    out_stddev: float

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        step: Step,
        state: KeyValueState | SegmentMemory | None,
    ) -> tuple[jax.Array, KeyValueState | SegmentMemory | None]:
        c, d_model, dtype = self.config, x_BLD.shape[-1], x_BLD.dtype
        in_shape, in_axes = (d_model, c.num_heads, c.head_dim), ("embed", "heads", "head_dim")
        w_q_DHC = weight(self, "q", in_shape, in_axes, d_model**-0.5, MatrixDims(1, 2))
        w_kv_D2HC = weight(
            self,
            "kv",
            (d_model, 2, c.num_heads, c.head_dim),
            ("embed", None, "kv_heads", "head_dim"),
            d_model**-0.5,
            MatrixDims(1, 3),
        )
        w_r_DHC = weight(self, "r", in_shape, in_axes, d_model**-0.5).astype(dtype)
        bias_shape, bias_axes = in_shape[1:], in_axes[1:]
        u_HC = weight(self, "content_bias", bias_shape, bias_axes, BIAS_STDDEV)
        w_HC = weight(self, "position_bias", bias_shape, bias_axes, BIAS_STDDEV)
        out_shape, out_axes = (*bias_shape, d_model), (*bias_axes, "embed")
        w_o_HCD = weight(self, "o", out_shape, out_axes, self.out_stddev, MatrixDims(2, 1))

        q_BLHC = project("BLD,DHC->BLHC", x_BLD, w_q_DHC)
        q_content_BLHC, q_position_BLHC = (
            (q_BLHC + bias_HC.astype(dtype)[None, None]) * c.head_dim**-0.5
            for bias_HC in (u_HC, w_HC)
        )
        seen_BSD, positions_BS, segments_BS = x_BLD, step.positions_BL, step.segments_BL
        if isinstance(state, SegmentMemory):
            seen_BSD, positions_BS, segments_BS, state = _remember(state, x_BLD, step.positions_BL)
        kv_BS2HC = project("BSD,DiHC->BSiHC", seen_BSD, w_kv_D2HC)
        k_BSHC, v_BSHC = kv_BS2HC[:, :, 0], kv_BS2HC[:, :, 1]
        if isinstance(state, KeyValueState):
            if step.rows_BL is not None:
                raise NotImplementedError(f"{NO_PAGES}: give each sequence a row of tokens")
            state = state.write(step, k_BSHC, v_BSHC)
        if isinstance(state, KeyValueState) and not step.is_whole:
            reach = min(c.window_size, state.positions_RS.shape[1])
            sines_ND = sinusoids(reach, d_model).astype(dtype)
            out_BLHC = cached_attention(
                q_content_BLHC, q_position_BLHC, state, step.positions_BL, w_r_DHC, sines_ND
            )
        else:
            reach = min(c.window_size, seen_BSD.shape[1])
            sines_ND = sinusoids(reach, d_model).astype(dtype)
            r_NHC = jnp.einsum("ND,DHC->NHC", sines_ND, w_r_DHC)
            out_BLHC = segment_attention(
                q_content_BLHC, q_position_BLHC, k_BSHC, v_BSHC, r_NHC, positions_BS, segments_BS
            )
        return project("BLHC,HCD->BLD", out_BLHC, w_o_HCD), state


def _remember(
    memory: SegmentMemory, x_BLD: jax.Array, positions_BL: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, SegmentMemory]:
    """Memory and segment as one row, its positions, its documents, and the memory after it.

    A document goes on from the memory into the segment if its positions do, the rule for documents
    everywhere (model/layers.py). No gradient flows into what is remembered.
    """
    past_BMD = jax.lax.stop_gradient(memory.x_BMD).astype(x_BLD.dtype)
    seen_BSD = jnp.concatenate([past_BMD, x_BLD], axis=1)
    positions_BS = jnp.concatenate([memory.positions_BM, positions_BL], axis=1)
    slots = memory.positions_BM.shape[1]
    newest_BMD = jax.lax.stop_gradient(seen_BSD[:, -slots:]).astype(memory.x_BMD.dtype)
    new_memory = SegmentMemory(x_BMD=newest_BMD, positions_BM=positions_BS[:, -slots:])
    return seen_BSD, positions_BS, document_segments(positions_BS), new_memory


def sinusoids(num_distances: int, width: int) -> jax.Array:
    """Codes of the distances N - 1 to 0: sines, then cosines, of d * 10000^(-2k/D); float32 [N, D].

    In the order of keys from the farthest to the query's own (Transformer-XL, section 3.3; Vaswani
    et al. 2017).
    """
    frequency_K = 10_000.0 ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    distance_N = jnp.arange(num_distances - 1, -1, -1, dtype=jnp.float32)
    angle_NK = distance_N[:, None] * jnp.asarray(frequency_K, jnp.float32)[None]
    return jnp.concatenate([jnp.sin(angle_NK), jnp.cos(angle_NK)], axis=-1)


def segment_attention(
    q_content_BLHC: jax.Array,
    q_position_BLHC: jax.Array,
    k_BSHC: jax.Array,
    v_BSHC: jax.Array,
    r_NHC: jax.Array,
    positions_BS: jax.Array,
    segments_BS: jax.Array,
) -> jax.Array:
    """Attention of the last L of S rows over the rows less than N before them, [B, L, H, C].

    Runs by blocks of queries, each against the keys it can reach, so scores take memory in
    proportion to L * (N + R).

    Args:
      q_content_BLHC: (q + u) / sqrt(C); q_position_BLHC: (q + w) / sqrt(C).
      r_NHC: of distances N - 1 to 0; no key farther away is visible.
      positions_BS: int32, negative for empty slots and padding, which no query sees.
      segments_BS: int32, equal for the rows of one document, which must be contiguous.
    Numerics: scores and softmax in float32.
    """
    length, reach = q_content_BLHC.shape[1], r_NHC.shape[0] - 1
    num_past, block = k_BSHC.shape[1] - length, block_rows(length)
    blocks = []
    for begin in range(0, length, block):
        end = min(begin + block, length)
        first_key = max(0, num_past + begin - reach)
        offset = num_past + begin - first_key  # the block's first query among its keys
        rows, keys = slice(begin, end), slice(first_key, num_past + end)
        own = slice(num_past + begin, num_past + end)
        distance_RS = offset + np.arange(end - begin)[:, None] - np.arange(offset + end - begin)
        mask_BRS = jnp.asarray((distance_RS >= 0) & (distance_RS <= reach))[None]
        mask_BRS &= (segments_BS[:, own, None] == segments_BS[:, None, keys]) & (
            positions_BS[:, None, keys] >= 0
        )
        content_BHRS = jnp.einsum(
            "BRHC,BSHC->BHRS",
            q_content_BLHC[:, rows],
            k_BSHC[:, keys],
            preferred_element_type=jnp.float32,
        )
        num_distances = min(reach, offset + end - begin - 1) + 1
        position_BHRN = jnp.einsum(
            "BRHC,NHC->BHRN",
            q_position_BLHC[:, rows],
            r_NHC[-num_distances:],
            preferred_element_type=jnp.float32,
        )
        position_BHRS = relative_shift(position_BHRN, offset, content_BHRS.shape[-1])
        blocks.append(_mix(content_BHRS + position_BHRS, mask_BRS, v_BSHC[:, keys]))
    return jnp.concatenate(blocks, axis=1)


def relative_shift(scores_BHRN: jax.Array, offset: int, num_keys: int) -> jax.Array:
    """Moves scores from distances to keys, [B, H, R, S], by padding and reshaping alone.

    In row i, distance d goes from place N - 1 - d to the key that far before the query, offset + i
    - d: one place further right in each row, which a change of the rows' length does (Transformer-
    XL, appendix B). Keys that are no distance in [0, N) away get something, and must be masked.
    """
    batch, heads, rows, num_distances = scores_BHRN.shape
    skipped = num_distances - 1 - offset
    padding = ((0, 0), (0, 0), (0, 0), (0, num_keys + 1 - num_distances))
    flat = jnp.pad(scores_BHRN, padding).reshape(batch, heads, rows * (num_keys + 1))
    flat = flat[..., skipped : skipped + rows * num_keys]
    return flat.reshape(batch, heads, rows, num_keys)


def cached_attention(
    q_content_BLHC: jax.Array,
    q_position_BLHC: jax.Array,
    state: KeyValueState,
    positions_BL: jax.Array,
    w_r_DHC: jax.Array,
    sines_ND: jax.Array,
) -> jax.Array:
    """Attention over a state whose slots lie in any order, [B, L, H, C].

    Each query's scores of all distances are made first, and each slot's picked from them. A query's
    product with r = sines W_r goes the cheaper way: for few queries through (q W_r^T) sines^T,
    without making r.

    Args:
      state: with the L new tokens in it.
      sines_ND: codes of the distances that are visible.
    """
    (batch, length, _, width), num_distances = q_content_BLHC.shape, sines_ND.shape[0]
    k_BSHC, v_BSHC = (x.astype(q_content_BLHC.dtype) for x in (state.k_RSGC, state.v_RSGW))
    if batch * length < width:
        wide_BLHD = jnp.einsum("BLHC,DHC->BLHD", q_position_BLHC, w_r_DHC)
        by_distance_BHLN = jnp.einsum(
            "BLHD,ND->BHLN", wide_BLHD, sines_ND, preferred_element_type=jnp.float32
        )
    else:
        r_NHC = jnp.einsum("ND,DHC->NHC", sines_ND, w_r_DHC)
        by_distance_BHLN = jnp.einsum(
            "BLHC,NHC->BHLN", q_position_BLHC, r_NHC, preferred_element_type=jnp.float32
        )
    q_positions, k_positions = positions_BL[:, :, None], state.positions_RS[:, None, :]
    place_BLS = num_distances - 1 - (q_positions - k_positions)
    place_BLS = jnp.clip(place_BLS, 0, num_distances - 1)
    position_BHLS = jnp.take_along_axis(by_distance_BHLN, place_BLS[:, None], axis=-1)
    content_BHLS = jnp.einsum(
        "BLHC,BSHC->BHLS", q_content_BLHC, k_BSHC, preferred_element_type=jnp.float32
    )
    mask_BLS = visible(q_positions, k_positions, window_size=num_distances, num_sink_tokens=0)
    return _mix(content_BHLS + position_BHLS, mask_BLS, v_BSHC)


def _mix(scores_BHLS: jax.Array, mask_BLS: jax.Array, v_BSHC: jax.Array) -> jax.Array:
    """softmax(scores) v over the visible keys, [B, L, H, C]."""
    scores_BHLS = jnp.where(mask_BLS[:, None], scores_BHLS, MASKED)
    weights_BHLS = jax.nn.softmax(scores_BHLS, axis=-1).astype(v_BSHC.dtype)
    return jnp.einsum("BHLS,BSHC->BLHC", weights_BHLS, v_BSHC)
