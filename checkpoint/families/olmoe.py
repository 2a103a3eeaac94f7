"""OLMoE (2024): queries and keys normed over all heads together, gates as they are."""

from typing import Any

from checkpoint import gguf_tables
from checkpoint.families import parts, rows
from checkpoint.families.base import GGUF, Family
from checkpoint.settings import Settings
from checkpoint.tables import Row
from configs.architecture import LayerSpec, ModelConfig
from configs.feed_forward import MoEConfig

DEFAULTS = {
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 8,
    "num_experts": 64,
}
"""Values of transformers\' OlmoeConfig for keys that a config.json leaves out."""


def read_config(settings: Settings) -> ModelConfig:
    attention = parts.read_grouped_query(
        settings, qk_norm="all", clip_qkv=settings.number("clip_qkv", default=None)
    )
    normalize = settings.flag("norm_topk_prob", default=False)
    ffn = MoEConfig(
        num_experts=settings.integer("num_experts", "num_local_experts"),
        d_ff=settings.integer("intermediate_size"),
        router=parts.read_softmax_router(settings, normalize=normalize, auxiliary=1e-2),
    )
    layers = [LayerSpec(attention=attention, ffn=ffn)] * parts.read_num_layers(settings)
    return parts.read_model(settings, layers, norm_eps=1e-5)


def write_config(config: ModelConfig) -> dict[str, Any]:
    attention, ffn = parts.grouped_query(config), parts.the_moe(config)
    return {
        **parts.write_model(config),
        **parts.write_grouped_query(attention),
        **parts.write_softmax_router(ffn.router),
        "num_experts": ffn.num_experts,
        "intermediate_size": ffn.d_ff,
        "norm_topk_prob": ffn.router.normalize_gates,
        "clip_qkv": attention.clip_qkv,
    }


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *rows.EMBEDDING,
        *rows.GROUPED_QUERY,
        Row("layers.*.attention.q_norm.scale", f"{rows.ATTENTION}.q_norm.weight", "(h c) -> h c"),
        Row("layers.*.attention.k_norm.scale", f"{rows.ATTENTION}.k_norm.weight", "(h c) -> h c"),
        rows.ROUTER,
        *rows.EXPERTS,
    ),
    fuses_experts=True,
    gguf=GGUF("olmoe", gguf_tables.OLMOE),
)
