"""Gemma 4's GGUF beside what llama.cpp's loader of it asks for (src/models/gemma4.cpp in
llama-cpp-python 0.3.36), read off it by hand: names, shapes, keys that it does without, and what
it means then."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint import gguf
from checkpoint.config_reader import Settings
from checkpoint.gguf_config import config_from_gguf
from checkpoint.gguf_rope import turned_share
from checkpoint.public import find_family, lost_settings
from configs.architecture import ModelConfig
from configs.checks import UserError
from formats.gguf.reader import GGUFFile
from formats.gguf.writer import Tensor, write_gguf
from tests.checkpoint.test_gguf import built, placed

CASES = ("gemma4_text", "gemma4_text moe", "gemma4_text e2b", "gemma4_text e4b")
Shapes = dict[str, tuple[int, ...]]


def exported(case: str, tmp_path: Path) -> GGUFFile:
    family, config, variables = built(case)
    gguf.export(tmp_path / "it.gguf", family, config, variables, None, "F16")
    return GGUFFile(tmp_path / "it.gguf")


def read_config(metadata: dict[str, Any], shapes: Any, file: GGUFFile) -> ModelConfig:
    settings = Settings(config_from_gguf(metadata, shapes, file.read, "it"), "it")
    return find_family(settings).read_config(settings)


def by_layer(metadata: dict[str, Any], key: str) -> list[int]:
    value, count = metadata[f"gemma4.{key}"], metadata["gemma4.block_count"]
    return value if isinstance(value, list) else [value] * count


def asked_for(file: GGUFFile) -> Shapes:
    """All that the loader creates for this metadata, in numpy's order. Layers that share keys have
    none of attn_k, attn_k_norm and attn_v, whole layers no attn_v where values are keys."""
    m = {key.removeprefix("gemma4."): value for key, value in file.metadata.items()}
    d, vocab, count = m["embedding_length"], m["vocab_size"], m["block_count"]
    extra, experts = m["embedding_length_per_layer_input"], m.get("expert_count", 0)
    units = m.get("expert_feed_forward_length", 0)
    heads, groups = m["attention.head_count"], by_layer(file.metadata, "attention.head_count_kv")
    asked: Shapes = {
        "token_embd.weight": (vocab, d),
        "output_norm.weight": (d,),
        "rope_freqs.weight": (m["attention.key_length"] // 2,),
    }
    if extra:
        asked |= {
            "per_layer_token_embd.weight": (vocab, extra * count),
            "per_layer_model_proj.weight": (extra * count, d),
            "per_layer_proj_norm.weight": (extra,),
        }
    for i, has_window in enumerate(m["attention.sliding_window_pattern"]):
        width = m["attention.key_length_swa" if has_window else "attention.key_length"]
        wide = by_layer(file.metadata, "feed_forward_length")[i]
        layer: Shapes = {
            "attn_norm.weight": (d,),
            "attn_q.weight": (width * heads, d),
            "attn_output.weight": (d, width * heads),
            "attn_q_norm.weight": (width,),
            "post_attention_norm.weight": (d,),
            "layer_output_scale.weight": (1,),
            "ffn_norm.weight": (d,),
            "ffn_gate.weight": (wide, d),
            "ffn_up.weight": (wide, d),
            "ffn_down.weight": (d, wide),
            "post_ffw_norm.weight": (d,),
        }
        if i < count - m["attention.shared_kv_layers"]:
            layer["attn_k.weight"] = (width * groups[i], d)
            layer["attn_k_norm.weight"] = (width,)
            if has_window or f"blk.{i}.attn_v.weight" in file.shapes:
                layer["attn_v.weight"] = (width * groups[i], d)
        if experts:
            layer |= {
                "ffn_gate_inp.weight": (experts, d),
                "ffn_gate_inp.scale": (d,),
                "pre_ffw_norm_2.weight": (d,),
                "post_ffw_norm_1.weight": (d,),
                "post_ffw_norm_2.weight": (d,),
                "ffn_gate_exps.weight": (experts, units, d),
                "ffn_up_exps.weight": (experts, units, d),
                "ffn_down_exps.weight": (experts, d, units),
                "ffn_down_exps.scale": (experts,),
            }
        if extra:
            layer |= {
                "inp_gate.weight": (extra, d),
                "proj.weight": (d, extra),
                "post_norm.weight": (d,),
            }
        asked |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return asked


@pytest.mark.parametrize("case", CASES)
def test_the_loader_finds_what_it_asks_for(case: str, tmp_path: Path):
    file = exported(case, tmp_path)
    asked = asked_for(file)
    if case.endswith("e4b"):
        asked["output.weight"] = (256, 64)  # the embedding's place, where that is another's
    assert dict(file.shapes) == asked
    values_are_keys = case in ("gemma4_text", "gemma4_text moe")
    assert ("blk.2.attn_v.weight" not in file.shapes) == (values_are_keys or case.endswith("e2b"))


NEEDED = (
    "attention.sliding_window_pattern",
    "attention.sliding_window",
    "attention.layer_norm_rms_epsilon",
    "embedding_length_per_layer_input",
    "attention.key_length_swa",
    "attention.value_length_swa",
)
"""Keys without which it loads nothing."""


@pytest.mark.parametrize("case", CASES)
def test_the_loader_finds_its_keys(case: str, tmp_path: Path):
    """E2B's: wide layers by list; no bound of logits is 0, for no key is one of 30."""
    metadata = exported(case, tmp_path).metadata
    assert not [key for key in NEEDED if f"gemma4.{key}" not in metadata]
    assert isinstance(metadata["gemma4.attention.sliding_window_pattern"], list)
    sizes = {k: metadata[f"gemma4.{k}"] for k in ("rope.dimension_count", "attention.key_length")}
    assert set(sizes.values()) == {32}
    assert metadata["gemma4.rope.dimension_count_swa"] == 16
    if case.endswith("e2b"):
        assert metadata["gemma4.feed_forward_length"] == [96, 96, 192, 192]
        assert metadata["gemma4.attention.shared_kv_layers"] == 2
        assert metadata["gemma4.final_logit_softcapping"] == 0.0
    if case.endswith("moe"):
        assert metadata["gemma4.attention.head_count_kv"] == [2, 2, 1]
        assert metadata["gemma4.expert_used_count"] == 2


@pytest.mark.parametrize("case", ["gemma4_text", "gemma4_text e4b"])
def test_pairs_that_do_not_turn_are_slow(case: str, tmp_path: Path):
    """A quarter of the 16 pairs turns, or all of them; 1e30 is what the converter writes."""
    factors_C = exported(case, tmp_path).read("rope_freqs.weight")
    turned = 16 if case.endswith("e4b") else 4
    np.testing.assert_array_equal(factors_C[:turned], 1)
    np.testing.assert_array_equal(factors_C[turned:], np.float32(1e30))


def test_any_number_of_turning_pairs_comes_back():
    """As transformers counts them: int(share * width // 2)."""
    for width in range(4, 260, 2):
        for pairs in range(1, width // 2):
            assert int(turned_share(pairs, width) * width // 2) == pairs


def test_keys_that_no_layer_reads_are_left_out(tmp_path: Path):
    """The converter's files have those that released folders hold."""
    file, case = exported("gemma4_text e2b", tmp_path), "gemma4_text e2b"
    tensors: list[Tensor] = [
        (name, shape, lambda name=name: file.read(name)) for name, shape in file.shapes.items()
    ]
    for name in ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight"):
        held = file.read(f"blk.1.{name}")
        tensors.append((f"blk.3.{name}", held.shape, lambda held=held: held))
    write_gguf(tmp_path / "more.gguf", file.metadata, tensors, "F16")
    variables = built(case)[2]
    read = gguf.open_checkpoint(tmp_path / "more.gguf").load(placed(variables))
    np.testing.assert_array_equal(read["params"]["embedding"], variables["params"]["embedding"])


def test_a_key_left_out_means_what_llama_cpp_means(tmp_path: Path):
    """Logits bounded by 30, RoPE of base 10,000 in windows, no shared keys."""
    file = exported("gemma4_text", tmp_path)
    left_out = ("final_logit_softcapping", "rope.freq_base_swa", "attention.shared_kv_layers")
    metadata = {k: v for k, v in file.metadata.items() if k.split(".", 1)[1] not in left_out}
    read = read_config(metadata, file.shapes, file)
    lost = lost_settings(built("gemma4_text")[1], read)
    assert lost == ["logit_cap was 3.0, now 30.0"]


def _without_freqs(metadata: dict[str, Any], shapes: dict[str, Any]) -> None:
    del metadata, shapes["rope_freqs.weight"]


def _changed(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda metadata, _: metadata.update({f"gemma4.{key}": value})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_without_freqs, r"no rope_freqs\.weight, which tells how many pairs"),
        (_changed("attention.value_length_swa", 8), "value_length_swa=8 and heads of width 16"),
        (_changed("rope.dimension_count", 8), "dimension_count=8 and heads of width 32"),
        (_changed("attention.sliding_window_pattern", None), "for each of 5 layers"),
        (_changed("feed_forward_length", [96, 96, 96, 96, 192]), "and that or twice that in"),
        (_changed("attention.sliding_window_pattern", [True] * 5), "whatever it says: say so"),
        (_changed("rope.scaling.type", "yarn"), "but for Gemma and GLM"),
    ],
)
def test_what_is_no_gemma_4_is_told(change, sentence: str, tmp_path: Path):
    file = exported("gemma4_text e4b", tmp_path)
    metadata, shapes = dict(file.metadata), dict(file.shapes)
    change(metadata, shapes)
    with pytest.raises(UserError, match=sentence):
        read_config(metadata, shapes, file)


def test_values_in_some_whole_layers_are_told(tmp_path: Path):
    file = exported("gemma4_text e4b", tmp_path)
    metadata = file.metadata | {
        "gemma4.attention.sliding_window_pattern": [True, False, False, True, False]
    }
    shapes = {name: x for name, x in file.shapes.items() if name != "blk.1.attn_v.weight"}
    with pytest.raises(UserError, match=r"attn_v\.weight in some of its layers without windows"):
        config_from_gguf(metadata, shapes, file.read, "it")


@pytest.mark.parametrize("factors", [[1.0] * 15 + [2.0], [1e30] + [1.0] * 15])
def test_other_factors_are_told(factors: list[float], tmp_path: Path):
    file = exported("gemma4_text", tmp_path)
    with pytest.raises(UserError, match="expected 1 for the first pairs of a head and 1e"):
        config_from_gguf(file.metadata, file.shapes, lambda _: np.float32(factors), "it")
