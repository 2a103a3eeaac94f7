"""Parts of config.json that several families share, each read and written side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.config_reader import Settings
from checkpoint.families import rope_section
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.checks import UserError
from configs.feed_forward import (
    DenseActivation,
    DenseConfig,
    MoEConfig,
    NoFeedForwardConfig,
    RouterConfig,
)
from configs.shared_keys import key_sources, shares_keys

MAX_LAYERS = 4096
"""More than any model has."""


ACTIVATIONS = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",), "relu2": ("relu2",)}
"""hidden_act of the gates' activation, or of the hidden units' where there are no gates."""


def read_model(
    settings: Settings,
    layers: Sequence[LayerSpec],
    *,
    norm_eps: float,
    activation_key: str = "hidden_act",
    norm_key: str = "rms_norm_eps",
    **extra: Any,
) -> ModelConfig:
    """What every family has, around its layers.

    Args:
      norm_eps: the family's own, where the config doesn't say.
      activation_key, norm_key: the family's names of them.
    """
    activation = _dense_activation(layers)
    if activation is not None:
        settings.expect(activation_key, *ACTIVATIONS[activation])
    settings.expect("mlp_bias", _has_dense_bias(layers))
    prefix, pattern = folded(layers)
    return ModelConfig(
        vocab_size=settings.integer("vocab_size"),
        d_model=settings.integer("hidden_size"),
        num_layers=len(layers),
        prefix=prefix,
        pattern=pattern,
        context_length=settings.integer("max_position_embeddings"),
        tie_embeddings=settings.flag("tie_word_embeddings", default=False),
        norm_eps=settings.number(norm_key, default=norm_eps),
        **extra,
    )


def read_num_layers(settings: Settings) -> int:
    """Bounded: each layer is a value of its own on the way to a ModelConfig."""
    return settings.integer("num_hidden_layers", most=MAX_LAYERS)


def write_model(
    config: ModelConfig, activation_key: str = "hidden_act", norm_key: str = "rms_norm_eps"
) -> dict[str, Any]:
    activation = _dense_activation(unfolded(config))
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tie_embeddings,
        norm_key: config.norm_eps,
        **({} if activation is None else {activation_key: ACTIVATIONS[activation][0]}),
        "mlp_bias": _has_dense_bias(unfolded(config)),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def _dense_activation(layers: Sequence[LayerSpec]) -> DenseActivation | None:
    """That of the gates in all layers, None where there are none: the experts' own variants go by
    "swiglu".

    Raises:
      UserError: layers differ.
    """
    ffns = [layer.ffn for layer in layers if not isinstance(layer.ffn, NoFeedForwardConfig)]
    kinds = [x.activation if x.activation in ("geglu", "relu2") else "swiglu" for x in ffns]
    return the_one(kinds, "activation") if kinds else None


def _has_dense_bias(layers: Sequence[LayerSpec]) -> bool:
    return any(isinstance(layer.ffn, DenseConfig) and layer.ffn.bias for layer in layers)


def folded(layers: Sequence[LayerSpec]) -> tuple[tuple[LayerSpec, ...], tuple[LayerSpec, ...]]:
    """(prefix, pattern): dense layers before the first experts, or without experts those before the
    first that reads another's keys, then the shortest period of the rest; or no prefix, where the
    shortest period of all layers is shorter than both.
    """
    moe = [i for i, layer in enumerate(layers) if isinstance(layer.ffn, MoEConfig)]
    sources = key_sources([layer.attention for layer in layers], (), 1)
    sharing = [i for i, source in enumerate(sources) if source is not None]
    first, whole = ((moe or sharing)[0] if moe or sharing else 0), _period(layers, sources, 0)
    rest = _period(layers, sources, first)
    if first + len(rest) > len(whole):
        return (), whole
    return tuple(layers[:first]), rest


def _period(
    layers: Sequence[LayerSpec], sources: Sequence[int | None], first: int
) -> tuple[LayerSpec, ...]:
    """The shortest beginning that all layers from the first on repeat: such that each reads the
    same layer before the first, or one as far before it (key_sources)."""
    reads = [
        source if source is None or source < first else source - i
        for i, source in enumerate(sources)
    ]
    rest = list(zip(layers, reads, strict=True))[first:]
    count = len(rest)
    size = next(n for n in range(1, count + 1) if count % n == 0 and _repeats(rest, n))
    return tuple(layers[first : first + size])


def _repeats(items: Sequence[Any], period: int) -> bool:
    return all(item == items[i % period] for i, item in enumerate(items))


def unfolded(config: ModelConfig) -> list[LayerSpec]:
    """Every layer in order: what `folded` was given."""
    return [*config.prefix, *config.pattern * config.num_periods]


def sharing_layers(config: ModelConfig) -> list[int]:
    """The numbers of those that read what an earlier one made: keys and values, or the choice of
    keys."""
    return [i for i, layer in enumerate(unfolded(config)) if shares_keys(layer.attention)]


def the_one(values: Sequence[Any], what: str) -> Any:
    """The value that all layers share.

    Raises:
      UserError: layers differ, or none has such a part: the family can't say it.
    """
    if not values or any(value != values[0] for value in values):
        count = f"{len(set(values))} kinds of it" if values else "no layer with it"
        raise UserError(f"this family has one {what} for all layers, the model has {count}")
    return values[0]


def the_dense(config: ModelConfig) -> DenseConfig:
    """The feed-forward layer of a model whose layers share it.

    Raises:
      UserError: they don't, or it has experts.
    """
    ffn = the_one([layer.ffn for layer in unfolded(config)], "feed-forward layer")
    if not isinstance(ffn, DenseConfig):
        raise UserError("this family has dense layers, the model has experts")
    return ffn


def read_grouped_query(
    settings: Settings,
    *,
    rope_base: float = 10_000.0,
    rope: Mapping[str, Any] | None = None,
    bias: bool | None = None,
    turned_share: float | None = None,
    **extra: Any,
) -> AttentionConfig:
    """
    Args:
      rope_base, rope: the family's own base and rope_parameters, where the config doesn't say.
      bias: the family's, if its config has no attention_bias.
      turned_share: its own partial_rotary_factor; None: it turns whole heads, always.
    """
    heads = settings.integer("num_attention_heads")
    head_dim = settings.integer("head_dim", default=settings.integer("hidden_size") // heads)
    share = 1.0 if turned_share is None else rope_section.read_turned_share(settings, turned_share)
    base, scaling = rope_section.read_rope(
        settings,
        rope_base,
        rope,
        turned_share=share,
        is_on_sines=share != 1.0 or extra.get("qk_norm_after_rope", False),
    )
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=settings.integer("num_key_value_heads", default=heads),
        head_dim=head_dim,
        rope_base=base,
        rope_scaling=scaling,
        rotary_dim=None if share == 1.0 else int(head_dim * share),
        bias=settings.flag("attention_bias", default=False) if bias is None else bias,
        **extra,
    )


def write_grouped_query(attention: AttentionConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias,
        **_write_turned(attention),
    }


def _write_turned(attention: AttentionConfig) -> dict[str, Any]:
    """RoPE, and the share of a head that it turns where that is not all."""
    is_on_sines = attention.rotary_dim is not None or attention.qk_norm_after_rope
    written = rope_section.write_rope(
        attention.rope_base, attention.rope_scaling, is_on_sines=is_on_sines
    )
    if attention.rotary_dim is None:
        return written
    share = {"partial_rotary_factor": attention.rotary_dim / attention.head_dim}
    scaling = written["rope_scaling"]
    return {
        **written,
        **share,
        "rope_scaling": None if scaling is None else scaling | share,
        "rope_parameters": written["rope_parameters"] | share,
    }


def grouped_query(config: ModelConfig) -> AttentionConfig:
    """The one attention of a model whose layers share it.

    Raises:
      UserError: they don't, or it is of another kind.
    """
    return the_one(grouped_queries(config), "attention")


def grouped_queries(config: ModelConfig) -> list[AttentionConfig]:
    """Each layer's attention.

    Raises:
      UserError: one is of another kind.
    """
    attentions = [layer.attention for layer in unfolded(config)]
    found = [each for each in attentions if isinstance(each, AttentionConfig)]
    if len(found) != len(attentions):
        kinds = sorted({each.kind for each in attentions})
        raise UserError(
            f"this family has attention.kind='grouped_query', the model has {', '.join(kinds)}"
        )
    return found


NO_WINDOWS: Mapping[str, Any] = {"use_sliding_window": False, "sliding_window": None}


def expect_no_windows(settings: Settings) -> None:
    """Of Qwen's families, whose engines differ in which layers have one."""
    settings.expect("use_sliding_window", False)
    kinds = settings.items("layer_types", of=str, default=[])
    if set(kinds) - {"full_attention"}:
        raise UserError(
            f"{settings.where} has layer_types with {sorted(set(kinds))}: only 'full_attention' is "
            "built for this family"
        )


def read_softmax_router(
    settings: Settings, *, normalize: bool, auxiliary: float, bias: bool = False
) -> RouterConfig:
    """The router of Mixtral, Qwen3-MoE, OLMoE and gpt-oss."""
    return RouterConfig(
        top_k=settings.integer("num_experts_per_tok"),
        normalize_gates=normalize,
        load_balance_weight=settings.number("router_aux_loss_coef", default=auxiliary),
        bias=bias,
        z_loss_weight=0.0,
    )


def write_softmax_router(router: RouterConfig) -> dict[str, Any]:
    return {
        "num_experts_per_tok": router.top_k,
        "router_aux_loss_coef": router.load_balance_weight,
        "output_router_logits": False,
    }


def the_moe(config: ModelConfig) -> MoEConfig:
    """The experts that all MoE layers share."""
    ffns = [layer.ffn for layer in unfolded(config) if isinstance(layer.ffn, MoEConfig)]
    return the_one(ffns, "form of its MoE layers")
