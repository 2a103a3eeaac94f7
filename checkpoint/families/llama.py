"""Llama 1 to 3, SmolLM2 and what else calls itself llama: dense, grouped-query attention."""

from typing import Any

from checkpoint import gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, weight_maps
from checkpoint.families.base import GGUF, Family
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import DenseConfig

DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
"""Values of transformers\' LlamaConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    ffn = DenseConfig(
        d_ff=settings.integer("intermediate_size"), bias=settings.flag("mlp_bias", default=False)
    )
    layer = LayerSpec(attention=config_sections.read_grouped_query(settings), ffn=ffn)
    layers = [layer] * config_sections.read_num_layers(settings)
    return config_sections.read_model(settings, layers, norm_eps=1e-6)


def write_config(config: ModelConfig) -> dict[str, Any]:
    ffn = config_sections.the_dense(config)
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(config_sections.grouped_query(config)),
        "intermediate_size": ffn.d_ff,
        "pretraining_tp": 1,
    }


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(*weight_maps.EMBEDDING, *weight_maps.GROUPED_QUERY, *weight_maps.DENSE),
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    gguf=GGUF(
        "llama",
        gguf_weight_maps.LLAMA,
        optional={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"},
        is_meant=lambda metadata: not metadata.get("llama.expert_count"),
    ),
)
