"""DeepSeek-V4 beyond its logits: in few bits, released names, damaged tables, what is not built.

On a mesh it is read in tests/checkpoint/test_latest_families.py.
"""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoint import huggingface
from configs.architecture import ModelConfig
from configs.checks import UserError
from configs.family_models import deepseek_v4_nano
from infer.logits import full_logits
from infer.sources import open_source
from infer.weights import converted, converter
from kernels.quantize import QTensor, dequantize
from model.transformer import Transformer
from tests.checkpoint.cases import read_case, write_case
from tests.checkpoint.test_parity import loaded
from tests.probes import drawn, inputs

CASE = "deepseek_v4"


def wide() -> ModelConfig:
    """One layer of widths that kernels of few bits have blocks for."""
    nano = deepseek_v4_nano()
    sparse = dataclasses.replace(nano.pattern[1].attention, output_rank=128)
    layer = dataclasses.replace(nano.pattern[1], attention=sparse)
    return dataclasses.replace(nano, pattern=(layer,), num_layers=1, vocab_size=256)


@pytest.mark.slow
def test_int8_computes_what_its_weights_say():
    model, variables = Transformer(wide()), drawn(wide())
    given = jax.tree.map(lambda x: x, variables)  # emptied as it is converted
    held = converted(given, converter(model, "int8"))

    def is_rounded(x):
        return isinstance(x, QTensor)

    leaves = jax.tree.leaves_with_path(held, is_leaf=is_rounded)
    rounded = {path[-1].key for path, x in leaves if is_rounded(x)}
    assert {"q_down", "q", "kv", "o_down", "o_up", "gate_up", "down"} <= rounded
    floats = jax.tree.map(lambda x: dequantize(x) if is_rounded(x) else x, held, is_leaf=is_rounded)
    tokens = inputs(wide(), 40)[0][0].tolist()
    found, expected, exact = (full_logits(model, v, tokens) for v in (held, floats, variables))
    # Kernels hold x to 2^-16 of its block's largest; int8 itself changes a hundred times as much.
    np.testing.assert_allclose(found, expected, atol=1e-3 * expected.std())
    assert np.abs(expected - exact).max() > 0.01 * exact.std()


def test_released_names_are_read(tmp_path):
    """Without "model." before them, and with modules that predict further, which are left out."""
    write_case(CASE, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    released = {
        name.removeprefix("model.")
        .replace("embed_tokens.", "embed.")
        .replace("hc_head.hc_", "hc_head_"): x
        for name, x in tensors.items()
    }
    released["mtp.0.e_proj.weight"] = np.ones((2, 2), np.float32)
    save_file(released, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    _, variables = source.load()
    jax.tree.map(np.testing.assert_array_equal, variables, loaded(CASE)[1])
    assert source.public is not None
    assert "multi-token modules in 1 tensors" in " ".join(source.public.left_out())


def released(tensors: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Tensors as released, experts in pairs of 4 bits and attention's projections in float8, each
    with powers of two; and what they stand for."""
    stored, meant = {}, dict(tensors)
    random = np.random.RandomState(0)
    for name, x in tensors.items():
        stem = name.removesuffix(".weight")
        if ".experts." in name:
            codes = random.randint(0, 16, x.shape).astype(np.uint8)
            powers = random.randint(-4, 1, (x.shape[0], x.shape[1] // 32))
            floats = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
            stored[name] = (codes[:, ::2] | codes[:, 1::2] << 4).view(np.int8)
            scales = 2.0**powers
        elif ".attn.w" in name and x.ndim == 2:
            stored[name] = x.astype(ml_dtypes.float8_e4m3fn)
            floats, scales = stored[name].astype(np.float32), np.full((1, 1), 0.5)
        else:
            stored[name] = x
            continue
        stored[f"{stem}.scale"] = scales.astype(ml_dtypes.float8_e8m0fnu)
        wide = np.repeat(scales, x.shape[1] // scales.shape[1], axis=1)
        meant[name] = floats * wide.astype(np.float32)
    return stored, meant


QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def test_released_weights_of_4_and_8_bits_are_read(tmp_path):
    """The first of a pair is in the low half, 32 inputs share a power of two."""
    folders = tmp_path / "released", tmp_path / "floats"
    for folder in folders:
        write_case(CASE, folder)
    stored, meant = released(load_file(folders[0] / "model.safetensors"))
    assert {x.dtype.name for x in stored.values()} >= {"int8", "float8_e4m3fn", "float8_e8m0fnu"}
    for folder, tensors in zip(folders, (stored, meant), strict=True):
        save_file(tensors, folder / "model.safetensors")
    config = json.loads((folders[0] / "config.json").read_text())
    config |= {"quantization_config": QUANTIZATION, "expert_dtype": "fp4"}
    (folders[0] / "config.json").write_text(json.dumps(config))
    found, expected = (open_source(str(folder)).load()[1] for folder in folders)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "change", [lambda scale: None, lambda scale: scale[:-1], lambda scale: scale.astype(np.float32)]
)
def test_pairs_without_scales_of_their_form_are_refused(change, tmp_path):
    write_case(CASE, tmp_path)
    tensors, _ = released(load_file(tmp_path / "model.safetensors"))
    name = next(name for name in tensors if name.endswith("experts.0.w1.scale"))
    changed = change(tensors.pop(name))
    tensors |= {} if changed is None else {name: changed}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"quantization_config": QUANTIZATION}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"w1.weight' of 4 bits, .* needs \S+w1.scale"):
        open_source(str(tmp_path)).load()


def test_a_config_with_the_older_keys_means_the_same(tmp_path):
    """As its released files have them: ratios of layers, one RoPE for all that compress."""
    config, _, _, _ = read_case(CASE)
    rates = {"sliding_attention": 0, **config.pop("compress_rates")}
    kinds = config.pop("layer_types")
    rope = config.pop("rope_parameters")["compress"]
    theta, _ = rope.pop("rope_theta"), rope.pop("partial_rotary_factor")
    hashed = config.pop("mlp_layer_types").count("hash_moe")
    del config["partial_rotary_factor"]
    older = {
        "compress_ratios": [{0: 0, 4: 4, 8: 128}[rates[kind]] for kind in kinds],
        "compress_rate_hca": 8,
        "rope_scaling": {**rope, "type": rope.pop("rope_type")},
        "compress_rope_theta": theta,
        "num_hash_layers": hashed,
    }
    write_case(CASE, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | older))
    found = huggingface.open_checkpoint(tmp_path).config.pattern
    expected = loaded(CASE)[2].config.pattern
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.ffn == theirs.ffn
        assert mine.attention.compression == theirs.attention.compression
        assert mine.attention.rotary_dim == theirs.attention.rotary_dim
    # The older form has no factor on sines; the newer one has YaRN's, where it doesn't say.
    assert found[1].attention.rope_scaling.rotary_scale == 1.0
    assert expected[1].attention.rope_scaling.rotary_scale > 1.1


@pytest.mark.parametrize("wrong", [-1, 999])
def test_a_table_with_experts_that_are_not_there_is_refused(wrong, tmp_path):
    write_case(CASE, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("tid2eid"))
    tensors[name][3, 1] = wrong
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"tid2eid names the expert {wrong:g}, the model has 0 to"):
        open_source(str(tmp_path)).load()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layer_types": ["sliding_attention"]}, "layer_types="),
        ({"n_shared_experts": 2}, "n_shared_experts=2"),
        ({"hc_mult": 1}, "num_streams=1 must be at least 2"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"layer_types": None, "compress_ratios": [4, 4, 7, 4]}, "'7'"),
    ],
)
def test_what_is_not_built_is_refused(change, sentence, tmp_path):
    config, _, _, _ = read_case(CASE)
    write_case(CASE, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=sentence):
        huggingface.open_checkpoint(tmp_path)
