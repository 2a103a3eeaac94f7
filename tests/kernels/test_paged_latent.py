"""paged_latent_attention: against multi-head latent attention written out, and against the model.

B sequences, H heads, N nope_head_dim, W value_head_dim, C latent_rank, E rope_head_dim.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.attention import LatentAttentionConfig
from configs.base import ExecutionConfig
from kernels.backend import INTERPRET
from kernels.paged_attention import (
    paged_latent_attention,
    pallas_triton_latent,
    quantize_positions,
)
from kernels.paged_attention.cases import LATENT_CASES, LatentCase
from model.attention.latent import LatentAttention
from model.layers import RMSNorm, rope
from model.step import make_step

TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}  # float32 softmax in base 2, sums in another order
NOPE, VALUE = 16, 24

xla = functools.partial(paged_latent_attention, implementation="xla")
interpreted = functools.partial(pallas_triton_latent.paged_latent_attention, target=INTERPRET)
BOTH = pytest.mark.parametrize("function", [xla, interpreted], ids=["xla", "triton"])


def into_pages(dense, lengths, size, random):
    """Dense [B, L, C] in pages that lie anywhere, with NaN where nothing was written; tables."""
    batch, pages = len(lengths), -(-max(lengths) // size)
    tables = 1 + random.permutation(batch * pages).reshape(batch, pages)
    pools = [np.full((1 + batch * pages, size, x.shape[-1]), np.nan, np.float32) for x in dense]
    for b, length in enumerate(lengths):
        for p in range(length):
            for pool, x in zip(pools, dense, strict=True):
                pool[tables[b, p // size], p % size] = x[b, p]
        tables[b, -(-length // size) :] = 0
    return (*pools, tables.astype(np.int32))


def draw(case: LatentCase):
    """Operands in pages, and what they come from: per-head queries, latents, up-projections."""
    random = np.random.RandomState(5)
    batch, heads, rank = len(case.lengths), case.num_heads, case.latent_rank

    def normal(*shape):
        return random.randn(*shape).astype(np.float32)

    q_nope, q_rope = normal(batch, heads, NOPE), normal(batch, heads, case.rope_head_dim)
    latent = normal(batch, max(case.lengths), rank)
    rope = normal(batch, max(case.lengths), case.rope_head_dim)
    up_k, up_v = normal(rank, heads, NOPE) / 4, normal(rank, heads, VALUE) / 4
    q_latent = np.einsum("BHN,RHN->BHR", q_nope, up_k)
    pages = into_pages((latent, rope), case.lengths, case.page_size, random)
    operands = (q_latent, q_rope, *pages, np.array(case.lengths, np.int32))
    return operands, (q_nope, q_rope, latent, rope, up_k, up_v)


def settings(case: LatentCase):
    scale = (NOPE + case.rope_head_dim) ** -0.5
    return {
        "scale": scale,
        "window_size": case.window_size,
        "num_sink_tokens": case.num_sink_tokens,
    }


def written_out(case, q_nope, q_rope, latent, rope, up_k, up_v):
    """Every head's own keys and values, one head of one sequence at a time, in float64: [B, H, W].

    DeepSeek-V2, 2024, equations 9 to 19.
    """
    out = np.zeros((*q_nope.shape[:2], VALUE))
    for b, length in enumerate(case.lengths):
        position = np.arange(length)
        is_seen = length - position <= (case.window_size or length)
        is_seen |= position < case.num_sink_tokens
        for h in range(case.num_heads if length else 0):
            key = np.concatenate([latent[b, :length] @ up_k[:, h], rope[b, :length]], axis=-1)
            query = np.concatenate([q_nope[b, h], q_rope[b, h]]).astype(np.float64)
            score = np.where(is_seen, key @ query / np.sqrt(len(query)), -np.inf)
            weight = np.exp(score - score.max())
            out[b, h] = weight / weight.sum() @ (latent[b, :length] @ up_v[:, h])
    return out


@BOTH
@pytest.mark.parametrize("name", LATENT_CASES)
def test_absorbed_attention_equals_that_of_each_heads_keys_and_values(name, function):
    case = LATENT_CASES[name]
    operands, parts = draw(case)
    summed = jax.jit(functools.partial(function, **settings(case)))(*operands)
    found = np.einsum("BHC,CHW->BHW", summed, parts[-1])
    np.testing.assert_allclose(found, written_out(case, *parts), **TOLERANCE)


def test_the_number_of_parts_changes_nothing(monkeypatch):
    case = LATENT_CASES["sinks"]
    operands, parts = draw(case)
    for programs in (1, 2 * len(case.lengths)):
        monkeypatch.setattr(pallas_triton_latent, "PROGRAMS", programs)
        summed = jax.jit(functools.partial(interpreted, **settings(case)))(*operands)
        found = np.einsum("BHC,CHW->BHW", summed, parts[-1])
        np.testing.assert_allclose(found, written_out(case, *parts), **TOLERANCE)


@pytest.mark.parametrize("wrong", ["rope", "scale"])
def test_wrong_versions_are_rejected(wrong):
    case = LATENT_CASES["ragged"]
    (q_latent, q_rope, *rest), parts = draw(case)
    changed = settings(case)
    if wrong == "rope":
        q_rope = 0 * q_rope
    else:  # that of the wide product's width
        changed["scale"] = (case.latent_rank + case.rope_head_dim) ** -0.5
    found = np.einsum("BHC,CHW->BHW", xla(q_latent, q_rope, *rest, **changed), parts[-1])
    assert not np.allclose(found, written_out(case, *parts), atol=1e-2)


@BOTH
def test_int8_latents_equal_what_they_stand_for_and_stay_near_the_floats(function):
    case = LATENT_CASES["ragged"]
    (q_latent, q_rope, latent, rope, *rest), parts = draw(case)
    quantized = jax.jit(quantize_positions, static_argnums=1)
    values, scales = quantized(np.nan_to_num(latent), "bfloat16")
    restored = np.asarray(values, np.float32) * np.asarray(scales, np.float32)[..., None]
    run, floating = (jax.jit(functools.partial(f, **settings(case))) for f in (function, xla))
    is_written = ~np.isnan(latent[..., 0])
    nan_scales = jnp.where(is_written, scales, jnp.bfloat16(jnp.nan))
    found = run(q_latent, q_rope, values, rope, *rest, latent_scales_ZS=nan_scales)
    expected = floating(q_latent, q_rope, restored, rope, *rest)
    np.testing.assert_allclose(found, expected, **TOLERANCE)
    floats = floating(q_latent, q_rope, latent, rope, *rest)
    # As of keys and values (test_paged_int8.py), whose query and channels are the latent's here.
    moved = np.abs(q_latent).sum(-1).max() * settings(case)["scale"]
    half_step = np.asarray(scales, np.float32).max() / 2
    bound = np.expm1(2 * moved * half_step) * np.abs(parts[2]).max() + half_step
    assert 1e-4 < np.abs(np.asarray(found) - np.asarray(floats)).max() < min(bound, 0.05)


@BOTH
def test_a_model_decodes_the_same_from_pages(function):
    """The model's layer over a text, against its last position from pages with the same weights."""
    config = LatentAttentionConfig(
        num_heads=3,
        query_rank=None,
        latent_rank=32,
        nope_head_dim=NOPE,
        rope_head_dim=16,
        value_head_dim=VALUE,
    )
    layer = LatentAttention(config, ExecutionConfig(), out_stddev=0.1)

    @jax.jit
    def of_layer(x_BLD):
        """Its weights and its result, and by the equations what pages would hold and the query."""
        positions_BL = jnp.arange(21, dtype=jnp.int32)[None]
        inputs = (x_BLD, make_step(positions_BL, positions_BL), None)
        (out_BLD, _, _), variables = layer.init_with_output(jax.random.key(1), *inputs)
        weights = nn.unbox(variables["params"])
        q_BHK = jnp.einsum("BD,DHK->BHK", x_BLD[:, -1], weights["q"])
        down_BLR = jnp.einsum("BLD,DR->BLR", x_BLD, weights["kv_down"])
        latent_BLR, rope_BL1P = down_BLR[..., :32], down_BLR[:, :, None, 32:]
        latent_BLR = RMSNorm(1e-6).apply({"params": weights["kv_norm"]}, latent_BLR)
        rope_BLP = rope(rope_BL1P, positions_BL, config.rope_base)[:, :, 0]
        q_rope_BHP = rope(q_BHK[:, None, :, NOPE:], positions_BL[:, -1:], config.rope_base)[:, 0]
        up_k_RHN, up_v_RHW = jnp.split(weights["kv_up"], [NOPE], axis=-1)
        q_latent_BHR = jnp.einsum("BHN,RHN->BHR", q_BHK[..., :NOPE], up_k_RHN)
        return (
            (q_latent_BHR, q_rope_BHP),
            (latent_BLR, rope_BLP),
            (up_v_RHW, weights["o"]),
            out_BLD[:, -1],
        )

    x_BLD = np.random.RandomState(3).randn(1, 21, 40).astype(np.float32)
    queries, dense, ups, last_BD = of_layer(x_BLD)
    dense = [np.asarray(x) for x in dense]
    pages = into_pages(dense, [21], 16, np.random.RandomState(0))
    reach = {"scale": config.query_head_dim**-0.5, "window_size": None, "num_sink_tokens": 0}
    function = jax.jit(functools.partial(function, **reach))
    summed_BHR = function(*queries, *pages, jnp.array([21]))
    found_BD = np.einsum("BHR,RHW,HWD->BD", summed_BHR, *ups)
    np.testing.assert_allclose(found_BD, last_BD, **TOLERANCE)


def test_what_does_not_fit_is_said():
    (q_latent, q_rope, latent, rope, tables, lengths), _ = draw(LATENT_CASES["ragged"])
    with pytest.raises(ValueError, match=r"must be \[B, H, R\], \[B, H, P\]"):
        paged_latent_attention(q_latent, q_rope, latent[..., :8], rope, tables, lengths, scale=1.0)
    with pytest.raises(ValueError, match=r"lengths \(2,\) must be"):
        paged_latent_attention(q_latent, q_rope, latent, rope, tables, lengths[:2], scale=1.0)
    with pytest.raises(NotImplementedError, match="page_size=8 must be a power of two from 16"):
        interpreted(
            q_latent,
            q_rope,
            latent[:, :8],
            rope[:, :8],
            tables,
            lengths,
            scale=1.0,
            window_size=None,
            num_sink_tokens=0,
        )
