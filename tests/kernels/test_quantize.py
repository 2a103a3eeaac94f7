"""QTensor: rounding within its bounds, every code there and back, orders that undo each other."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

import kernels.quantize
from kernels import native
from kernels.backend import A100, H100, Target
from kernels.grouped_matmul import grouped_matmul, pallas_mosaic_quantized, pallas_triton_quantized
from kernels.quantize import (
    QUANTIZED,
    MatrixDims,
    QTensor,
    choose_block_size,
    preferred_packing,
    quantizable_reason,
    quantize,
    to_format,
)
from kernels.quantize import packing as packings
from kernels.quantize.native import quantize_panels

# One program for each shape: operation by operation, compiling would take most of the tests' time.
dequantize = jax.jit(kernels.quantize.dequantize)
repack = jax.jit(kernels.quantize.repack, static_argnums=1)
take_outputs = jax.jit(kernels.quantize.take_outputs)
pack = jax.jit(packings.pack, static_argnums=(1, 2))
unpack = jax.jit(packings.unpack, static_argnums=(1, 2))

SCALED = ("fp8_e4m3", "int8", "int4")


def draw(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def steps(q: QTensor) -> np.ndarray:
    """Each weight's scale, [..., K, N]."""
    return np.repeat(np.asarray(q.scales, np.float32), q.block_size, axis=-2)


def bound(w, q):
    """The error that quantize promises, and a rounding of the arithmetic itself."""
    step = steps(q)
    if q.format == "fp8_e4m3":
        return np.maximum(np.abs(w) / 16, step / 1024) * (1 + 1e-5)
    if q.format == "int4":  # the largest of the other sign has no code of its own
        return np.abs(step) * (1 + 1e-5)
    return step / 2 * (1 + 1e-5)


def symmetric_errors(w, block_size: int, largest: int = 7) -> np.ndarray:
    """Squared error of each block whose largest weight is the largest code."""
    blocks = np.asarray(w, np.float64)
    blocks = blocks.reshape(*w.shape[:-2], -1, block_size, w.shape[-1])
    scale = np.abs(blocks).max(-2, keepdims=True) / largest
    codes = np.round(blocks / np.where(scale > 0, scale, 1))
    return ((codes * scale - blocks) ** 2).sum(-2)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", SCALED)
def test_error_is_within_the_bound(format, scale_dtype):
    w = draw(3, 256, 32) * np.exp(draw(3, 256, 32, seed=1) * 3)
    q = quantize(w, format, block_size=64, scale_dtype=scale_dtype)
    assert q.shape == w.shape
    assert (np.abs(dequantize(q) - w) <= bound(w, q)).all()


@settings(max_examples=30, deadline=None)
@given(*[st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)] * 2)
def test_any_pair_of_weights(a, b):
    w = np.array([[a], [b]], np.float32)
    for format in SCALED:
        q = quantize(w, format, block_size=2)
        back = np.asarray(dequantize(q))
        assert np.isfinite(back).all()
        # Steps below the least float32 are none: then all a block can hold is zero.
        tiny = np.finfo(np.float32).tiny * 512
        assert (np.abs(back - w) <= bound(w, q) + tiny).all()


@pytest.mark.parametrize("shape", [(64, 512), (4, 96, 32)])
@pytest.mark.parametrize(("format", "largest", "share"), [("int8", 127, 0.9), ("int4", 7, 0.85)])
def test_rounding_is_better_than_by_the_largest_weight(format, largest, share, shape):
    """Of normal weights by a tenth (int8), in no block worse than with the largest weight as the
    largest code; by a seventh (int4, which has one code more on one side)."""
    w = draw(*shape)
    q = quantize(w, format, block_size=32)
    error = (np.asarray(dequantize(q), np.float64) - w) ** 2
    found = error.reshape(*shape[:-2], -1, 32, shape[-1]).sum(-2)
    plain = symmetric_errors(w, 32, largest)
    assert format == "int4" or (found <= plain * (1 + 1e-5)).all()
    assert found.sum() < share * plain.sum()


def test_no_block_s_largest_weight_is_clipped():
    """Though smaller scales err less in all: models are worse for it (docs/experiments.md)."""
    w = draw(256, 32)
    for is_affine in (False, True):
        back = np.asarray(dequantize(quantize(w, "int4", block_size=32, is_affine=is_affine)))
        blocks, found = (x.reshape(8, 32, 32) for x in (w, back))
        at = np.abs(blocks).argmax(1, keepdims=True)
        largest, kept = (np.take_along_axis(x, at, 1) for x in (blocks, found))
        np.testing.assert_allclose(kept, largest, rtol=1e-5)


def test_a_zero_block_stays_zero_and_has_no_nan():
    w = np.zeros((256, 8), np.float32)
    w[128:] = draw(128, 8)
    for format in SCALED:
        back = np.asarray(dequantize(quantize(w, format)))
        np.testing.assert_array_equal(back[:128], 0)
        assert np.isfinite(back).all()


def affine_errors(w, block_size: int) -> np.ndarray:
    """Squared error of each block whose least and largest weight are the first and last code."""
    blocks = np.asarray(w, np.float64)
    blocks = blocks.reshape(*w.shape[:-2], -1, block_size, w.shape[-1])
    low = blocks.min(-2, keepdims=True)
    scale = (blocks.max(-2, keepdims=True) - low) / 15
    codes = np.round((blocks - low) / np.where(scale > 0, scale, 1))
    return ((low + codes * scale - blocks) ** 2).sum(-2)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_an_affine_grid_goes_from_least_to_largest(scale_dtype):
    """As good in each block, but for what bfloat16 loses; of weights that are not about zero better
    than without an offset."""
    w = draw(3, 256, 32) + draw(3, 1, 32, seed=1)
    q = quantize(w, "int4", block_size=32, scale_dtype=scale_dtype, is_affine=True)
    found = ((np.asarray(dequantize(q), np.float64) - w) ** 2).reshape(3, 8, 32, 32).sum(-2)
    plain = affine_errors(w, 32)
    assert (found <= plain * (1 + (1e-4 if scale_dtype == "float32" else 0.2))).all()
    without = np.asarray(dequantize(quantize(w, "int4", block_size=32)), np.float64)
    assert found.sum() < 0.85 * ((without - w) ** 2).sum()


GRIDS = {
    "Q4_1's": (0, 15, True),
    "Q4_K's": (3, 12, True),
    "Q4_0's": (-8, 7, False),
    "of eight codes": (0, 8, True),
    "GPTQ's, symmetric": (-5, 6, False),
}
"""Least and largest code, and whether blocks have an offset."""


@pytest.mark.parametrize("name", GRIDS)
def test_weights_on_a_grid_are_found_again(name):
    """Of codes that need not be all sixteen, with scales and offsets in float16."""
    least, largest, is_affine = GRIDS[name]
    random = np.random.RandomState(0)
    codes = random.randint(least, largest + 1, (4, 32, 48))
    codes[:, 0], codes[:, 1] = least, largest
    scale = random.uniform(0.01, 0.1, (4, 1, 48)).astype(np.float16).astype(np.float64)
    offset = random.standard_normal((4, 1, 48)).astype(np.float16) * is_affine
    w = (codes * scale + offset).reshape(128, 48).astype(np.float32)
    of_weights = np.abs(w).reshape(4, 32, 48)
    # Half of bfloat16's last bit, of the offset and of the scale, which counts eight times.
    for scale_dtype, part, steps in (("float32", 1e-6, 1e-5), ("bfloat16", 2**-8, 9 * 2**-8)):
        q = quantize(w, "int4", block_size=32, scale_dtype=scale_dtype, is_affine=True)
        off = (np.asarray(dequantize(q)) - w).reshape(4, 32, 48)
        most = part * of_weights.max(1) + steps * scale[:, 0]  # another scale may err less in all
        assert (np.sqrt(np.square(off).mean(1)) <= most).all()


def test_bits_per_weight_count_the_scales():
    w = draw(256, 64)
    affine = quantize(w, "int4", block_size=32, scale_dtype="bfloat16", is_affine=True)
    assert affine.nbytes * 8 / w.size == 5
    assert quantize(w, "int8").nbytes * 8 / w.size == 8 + 32 / 128
    assert quantize(w, "int4").nbytes * 8 / w.size == 4 + 32 / 128
    assert quantize(w, "int4", block_size=32, scale_dtype="bfloat16").nbytes * 8 / w.size == 4.5


def test_all_codes_of_int8_and_int4_come_back():
    for format, least, largest in (("int8", -127, 127), ("int4", -7, 7), ("int4", -8, 7)):
        codes = np.arange(least, largest + 1, dtype=np.float32)
        w = np.concatenate([codes, np.zeros(-len(codes) % 2)])[:, None]
        q = quantize(w, format, block_size=len(w))
        np.testing.assert_array_equal(dequantize(q), w)


def test_all_codes_of_fp8_come_back():
    """Every finite e4m3 value is kept, subnormal ones too; ml_dtypes says what they are."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    w = codes[np.isfinite(codes)][:, None]
    np.testing.assert_array_equal(dequantize(quantize(w, "fp8_e4m3", block_size=len(w))), w)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("packing", ["canonical", "panels", "split_128"])
def test_packing_keeps_every_code(bits, packing):
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    values = np.random.RandomState(0).choice(codes, (2, 32, 256)).astype(np.int8)
    stored = pack(jnp.array(values), bits, packing)
    assert stored.size * 8 == values.size * bits
    np.testing.assert_array_equal(unpack(stored, bits, packing), values)


def test_panels_put_sixteen_outputs_side_by_side():
    values = jnp.arange(32 * 8, dtype=jnp.int32).astype(jnp.int8).reshape(32, 8)
    panels = np.asarray(pack(values, 8, "panels")).reshape(2, 2, 16, 4)
    np.testing.assert_array_equal(panels[1, 1, 5], values[16 + 5, 4:8])


def test_canonical_int4_has_the_even_input_in_the_low_nibble():
    stored = pack(jnp.array([[3, -2]], jnp.int8), 4, "canonical")
    assert int(stored[0, 0]) == 3 | (14 << 4)


@pytest.mark.parametrize("format", SCALED)
@pytest.mark.parametrize("is_affine", [False, True])
def test_another_order_is_the_same_weight(format, is_affine):
    if is_affine and format != "int4":
        with pytest.raises(ValueError, match=f"one of int4, not of {format}"):
            quantize(draw(2, 256, 32), format, is_affine=True)
        return
    q = quantize(draw(2, 256, 32), format, is_affine=is_affine)
    for packing in ("panels", "split_128", "canonical"):
        np.testing.assert_array_equal(dequantize(repack(q, packing)), dequantize(q))


def test_a_wrong_order_is_another_weight():
    q = quantize(draw(256, 32), "int4")
    values = repack(q, "panels").values
    misread = QTensor(values, q.scales, q.format, q.block_size, "split_128")
    assert not np.allclose(dequantize(misread), dequantize(q))


def test_a_stack_of_layers_is_sliced_by_scan():
    w = draw(3, 128, 16)
    q = quantize(w, "int4")
    each = jax.lax.scan(lambda _, layer: (None, dequantize(layer)), None, q)[1]
    np.testing.assert_array_equal(each, dequantize(q))


def test_quantize_runs_under_jit():
    w = draw(128, 16)
    q = jax.jit(lambda w: quantize(w, "fp8_e4m3"))(w)
    np.testing.assert_array_equal(dequantize(q), dequantize(quantize(w, "fp8_e4m3")))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: quantize(draw(100, 4), "int8"), "block_size=128 must divide the 100 inputs"),
        (lambda: quantize(draw(128, 4), "int3"), "must be one of"),
        (lambda: quantize(draw(128), "int8"), "has no 1 dimensions of inputs and 1 of outputs"),
        (lambda: quantize(draw(3, 4), "int4", block_size=3), "in pairs"),
        (lambda: quantize(draw(128, 4), "int8", scale_dtype="float16"), "float32 or bfloat16"),
        (lambda: quantize(draw(128, 4) * np.inf, "int8"), "512 of 512 weights are not finite"),
        (lambda: repack(quantize(draw(128, 4), "int8"), "panels"), "multiples of 4 x 16"),
    ],
)
def test_what_can_not_be_done_is_said(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


# --- The weight's own dimensions -----------------------------------------------------------------

SHAPES = {
    "q": ((3, 64, 4, 8), MatrixDims(1, 2), (3, 32, 64)),
    "kv": ((64, 2, 4, 8), MatrixDims(1, 3), (64, 64)),
    "gate_up": ((5, 64, 2, 16), MatrixDims(1, 2), (5, 32, 64)),
    "o": ((4, 8, 48), MatrixDims(2, 1), (48, 32)),
    "down": ((2, 5, 32, 16), MatrixDims(), (2, 5, 16, 32)),
    "output layer": ((96, 64), MatrixDims(1, 1, outputs_first=True), (96, 64)),
}
"""Shape, dimensions, and what is stored: [..., N, K]."""


@pytest.mark.parametrize("packing", ["canonical", "panels"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_weight_keeps_its_shape(name, packing):
    """And its blocks lie along what a product sums over: each is rounded by itself."""
    shape, dims, stored = SHAPES[name]
    w = draw(*shape)
    q = repack(quantize(w, "int8", dims=dims, block_size=16), packing)
    assert q.shape == shape
    assert q.values.shape == stored
    back = np.asarray(dequantize(q))
    assert back.shape == shape
    stack, inputs, outputs = dims.split(shape)
    first, last = (outputs, inputs) if dims.outputs_first else (inputs, outputs)
    matrix = w.reshape(*stack, np.prod(first), np.prod(last))
    matrix = matrix if dims.outputs_first else matrix.swapaxes(-1, -2)
    blocks = matrix.reshape(*matrix.shape[:-1], -1, 16)
    largest = np.abs(blocks).max(-1, keepdims=True)
    tried = np.stack([np.round(blocks / largest * n) * largest / n for n in range(120, 128)])
    best = ((tried - blocks) ** 2).sum(-1).argmin(0)
    by_hand = np.take_along_axis(tried, best[None, ..., None], 0)[0]
    by_hand = by_hand.reshape(matrix.shape)
    by_hand = by_hand if dims.outputs_first else by_hand.swapaxes(-1, -2)
    np.testing.assert_allclose(back, by_hand.reshape(shape), rtol=1e-5, atol=1e-6)


def test_a_scan_over_layers_sees_one_layer_s_shape():
    shape, dims, _ = SHAPES["q"]
    q = repack(quantize(draw(*shape), "int4", dims=dims, block_size=32), "panels")

    def layer(_, weight):
        assert weight.shape == shape[1:]
        return None, dequantize(weight)

    np.testing.assert_array_equal(jax.lax.scan(layer, None, q)[1], dequantize(q))
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), q)
    assert twice.shape == (6, *shape[1:])
    assert jax.eval_shape(lambda q: q, q).shape == shape


def test_a_part_of_the_outputs_has_no_shape():
    q = quantize(draw(64, 4, 8), "int8", dims=MatrixDims(1, 2), block_size=32)
    half = jax.tree.map(lambda a: a[..., :16, :], q)
    with pytest.raises(ValueError, match="slice or split only the dimensions that stack"):
        _ = half.shape


@pytest.mark.parametrize(("format", "is_affine"), [*((f, False) for f in SCALED), ("int4", True)])
@pytest.mark.parametrize("packing", ["canonical", "panels", "split_128"])
def test_rows_of_an_embedding_table(format, is_affine, packing):
    dims = MatrixDims(1, 1, outputs_first=True)
    q = quantize(draw(96, 128), format, dims=dims, block_size=32, is_affine=is_affine)
    q = repack(q, packing)
    ids = np.array([[5, 0, 95], [17, 17, 32]])
    np.testing.assert_array_equal(take_outputs(q, ids), np.asarray(dequantize(q))[ids])


@pytest.mark.parametrize(("format", "is_affine"), [*((f, False) for f in SCALED), ("int4", True)])
def test_a_checkpoint_keeps_it(format, is_affine, tmp_path):
    dims = MatrixDims(1, 2)
    q = quantize(draw(2, 64, 4, 8), format, dims=dims, block_size=32, is_affine=is_affine)
    q = repack(q, "panels")
    tree = {"layer": {"q": q, "scale": jnp.ones(3)}}
    ocp.save(tmp_path / "it", tree)
    restored = ocp.load(tmp_path / "it", jax.eval_shape(lambda: tree))
    assert isinstance(restored["layer"]["q"], QTensor)
    assert restored["layer"]["q"].shape == (2, 64, 4, 8)
    np.testing.assert_array_equal(dequantize(restored["layer"]["q"]), dequantize(q))


# --- What targets read ---------------------------------------------------------------------------

CPU = Target("cpu")


@pytest.mark.parametrize("target", [CPU, A100, H100, Target("rocm")], ids=str)
@pytest.mark.parametrize("format", SCALED)
@pytest.mark.parametrize("num_inputs", [576, 1536, 128, 48, 100])
@pytest.mark.thinned(4)
def test_what_is_called_quantizable_can_be_multiplied(format, num_inputs, target):
    """By the kernels' own judgment; SmolLM2-135M's width, 576, has blocks of 64 at most."""
    reason = quantizable_reason((num_inputs, 64), format, target)
    block_size = choose_block_size(num_inputs, format, target)
    assert (reason is None) == (block_size is not None)
    if reason is not None:
        assert f"{num_inputs} inputs" in reason
        return
    assert num_inputs % block_size == 0
    weight = to_format(jnp.ones((1, num_inputs, 64)), name_of(format), target)
    assert weight.packing == preferred_packing(format, target)
    x, sizes = jnp.ones((4, num_inputs)), jnp.array([4])
    if target == CPU:  # scales of 8 bits, rounded up: 127 steps need not be the largest weight
        np.testing.assert_allclose(grouped_matmul(x, weight, sizes), num_inputs, rtol=2**-7)
        return
    reasons = [pallas_triton_quantized.unsupported_reason(x, weight, target)]
    if target == H100:
        x = x.astype(jnp.bfloat16)
        reasons.append(pallas_mosaic_quantized.unsupported_reason(x, weight, target=target))
    assert None in reasons


def name_of(format):
    return next(name for name, value in QUANTIZED.items() if value == format)


@pytest.mark.parametrize(
    ("target", "num_inputs", "block_sizes"),
    [(CPU, 576, (32, 32)), (CPU, 48, (16, 16)), (A100, 1024, (128, 128)), (A100, 576, (64, None))],
)
def test_blocks_are_as_large_as_they_may_be(target, num_inputs, block_sizes):
    found = tuple(choose_block_size(num_inputs, format, target) for format in ("int8", "int4"))
    assert found == block_sizes


@pytest.mark.skipif(not native.is_available(), reason="no native library")
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("format", "is_affine"), [*((f, False) for f in SCALED), ("int4", True)])
@pytest.mark.parametrize(
    ("shape", "dims", "block_size"),
    [
        ((3, 64, 48), MatrixDims(), 32),
        ((48, 128), MatrixDims(1, 1, outputs_first=True), 8),
        ((2, 128, 2, 24), MatrixDims(1, 2), 128),
    ],
)
@pytest.mark.thinned(4)
def test_native_rounding_is_as_good_in_every_block(
    shape, dims, block_size, format, is_affine, scale_dtype, isa
):
    """It may take another of two scales that are as good; a scale's last bit counts, too."""
    w = draw(*shape) * np.exp(draw(*shape, seed=1) * 3)
    w.reshape(-1)[:300] = 0
    of_blocks = {"block_size": block_size, "scale_dtype": scale_dtype, "is_affine": is_affine}
    plain = quantize(w, format, dims=dims, **of_blocks)
    expected = repack(plain, "panels")
    errors, sizes = [], []
    for q in (expected, _native(w, plain)):
        assert jax.tree.map(jnp.shape, q) == jax.tree.map(jnp.shape, expected)
        assert (q.shape, q.scales.dtype) == (w.shape, jnp.dtype(scale_dtype))
        for found, of in ((errors, np.asarray(dequantize(q), np.float64) - w), (sizes, w)):
            matrices = of.reshape(-1, *q.matrix_shape[:: -1 if dims.outputs_first else 1])
            if dims.outputs_first:
                matrices = matrices.swapaxes(1, 2)
            blocks = matrices.reshape(len(matrices), -1, block_size, matrices.shape[-1])
            found.append(np.square(blocks).sum(2))
    # A bit of a scale moves the error of a weight by 1e-7 of its size times the error.
    for error in errors[1:]:
        assert (np.abs(error - errors[0]) <= 1e-4 * errors[0] + 1e-6 * sizes[0]).all()


def _native(w: np.ndarray, plain: QTensor) -> QTensor:
    return quantize_panels(
        jnp.asarray(w),
        plain.format,
        dims=MatrixDims(len(plain.inputs), len(plain.outputs), plain.outputs_first),
        block_size=plain.block_size,
        scale_dtype=str(plain.scales.dtype),
        is_affine=plain.offsets is not None,
    )


@pytest.mark.skipif(not native.is_available(), reason="no native library")
def test_native_rounding_refuses_what_is_not_finite():
    w = jnp.ones((32, 16)).at[3, 4].set(jnp.nan)
    with pytest.raises(ValueError, match="1 of 512 weights are not finite"):
        to_format(w, "int8", CPU)


@pytest.mark.skipif(not native.is_available(), reason="no native library")
def test_outputs_that_fill_no_panel_stay_floats():
    reason = quantizable_reason((64, 3, 8), "int8", CPU, dims=MatrixDims(1, 2))
    assert reason is not None
    assert "a multiple of 16 outputs on cpu" in reason
    with pytest.raises(ValueError, match="leave it in float32 or bfloat16"):
        to_format(jnp.ones((64, 3, 8)), "int8", CPU, dims=MatrixDims(1, 2))


def test_plain_formats_are_arrays():
    w = draw(64, 16)
    np.testing.assert_array_equal(to_format(jnp.asarray(w), "float32", CPU), w)
    np.testing.assert_array_equal(to_format(w, "bfloat16", A100), w.astype(ml_dtypes.bfloat16))
