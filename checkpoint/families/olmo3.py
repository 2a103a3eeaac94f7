"""OLMo 3 (2025): OLMo 2 with windows in three of four layers, whose RoPE is not stretched."""

from collections.abc import Mapping
from typing import Any

from checkpoint import gguf_layers, gguf_rope, gguf_sections, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, olmo2, rope_section, weight_maps, windows
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.feed_forward import DenseConfig

DEFAULTS = {
    "vocab_size": 50_304,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
}
"""Values of transformers\' Olmo3Config for keys that a config.json leaves out."""

BASE = 500_000.0


def read_config(settings: Settings) -> ModelConfig:
    count = config_sections.read_num_layers(settings)
    default = [windows.WHOLE if (i + 1) % 4 == 0 else windows.WINDOW for i in range(count)]
    ffn = DenseConfig(d_ff=settings.integer("intermediate_size"))
    layers = [
        LayerSpec(attention=_read_attention(settings, size), ffn=ffn, norms="post")
        for size in windows.read(settings, default)
    ]
    return config_sections.read_model(settings, layers, norm_eps=1e-5)


def _read_attention(settings: Settings, window_size: int | None) -> AttentionConfig:
    """RoPE for each kind of layer; in the older spelling rope_scaling is whole attention's."""
    kind = windows.WHOLE if window_size is None else windows.WINDOW
    nested = settings.part("rope_parameters")
    if nested is None or not {windows.WHOLE, windows.WINDOW} & set(nested.values):
        settings.expect("rope_theta", BASE)
        own = settings.values if window_size is None else _without_scaling(settings.values)
    else:
        own = _without_scaling(settings.values) | {"rope_parameters": nested.values.get(kind)}
    return config_sections.read_grouped_query(
        Settings(dict(own), settings.where, settings.defaults),
        rope_base=BASE,
        qk_norm="all",
        window_size=window_size,
    )


def _without_scaling(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in ("rope_scaling", "rope_parameters")}


def write_config(config: ModelConfig) -> dict[str, Any]:
    attentions = config_sections.grouped_queries(config)
    kinds = {
        windows.WHOLE: [each for each in attentions if each.window_size is None],
        windows.WINDOW: [each for each in attentions if each.window_size is not None],
    }
    ones = {kind: config_sections.the_one(x, "attention") for kind, x in kinds.items() if x}
    first = next(iter(ones.values()))
    rope = {
        kind: rope_section.write_rope(each.rope_base, each.rope_scaling)["rope_parameters"]
        for kind, each in {**dict.fromkeys(kinds, first), **ones}.items()
    }
    written = config_sections.write_grouped_query(first)
    return {
        **config_sections.write_model(config),
        **{k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")},
        **windows.write([each.window_size for each in attentions], unused=4096),
        "rope_parameters": rope,
        "intermediate_size": config_sections.the_dense(config).d_ff,
    }


OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(*olmo2.ROWS, *weight_maps.DENSE),
    gguf=GGUF(
        "olmo2",
        gguf_weight_maps.OLMO2,
        sections=(
            gguf_sections.HEADS,
            gguf_layers.windows(period=4),
            gguf_rope.by_kind("olmo2", window_base=None),
        ),
    ),
)
