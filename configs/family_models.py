"""Nano models with the switches of public families (docs/checkpoints.md), for two CPU cores."""

import dataclasses

from configs.architecture import HyperConnectionConfig, LayerSpec, ModelConfig
from configs.attention import AttentionConfig, LatentAttentionConfig
from configs.attention_traits import NoAttentionConfig
from configs.compressed_attention import (
    CompressedAttentionConfig,
    CompressionConfig,
    EntryIndexerConfig,
)
from configs.feed_forward import DenseConfig, MoEConfig, NoFeedForwardConfig, RouterConfig
from configs.models import v31_nano
from configs.per_layer_embeddings import PerLayerEmbeddingConfig
from configs.recurrent_attention import GatedDeltaConfig, Mamba2Config
from configs.rope import YarnConfig


def glm4_nano() -> ModelConfig:
    """GLM-4.5's form in 4.0M parameters: half of each head turned, biases on queries, keys and
    values alone, normed heads, a dense layer first, sigmoid scores with a bias on the choice.
    """
    attention = AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rotary_dim=16,
        bias=True,
        output_bias=False,
        qk_norm="head",
    )
    router = RouterConfig(
        top_k=2,
        scores="sigmoid",
        gate_scale=2.5,
        balance="loss_free",
        bias_rate=1e-3,
        load_balance_weight=0.0,
        sequence_weight=1e-4,
        z_loss_weight=0.0,
    )
    ffn = MoEConfig(num_experts=16, d_ff=128, num_shared_experts=1, router=router)
    return dataclasses.replace(
        v31_nano(),
        prefix=(LayerSpec(attention=attention, ffn=DenseConfig(d_ff=512)),),
        pattern=(LayerSpec(attention=attention, ffn=ffn),),
    )


def nope_nano() -> ModelConfig:
    """v31_nano with the other switches: its global layers know no positions (SmolLM3, Llama 4),
    norms come after attention and feed-forward (OLMo 3), the shared expert has a gate (Qwen2-MoE),
    and residual stream and scores have factors (Granite).
    """
    base = v31_nano()
    local = AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=32, window_size=64, qk_norm="all", score_scale=0.2
    )
    everywhere = dataclasses.replace(local, window_size=None, rotary_dim=0)
    ffn = MoEConfig(
        num_experts=16,
        d_ff=128,
        num_shared_experts=1,
        shared_gate=True,
        router=RouterConfig(top_k=2),
    )
    pattern = (LayerSpec(attention=each, ffn=ffn, norms="post") for each in (local, everywhere))
    return dataclasses.replace(base, pattern=tuple(pattern), residual_scale=0.5)


def qwen3_next_nano() -> ModelConfig:
    """Qwen3-Next's and Qwen3.5's form in 4.7M parameters: three gated delta nets, half as many
    heads of keys as of values, before each gated attention, of whose heads a quarter is turned;
    norms centered on zero, a shared expert with a gate.
    """
    delta = GatedDeltaConfig(num_heads=4, num_key_heads=2, key_head_dim=32, value_head_dim=32)
    gated = AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rotary_dim=8,
        qk_norm="head",
        zero_centered_qk_norm=True,
        output_gate=True,
    )
    ffn = MoEConfig(
        num_experts=16,
        d_ff=128,
        num_shared_experts=1,
        shared_gate=True,
        router=RouterConfig(top_k=2, load_balance_weight=1e-3, z_loss_weight=0.0),
    )
    pattern = tuple(LayerSpec(attention=each, ffn=ffn) for each in (delta, delta, delta, gated))
    return dataclasses.replace(v31_nano(), pattern=pattern, zero_centered_norms=True)


def kimi_linear_nano() -> ModelConfig:
    """Kimi Linear's form in 4.9M parameters: three Kimi delta nets before each latent attention
    without positions, a dense layer first, DeepSeek-V3's experts.
    """
    delta = GatedDeltaConfig(
        num_heads=4,
        key_head_dim=24,
        value_head_dim=24,
        decay="channel",
        output_gate="sigmoid",
        gate_rank=24,
    )
    latent = LatentAttentionConfig(
        num_heads=4,
        query_rank=None,
        latent_rank=32,
        nope_head_dim=32,
        rope_head_dim=16,
        value_head_dim=32,
        has_rope=False,
    )
    model = glm4_nano()
    ffn = model.pattern[0].ffn
    pattern = tuple(LayerSpec(attention=each, ffn=ffn) for each in (delta, delta, latent, delta))
    first = LayerSpec(attention=delta, ffn=DenseConfig(d_ff=512))
    return dataclasses.replace(model, prefix=(first,), pattern=pattern, num_layers=5)


def nemotron_h_nano() -> ModelConfig:
    """Nemotron 3's form in 3.0M parameters: Mamba-2, experts on latent vectors without gates, and
    one attention without positions in seven layers, each a branch alone.
    """
    mamba = Mamba2Config(num_heads=8, head_dim=32, state_dim=32, num_groups=2, norm_by_group=True)
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, rotary_dim=0)
    model = glm4_nano()
    glm = model.pattern[0].ffn
    assert isinstance(glm, MoEConfig)
    experts = dataclasses.replace(
        glm, d_ff=192, shared_d_ff=384, latent_width=64, activation="relu2"
    )
    mixers, nothing = {"M": mamba, "*": attention}, NoAttentionConfig()
    pattern = tuple(
        LayerSpec(attention=nothing, ffn=experts)
        if letter == "E"
        else LayerSpec(attention=mixers[letter], ffn=NoFeedForwardConfig())
        for letter in "MEM*EME"
    )
    return dataclasses.replace(model, prefix=(), pattern=pattern, num_layers=7)


def gemma4_nano() -> ModelConfig:
    """Gemma 4's form in 4.5M parameters: a layer with a window before one over everything, whose
    keys are its values and a quarter of whose pairs turn; the last two read the keys of the first
    two; a dense layer beside the experts, and embeddings for each layer.
    """
    window = AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        window_size=64,
        qk_norm="head",
        value_norm=True,
        score_scale=1.0,
    )
    everywhere = dataclasses.replace(
        window,
        num_kv_heads=1,
        window_size=None,
        rope_base=1_000_000.0,
        rotary_dim=8,
        rotary_pairs="across",
        values_from_keys=True,
    )
    router = RouterConfig(top_k=2, expert_scales=True, input_norm=True, z_loss_weight=0.0)
    pattern = tuple(
        LayerSpec(
            attention=dataclasses.replace(attention, shares_keys=is_sharing),
            ffn=MoEConfig(num_experts=16, d_ff=128, activation="geglu", router=router),
            dense=DenseConfig(d_ff=256, activation="geglu"),
            norms="sandwich",
            output_scale=True,
        )
        for is_sharing in (False, True)
        for attention in (window, everywhere)
    )
    base = v31_nano()
    return dataclasses.replace(
        base,
        pattern=pattern,
        num_layers=len(pattern),
        tie_embeddings=True,
        embedding_scale=base.d_model**0.5,
        logit_cap=30.0,
        per_layer_embeddings=PerLayerEmbeddingConfig(width=16),
    )


def deepseek_v4_nano() -> ModelConfig:
    """DeepSeek-V4's form in 4.9M parameters: four residual streams, a layer with a window whose
    experts go by token, then sparse, heavy and sparse compression of what lies before the window.
    """
    window = CompressedAttentionConfig(
        num_heads=4,
        query_rank=64,
        head_dim=64,
        rotary_dim=16,
        window_size=32,
        num_output_groups=2,
        output_rank=64,
    )
    indexer = EntryIndexerConfig(num_heads=4, head_dim=32, top_k=16)
    return _deepseek_v4(
        v31_nano(),
        window,
        (CompressionConfig(rate=4, overlaps=True, indexer=indexer), CompressionConfig(rate=16)),
        MoEConfig(
            num_experts=16,
            d_ff=128,
            num_shared_experts=1,
            router=_by_score(top_k=3),
            activation="bounded_swiglu",
            swiglu_limit=10.0,
        ),
        num_windows=1,
        num_hashed=1,
    )


def deepseek_v4_flash() -> ModelConfig:
    """DeepSeek-V4-Flash (2026), 284B parameters: its published sizes, two layers with windows alone
    and then sparse and heavy compression in turn, the experts of the first three by token; without
    the module that predicts further.
    """
    window = CompressedAttentionConfig(
        num_heads=64,
        query_rank=1024,
        head_dim=512,
        rotary_dim=64,
        window_size=128,
        num_output_groups=8,
        output_rank=1024,
    )
    indexer = EntryIndexerConfig(num_heads=64, head_dim=128, top_k=512)
    base = ModelConfig(
        vocab_size=129_280,
        d_model=4096,
        num_layers=43,
        pattern=v31_nano().pattern[:1],
        context_length=1_048_576,
    )
    return _deepseek_v4(
        base,
        window,
        (CompressionConfig(rate=4, overlaps=True, indexer=indexer), CompressionConfig(rate=128)),
        MoEConfig(
            num_experts=256,
            d_ff=2048,
            num_shared_experts=1,
            router=_by_score(top_k=6),
            activation="bounded_swiglu",
            swiglu_limit=10.0,
        ),
        num_windows=2,
        num_hashed=3,
        yarn=YarnConfig(factor=16.0, original_length=65_536, mscale=0.0),
    )


def _by_score(top_k: int) -> RouterConfig:
    return RouterConfig(
        top_k=top_k,
        scores="sqrt_softplus",
        gate_scale=1.5,
        balance="loss_free",
        bias_rate=1e-3,
        load_balance_weight=0.0,
        sequence_weight=1e-4,
        z_loss_weight=0.0,
    )


def _deepseek_v4(
    base: ModelConfig,
    window: CompressedAttentionConfig,
    compressions: tuple[CompressionConfig, ...],
    ffn: MoEConfig,
    *,
    num_windows: int,
    num_hashed: int,
    yarn: YarnConfig | None = None,
) -> ModelConfig:
    """`base` with these layers in turn, the first with windows alone or with experts by token."""
    by_token = dataclasses.replace(
        ffn.router, choice="token", balance="none", bias_rate=None, sequence_weight=0.0
    )
    hashed = dataclasses.replace(ffn, router=by_token)
    layers = []
    for i in range(base.num_layers):
        attention = window
        if i >= num_windows:
            compression = compressions[(i - num_windows) % len(compressions)]
            attention = dataclasses.replace(
                window, compression=compression, rope_base=160_000.0, rope_scaling=yarn
            )
        layers.append(LayerSpec(attention=attention, ffn=hashed if i < num_hashed else ffn))
    return dataclasses.replace(
        base, prefix=(), pattern=tuple(layers), hyper_connections=HyperConnectionConfig()
    )
