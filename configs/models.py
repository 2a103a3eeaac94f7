"""Named model sizes. Each docstring says where its numbers come from."""

from configs.architecture import (
    AttentionConfig,
    DenseConfig,
    LayerSpec,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)


def v3_7b() -> ModelConfig:
    """V3, 7.4B parameters: sliding-window attention with sinks and 64 experts, 32K context.

    From the articles: 7B parameters, 64 experts with top-2 routing, a 32K window of context. The
    widths are ours, chosen so that the whole comes near 7B.
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


def v31() -> ModelConfig:
    """V3.1, 14.0B parameters: V3 with 128 experts, five local layers to one that sees everything.

    From the articles: the experts grow from 64 to 128; everything else keeps V3's widths.
    """
    base = v3_7b()
    attention = AttentionConfig(num_heads=16, num_kv_heads=4, head_dim=128, rope_base=500_000.0)
    local = AttentionConfig(
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        window_size=1024,
        num_sinks=4,
        rope_base=500_000.0,
    )
    ffn = MoEConfig(num_experts=128, d_ff=704, num_shared_experts=2, router=RouterConfig(top_k=2))
    return ModelConfig(
        vocab_size=base.vocab_size,
        d_model=base.d_model,
        num_layers=base.num_layers,
        pattern=tuple(LayerSpec(attention=a, ffn=ffn) for a in (*[local] * 5, attention)),
        context_length=base.context_length,
    )


def _nano_attention() -> tuple[AttentionConfig, AttentionConfig]:
    """(local, global) attention of the nano sizes."""
    local = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, window_size=64, num_sinks=4)
    return local, AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32)


def v31_nano() -> ModelConfig:
    """V3.1's form in 4.6M parameters, 1.8M of them active: for two CPU cores."""
    ffn = MoEConfig(num_experts=16, d_ff=128, num_shared_experts=1, router=RouterConfig(top_k=2))
    return ModelConfig(
        vocab_size=4096,
        d_model=128,
        num_layers=4,
        pattern=tuple(LayerSpec(attention=a, ffn=ffn) for a in _nano_attention()),
        context_length=256,
    )


def v31_nano_student() -> ModelConfig:
    """A dense student of v31_nano: its depth and width, 1.1M parameters, a quarter of the
    teacher's.
    """
    return ModelConfig(
        vocab_size=4096,
        d_model=128,
        num_layers=4,
        pattern=tuple(LayerSpec(attention=a, ffn=DenseConfig(d_ff=256)) for a in _nano_attention()),
        context_length=256,
        tie_embeddings=True,
    )


def v31_small() -> ModelConfig:
    """V3.1's form in 32.5M parameters, 6.0M of them active: for an hour on two CPU cores."""
    local = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=32, window_size=128, num_sinks=4)
    everywhere = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=32)
    ffn = MoEConfig(num_experts=32, d_ff=192, num_shared_experts=1, router=RouterConfig(top_k=2))
    return ModelConfig(
        vocab_size=4096,
        d_model=256,
        num_layers=6,
        pattern=tuple(LayerSpec(attention=a, ffn=ffn) for a in (local, local, everywhere)),
        context_length=512,
    )
