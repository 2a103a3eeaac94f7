"""Named model sizes. Each docstring says where its numbers come from."""

import dataclasses

from configs.architecture import (
    EarlyExitConfig,
    LayerSpec,
    MixtureOfDepthsConfig,
    ModelConfig,
    MultiTokenConfig,
)
from configs.attention import (
    AttentionConfig,
    LatentAttentionConfig,
    LocalSparseAttentionConfig,
    RelativeAttentionConfig,
)
from configs.feed_forward import ContextConfig, DenseConfig, MoEConfig, RouterConfig
from configs.recurrent_attention import GatedDeltaConfig
from configs.rope import YarnConfig


def v1_1b() -> ModelConfig:
    """V1, 1.19B parameters: Transformer-XL's relative attention and memory, dense layers.

    From the articles: 1.2B parameters, Transformer-XL with relative positions. The widths are ours,
    chosen so that the whole comes near 1.2B. A layer sees 1024 tokens back, so what the model
    predicts depends on up to 20 * 1024 tokens before it.
    """
    attention = RelativeAttentionConfig(num_heads=16, head_dim=128, memory_length=1024)
    return ModelConfig(
        vocab_size=65_536,
        d_model=2048,
        num_layers=20,
        pattern=(LayerSpec(attention=attention, ffn=DenseConfig(d_ff=4096)),),
        context_length=8192,
    )


def v1_nano() -> ModelConfig:
    """V1's form in 2.2M parameters, a memory of 256 tokens: for two CPU cores."""
    attention = RelativeAttentionConfig(num_heads=4, head_dim=32, memory_length=256)
    return ModelConfig(
        vocab_size=4096,
        d_model=128,
        num_layers=4,
        pattern=(LayerSpec(attention=attention, ffn=DenseConfig(d_ff=512)),),
        context_length=1024,
    )


def v2_3b() -> ModelConfig:
    """V2, 3.5B parameters: sparse local attention in every other layer, between them layers that
    work on an eighth of the tokens, and exits after each pair.

    From the articles: 3.5B parameters, attention in O(n log n) with a window of 1024 tokens,
    dynamic compute layers. The widths are ours, chosen so that the whole comes near 3.5B.
    """
    sparse = LocalSparseAttentionConfig(
        num_heads=20, num_kv_heads=4, head_dim=128, window_size=1024, num_sink_tokens=4
    )
    chosen = AttentionConfig(num_heads=20, num_kv_heads=4, head_dim=128)
    return ModelConfig(
        vocab_size=65_536,
        d_model=2560,
        num_layers=32,
        pattern=_v2_pattern(sparse, chosen, DenseConfig(d_ff=10_752), capacity=0.125),
        context_length=16_384,
        early_exit=EarlyExitConfig(dropout=0.1, loss_scale=0.2, rotation=8),
    )


def v2_nano() -> ModelConfig:
    """V2's form in 3.0M parameters, 2.3M of them active: for two CPU cores."""
    sparse = LocalSparseAttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=32, window_size=64, num_sink_tokens=4
    )
    chosen = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32)
    return ModelConfig(
        vocab_size=4096,
        d_model=128,
        num_layers=8,
        pattern=_v2_pattern(sparse, chosen, DenseConfig(d_ff=512), capacity=0.25),
        context_length=256,
        early_exit=EarlyExitConfig(dropout=0.1, loss_scale=0.5, rotation=3),
    )


def _v2_pattern(
    sparse: LocalSparseAttentionConfig, chosen: AttentionConfig, ffn: DenseConfig, capacity: float
) -> tuple[LayerSpec, ...]:
    """A layer for every token, then one for a share of them that see each other whole."""
    depth = MixtureOfDepthsConfig(capacity=capacity)
    return (
        LayerSpec(attention=sparse, ffn=ffn),
        LayerSpec(attention=chosen, ffn=ffn, depth=depth),
    )


def v3_7b() -> ModelConfig:
    """V3, 7.4B parameters: sliding-window attention with learned sinks and 64 experts, 32K context.

    From the articles: 7B parameters, 64 experts with top-2 routing, a 32K window of context, and
    easy tokens on a shorter path: here one null expert, so that a token has one or two experts. The
    widths are ours, chosen so that the whole comes near 7B.
    """
    attention = AttentionConfig(
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        window_size=4096,
        sink_logits=True,
        rope_base=500_000.0,
    )
    router = RouterConfig(top_k=2, num_null_experts=1, target_k=1.5)
    ffn = MoEConfig(num_experts=64, d_ff=704, num_shared_experts=2, router=router)
    return ModelConfig(
        vocab_size=65_536,
        d_model=2048,
        num_layers=24,
        pattern=(LayerSpec(attention=attention, ffn=ffn),),
        context_length=32_768,
    )


def v3_nano() -> ModelConfig:
    """V3's form in 4.6M parameters, 1.7M of them active: v31_nano's sizes, every layer a window of
    64 with learned sinks, one to three experts per token, 1.5 on average: easy tokens use fewer.
    """
    base = v31_nano()
    attention = AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=32, window_size=64, sink_logits=True
    )
    router = RouterConfig(top_k=3, num_null_experts=2, target_k=1.5)
    ffn = MoEConfig(num_experts=16, d_ff=128, num_shared_experts=1, router=router)
    return dataclasses.replace(base, pattern=(LayerSpec(attention=attention, ffn=ffn),))


def v31() -> ModelConfig:
    """V3.1, 14.0B parameters: V3 with 128 experts, five local layers to one that sees everything.

    From the articles: the experts grow from 64 to 128, one to three of them per token, chosen by a
    router that sees the context; 100,000 tokens of context. Everything else keeps V3's widths.
    """
    base = v3_7b()
    yarn = YarnConfig(factor=3.2, original_length=base.context_length)
    attention = AttentionConfig(
        num_heads=16, num_kv_heads=4, head_dim=128, rope_base=500_000.0, rope_scaling=yarn
    )
    local = AttentionConfig(
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        window_size=1024,
        num_sink_tokens=4,
        rope_base=500_000.0,
    )
    router = dynamic_router(ContextConfig(kind="causal", window_size=256))
    ffn = MoEConfig(num_experts=128, d_ff=704, num_shared_experts=2, router=router)
    return ModelConfig(
        vocab_size=base.vocab_size,
        d_model=base.d_model,
        num_layers=base.num_layers,
        pattern=tuple(LayerSpec(attention=a, ffn=ffn) for a in (*[local] * 5, attention)),
        context_length=100_000,
    )


def dynamic_router(context: ContextConfig) -> RouterConfig:
    """V3.1's router: one to three experts per token, two on average, kept even by a bias.

    The entropy term keeps them even too, at a cost in loss in runs longer than docs/ablations.md's;
    the two together undo each other (docs/experiments.md).
    """
    return RouterConfig(
        top_k=3,
        num_null_experts=2,
        target_k=2.0,
        context=context,
        load_balance_weight=0.0,
        balance="quantile",
        bias_rate=0.5,
    )


def _nano_attention() -> tuple[AttentionConfig, AttentionConfig]:
    """(local, global) attention of the nano sizes."""
    local = AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=32, window_size=64, num_sink_tokens=4
    )
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


def delta_nano() -> ModelConfig:
    """v31_nano with three gated delta nets before each attention over everything, as Qwen3-Next and
    Kimi Linear (2025) mix them: 4.6M parameters."""
    base = v31_nano()
    delta = GatedDeltaConfig(num_heads=4, key_head_dim=16, value_head_dim=24)
    _, everywhere = _nano_attention()
    kinds = (delta, delta, delta, everywhere)
    ffn = base.pattern[0].ffn
    return dataclasses.replace(
        base, pattern=tuple(LayerSpec(attention=kind, ffn=ffn) for kind in kinds)
    )


def v31_nano_student() -> ModelConfig:
    """A dense student of v31_nano: its depth and width, 1.1M parameters, a quarter of the
    teacher's; of the Llama family's form, so that other programs can run it.
    """
    _, everywhere = _nano_attention()
    return ModelConfig(
        vocab_size=4096,
        d_model=128,
        num_layers=4,
        pattern=(LayerSpec(attention=everywhere, ffn=DenseConfig(d_ff=256)),),
        context_length=256,
        tie_embeddings=True,
    )


def v31_small() -> ModelConfig:
    """V3.1's form in 32.5M parameters, 6.0M of them active: for half an hour on two CPU cores."""
    local = AttentionConfig(
        num_heads=8, num_kv_heads=4, head_dim=32, window_size=128, num_sink_tokens=4
    )
    everywhere = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=32)
    ffn = MoEConfig(num_experts=32, d_ff=192, num_shared_experts=1, router=RouterConfig(top_k=2))
    return ModelConfig(
        vocab_size=4096,
        d_model=256,
        num_layers=6,
        pattern=tuple(LayerSpec(attention=a, ffn=ffn) for a in (local, local, everywhere)),
        context_length=512,
    )


def v31_dynamic_nano() -> ModelConfig:
    """v31_nano with V3.1's whole router: context, one to three experts, entropy."""
    base = v31_nano()
    router = dynamic_router(ContextConfig(kind="causal", window_size=64))
    ffn = MoEConfig(num_experts=16, d_ff=128, num_shared_experts=1, router=router)
    pattern = tuple(dataclasses.replace(spec, ffn=ffn) for spec in base.pattern)
    return dataclasses.replace(base, pattern=pattern)


def deepseek_v3() -> ModelConfig:
    """DeepSeek-V3 (2024), 671B parameters, 37B active, and 11.5B in the module that predicts one
    token further: its published config.
    """
    attention = LatentAttentionConfig(
        num_heads=128,
        query_rank=1536,
        latent_rank=512,
        nope_head_dim=128,
        rope_head_dim=64,
        value_head_dim=128,
        rope_scaling=YarnConfig(factor=40.0, original_length=4096),
    )
    router = _deepseek_router(top_k=8, num_groups=8, top_groups=4)
    ffn = MoEConfig(num_experts=256, d_ff=2048, num_shared_experts=1, router=router)
    dense = LayerSpec(attention=attention, ffn=DenseConfig(d_ff=18_432))
    return ModelConfig(
        vocab_size=129_280,
        d_model=7168,
        num_layers=61,
        prefix=(dense,) * 3,
        pattern=(LayerSpec(attention=attention, ffn=ffn),),
        context_length=163_840,
        multi_token=MultiTokenConfig(layer=LayerSpec(attention=attention, ffn=ffn)),
    )


def deepseek_v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite (2024), 15.7B parameters, 2.4B active: its published config."""
    attention = LatentAttentionConfig(
        num_heads=16,
        query_rank=None,
        latent_rank=512,
        nope_head_dim=128,
        rope_head_dim=64,
        value_head_dim=128,
        rope_scaling=YarnConfig(factor=40.0, original_length=4096, mscale=0.707),
    )
    router = RouterConfig(top_k=6, normalize_gates=False)
    ffn = MoEConfig(num_experts=64, d_ff=1408, num_shared_experts=2, router=router)
    return ModelConfig(
        vocab_size=102_400,
        d_model=2048,
        num_layers=27,
        prefix=(LayerSpec(attention=attention, ffn=DenseConfig(d_ff=10_944)),),
        pattern=(LayerSpec(attention=attention, ffn=ffn),),
        context_length=163_840,
    )


def mixtral_8x7b() -> ModelConfig:
    """Mixtral 8x7B (2024), 46.7B parameters, 12.9B active: its published config."""
    attention = AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128, rope_base=1_000_000.0)
    ffn = MoEConfig(num_experts=8, d_ff=14_336, router=RouterConfig(top_k=2))
    return ModelConfig(
        vocab_size=32_000,
        d_model=4096,
        num_layers=32,
        pattern=(LayerSpec(attention=attention, ffn=ffn),),
        context_length=32_768,
        norm_eps=1e-5,
    )


def smollm2_135m() -> ModelConfig:
    """SmolLM2-135M (2025), 134.5M parameters: its published config."""
    return _smollm2_135m(DenseConfig(d_ff=1536))


def smollm2_4x135m() -> ModelConfig:
    """SmolLM2-135M upcycled: four experts in each layer, two for each token; 373M parameters, 214M
    of them active.
    """
    return _smollm2_135m(MoEConfig(num_experts=4, d_ff=1536, router=RouterConfig(top_k=2)))


def _smollm2_135m(ffn: DenseConfig | MoEConfig) -> ModelConfig:
    attention = AttentionConfig(num_heads=9, num_kv_heads=3, head_dim=64, rope_base=100_000.0)
    return ModelConfig(
        vocab_size=49_152,
        d_model=576,
        num_layers=30,
        pattern=(LayerSpec(attention=attention, ffn=ffn),),
        context_length=8192,
        tie_embeddings=True,
        norm_eps=1e-5,
    )


def _deepseek_router(top_k: int, num_groups: int, top_groups: int) -> RouterConfig:
    """Sigmoid scores, a bias without gradients, balance in each sequence (DeepSeek-V3, 2.1.2)."""
    return RouterConfig(
        top_k=top_k,
        scores="sigmoid",
        gate_scale=2.5,
        num_groups=num_groups,
        top_groups=top_groups,
        balance="loss_free",
        bias_rate=1e-3,
        load_balance_weight=0.0,
        sequence_weight=1e-4,
        z_loss_weight=0.0,
    )


def deepseek_v3_nano() -> ModelConfig:
    """DeepSeek-V3's form in 4.0M parameters: latent attention, a dense layer first, 16 small
    experts in four groups, and a module that predicts one token further.
    """
    attention = LatentAttentionConfig(
        num_heads=4,
        query_rank=64,
        latent_rank=64,
        nope_head_dim=32,
        rope_head_dim=16,
        value_head_dim=32,
    )
    router = _deepseek_router(top_k=3, num_groups=4, top_groups=2)
    ffn = MoEConfig(num_experts=16, d_ff=128, num_shared_experts=1, router=router)
    return ModelConfig(
        vocab_size=4096,
        d_model=128,
        num_layers=4,
        prefix=(LayerSpec(attention=attention, ffn=DenseConfig(d_ff=512)),),
        pattern=(LayerSpec(attention=attention, ffn=ffn),),
        context_length=256,
        multi_token=MultiTokenConfig(layer=LayerSpec(attention=attention, ffn=ffn)),
    )


def of_source() -> ModelConfig:
    """Stands where init.source says the architecture (init.architecture="source"): it is put in its
    place before anything is made.
    """
    attention = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2)
    layer = LayerSpec(attention=attention, ffn=DenseConfig(d_ff=1))
    return ModelConfig(
        vocab_size=512, d_model=2, num_layers=1, pattern=(layer,), context_length=2**30
    )
