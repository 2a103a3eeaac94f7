"""grouped_matmul's Mosaic kernel for Hopper in Pallas' interpreter, against dequantized weights.

The interpreter runs all but the other halves of kernels/warpgroups.py: warpgroups as threads,
copies, barriers, the order of tiles, borders and scales; and no layout, wgmma or swizzling.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # what the interpreter found

from kernels.backend import H100, INTERPRET
from kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels.grouped_matmul import pallas_mosaic_quantized as kernel
from kernels.quantize import dequantize, quantize

D_IN, D_OUT = 256, 40
"""Two steps of 128 inputs; two and a half blocks of 16 outputs, of two warpgroups each."""
SIZES = {
    "ragged": (9, 0, 30, 1, 16, 17, 0, 0, 5),
    "one_hot": (0, 78, 0),
    "no_rows_used": (0, 0),
}
"""Of 82 rows in tiles of 16: the last ones belong to no group."""
TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}  # float32 sums of 256 terms whose size is about 1


def draw(format, sizes="ragged", d_out=D_OUT, **options):
    random, sizes = np.random.RandomState(4), SIZES[sizes]
    x, dy = random.randn(82, D_IN), random.randn(82, D_OUT)
    dy[sum(sizes) :] = 0.0
    w = random.randn(len(sizes), D_IN, d_out) * D_IN**-0.5
    w[:, 128:] *= 7.0  # scales that differ from block to block
    weight = quantize(jnp.asarray(w, jnp.float32), format, **options)
    x, dy = (jnp.asarray(a, jnp.float32) for a in (x, dy))
    return x, weight, jnp.asarray(sizes, jnp.int32), dy


def interpreted(*operands, **options):
    ours = functools.partial(kernel.grouped_matmul, target=INTERPRET, **options)
    return jax.jit(ours)(*operands)


@functools.partial(jax.jit, static_argnames="gated")
def reference(x, weight, sizes, gated=False):
    op = grouped_swiglu if gated else grouped_matmul
    return op(x, dequantize(weight), sizes, implementation="reference")


@pytest.mark.parametrize(
    ("format", "sizes", "options"),
    [
        ("int8", "ragged", {}),
        pytest.param("int4", "ragged", {}, marks=pytest.mark.slow),  # with its gradient below
        pytest.param("fp8_e4m3", "ragged", {"scale_dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param("int8", "one_hot", {"block_size": 256}, marks=pytest.mark.slow),
        pytest.param("int8", "no_rows_used", {}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
@pytest.mark.sampled
def test_the_kernel_equals_the_reference_and_no_wrong_version(format, sizes, options):
    x, weight, sizes, _ = draw(format, sizes, **options)
    found = interpreted(x, weight, sizes)
    np.testing.assert_allclose(found, reference(x, weight, sizes), **TOLERANCE)
    assert not gpu_callbacks.get_races().races_found
    other_block = dataclasses.replace(weight, scales=jnp.roll(weight.scales, 1, axis=1))
    one_row_on = jnp.roll(sizes, 1)
    for wrong in ((x, other_block, sizes), (x, weight, one_row_on)):
        if sizes.sum() and weight.block_size < D_IN:
            assert np.abs(found - reference(*wrong)).max() > 0.1


@pytest.mark.slow
def test_the_gradient_of_x_is_that_of_the_triton_kernel_with_int4_repacked():
    x, weight, sizes, dy = draw("int4")

    def with_gradient(function):
        y, pull = jax.vjp(lambda x: function(x, weight, sizes), x)
        return y, *pull(dy)

    for a, b in zip(with_gradient(interpreted), with_gradient(reference), strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="a race is an exception from 0.11 on")
def test_a_slot_given_back_too_early_is_a_race(monkeypatch):
    def read_late(ring, step):
        slot = wait_filled(ring, step)
        give_back(ring, slot)
        return slot

    wait_filled, give_back = kernel.wait_filled, kernel.give_back
    monkeypatch.setattr(kernel, "wait_filled", read_late)
    monkeypatch.setattr(kernel, "give_back", lambda ring, slot: None)
    interpreted(*draw("int8")[:3]).block_until_ready()
    assert gpu_callbacks.get_races().races_found


@pytest.mark.slow
def test_gate_and_up_of_gathered_rows_in_one_kernel():
    x, weight, sizes, _ = draw("int8", d_out=2 * D_OUT)
    rows = jnp.asarray(np.random.RandomState(0).permutation(82), jnp.int32)
    found = interpreted(x, weight, sizes, rows_R=rows, gated=True)
    np.testing.assert_allclose(found, reference(x[rows], weight, sizes, gated=True), **TOLERANCE)


def test_canonical_nibbles_are_xlas_own_int4():
    """What a kernel reads as int4 is not moved: in XLA's program it is a bitcast."""
    w = np.random.RandomState(0).randn(2, 128, 64)
    weight = quantize(jnp.asarray(w, jnp.float32), "int4")
    ones = dataclasses.replace(weight, scales=jnp.ones_like(weight.scales))
    codes = jnp.swapaxes(dequantize(ones), 1, 2)
    np.testing.assert_array_equal(kernel.readable(weight).astype(jnp.float32), codes)


# --- What the kernel lacks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"packing": "split_128"}, r"canonical order and these are split_128: .*repack"),
        ({"format": "int8", "block_size": 64}, "a multiple of 128 inputs"),
        ({"format": "int8"}, "writes 64 outputs at a time, and these weights have 16"),
    ],
)
def test_what_the_kernel_cannot_read_is_said(changes, sentence):
    weight = dataclasses.replace(quantize(jnp.ones((1, 256, 16)), "int4").as_matrices(), **changes)
    with pytest.raises(NotImplementedError, match=sentence):
        kernel.grouped_matmul(
            jnp.ones((4, 256), jnp.bfloat16), weight, jnp.ones(1, jnp.int32), target=H100
        )


def test_rows_must_be_bfloat16():
    weight = quantize(jnp.ones((1, 256, 64)), "int8")
    with pytest.raises(NotImplementedError, match="rows in bfloat16: cast x"):
        kernel.grouped_matmul(jnp.ones((4, 256)), weight, jnp.ones(1, jnp.int32), target=H100)


def test_the_ops_take_it_by_name_and_refuse_what_it_lacks(monkeypatch):
    x, weight, sizes, _ = draw("int8")
    with pytest.raises(NotImplementedError, match=r"needs a Hopper GPU .* default device is cpu"):
        grouped_matmul(x, weight, sizes, implementation="mosaic")
    for module in ("backend", "grouped_matmul.api"):
        monkeypatch.setattr(f"kernels.{module}.current_target", lambda: INTERPRET)
    traced = jax.make_jaxpr(functools.partial(grouped_matmul, implementation="mosaic"))
    assert "mosaic_grouped_matmul_int8" in str(traced(x, weight, sizes))
    traced = jax.make_jaxpr(functools.partial(grouped_swiglu, implementation="mosaic"))
    assert "mosaic_grouped_matmul_int8" in str(traced(x, weight, sizes))
    with pytest.raises(NotImplementedError, match="do not round rows"):
        grouped_matmul(x, weight, sizes, activations="int8", implementation="mosaic")
    with pytest.raises(NotImplementedError, match="multiplies quantized weights"):
        grouped_swiglu(x, dequantize(weight), sizes, implementation="mosaic")
