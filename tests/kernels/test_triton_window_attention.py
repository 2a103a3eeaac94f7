"""window_attention's Triton kernels in Pallas' interpreter, against the dense mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.backend import INTERPRET
from kernels.window_attention import pallas_triton, window_attention
from kernels.window_attention.cases import CASES, Case

TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}  # float32 softmax in base 2, sums in another order
FAST = ("one_row", "padded", "sinks_packed")
"""The others run after `make test`: three kernels and a reference take seconds to compile."""
SPREAD = Case(length=96, documents=(5, 60, 31), window_size=20, num_sink_tokens=3)
"""Blocks of 32 queries and 16 keys: documents, windows and sinks begin inside of blocks."""


def draw(case: Case, value_width: int | None = None):
    random = np.random.RandomState(7)
    heads, kv_heads, width = case.num_heads, case.num_kv_heads, case.head_dim
    positions = np.concatenate([np.arange(n) for n in case.documents])
    segments = np.repeat(np.arange(len(case.documents)), case.documents)
    padding = case.length - len(positions)
    positions = np.pad(positions, (0, padding), constant_values=-1)
    segments = np.pad(segments, (0, padding), constant_values=len(case.documents))
    q, k, v, dout = (
        random.randn(case.batch, case.length, n, w).astype(np.float32)
        for n, w in (
            (heads, width),
            (kv_heads, width),
            (kv_heads, value_width or width),
            (heads, value_width or width),
        )
    )
    dout *= (positions >= 0)[None, :, None, None]
    rows = [np.tile(a.astype(np.int32), (case.batch, 1)) for a in (positions, segments)]
    return q, k, v, *rows, dout


def reach_of(case: Case):
    return {"window_size": case.window_size, "num_sink_tokens": case.num_sink_tokens}


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(function, case, q, k, v, positions, segments, dout, sinks=None):
    """Results where there are tokens, and the gradients of q, k, v and the sinks' logits."""

    def forward(q, k, v, sinks):
        return function(q, k, v, positions, segments, sink_logits_H=sinks, **reach_of(case))

    out, pull = jax.vjp(forward, q, k, v, sinks)
    return jnp.where((positions >= 0)[:, :, None, None], out, 0.0), *pull(dout)


interpreted = functools.partial(pallas_triton.window_attention, target=INTERPRET)
reference = functools.partial(window_attention, implementation="reference")


def check(case, operands, sinks=None):
    ours, theirs = (run(f, case, *operands, sinks) for f in (interpreted, reference))
    for a, b, what in zip(ours, theirs, "oqkvb", strict=True):
        if a is None:
            continue
        # A sink's gradient sums over all rows: its error is that of its largest entry.
        scale = max(np.abs(b).max(), 1.0) if what == "b" else 1.0
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5 * scale, err_msg=what)


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_kernels_equal_reference_with_gradients(name):
    check(CASES[name], draw(CASES[name]))


def test_documents_sinks_and_logits_inside_of_blocks():
    """Values narrower than keys, of a width that is no power of two, and learned sinks."""
    operands = draw(SPREAD, value_width=12)
    check(SPREAD, operands, jnp.asarray([-1.0, 0.0, 2.0, -jnp.inf]))


@pytest.mark.parametrize("form", ["gathered", "masked"])
def test_positions_with_gaps(form):
    """Some of the rows, the others taken out or turned into padding between them."""
    *operands, dout = draw(SPREAD)
    is_kept = np.random.RandomState(5).rand(SPREAD.length) < 0.6
    if form == "gathered":
        operands = [a[:, is_kept] for a in operands]
        dout = dout[:, is_kept]
    else:
        operands[3][:, ~is_kept] = -1
        dout = dout * is_kept[None, :, None, None]
    check(SPREAD, (*operands, dout))


def test_padding_gives_finite_values():
    q, k, v, *rows, _ = draw(CASES["padded"])
    out = jax.jit(functools.partial(interpreted, **reach_of(CASES["padded"])))(q, k, v, *rows)
    assert np.isfinite(np.asarray(out)).all()


def test_bfloat16_rounds_weights_and_result():
    q, k, v, positions, segments, _ = draw(SPREAD)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    ours = jax.jit(functools.partial(interpreted, **reach_of(SPREAD)))(q, k, v, positions, segments)
    exact = reference(
        *(x.astype(jnp.float32) for x in (q, k, v)), positions, segments, **reach_of(SPREAD)
    )
    # Weights of at most 1 and the result, each rounded to 8 bits of mantissa; values are about 1.
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=2**-6)


@pytest.mark.parametrize("wrong", ["a window one longer", "no sinks"])
def test_wrong_versions_are_rejected(wrong):
    *operands, _ = draw(SPREAD)
    reach = reach_of(SPREAD)
    expected = np.asarray(reference(*operands, **reach))
    if wrong == "no sinks":
        reach["num_sink_tokens"] = 0
    else:
        reach["window_size"] += 1
    found = np.asarray(jax.jit(functools.partial(interpreted, **reach))(*operands))
    assert np.abs(found - expected).max() > 1e-2


def test_without_a_gpu_the_name_is_refused():
    *operands, _ = draw(CASES["one_row"])
    with pytest.raises(NotImplementedError, match="the default device is cpu"):
        window_attention(*operands, **reach_of(SPREAD), implementation="triton")
