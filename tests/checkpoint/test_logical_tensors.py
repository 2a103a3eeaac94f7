"""Tensors as the model means them: decoded in pieces, each source used once, nothing infinite."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from checkpoint.logical_tensors import LogicalTensors
from configs.checks import UserError
from formats.block_floats import decode_fp8, decode_mxfp4, encode_fp8, encode_mxfp4
from formats.safetensors.reader import open_tensors
from formats.safetensors.writer import TensorWriter

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def logical(folder, arrays, quantization) -> LogicalTensors:
    plan = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    with TensorWriter(folder, plan) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return LogicalTensors(open_tensors(folder), quantization)


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def fp8_arrays(power_of_two=False):
    values, scales = encode_fp8(normal(300, 200), (128, 128), power_of_two=power_of_two)
    return {"l.weight": values, "l.weight_scale_inv": scales, "norm": normal(5)}


def mxfp4_arrays():
    blocks, scales = encode_mxfp4(normal(3, 10, 64))
    return {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales, "norm": normal(5)}


@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_weight_and_scale_are_one_tensor(tmp_path, power_of_two):
    arrays = fp8_arrays(power_of_two)
    tensors = logical(tmp_path, arrays, FP8)
    assert tensors.shapes == {"norm": (5,), "l.weight": (300, 200)}
    assert tensors.sources("l.weight") == ("l.weight", "l.weight_scale_inv")
    assert tensors.file("l.weight") == tmp_path / "model.safetensors"
    whole = decode_fp8(arrays["l.weight"], arrays["l.weight_scale_inv"], (128, 128))
    np.testing.assert_array_equal(tensors.read("l.weight"), whole)
    np.testing.assert_array_equal(tensors.read_rows("l.weight", 100, 260), whole[100:260])
    np.testing.assert_array_equal(tensors.read("norm"), arrays["norm"])
    low = tensors.read("l.weight", ml_dtypes.bfloat16)
    np.testing.assert_array_equal(low, whole.astype(ml_dtypes.bfloat16))


def test_mxfp4_experts_are_presented_as_transformers_holds_them(tmp_path):
    arrays = mxfp4_arrays()
    tensors = logical(tmp_path, arrays, MXFP4)
    assert tensors.shapes == {"norm": (5,), "e.gate_up_proj": (3, 64, 10)}
    assert tensors.sources("e.gate_up_proj") == ("e.gate_up_proj_blocks", "e.gate_up_proj_scales")
    assert tensors.sources("norm") == ("norm",)
    decoded = decode_mxfp4(arrays["e.gate_up_proj_blocks"], arrays["e.gate_up_proj_scales"])
    whole = decoded.swapaxes(1, 2)
    np.testing.assert_array_equal(tensors.read("e.gate_up_proj"), whole)
    np.testing.assert_array_equal(tensors.read_rows("e.gate_up_proj", 1, 3), whole[1:3])


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
def test_pieces_of_any_size_make_the_same_tensor(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("checkpoint.logical_tensors._CHUNK", chunk)
    fp8, mxfp4 = fp8_arrays(), mxfp4_arrays()
    whole = decode_fp8(fp8["l.weight"], fp8["l.weight_scale_inv"], (128, 128))
    tensors = logical(tmp_path / "fp8", fp8, FP8)
    np.testing.assert_array_equal(tensors.read("l.weight"), whole)
    tensors = logical(tmp_path / "mxfp4", mxfp4, MXFP4)
    whole = decode_mxfp4(mxfp4["e.gate_up_proj_blocks"], mxfp4["e.gate_up_proj_scales"])
    np.testing.assert_array_equal(tensors.read("e.gate_up_proj"), whole.swapaxes(1, 2))


def test_unquantised_tensors_come_in_the_dtype_asked(tmp_path):
    arrays = {"w": normal(7, 3).astype(ml_dtypes.bfloat16), "ids": np.arange(4), "s": np.array(2.5)}
    tensors = logical(tmp_path, arrays, None)
    assert tensors.read("w", ml_dtypes.bfloat16).tobytes() == arrays["w"].tobytes()
    np.testing.assert_array_equal(tensors.read("w"), arrays["w"].astype(np.float32))
    assert tensors.read("w").dtype == np.float32
    np.testing.assert_array_equal(tensors.read("ids", np.int64), arrays["ids"])
    assert (tensors.read("s").shape, tensors.read("s").dtype) == ((), np.float32)
    with pytest.raises(AssertionError, match="has fractions"):
        tensors.read("w", np.int32)


def test_decoding_needs_little_beside_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoint.logical_tensors._CHUNK", 2**14)
    monkeypatch.setattr("formats.block_floats._CHUNK", 2**14)
    blocks, scales = encode_mxfp4(normal(8, 64, 1024))
    values, value_scales = encode_fp8(normal(1024, 512), (128, 128))
    mxfp4 = logical(tmp_path / "a", {"w_blocks": blocks, "w_scales": scales}, MXFP4)
    fp8 = logical(tmp_path / "b", {"w": values, "w_scale_inv": value_scales}, FP8)
    plain = logical(tmp_path / "c", {"w": normal(1024, 512).astype(np.float16)}, None)
    result = 4 * 8 * 64 * 1024
    for tensors in (mxfp4, fp8, plain):
        tracemalloc.start()
        assert tensors.read("w").nbytes == result
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # Pieces of 64 KB in float32, and an expert's packed bytes; a second copy would give 2.
        assert peak < 1.25 * result


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_and_counted(tmp_path, bad):
    weight = normal(6, 4)
    weight[2, 3] = weight[5, 0] = bad
    tensors = logical(tmp_path, {"good": normal(2), "w": weight}, None)
    assert tensors.read("good").shape == (2,)
    sentence = r"model.safetensors: tensor 'w' has 2 values that are NaN.*the first at \[2, 3\]"
    with pytest.raises(UserError, match=sentence):
        tensors.read("w")
    with pytest.raises(UserError, match=r"has 1 values.*the first at \[5, 0\]"):
        tensors.read_rows("w", 3, 6)
    assert tensors.read_rows("w", 3, 5).shape == (2, 4)


def test_a_number_beyond_the_dtype_asked_is_not_finite(tmp_path):
    tensors = logical(tmp_path, {"w": np.array([[1.0, 1e6]], np.float32)}, None)
    with pytest.raises(UserError, match=r"infinite as float16, the first at \[0, 1\]"):
        tensors.read("w", np.float16)


def test_a_scale_that_is_nan_is_refused(tmp_path):
    arrays = mxfp4_arrays()
    arrays["e.gate_up_proj_scales"][1, 4, 1] = 255
    with pytest.raises(UserError, match=r"has 32 values that are NaN.*first at \[1, 32, 4\]"):
        logical(tmp_path / "mxfp4", arrays, MXFP4).read("e.gate_up_proj")
    arrays = fp8_arrays(power_of_two=True)
    arrays["l.weight_scale_inv"].view(np.uint8)[2, 1] = 255
    with pytest.raises(UserError, match=rf"has {44 * 72} values.*first at \[256, 128\]"):
        logical(tmp_path / "fp8", arrays, FP8).read("l.weight")


COMPRESSED = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def nvfp4_arrays(rows=5, columns=64, seed=0):
    """Random codes and scales, and the weight that they stand for, entry by entry."""
    random = np.random.RandomState(seed)
    codes = random.randint(0, 16, (rows, columns))
    scales = random.uniform(0.1, 400, (rows, columns // 16)).astype(ml_dtypes.float8_e4m3fn)
    factor = np.float32(0.037)
    weight = np.array(
        [
            [E2M1[codes[i, j]] * float(scales[i, j // 16]) * float(factor) for j in range(columns)]
            for i in range(rows)
        ]
    )
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    return packed, scales, factor, weight


def modelopt_arrays(**changes):
    packed, scales, factor, _ = nvfp4_arrays()
    arrays = {
        "l.weight": packed,
        "l.weight_scale": scales,
        "l.weight_scale_2": np.array(factor),
        "l.input_scale": np.array(factor),
        "l.k_proj.k_scale": np.array(factor),
        "norm": normal(5),
    } | {name.replace("__", "."): array for name, array in changes.items()}
    return {name: array for name, array in arrays.items() if array is not None}


def test_nvfp4_of_modelopt(tmp_path):
    tensors = logical(tmp_path, modelopt_arrays(), MODELOPT)
    weight = nvfp4_arrays()[-1]
    assert tensors.shapes == {"l.weight": (5, 64), "norm": (5,)}
    assert tensors.sources("l.weight") == ("l.weight", "l.weight_scale", "l.weight_scale_2")
    np.testing.assert_allclose(tensors.read("l.weight"), weight, rtol=1e-6)
    np.testing.assert_allclose(tensors.read_rows("l.weight", 2, 4), weight[2:4], rtol=1e-6)


def test_nvfp4_of_compressed_tensors(tmp_path):
    """Its factor divides; the scales of activations are passed over."""
    packed, scales, factor, weight = nvfp4_arrays()
    one = np.array([1 / factor], np.float32)
    arrays = {
        "l.weight_packed": packed,
        "l.weight_scale": scales,
        "l.weight_global_scale": one,
        "l.input_global_scale": one,
        "norm": normal(5),
    }
    tensors = logical(tmp_path, arrays, COMPRESSED)
    assert tensors.shapes == {"l.weight": (5, 64), "norm": (5,)}
    np.testing.assert_allclose(tensors.read("l.weight"), weight, rtol=1e-6)


@pytest.mark.parametrize("quantization", [MODELOPT, COMPRESSED], ids=["modelopt", "compressed"])
def test_mxfp8(tmp_path, quantization):
    """float8 under a power of two of each 32 inputs, kept as its exponent plus 127."""
    values = normal(3, 64).astype(ml_dtypes.float8_e4m3fn)
    exponents = np.random.RandomState(1).randint(120, 134, (3, 2)).astype(np.uint8)
    arrays = {"l.weight": values, "l.weight_scale": exponents}
    tensors = logical(tmp_path, arrays, quantization)
    assert tensors.shapes == {"l.weight": (3, 64)}
    powers = np.repeat(2.0 ** (exponents.astype(int) - 127), 32, axis=1)
    np.testing.assert_array_equal(tensors.read("l.weight"), values.astype(np.float32) * powers)


def test_float8_of_modelopt_has_one_scale(tmp_path):
    values = normal(3, 64).astype(ml_dtypes.float8_e4m3fn)
    arrays = {"l.weight": values, "l.weight_scale": np.array(0.25, np.float32)}
    found = logical(tmp_path, arrays, MODELOPT).read("l.weight")
    np.testing.assert_array_equal(found, values.astype(np.float32) / 4)


def fp8_with(**changes):
    arrays = fp8_arrays() | {name.replace("__", "."): array for name, array in changes.items()}
    return {name: array for name, array in arrays.items() if array is not None}


def mxfp4_with(**changes):
    arrays = mxfp4_arrays() | {f"e.{name}": array for name, array in changes.items()}
    return {name: array for name, array in arrays.items() if array is not None}


U8 = np.uint8
REFUSED = {
    "gptq": ({"x": normal(2)}, {"quant_method": "gptq"}, "'gptq'.*fp8 .float8 blocks. or mxfp4"),
    "no method": ({"x": normal(2)}, {}, "quantization_config is {}"),
    "a list": ({"x": normal(2)}, ["fp8"], r"quantization_config is \['fp8'\]"),
    "method is a list": ({"x": normal(2)}, {"quant_method": ["fp8"]}, "quant_method"),
    "no block": (fp8_arrays(), {"quant_method": "fp8"}, "weight_block_size is None"),
    "block of 0": (fp8_arrays(), FP8 | {"weight_block_size": [0, 128]}, r"is \[0, 128\]"),
    "block of truth": (fp8_arrays(), FP8 | {"weight_block_size": [True, 1]}, "whole numbers"),
    "other fp8": (fp8_arrays(), FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'; only e4m3"),
    "static": (fp8_arrays(), FP8 | {"activation_scheme": "static"}, "only dynamic"),
    "fp8 without config": (fp8_arrays(), None, "'l.weight' is float8_e4m3fn, which needs scales"),
    "fp8 in mxfp4": (fp8_arrays(), MXFP4, "'l.weight' is float8_e4m3fn, which needs scales"),
    "weight without scale": (
        fp8_with(l__weight_scale_inv=None),
        FP8,
        "'l.weight' has no scales: 'l.weight_scale_inv' is missing",
    ),
    "scale without weight": (fp8_with(l__weight=None), FP8, "'l.weight' is missing"),
    "scale of a plain weight": (fp8_with(l__weight=normal(300, 200)), FP8, "'l.weight' is float32"),
    "scales of another shape": (
        fp8_with(l__weight_scale_inv=normal(2, 3)),
        FP8,
        r"\[300, 200\], in blocks of \[128, 128\], needs .* \[3, 2\].* is float32 \[2, 3\]",
    ),
    "scales of another dtype": (fp8_with(l__weight_scale_inv=np.ones((3, 2))), FP8, "is float64"),
    "fp8 vector": (
        fp8_with(norm=np.ones(5, ml_dtypes.float8_e4m3fn), norm_scale_inv=normal(1)),
        FP8,
        "two dims or more",
    ),
    "nvfp4 without scales": (
        modelopt_arrays(l__weight_scale=None),
        MODELOPT,
        r"'l.weight' of 4 bits, \[5, 32\], needs 'l.weight_scale'",
    ),
    "nvfp4 without a factor": (modelopt_arrays(l__weight_scale_2=None), MODELOPT, "one number"),
    "nvfp4 in other blocks": (
        modelopt_arrays(l__weight_scale=normal(5, 3).astype(ml_dtypes.float8_e4m3fn)),
        MODELOPT,
        "of 4 bits",
    ),
    "float8 with scales of rows": (
        {"l.weight": normal(3, 64).astype(ml_dtypes.float8_e4m3fn), "l.weight_scale": normal(3, 1)},
        MODELOPT,
        "one number, or a power of two of each 32 inputs",
    ),
    "blocks without scales": (mxfp4_with(gate_up_proj_scales=None), MXFP4, "has no scales"),
    "scales without blocks": (
        mxfp4_with(gate_up_proj_blocks=None),
        MXFP4,
        "is the scale of 'e.gate_up_proj_blocks', which is missing",
    ),
    "packed and plain": (mxfp4_with(gate_up_proj=normal(3, 64, 10)), MXFP4, "same tensor twice"),
    "blocks of 8": (
        mxfp4_with(gate_up_proj_blocks=np.ones((3, 10, 2, 8), U8)),
        MXFP4,
        r"is uint8 \[3, 10, 2, 8\], and must be U8 \[experts, rows, groups, 16\]",
    ),
    "blocks of one expert": (
        mxfp4_with(gate_up_proj_blocks=np.ones((10, 2, 16), U8)),
        MXFP4,
        "must be U8",
    ),
    "scales of other experts": (
        mxfp4_with(gate_up_proj_scales=np.ones((2, 10, 2), U8)),
        MXFP4,
        r"needs scales of U8 \[3, 10, 2\].* is uint8 \[2, 10, 2\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_refused(tmp_path, case):
    arrays, quantization, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence):
        logical(tmp_path, arrays, quantization)
