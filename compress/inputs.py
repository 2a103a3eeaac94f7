"""What a layer's weights read on the calibration text: sums from which rounding learns.

T tokens, K inputs of a weight, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.importance import expert_hidden, routing_of
from compress.layered import Layer, LayeredModel, run_layer
from configs.feed_forward import MoEConfig
from model.step import Step

READ_BY = {
    "attention.q": "attention",
    "attention.kv": "attention",
    "attention.o": "heads",
    "ffn.gate_up": "ffn",
    "ffn.down": "hidden",
    "moe.shared.gate_up": "ffn",
    "moe.shared.down": "shared",
}
"""The inputs (see `compress.layered.Taps`) of each weight, by its path in a layer. Those of expert
e are "experts.e" of gate and up, and "hidden.e" of down."""


@dataclass
class InputSums:
    """Of one kind of inputs."""

    gram_KK: np.ndarray
    """Sum of x x^T, float64."""
    largest_K: np.ndarray
    """Of |x|."""
    total_K: np.ndarray
    """Sum of |x|."""
    tokens: int

    @classmethod
    def of(cls, x_TK: np.ndarray) -> "InputSums":
        size_TK = np.abs(x_TK)
        largest_K = size_TK.max(0, initial=0.0)
        gram_KK = (x_TK.T @ x_TK).astype(np.float64)
        return cls(gram_KK, largest_K, size_TK.sum(0, dtype=np.float64), len(x_TK))

    def __iadd__(self, more: "InputSums") -> "InputSums":
        self.gram_KK += more.gram_KK
        self.largest_K = np.maximum(self.largest_K, more.largest_K)
        self.total_K += more.total_K
        self.tokens += more.tokens
        return self

    def divided(self, factor_K: np.ndarray) -> "InputSums":
        """Of the inputs divided by factors."""
        return InputSums(
            self.gram_KK / np.outer(factor_K, factor_K),
            self.largest_K / factor_K,
            self.total_K / factor_K,
            self.tokens,
        )


Inputs = dict[str, InputSums]


def read_inputs(
    model: LayeredModel, layer: Layer, xs: Sequence[Any], steps: Sequence[Step]
) -> Inputs:
    """The sums of a layer's inputs, by name.

    Args:
      xs: what the layer reads, [B, L, D] of each batch.
    """
    inputs: Inputs = {}
    for x_BLD, step in zip(xs, steps, strict=True):
        _, taps = run_layer(model, layer, x_BLD, step)
        seen = {name: np.asarray(x) for name, x in taps.items() if name != "router_logits"}
        for name, x in seen.items():
            rows = x.reshape(x.shape[0] * x.shape[1], -1)
            _add(inputs, name, InputSums.of(rows))
        if isinstance(layer.spec.ffn, MoEConfig):
            _add_experts(inputs, layer, seen["ffn"], np.asarray(taps["router_logits"]))
    return inputs


def _add_experts(
    inputs: Inputs, layer: Layer, x_BLD: np.ndarray, router_logits_BLE: np.ndarray
) -> None:
    """What each expert reads of the tokens that are its own."""
    ffn = layer.spec.ffn
    assert isinstance(ffn, MoEConfig)
    ids_TK, _ = routing_of(layer, router_logits_BLE)
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    for e in range(ffn.num_experts):
        own_TD = x_TD[(ids_TK == e).any(1)]
        _add(inputs, f"experts.{e}", InputSums.of(own_TD))
        hidden_TF = expert_hidden(ffn, layer.params["moe"], e, own_TD)
        _add(inputs, f"hidden.{e}", InputSums.of(hidden_TF))


def _add(inputs: Inputs, name: str, more: InputSums) -> None:
    if name in inputs:
        inputs[name] += more
    else:
        inputs[name] = more


def grams_of(inputs: Inputs, path: str, count: int) -> list[np.ndarray] | None:
    """Sum of x x^T for each matrix of a weight; None: its inputs are not seen.

    Args:
      count: matrices that the weight stacks.
    """
    if path in READ_BY:
        found = inputs.get(READ_BY[path])
        return None if found is None else [found.gram_KK] * count
    name = {"moe.gate_up": "experts", "moe.down": "hidden"}.get(path)
    if name is None or f"{name}.0" not in inputs:
        return None
    return [inputs[f"{name}.{e}"].gram_KK for e in range(count)]
