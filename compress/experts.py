"""Fewer experts by merging them, and experts made into a dense layer.

Merging: an expert that goes leaves its weights to the kept one whose results are most alike
(HC-SMoE, 2024); the hidden units are matched first, as their order means nothing, and weights are
averaged by load (M-SMoE, 2024). The router's columns are those of the kept experts.

Dense: the experts are grouped, each group's average stands beside the others along d_ff, and its
result is multiplied by the mean of its gates: exact where gates don't depend on the token.

T tokens, D d_model, F d_ff, E experts, J groups.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from compress.importance import Sums, expert_hidden, expert_result, expert_scores
from compress.layered import Layer, LayeredModel, Tree
from compress.prune import ExpertScore, kept_units
from configs.architecture import ModelConfig
from configs.checks import require
from configs.feed_forward import DenseConfig, MoEConfig


def with_merged_experts(layer: Layer, kept_E: np.ndarray, sums: Sums) -> Layer:
    """The layer in which each kept expert is the average of itself and of those that go to it; the
    others are still there.

    Args:
      kept_E: experts that will stay.
    """
    ffn, moe = layer.spec.ffn, dict(layer.params["moe"])
    assert isinstance(ffn, MoEConfig)
    group_of_E = nearest(results_of(layer, sums["probes"]), kept_E)
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        if name in moe:
            moe[name] = moe[name].copy()
    for e in kept_E:
        members = np.nonzero(group_of_E == e)[0]
        if len(members) > 1:
            merged = averaged(layer.params["moe"], members, int(e), sums["loads"])
            for name, value in merged.items():
                moe[name][e] = value
    return dataclasses.replace(layer, params=layer.params | {"moe": moe})


def results_of(layer: Layer, x_TD: np.ndarray) -> np.ndarray:
    """Each expert's results on the same tokens, [E, T * D]."""
    ffn, moe = layer.spec.ffn, layer.params["moe"]
    assert isinstance(ffn, MoEConfig)
    return np.stack(
        [
            expert_result(moe, e, expert_hidden(ffn, moe, e, x_TD)).reshape(-1)
            for e in range(ffn.num_experts)
        ]
    )


def nearest(results_EX: np.ndarray, kept_E: np.ndarray) -> np.ndarray:
    """The kept expert whose results have the greatest cosine with each one's, int [E]."""
    unit_EX = results_EX / np.maximum(np.linalg.norm(results_EX, axis=1, keepdims=True), 1e-30)
    nearest_E = kept_E[np.argmax(unit_EX @ unit_EX[kept_E].T, axis=1)]
    nearest_E[kept_E] = kept_E
    return nearest_E


def averaged(moe: Tree, members: np.ndarray, center: int, loads_E: np.ndarray) -> Tree:
    """The mean of some experts' weights by their loads, hidden units in the order of `center`'s."""
    shares = np.maximum(loads_E[members], 1e-6)
    shares = (shares / shares.sum()).astype(np.float32)
    merged: Tree = {}
    for share, e in zip(shares, members, strict=True):
        units = matched_units(moe, center, int(e))
        own = {"gate_up": moe["gate_up"][e][..., units], "down": moe["down"][e][units]}
        if "gate_up_bias" in moe:
            own["gate_up_bias"] = moe["gate_up_bias"][e][..., units]
            own["down_bias"] = moe["down_bias"][e]
        for name, value in own.items():
            merged[name] = merged.get(name, 0.0) + share * value
    return merged


def matched_units(moe: Tree, center: int, other: int) -> np.ndarray:
    """For each hidden unit of one expert the unit of another that is most like it, each once."""
    if center == other:
        return np.arange(moe["down"].shape[1])
    gate_up, down = moe["gate_up"], moe["down"]
    alike_FF = gate_up[center].reshape(-1, down.shape[1]).T @ gate_up[other].reshape(
        -1, down.shape[1]
    )
    alike_FF = alike_FF + down[center] @ down[other].T
    return linear_sum_assignment(alike_FF, maximize=True)[1]


def dense_layer(layer: Layer, sums: Sums, groups: int) -> Layer:
    """The layer with a dense feed-forward part in place of its experts: `groups` of them beside
    each other, and the shared ones.

    Raises:
      UserError: experts of another activation, with biases or a gate on the shared ones; more
        groups than experts.
    """
    ffn, moe = layer.spec.ffn, layer.params["moe"]
    assert isinstance(ffn, MoEConfig)
    require(
        ffn.activation == "swiglu" and not ffn.bias and not ffn.shared_gate,
        "experts with biases, another activation than SwiGLU or a gate on the shared ones make no "
        "dense layer: prune experts instead (--experts)",
    )
    require(
        1 <= groups <= ffn.num_experts,
        f"dense={groups} must lie between 1 and the {ffn.num_experts} experts of a layer",
    )
    gates_E = sums["gates"] / sums["tokens"]
    centers = np.sort(np.argsort(-expert_scores(sums, "reap") * gates_E, kind="stable")[:groups])
    group_of_E = nearest(results_of(layer, sums["probes"]), centers)
    gate_ups, downs = [], []
    for center in centers:
        members = np.nonzero(group_of_E == center)[0]
        merged = averaged(moe, members, int(center), sums["gates"])
        gate_ups.append(merged["gate_up"])
        downs.append(merged["down"] * np.float32(gates_E[members].sum()))
    if "shared" in moe:
        gate_ups.append(moe["shared"]["gate_up"])
        downs.append(moe["shared"]["down"])
    params = {k: v for k, v in layer.params.items() if k != "moe"}
    params["ffn"] = {
        "gate_up": np.concatenate(gate_ups, axis=-1),
        "down": np.concatenate(downs, axis=0),
    }
    width = params["ffn"]["down"].shape[0]
    spec = dataclasses.replace(layer.spec, ffn=DenseConfig(d_ff=width))
    return Layer(spec, params, {})


def dense_model(model: LayeredModel, sums: Sequence[Sums], groups: int) -> LayeredModel:
    """The model with `dense_layer` for each layer of experts.

    Raises:
      UserError: see `dense_layer`.
    """
    layers = tuple(
        dense_layer(layer, own, groups) if isinstance(layer.spec.ffn, MoEConfig) else layer
        for layer, own in zip(model.layers, sums, strict=False)
    )
    return dataclasses.replace(model, layers=layers)


def merged_model(
    model: LayeredModel, target: ModelConfig, sums: Sequence[Sums], by: ExpertScore
) -> LayeredModel:
    """The model whose experts that will stay (`compress.prune.prune` with the same arguments) have
    taken in the others.
    """
    specs = [*target.prefix, *target.pattern * target.num_periods]
    layers = tuple(
        with_merged_experts(layer, kept_units(layer, spec, own, by)["E"], own)
        if isinstance(layer.spec.ffn, MoEConfig)
        else layer
        for layer, spec, own in zip(model.layers, specs, sums, strict=False)
    )
    return dataclasses.replace(model, layers=layers)
