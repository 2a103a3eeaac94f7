"""Checkpoints with packed weights, as they are released: read exactly, and written again.

What the scales mean is written out here once more, value by value, from the formats' descriptions:
formats/block_floats.py is not asked.
"""

import dataclasses
import functools
import importlib.util
import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from checkpoint import huggingface
from checkpoint.export_dtype import choose_storage
from checkpoint.families import FAMILIES
from configs.checks import UserError
from formats.block_floats import encode_fp8
from formats.safetensors.reader import open_tensors
from formats.safetensors.writer import TensorWriter
from infer.convert import Conversion, convert
from infer.logits import full_logits
from infer.sources import Source, open_source
from infer.verify import transformers_logits
from tests.checkpoint.cases import read_case
from tests.checkpoint.parity.weights import draw

BLOCK = 16
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
FP4_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]

TOKENS = list(range(1, 33))

Arrays = dict[str, np.ndarray]


def write(folder: Path, config: dict, arrays: Arrays) -> Path:
    plan = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    with TensorWriter(folder, plan) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_linear(name: str) -> bool:
    """Whether DeepSeek ships it in float8: every projection but router, embedding and output."""
    module = name.removesuffix(".weight").split(".")[-1]
    return module.endswith(("_proj", "_proj_with_mqa")) or module in ("wq_b", "wk")


def fp8_decoded(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    rows, columns = values.shape
    spread = np.kron(scales.astype(np.float32), np.ones((BLOCK, BLOCK), np.float32))
    return values.astype(np.float32) * spread[:rows, :columns]


def fp8_case(case: str, scale_dtype) -> tuple[dict, Arrays, Arrays]:
    """(config.json, the files' tensors, the same decoded)."""
    config, shapes, _, _ = read_case(case)
    power_of_two = scale_dtype != np.float32
    config |= {"quantization_config": FP8 | ({"scale_fmt": "ue8m0"} if power_of_two else {})}
    stored, decoded = {}, {}
    for name, shape in shapes.items():
        weight = draw(name, tuple(shape))
        if is_linear(name) and "weights_proj" not in name:
            values, scales = encode_fp8(weight, (BLOCK, BLOCK), power_of_two=power_of_two)
            values[::BLOCK, ::BLOCK] = 448  # the largest, by which a block's scale is known again
            stored |= {name: values, f"{name}_scale_inv": scales.astype(scale_dtype)}
            decoded[name] = fp8_decoded(values, scales)
        else:
            kept = "e_score_correction_bias" in name
            stored[name] = weight if kept else weight.astype(ml_dtypes.bfloat16)
            decoded[name] = stored[name].astype(np.float32)
    return config, stored, decoded


def mxfp4_decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [E, K, N] of blocks [E, N, G, 16] and scales [E, N, G]."""
    experts, outputs, groups, pairs = blocks.shape
    decoded = np.zeros((experts, groups, pairs, 2, outputs), np.float32)
    for half in (0, 1):  # the low one is the first
        code = blocks >> 4 * half & 15
        value = np.choose(code & 7, FP4_VALUES) * np.where(code & 8, -1.0, 1.0)
        value *= 2.0 ** (scales[..., None].astype(int) - 127)
        decoded[:, :, :, half] = value.transpose(0, 2, 3, 1)
    return decoded.reshape(experts, groups * pairs * 2, outputs)


def mxfp4_case() -> tuple[dict, Arrays, Arrays]:
    """gpt-oss, whose experts are 64 wide: 48 is no multiple of 32. One of a group's codes is 6 or
    4, so that its scale is the one that an encoder chooses.
    """
    config, shapes, _, _ = read_case("gpt_oss")
    config |= {"intermediate_size": 64, "quantization_config": MXFP4}
    rng, stored, decoded = np.random.default_rng(0), {}, {}
    wider = {48: 64, 96: 128}
    for name, shape in shapes.items():
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            experts, inputs, outputs = (wider.get(size, size) for size in shape)
            blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
            blocks[..., 0] |= 0x06
            scales = rng.integers(120, 125, blocks.shape[:-1]).astype(np.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            decoded[name] = mxfp4_decoded(blocks, scales)
        else:
            is_expert = "experts" in name
            shape = tuple(wider.get(size, size) if is_expert else size for size in shape)
            stored[name] = draw(name, shape).astype(ml_dtypes.bfloat16)
            decoded[name] = stored[name].astype(np.float32)
    return config, stored, decoded


@functools.cache
def case_of(name: str) -> tuple[dict, Arrays, Arrays]:
    if name == "mxfp4":
        return mxfp4_case()
    case = "deepseek_v32" if name == "v32" else "deepseek_v3"
    scale_dtype = np.float32 if name in ("fp8", "v32") else ml_dtypes.float8_e8m0fnu
    return fp8_case(case, scale_dtype)


def leaves(variables) -> dict[str, np.ndarray]:
    pairs = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in pairs}


def assert_equal(found, expected) -> None:
    found, expected = leaves(found), leaves(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def written(name: str, folder: Path) -> Source:
    config, stored, _ = case_of(name)
    return open_source(str(write(folder, config, stored)))


@pytest.mark.parametrize("name", ["fp8", "ue8m0", "v32", "mxfp4"])
def test_tensors_are_the_decoded_ones(name, tmp_path):
    _, stored, decoded = case_of(name)
    public = written(name, tmp_path).public
    assert public is not None
    assert set(public.tensors.shapes) == set(decoded)
    assert len(stored) > len(decoded)
    for tensor, array in decoded.items():
        np.testing.assert_array_equal(public.tensors.read(tensor), array, err_msg=tensor)


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_models_are_the_decoded_ones(name, tmp_path, monkeypatch):
    """Parameters, and so logits; also where tensors are read in pieces of a few rows."""
    config, _, decoded = case_of(name)
    source = written(name, tmp_path / "packed")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    model, expected = open_source(str(write(tmp_path / "plain", plain, decoded))).load()
    _, found = source.load()
    assert_equal(found, expected)
    if name == "fp8":
        logits = full_logits(model, expected, TOKENS)
        assert logits.std() > 0.1
        np.testing.assert_array_equal(full_logits(model, found, TOKENS), logits)
    monkeypatch.setattr("checkpoint.assemble.PIECE_BYTES", 1000)
    monkeypatch.setattr("checkpoint.logical_tensors._CHUNK", 100)
    assert_equal(source.load()[1], expected)


def test_scales_of_other_blocks_would_fail(tmp_path):
    config, stored, decoded = case_of("fp8")
    stored = dict(stored)
    name = "model.layers.0.self_attn.o_proj.weight"  # [64, 48]: 4 blocks by 3
    scales = stored[f"{name}_scale_inv"]
    assert scales.shape == (4, 3)
    stored[f"{name}_scale_inv"] = np.ascontiguousarray(scales[::-1])
    source = open_source(str(write(tmp_path, config, stored)))
    assert source.public is not None
    assert np.abs(source.public.tensors.read(name) - decoded[name]).max() > 0.01


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8", "float8"), ("ue8m0", "float8"), ("mxfp4", "mxfp4")]
)
def test_packed_in_packed_out_is_the_same_file(name, dtype, tmp_path):
    config, stored, decoded = case_of(name)
    conversion = Conversion(to="huggingface", dtype=dtype, max_shard_bytes=2**16)
    convert(written(name, tmp_path / "packed"), tmp_path / "again", conversion)
    after = open_tensors(tmp_path / "again")
    assert set(after.tensors) == set(stored)
    for tensor, array in stored.items():
        if array.dtype == ml_dtypes.float8_e8m0fnu:  # the same powers of two, as V3.1 ships them
            array = array.astype(np.float32)
        found = after.read(tensor)
        assert (found.dtype, found.tobytes()) == (array.dtype, array.tobytes()), tensor
    said = json.loads((tmp_path / "again" / "config.json").read_text())
    assert said["quantization_config"] == config["quantization_config"]
    assert said["dtype"] == said["torch_dtype"] == "bfloat16"
    public = open_source(str(tmp_path / "again")).public
    assert public is not None
    for tensor, array in decoded.items():
        np.testing.assert_array_equal(public.tensors.read(tensor), array, err_msg=tensor)


def test_plain_weights_are_rounded_to_float8_in_released_blocks(tmp_path):
    """Each to within half a step of three bits, of its own size or of the block's smallest."""
    config, shapes, _, _ = read_case("deepseek_v3")
    arrays = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
    source = open_source(str(write(tmp_path / "plain", config, arrays)))
    convert(source, tmp_path / "fp8", Conversion(to="huggingface", dtype="float8"))
    said = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert said == FP8 | {"weight_block_size": [128, 128]}
    files, packed = open_tensors(tmp_path / "fp8"), open_source(str(tmp_path / "fp8")).public
    assert packed is not None
    for name, array in arrays.items():
        is_packed = files.tensors[name].dtype == ml_dtypes.float8_e4m3fn
        assert is_packed == is_linear(name), name
        if is_packed:
            step = 2.0**-4 * np.abs(array) + 2.0**-10 * np.abs(array).max() / 448
            assert (np.abs(packed.tensors.read(name) - array) <= step * (1 + 1e-6)).all(), name
    assert files.tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == np.float32


def test_scales_come_back_whatever_their_last_bit():
    """448 scale is rounded, and the division by 448 may end one place beside the scale; 4,000
    scales and blocks of 448 and 1, which tells the scale.
    """
    scales = np.random.default_rng(0).uniform(0.5, 2, 4_000).astype(np.float32)
    weight_NK = np.stack([448 * scales, scales], axis=1)
    values, found = encode_fp8(weight_NK, (1, 2))
    np.testing.assert_array_equal(found[:, 0], scales)
    np.testing.assert_array_equal(values.astype(np.float32), [[448, 1]] * len(scales))
    assert (448 * scales / np.float32(448) != scales).mean() > 0.01  # or this tests nothing


REFUSED = [
    (
        "llama",
        "float8",
        r"llama is not released in float8.*for deepseek_v3, .*, glm_moe_dsa; export",
    ),
    ("deepseek_v2", "float8", r"deepseek_v2 is not released in float8"),
    ("gpt_oss", "float8", r"gpt_oss is not released in float8"),
    ("deepseek_v3", "mxfp4", r"deepseek_v3 is not released in mxfp4.*for gpt_oss; export"),
    ("gpt_oss", "mxfp4", r"down_proj has 48 inputs, which mxfp4 needs in groups of 32"),
]


@pytest.mark.parametrize(("case", "dtype", "sentence"), REFUSED)
def test_a_family_is_packed_as_it_is_released_or_not_at_all(case, dtype, sentence, tmp_path):
    config, shapes, _, _ = read_case(case)
    arrays = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
    source = open_source(str(write(tmp_path / "plain", config, arrays)))
    with pytest.raises(UserError, match=sentence):
        convert(source, tmp_path / "out", Conversion(to="huggingface", dtype=dtype))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("form", "name"), [("orbax", "out"), ("gguf", "out.gguf")])
def test_other_forms_are_not_packed(form, name, tmp_path):
    source = written("fp8", tmp_path / "packed")
    with pytest.raises(UserError, match=rf"float8 is a form of huggingface .* not of {form}"):
        convert(source, tmp_path / name, Conversion(to=form, dtype="float8"))


def test_weights_that_are_not_finite_are_not_packed(tmp_path):
    source = written("fp8", tmp_path / "packed")
    _, variables = source.load()
    checkpoint = source.public
    assert checkpoint is not None
    q_down = np.array(variables["params"]["prefix_0"]["attention"]["q_down"])
    q_down[3, 4] = np.nan
    variables["params"]["prefix_0"]["attention"]["q_down"] = q_down
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_a_proj\.weight has values"):
        huggingface.export(
            tmp_path / "out",
            checkpoint.family,
            checkpoint.config,
            variables,
            dtype="float8",
            extra={},
        )


def test_every_packed_name_is_in_the_table():
    """The expression of a family holds what `is_linear` says, written by another hand."""
    for case in ("deepseek_v3", "deepseek_v32"):
        config, shapes, _, _ = read_case(case)
        family = next(f for f in FAMILIES if f.model_type == config["model_type"])
        storage = choose_storage(family, "float8")
        assert storage.packed is not None
        for name in shapes:
            wanted = is_linear(name) and not re.search("weights_proj", name)
            assert storage.packed.holds(name) == wanted, name
        assert not storage.packed.holds("model.layers.2.eh_proj.weight")
        assert dataclasses.replace(storage, packed=None).settings().keys() == {
            "dtype",
            "torch_dtype",
        }


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "accelerate")),
    reason="transformers or accelerate, by which it reads float8, is missing: pip install both",
)
@pytest.mark.parametrize(
    ("case", "dtype"), [("deepseek_v3", "float8"), ("deepseek_v32", "float8"), ("mxfp4", "mxfp4")]
)
def test_transformers_reads_what_was_packed(case, dtype, tmp_path):
    """It decodes to float32 too: only the order of sums is left (measured: 5e-6)."""
    if case == "mxfp4":
        source = written("mxfp4", tmp_path / "source")
    else:
        config, shapes, _, _ = read_case(case)
        arrays = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
        source = open_source(str(write(tmp_path / "source", config, arrays)))
    convert(source, tmp_path / "packed", Conversion(to="huggingface", dtype=dtype))
    ours = full_logits(*open_source(str(tmp_path / "packed")).load(), TOKENS)
    theirs = transformers_logits(tmp_path / "packed", TOKENS)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
