"""window_attention's Mosaic kernel for Hopper in Pallas' interpreter, against the dense mask.

The interpreter runs all but the other halves of kernels/warpgroups.py: warpgroups as threads,
copies, barriers, the blocks that are visited, masks and the softmax; and no layout, wgmma or
swizzling.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # what the interpreter found

from kernels.backend import H100, INTERPRET
from kernels.window_attention import pallas_mosaic, window_attention
from kernels.window_attention.cases import CASES, Case
from tests.kernels.test_triton_window_attention import draw, reach_of

SPREAD = Case(
    batch=1,
    num_heads=2,
    num_kv_heads=1,
    length=76,
    documents=(5, 44, 20),
    window_size=20,
    num_sink_tokens=3,
)
"""Two blocks of 16 queries each, 16 keys at a time: documents, windows and sinks begin inside of
blocks, the third begins within the second's window, and the last rows are padding."""
SINKS = jnp.asarray([-1.0, 2.0])
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}  # float32 softmax in base 2, sums in another order


def interpreted(*operands, **options):
    return pallas_mosaic.window_attention(*operands, target=INTERPRET, **options)


reference = functools.partial(window_attention, implementation="reference")


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(function, case, q, k, v, positions, segments, sinks=None):
    out = function(q, k, v, positions, segments, sink_logits_H=sinks, **reach_of(case))
    return jnp.where((positions >= 0)[:, :, None, None], out, 0.0)


@pytest.mark.slow
def test_documents_windows_and_sinks_inside_of_blocks_with_gradients():
    """The gradients are of the Triton kernels, which read what this one leaves of its softmax."""
    q, k, v, *rows, dout = draw(SPREAD)

    def with_gradients(function):
        out, pull = jax.vjp(lambda *x: run(function, SPREAD, *x[:3], *rows, x[3]), q, k, v, SINKS)
        return out, *pull(jnp.asarray(dout))

    ours, theirs = with_gradients(interpreted), with_gradients(reference)
    assert not gpu_callbacks.get_races().races_found
    for a, b, what in zip(ours, theirs, "oqkvb", strict=True):
        np.testing.assert_allclose(a, b, err_msg=what, rtol=1e-5, atol=5e-5)
    for wrong in ({"window_size": 21}, {"num_sink_tokens": 0}):
        found = reference(q, k, v, *rows, sink_logits_H=SINKS, **reach_of(SPREAD) | wrong)
        assert np.abs(ours[0] - np.where(rows[0][..., None, None] >= 0, found, 0)).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["one_row", "multi_query", "packed", "padded", "window_of_one", "sinks_exceed_window"]
)
@pytest.mark.sampled
def test_the_kernel_equals_the_reference(name):
    case = dataclasses.replace(CASES[name], batch=1)
    *operands, _ = draw(case)
    np.testing.assert_allclose(
        run(interpreted, case, *operands), run(reference, case, *operands), **TOLERANCE
    )


@pytest.mark.slow
def test_positions_with_gaps_and_values_of_another_width():
    q, k, v, positions, segments, _ = draw(SPREAD, value_width=32)
    is_kept = np.random.RandomState(5).rand(SPREAD.length) < 0.6
    positions[:, ~is_kept] = -1
    operands = (q, k, v, positions, segments, SINKS)
    np.testing.assert_allclose(
        run(interpreted, SPREAD, *operands), run(reference, SPREAD, *operands), **TOLERANCE
    )


# --- What the kernel lacks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "dtype", "sentence"),
    [(96, jnp.bfloat16, "heads of 64 or 128 channels"), (64, jnp.float32, "in bfloat16")],
)
def test_what_the_kernel_cannot_do_is_said(width, dtype, sentence):
    q = jnp.zeros((1, 64, 2, width), dtype)
    row = jnp.arange(64, dtype=jnp.int32)[None]
    with pytest.raises(NotImplementedError, match=sentence):
        pallas_mosaic.window_attention(
            q, q, q, row, 0 * row, window_size=None, num_sink_tokens=0, target=H100
        )


def test_the_op_takes_it_by_name_where_it_runs(monkeypatch):
    *operands, _ = draw(CASES["one_row"])
    ours = functools.partial(window_attention, **reach_of(SPREAD), implementation="mosaic")
    with pytest.raises(NotImplementedError, match=r"needs a Hopper GPU .* default device is cpu"):
        ours(*operands)
    for module in ("backend", "window_attention.api"):
        monkeypatch.setattr(f"kernels.{module}.current_target", lambda: INTERPRET)
    assert "mosaic_window_attention" in str(jax.make_jaxpr(ours)(*operands))
