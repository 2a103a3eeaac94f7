"""gpt-oss (2025): biases everywhere, learned sinks, windows in every other layer, clamped experts.

Released files hold the experts in MXFP4; checkpoint/logical_tensors.py gives them as the tensors
named here.
"""

from typing import Any

from checkpoint import gguf_pairs, gguf_weight_maps
from checkpoint.config_reader import Settings
from checkpoint.families import config_sections, weight_maps, windows
from checkpoint.families.base import GGUF, Family, Packed
from checkpoint.weight_map import Row
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.feed_forward import MoEConfig

DEFAULTS = {
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 4,
    "num_local_experts": 128,
    "attention_bias": True,
}
"""Values of transformers\' GptOssConfig for keys that a config.json leaves out."""

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""RoPE of the same class, for a config.json with neither rope_scaling nor rope_parameters."""


def read_config(settings: Settings) -> ModelConfig:
    count = config_sections.read_num_layers(settings)
    default = [windows.WHOLE if i % 2 else windows.WINDOW for i in range(count)]
    sizes = windows.read(settings, default, default_size=128)
    ffn = MoEConfig(
        num_experts=settings.integer("num_local_experts", "num_experts"),
        d_ff=settings.integer("intermediate_size"),
        router=config_sections.read_softmax_router(
            settings, normalize=True, auxiliary=1e-3, bias=True
        ),
        bias=True,
        activation="clamped_swiglu",
        swiglu_limit=settings.number("swiglu_limit", default=7.0),
        swiglu_alpha=settings.number("swiglu_alpha", default=1.702),
    )
    layers = [LayerSpec(attention=_attention(settings, size), ffn=ffn) for size in sizes]
    return config_sections.read_model(settings, layers, norm_eps=1e-5)


def _attention(settings: Settings, window_size: int | None) -> AttentionConfig:
    return config_sections.read_grouped_query(
        settings, rope_base=150_000.0, rope=ROPE, window_size=window_size, sink_logits=True
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    attention, sizes = windows.split(config)
    ffn = config_sections.the_moe(config)
    return {
        **config_sections.write_model(config),
        **config_sections.write_grouped_query(attention),
        **config_sections.write_softmax_router(ffn.router),
        **windows.write(sizes, unused=128),
        "num_local_experts": ffn.num_experts,
        "experts_per_token": ffn.router.top_k,
        "intermediate_size": ffn.d_ff,
        "swiglu_limit": ffn.swiglu_limit,
        "swiglu_alpha": ffn.swiglu_alpha,
    }


MOE = f"{weight_maps.LAYER}.mlp"

GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read_config=read_config,
    write_config=write_config,
    defaults=DEFAULTS,
    rows=(
        *weight_maps.EMBEDDING,
        *weight_maps.GROUPED_QUERY,
        Row("layers.*.attention.sink_logits", f"{weight_maps.ATTENTION}.sinks", "h -> h"),
        Row("layers.*.moe.router", f"{MOE}.router.weight", "e d -> d e"),
        Row("layers.*.moe.router_bias", f"{MOE}.router.bias", "e -> e"),
        Row("layers.*.moe.gate_up", f"{MOE}.experts.gate_up_proj", "e d (f i) -> e d i f"),
        Row("layers.*.moe.gate_up_bias", f"{MOE}.experts.gate_up_proj_bias", "e (f i) -> e i f"),
        Row("layers.*.moe.down", f"{MOE}.experts.down_proj", "e f d -> e f d"),
        Row("layers.*.moe.down_bias", f"{MOE}.experts.down_proj_bias", "e d -> e d"),
    ),
    packed=Packed(
        "mxfp4",
        r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj",
        plain_modules=(
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ),
    ),
    gguf=GGUF(
        "gpt-oss",
        gguf_weight_maps.GPT_OSS,
        (
            *gguf_pairs.GROUPED,
            (gguf_pairs.LLM.EXPERT_COUNT, "num_local_experts"),
            (gguf_pairs.LLM.EXPERT_FEED_FORWARD_LENGTH, "intermediate_size"),
            (gguf_pairs.ATTENTION.SLIDING_WINDOW, "sliding_window"),
        ),
        fixed={"attention_bias": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
    ),
)
