"""A config.json that leaves keys out means what transformers' config class makes of it, and RoPE's
keys count in its order (recorded by parity/record_configs.py).
"""

import json
from typing import Any

import numpy as np
import pytest

from checkpoint.config_reader import Settings
from checkpoint.families import FAMILIES, config_sections
from checkpoint.families.base import Family
from checkpoint.gguf_config import config_from_gguf, config_to_gguf
from configs.architecture import ModelConfig
from configs.attention import AttentionConfig, LatentAttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, MoEConfig
from configs.rope import YarnConfig
from tests.checkpoint.cases import PARITY

RECORDED: dict[str, dict[str, Any]] = json.loads((PARITY / "configs" / "defaults.json").read_text())
ROPE = json.loads((PARITY / "configs" / "rope.json").read_text())
BY_NAME = {family.model_type: family for family in FAMILIES}

NEEDED = {
    "deepseek_v2": {"num_experts_per_tok": 3},
    "glm4_moe": {"head_dim": 128},
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "conv", "full_attention", "conv"],
    },
    "dots1": {"num_experts_per_tok": 3, "n_routed_experts": 8, "n_shared_experts": 1},
}
"""Values of keys that the class has none for; in GLM's class half of a head's width is odd."""


def whole(family: str) -> dict[str, Any]:
    """Every key that the class has a value for."""
    said = {key: value for key, value in RECORDED[family].items() if value is not None}
    return said | NEEDED.get(family, {})


def read(family: str, values: dict[str, Any], *, with_defaults: bool = True) -> ModelConfig:
    defaults = BY_NAME[family].defaults if with_defaults else {}
    return BY_NAME[family].read_config(Settings(values, "it", defaults))


def test_every_family_was_recorded():
    assert set(RECORDED) == set(BY_NAME)


@pytest.mark.parametrize("family", RECORDED)
def test_a_key_left_out_is_the_classs_default(family: str):
    said = whole(family)
    meant = read(family, said, with_defaults=False)
    for key in said:
        if key in NEEDED.get(family, {}):
            continue
        assert read(family, {k: v for k, v in said.items() if k != key}) == meant, key


@pytest.mark.parametrize("family", RECORDED)
def test_no_key_at_all_is_the_class_itself(family: str):
    """Nothing here has a default that the class has not."""
    assert read(family, NEEDED.get(family, {})) == read(family, whole(family), with_defaults=False)
    assert set(BY_NAME[family].defaults) <= set(RECORDED[family])


def test_a_wrong_default_would_be_seen():
    said = whole("deepseek_v3")
    left_out = {k: v for k, v in said.items() if k not in ("n_group", "topk_group")}
    without = read("deepseek_v3", left_out, with_defaults=False)
    assert without != read("deepseek_v3", said)


def router(config: ModelConfig) -> Any:
    ffn = config.pattern[-1].ffn
    assert isinstance(ffn, MoEConfig)
    return ffn.router


def attention(config: ModelConfig) -> Any:
    return config.pattern[0].attention


def test_null_is_not_left_out():
    """As the classes' __post_init__ have it."""
    latent = attention(read("deepseek_v3", {"q_lora_rank": None}))
    assert isinstance(latent, LatentAttentionConfig)
    assert (latent.query_rank, attention(read("deepseek_v3", {})).query_rank) == (None, 1536)
    heads = attention(read("mixtral", {"num_key_value_heads": None}))
    assert isinstance(heads, AttentionConfig)
    assert (heads.num_kv_heads, attention(read("mixtral", {})).num_kv_heads) == (32, 8)
    null = {"head_dim": None, "hidden_size": 2560}
    assert attention(read("gpt_oss", null)).head_dim == 2560 // 64
    assert attention(read("gpt_oss", {"hidden_size": 2560})).head_dim == 64


def test_another_name_of_a_key_counts_before_the_default():
    for family, name in (("mixtral", "num_experts"), ("qwen3_moe", "num_local_experts")):
        ffn = read(family, {name: 16}).pattern[0].ffn
        assert isinstance(ffn, MoEConfig)
        assert ffn.num_experts == 16


def test_released_v3_groups_its_experts_without_a_key():
    found = router(read("deepseek_v3", {}))
    assert (found.num_groups, found.top_groups) == (8, 4)


def test_v32_lists_its_dense_layers():
    kinds = ["dense", "sparse", "dense", "sparse"]
    config = read("deepseek_v32", {"mlp_layer_types": kinds, "num_hidden_layers": 4})
    found = [
        "dense" if isinstance(s.ffn, DenseConfig) else "sparse"
        for s in config_sections.unfolded(config)
    ]
    assert found == kinds
    with pytest.raises(UserError, match=r"mlp_layer_types=\['dense'\], expected 'dense' or"):
        read("deepseek_v32", {"mlp_layer_types": ["dense"], "num_hidden_layers": 4})


@pytest.mark.parametrize("number", range(len(ROPE)))
def test_rope_as_transformers(number: int):
    """The keys as given mean the same as what transformers makes of them."""
    family, given, made = ROPE[number]
    base = whole(family) | {"max_position_embeddings": 256}
    found = attention(read(family, base | given))
    wanted = attention(read(family, base | {"rope_parameters": made}))
    assert (found.rope_base, found.rope_scaling) == (wanted.rope_base, wanted.rope_scaling)
    assert found.rope_base == made["rope_theta"]
    kind = None if found.rope_scaling is None else found.rope_scaling.kind
    assert kind == (None if made["rope_type"] == "default" else made["rope_type"])


def test_gpt_oss_has_yarn_unless_it_says_otherwise():
    scaling = attention(read("gpt_oss", {})).rope_scaling
    assert isinstance(scaling, YarnConfig)
    assert (scaling.factor, scaling.original_length, scaling.truncate) == (32.0, 4096, False)
    assert (
        attention(read("gpt_oss", {"rope_scaling": {"rope_type": "default"}})).rope_scaling is None
    )


def test_a_rotation_for_each_kind_of_layer_is_refused():
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    with pytest.raises(UserError, match=r"rope_parameters has full_attention=.*one rotation"):
        read("gpt_oss", {"rope_parameters": nested})


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.gguf], ids=lambda f: f.model_type)
def test_an_export_says_every_key(family: Family):
    """What is written means the same to a reader without defaults."""
    config = read(family.model_type, whole(family.model_type))
    written = family.write_config(config)
    assert family.read_config(Settings(written, "it")) == config


def from_gguf(family: str, said: dict[str, Any], **keys: Any) -> ModelConfig:
    """The model of a GGUF's metadata with some keys changed, or left out (None)."""
    config = read(family, whole(family) | said)
    metadata = config_to_gguf(BY_NAME[family], BY_NAME[family].write_config(config))
    metadata |= {f"{BY_NAME[family].gguf.architecture}.{k}": v for k, v in keys.items()}  # pyright: ignore
    kept = {key: value for key, value in metadata.items() if value is not None}
    shapes = {"token_embd.weight": (config.vocab_size, 8), "output.weight": (config.vocab_size, 8)}
    values = config_from_gguf(kept, shapes, lambda name: np.zeros(1), "it")
    return BY_NAME[family].read_config(Settings(values, "it"))


def test_a_gguf_has_llama_cpps_defaults():
    """llama.cpp's load_hparams: no groups, gates as they are (not the class's 8, 4, normalised and
    2.5), and a scale of 0 for none."""
    left_out = dict.fromkeys(
        ("expert_group_count", "expert_group_used_count", "expert_weights_norm")
    )
    for scale in (None, 0.0, 1.0):
        found = router(from_gguf("deepseek_v3", {}, **left_out, expert_weights_scale=scale))
        assert (found.num_groups, found.top_groups) == (None, None)
        assert (found.normalize_gates, found.gate_scale) == (False, 1.0)
    assert router(from_gguf("deepseek_v3", {})).gate_scale == 2.5


def test_a_gguf_of_gpt_oss_without_scaling_has_none():
    plain = {"rope_scaling": {"rope_type": "default"}}
    assert attention(from_gguf("gpt_oss", plain)).rope_scaling is None
    assert attention(from_gguf("gpt_oss", {})).rope_scaling is not None
