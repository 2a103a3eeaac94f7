"""Llama 1 to 3, SmolLM2 and what else calls itself llama: dense, grouped-query attention."""

from typing import Any

from checkpoint import gguf_tables
from checkpoint.families import parts, rows
from checkpoint.families.base import GGUF, Family
from checkpoint.settings import Settings
from configs.architecture import LayerSpec, ModelConfig
from configs.checks import UserError
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
    layer = LayerSpec(attention=parts.read_grouped_query(settings), ffn=ffn)
    layers = [layer] * parts.read_num_layers(settings)
    return parts.read_model(settings, layers, norm_eps=1e-6)


def write_config(config: ModelConfig) -> dict[str, Any]:
    ffn = parts.the_one([layer.ffn for layer in parts.unfolded(config)], "feed-forward layer")
    if not isinstance(ffn, DenseConfig):
        raise UserError("llama has dense layers, the model has experts")
    return {
        **parts.write_model(config),
        **parts.write_grouped_query(parts.grouped_query(config)),
        "intermediate_size": ffn.d_ff,
        "pretraining_tp": 1,
    }


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(*rows.EMBEDDING, *rows.GROUPED_QUERY, *rows.DENSE),
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    gguf=GGUF("llama", gguf_tables.LLAMA),
)
