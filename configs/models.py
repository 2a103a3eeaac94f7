"""Named model sizes. Each function's docstring says where its numbers come from."""

from configs.base import (
    AttentionConfig,
    LayerSpec,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)


def v3_7b() -> ModelConfig:
    """V3: sliding-window MoE with sinks at 32K context, 64 experts, top-2, one shared (design
    table).

    The articles give 7B parameters, 64 experts and a 32K window of context; widths are ours,
    chosen so that the whole comes to 7B.
    """
    attention = AttentionConfig(
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        window_size=4096,
        num_sinks=4,
        rope_base=500_000.0,
    )
    ffn = MoEConfig(num_experts=64, d_ff=704, num_shared_experts=2, router=RouterConfig(top_k=2))
    return ModelConfig(
        vocab_size=65_536,
        d_model=2048,
        num_layers=24,
        pattern=(LayerSpec(attention=attention, ffn=ffn),),
        context_length=32_768,
    )


def v31_full() -> ModelConfig:
    """V3.1: V3's widths with 128 experts; five local layers, then one that sees everything."""
    local = AttentionConfig(
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        window_size=1024,
        num_sinks=4,
        rope_base=500_000.0,
    )
    everywhere = AttentionConfig(num_heads=16, num_kv_heads=4, head_dim=128, rope_base=500_000.0)
    ffn = MoEConfig(num_experts=128, d_ff=704, num_shared_experts=2, router=RouterConfig(top_k=2))
    return ModelConfig(
        vocab_size=65_536,
        d_model=2048,
        num_layers=24,
        pattern=tuple(LayerSpec(attention=a, ffn=ffn) for a in (*[local] * 5, everywhere)),
        context_length=32_768,
    )


def v31_nano() -> ModelConfig:
    """V3.1's form in 6M parameters, for two CPU cores."""
    attention = AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=32, window_size=128, num_sinks=4
    )
    ffn = MoEConfig(num_experts=16, d_ff=128, num_shared_experts=1, router=RouterConfig(top_k=2))
    return ModelConfig(
        vocab_size=4096,
        d_model=128,
        num_layers=4,
        pattern=(LayerSpec(attention=attention, ffn=ffn),),
        context_length=256,
    )
