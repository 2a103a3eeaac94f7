"""A model as a list of layers: what compression reads, changes and puts together again.

Layers run one after the other, so that activations of the calibration text are there when a layer
is looked at, and each layer can be changed before the next one sees its result. Weights lie in
numpy, in float32.

B batch, L length, D d_model, H heads, C head_dim, E experts, F d_ff.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from checkpoint.families.config_sections import folded
from checkpoint.rounded import stacked
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.base import ExecutionConfig
from configs.checks import require
from configs.feed_forward import DenseConfig, MoEConfig, NoFeedForwardConfig
from model.block import Block
from model.layers import SwiGLU
from model.step import Step
from model.transformer import Transformer, Variables

Tree = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer and its weights, without a stack's dimension."""

    spec: LayerSpec
    params: Tree
    router_state: Tree
    """{"moe": {"state": RouterState}}, empty where the router has none."""


@dataclass(frozen=True, eq=False)
class LayeredModel:
    """A decoder's ends and its layers."""

    config: ModelConfig
    """Of all but the layers; see `assembled`."""
    execution: ExecutionConfig
    ends: Tree
    """params without layers: embedding, output if it is not tied, final_norm."""
    layers: tuple[Layer, ...]

    def assembled(self) -> tuple[ModelConfig, Variables]:
        """The config, its pattern the shortest period of the layers, and the variables."""
        prefix, pattern = folded([layer.spec for layer in self.layers])
        periods = (len(self.layers) - len(prefix)) // len(pattern)
        config = dataclasses.replace(
            self.config,
            num_layers=len(self.layers),
            prefix=prefix,
            pattern=pattern,
            exit_spacing=None,
            multi_token=None,
            early_exit=self.config.early_exit if periods > 1 else None,
        )
        params: Tree = dict(self.ends)
        states: Tree = {}
        for i, layer in enumerate(self.layers[: len(prefix)]):
            params[f"prefix_{i}"] = layer.params
        for name, trees in (("params", params), ("router_state", states)):
            periodic = {}
            for i in range(len(pattern)):
                same = [getattr(x, name) for x in self.layers[len(prefix) + i :: len(pattern)]]
                if same[0]:
                    periodic[f"layer_{i}"] = jax.tree.map(lambda *xs: stacked(xs), *same)
            if periodic:
                trees["periods"] = periodic
        return config, {"params": params, "router_state": states}

    def assembled_config(self) -> ModelConfig:
        """The config of `assembled`, for who needs no variables."""
        bare = tuple(dataclasses.replace(x, params={}, router_state={}) for x in self.layers)
        return dataclasses.replace(self, layers=bare, ends={}).assembled()[0]


def layered(model: Transformer, variables: Variables) -> LayeredModel:
    """The layers of a model as it scores (`Source.load`).

    Raises:
      UserError: kinds of layers that can't run one by one.
    """
    config = model.config
    require(
        not config.zero_centered_norms,
        "norms that multiply by 1 + scale (zero_centered_norms) are not compressed yet: distil "
        "such a model into another one",
    )
    require(
        config.hyper_connections is None,
        "models with several residual streams (hyper_connections) are not compressed yet: distil "
        "such a model into another one",
    )
    require(
        config.per_layer_embeddings is None and not config.has_shared_keys,
        "models with embeddings for each layer (per_layer_embeddings) or layers that read the keys "
        "of others (shares_keys, shares_indexer) are not compressed yet: distil such a model into "
        "another one",
    )
    for spec in (*config.prefix, *config.pattern):
        require(
            not _is_beyond_known(spec),
            "layers with GELU, ReLU^2 or bounded SwiGLU, normed values, values of the keys' "
            "projection, gates on inputs, scales of experts, experts by token, a dense layer or "
            "latent vectors beside them, shared experts of a width of their own, or one branch "
            "alone are not compressed yet: distil such a model into another one",
        )
        require(
            not isinstance(spec.attention, AttentionConfig) or not spec.attention.output_gate,
            "attention with an output gate is not compressed yet: distil such a model into another "
            "one",
        )
        require(
            spec.depth is None and spec.attention.memory_tokens is None,
            "layers that tokens pass by (depth) or with memory of earlier segments (relative "
            "attention) are not compressed yet: distil such a model into another one",
        )
    numbers: Tree = dict(jax.tree.map(np.asarray, variables["params"]))
    states = jax.tree.map(np.asarray, variables["router_state"])
    layers = [Layer(spec, numbers.pop(f"prefix_{i}"), {}) for i, spec in enumerate(config.prefix)]
    periods, period_states = numbers.pop("periods"), states.get("periods", {})
    for p in range(config.num_periods):
        for i, spec in enumerate(config.pattern):
            params, state = (
                jax.tree.map(lambda x, p=p: x[p], tree.get(f"layer_{i}", {}))
                for tree in (periods, period_states)
            )
            layers.append(Layer(spec, params, state))
    ends = {k: v for k, v in numbers.items() if not k.startswith("multi_token")}
    return LayeredModel(config, model.execution, ends, tuple(layers))


def _is_beyond_known(spec: LayerSpec) -> bool:
    """Whether the layer has what nothing here has learned of."""
    attention, ffn = spec.attention, spec.ffn
    is_own = isinstance(attention, AttentionConfig) and (
        attention.value_norm or attention.values_from_keys
    )
    if isinstance(ffn, MoEConfig):
        router = ffn.router
        is_own |= router.gates_on == "inputs" or router.expert_scales or router.input_norm
        is_own |= ffn.latent_width is not None or ffn.shared_d_ff is not None
        is_own |= router.choice == "token"
    beyond = ("geglu", "bounded_swiglu", "relu2")
    is_own |= isinstance(ffn, NoFeedForwardConfig) or ffn.activation in beyond
    is_own |= not spec.has_attention
    return is_own or spec.dense is not None or spec.output_scale


Taps = dict[str, jax.Array]
"""What a layer multiplies by its weights, as far as it is seen:

    attention      [B, L, D] for queries, keys and values
    heads          [B, L, H, C] for the output projection
    ffn            [B, L, D] for a dense layer, the router and the experts
    hidden         [B, L, F] for a dense layer's down projection
    shared         [B, L, F] for that of shared experts
    router_logits  float32 [B, L, E]
"""


def run_layer(model: LayeredModel, layer: Layer, x_BLD: Any, step: Step) -> tuple[jax.Array, Taps]:
    """The layer's result and what its weights met."""
    config = dataclasses.replace(
        model.config, num_layers=1, prefix=(), pattern=(layer.spec,), early_exit=None,
        multi_token=None, exit_spacing=None,
    )  # fmt: skip
    return _run(layer.spec, config, model.execution, layer.params, layer.router_state, x_BLD, step)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    spec: LayerSpec,
    config: ModelConfig,
    execution: ExecutionConfig,
    params: Tree,
    router_state: Tree,
    x_BLD: jax.Array,
    step: Step,
) -> tuple[jax.Array, Taps]:
    taps: Taps = {}
    with nn.intercept_methods(partial(_tap, taps)):
        outputs: Any = Block(spec, config, execution).apply(
            {"params": params, "router_state": router_state}, x_BLD, step, None, mutable=["router"]
        )
    (out_BLD, *_), _ = outputs
    return out_BLD, taps


def _tap(taps: Taps, method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Keeps what a layer's products read; see flax's nn.intercept_methods."""
    result, module, name = method(*args, **kwargs), context.module, context.method_name
    if isinstance(module, Block) and name == "_read":
        taps[args[1].removesuffix("_norm")] = result
    elif name == "_attended" and module.name == "attention":
        taps["heads"] = result
    elif name == "_router_logits":
        taps["router_logits"] = result[0]
    elif isinstance(module, SwiGLU) and name == "__call__":
        params = dict(module.variables["params"])
        taps["hidden" if module.name == "ffn" else "shared"] = _hidden(
            module.config, params, args[0]
        )
    return result


def _hidden(config: DenseConfig, params: Tree, x_BLD: jax.Array) -> jax.Array:
    """What a SwiGLU's down projection reads; the compiler joins it with the layer's own."""
    h_BL2F = jnp.einsum("BLD,DiF->BLiF", x_BLD, params["gate_up"].astype(x_BLD.dtype))
    if config.bias:
        h_BL2F += params["gate_up_bias"].astype(x_BLD.dtype)[None, None]
    return jax.nn.silu(h_BL2F[:, :, 0]) * h_BL2F[:, :, 1]


def ends_model(model: LayeredModel) -> Transformer:
    """A model of no more than this one's ends, for its methods _embedded, finish, unembedding."""
    return Transformer(
        dataclasses.replace(model.config, early_exit=None, multi_token=None), model.execution
    )


@partial(jax.jit, static_argnums=0)
def embed(ends: Transformer, params: Tree, tokens_BL: jax.Array) -> jax.Array:
    """What the first layer reads."""
    return ends.apply({"params": params}, tokens_BL, method="_embedded")  # pyright: ignore[reportReturnType]
