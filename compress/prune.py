"""Structured pruning: which units of a model stay, and the smaller model that they make.

A unit goes from every weight that has it: a channel from gate, up and down; a head from queries and
output, its group from keys and values; a channel of d_model from every weight, norm and table; an
expert from the router, its bias on the choice, and the experts' stacks.

D d_model, H query heads, G key/value heads, C head_dim, F d_ff, S width of shared experts, E
experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from compress.importance import Sums, expert_scores, influence
from compress.layered import Layer, LayeredModel, Tree
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.checks import require
from configs.feed_forward import DenseConfig, MoEConfig

ExpertScore = Literal["reap", "frequency", "norm"]
Kept = dict[str, np.ndarray]
"""Units that stay by letter (D H G F S E), sorted; "F" of a layer with experts is [E, F], of those
that stay, each its own."""

GROUPED_QUERY = {
    **{"q": "DHC", "kv": "D2GC", "o": "HCD", "q_bias": "HC", "kv_bias": "2GC", "o_bias": "D"},
    **{"sink_logits": "H", "q_norm.scale": "C", "k_norm.scale": "C"},
}
DENSE = {"gate_up": "D2F", "down": "FD", "gate_up_bias": "2F", "down_bias": "D"}
MOE = {
    **{"router": "DE", "router_bias": "E", "correlation.qkv": "D3E", "shared_gate": "D"},
    **{"gate_up": "ED2F", "down": "EFD", "gate_up_bias": "E2F", "down_bias": "ED"},
    **{"shared.gate_up": "D2S", "shared.down": "SD"},
    **{"context.q": "Dxx", "context.kv": "D2xx", "context.o": "xxE"},
}
NORMS = ("attention_norm", "ffn_norm", "attention_norm_after", "ffn_norm_after")


@dataclass(frozen=True)
class PrunedLayer:
    """What a layer lost, for a report."""

    number: int
    heads: tuple[int, ...]
    channels: int
    experts: tuple[int, ...]


def prune(
    model: LayeredModel,
    target: ModelConfig,
    sums: Sequence[Sums],
    *,
    by: ExpertScore = "reap",
) -> tuple[LayeredModel, list[PrunedLayer]]:
    """The model with the most important units of each kind, as many as the target has.

    Args:
      target: the model's config shrunk (compress/sizes.py).
      sums: of `compress.importance.measure`.
      by: what experts are judged by.
    """
    specs = [*target.prefix, *target.pattern * target.num_periods]
    width = _best(np.sum([s["reads"] for s in sums], axis=0), target.d_model)
    pruned, lost = [], []
    for i, (layer, spec) in enumerate(zip(model.layers, specs, strict=True)):
        kept = kept_units(layer, spec, sums[i], by) | {"D": width}
        pruned.append(prune_layer(layer, spec, kept, sums[i]))
        lost.append(_lost(i, layer, kept))
    ends = _pruned_ends(model.ends, width, sums[-1])
    return LayeredModel(target, model.execution, ends, tuple(pruned)), lost


def without_layers(
    model: LayeredModel, sums: Sequence[Sums], count: int
) -> tuple[LayeredModel, list[Sums], list[int]]:
    """The model with so many layers, those of the greatest influence, their sums, and the numbers
    of those that went.

    Raises:
      UserError: no such count.
    """
    total = len(model.layers)
    require(1 <= count <= total, f"layers={count} must lie between 1 and the model's {total}")
    influences = np.asarray([influence(s) for s in sums[:total]])
    stay = _best(influences, count).tolist()
    smaller = replace(model, layers=tuple(model.layers[i] for i in stay))
    gone = [i for i in range(total) if i not in stay]
    return smaller, [*(sums[i] for i in stay), sums[-1]], gone


def kept_units(layer: Layer, spec: LayerSpec, sums: Sums, by: ExpertScore) -> Kept:
    """The units that a layer keeps, but for d_model."""
    kept: Kept = {}
    before, after = layer.spec.attention, spec.attention
    if before != after:
        assert isinstance(before, AttentionConfig)
        assert isinstance(after, AttentionConfig)
        kept |= _kept_heads(sums["heads"], before, after)
    ffn = spec.ffn
    if isinstance(ffn, DenseConfig):
        return kept | {"F": _best(sums["channels"], ffn.d_ff)}
    assert isinstance(layer.spec.ffn, MoEConfig)
    assert isinstance(ffn, MoEConfig)
    experts = _kept_experts(expert_scores(sums, by), layer.spec.ffn, ffn)
    units_EF = np.stack([_best(units_F, ffn.d_ff) for units_F in sums["units"][experts]])
    kept |= {"E": experts, "F": units_EF}
    if "shared" in sums:
        kept["S"] = _best(sums["shared"], ffn.num_shared_experts * ffn.d_ff)
    return kept


def prune_layer(layer: Layer, spec: LayerSpec, kept: Kept, sums: Sums) -> Layer:
    """The layer with the kept units alone.

    The norms' scales make up for the energy that leaves with channels of d_model: a root mean
    square over fewer channels is another.
    """
    params: Tree = {}
    for name, tree in layer.params.items():
        if name in NORMS:
            row = 0 if name.startswith("attention") else 1
            is_read = not name.endswith("_after")
            factor = _norm_factor(sums["energy"][row], kept["D"]) if is_read else 1.0
            params[name] = {"scale": tree["scale"][kept["D"]] * np.float32(factor)}
        elif name == "attention":
            is_known = isinstance(spec.attention, AttentionConfig)
            params[name] = _take(tree, GROUPED_QUERY, kept) if is_known else tree
        else:
            params[name] = _take(tree, DENSE if name == "ffn" else MOE, kept)
    return Layer(spec, params, _pruned_state(layer.router_state, spec, kept))


def _pruned_state(state: Tree, spec: LayerSpec, kept: Kept) -> Tree:
    """Router state with the kept experts' bias; twins' warm-up ends with their number."""
    if not state or not isinstance(spec.ffn, MoEConfig):
        return {}
    moe = dict(state["moe"])
    if spec.ffn.router.warmup is None:
        moe.pop("warmup", None)
    if "state" in moe:
        moe["state"] = moe["state"].replace(bias_E=moe["state"].bias_E[kept["E"]])
    return {"moe": moe}


def _take(tree: Tree, letters: dict[str, str], kept: Kept, prefix: str = "") -> Tree:
    """The kept units of each weight, by the letters of its dims."""
    taken: Tree = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            taken[name] = _take(value, letters, kept, f"{path}.")
            continue
        dims = letters[path]
        for axis, letter in enumerate(dims):
            if letter not in kept:
                continue
            units = kept[letter]
            if units.ndim == 1:
                value = np.take(value, units, axis=axis)
            else:  # each expert's own channels
                shape = [
                    len(units) if d == "E" else units.shape[1] if d == "F" else 1 for d in dims
                ]
                value = np.take_along_axis(value, units.reshape(shape), axis=axis)
        taken[name] = np.ascontiguousarray(value)
    return taken


def _pruned_ends(ends: Tree, width: np.ndarray, last: Sums) -> Tree:
    pruned: Tree = {"embedding": np.ascontiguousarray(ends["embedding"][:, width])}
    if "output" in ends:
        pruned["output"] = np.ascontiguousarray(ends["output"][width])
    factor = np.float32(_norm_factor(last["energy"][0], width))
    pruned["final_norm"] = {"scale": ends["final_norm"]["scale"][width] * factor}
    return pruned


def _norm_factor(energy_D: np.ndarray, width: np.ndarray) -> float:
    """What a norm's scale is multiplied by when only these channels stay: 1 where all do, and
    sqrt(D / D') where the others were 0.
    """
    if len(width) == len(energy_D):
        return 1.0
    share = energy_D[width].sum() / max(energy_D.sum(), 1e-30)
    return float(np.sqrt(share * len(energy_D) / len(width)))


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """The units of the greatest scores, in order; of equal ones the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _kept_heads(scores_H: np.ndarray, before: AttentionConfig, after: AttentionConfig) -> Kept:
    each, kept_each = (c.num_heads // c.num_kv_heads for c in (before, after))
    scores_GR = scores_H.reshape(before.num_kv_heads, each)
    best_GR = np.stack([_best(scores_R, kept_each) for scores_R in scores_GR])
    groups = _best(np.take_along_axis(scores_GR, best_GR, axis=1).sum(1), after.num_kv_heads)
    heads = (groups[:, None] * each + best_GR[groups]).reshape(-1)
    return {"G": groups, "H": heads}


def _kept_experts(scores_E: np.ndarray, before: MoEConfig, after: MoEConfig) -> np.ndarray:
    """The best of all, or as many of each of the router's groups."""
    groups = before.router.num_groups or 1
    scores_JE = scores_E.reshape(groups, -1)
    best = [_best(scores, after.num_experts // groups) for scores in scores_JE]
    return np.concatenate([ids + j * scores_JE.shape[1] for j, ids in enumerate(best)])


def _lost(number: int, layer: Layer, kept: Kept) -> PrunedLayer:
    def gone(letter: str, count: int) -> tuple[int, ...]:
        return (
            tuple(sorted(set(range(count)) - set(kept[letter].tolist()))) if letter in kept else ()
        )

    ffn = layer.spec.ffn
    experts = gone("E", ffn.num_experts) if isinstance(ffn, MoEConfig) else ()
    channels = ffn.d_ff - kept["F"].shape[-1]
    return PrunedLayer(number, gone("H", layer.spec.attention.num_heads), channels, experts)
