"""Importance of a model's units, measured on text: how much each adds to the residual stream.

A unit that adds nothing has importance 0, and its removal changes nothing. Sources: Minitron
(Muralidharan et al. 2024) for heads, channels and widths; ShortGPT (2024) for layers; REAP (Lasby
et al. 2025) for experts.

B batch, L length, T tokens, D d_model, H heads, C head_dim, F d_ff, S width of shared experts, E
experts, K experts per token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from compress.layered import Layer, LayeredModel, Taps, embed, ends_model, run_layer
from configs.feed_forward import MoEConfig
from model.router import Routing, route
from model.step import Step

Progress = Callable[[int, int], None]
"""Called with layers done and layers in all."""
Sums = dict[str, np.ndarray]
"""Sums over the tokens seen, by unit:

    tokens      [] how many
    cosine      [] of a layer's input and result
    heads       [H] size of what each head adds
    channels    [F] of a dense layer: size of what each channel adds
    shared      [S] of shared experts, the same
    reads       [D] size of what the layer's branches read of each embedding channel
    energy      [2, D] squares of what attention and feed-forward read, before the norm's scale
    loads       [E] tokens of each expert
    gates       [E] their gates
    sizes       [E] sizes of the expert's results
    gated       [E] sizes of the results times their gates
    units       [E, F] sizes of what each of an expert's channels adds, times gates
    probes      [P, D] what the experts read of the first tokens; no sum
"""


def measure(
    model: LayeredModel,
    steps: Sequence[Step],
    *,
    known: Sequence[Sums] = (),
    keep: Callable[[int, Sums], None] = lambda i, sums: None,
    progress: Progress = lambda done, total: None,
) -> list[Sums]:
    """The sums of each layer; one more entry is what the final norm reads ("energy" [1, D]).

    Args:
      known: sums of the first layers, from a pass that was interrupted.
      keep: is given each layer's as it is measured.
    """
    ends, total = ends_model(model), len(model.layers)
    if len(known) > total:
        return list(known)
    xs = [embed(ends, model.ends, step.tokens_BL) for step in steps]
    measured = list(known)
    for i, layer in enumerate(model.layers):
        sums: Sums = {}
        for b, step in enumerate(steps):
            out_BLD, taps = run_layer(model, layer, xs[b], step)
            if i >= len(known):
                _add(sums, layer_sums(layer, np.asarray(xs[b]), np.asarray(out_BLD), taps))
            xs[b] = out_BLD
        if i >= len(known):
            measured.append(sums)
            keep(i, sums)
        progress(i + 1, total)
    last: Sums = {}
    for x_BLD in xs:
        x_TD = np.asarray(x_BLD).reshape(-1, model.config.d_model)
        unit_TD = x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + model.config.norm_eps)
        _add(last, {"energy": (unit_TD**2).sum(0)[None], "reads": np.abs(unit_TD).sum(0)})
    measured.append(last)
    keep(total, last)
    return measured


PROBES = 256
"""Tokens on which experts are compared."""


def _add(sums: Sums, more: Sums) -> None:
    for name, value in more.items():
        if name == "probes":
            sums.setdefault(name, value)
            continue
        sums[name] = sums[name] + value if name in sums else np.asarray(value, np.float64)


def layer_sums(layer: Layer, x_BLD: np.ndarray, out_BLD: np.ndarray, taps: Taps) -> Sums:
    """One batch's part of a layer's sums; rows are full: every place is a token."""
    width = x_BLD.shape[-1]
    x_TD, out_TD = x_BLD.reshape(-1, width), out_BLD.reshape(-1, width)
    lengths_T = np.linalg.norm(x_TD, axis=-1) * np.linalg.norm(out_TD, axis=-1)
    cosine = float(((x_TD * out_TD).sum(-1) / np.maximum(lengths_T, 1e-30)).sum())
    sums: Sums = {"tokens": np.asarray(float(len(x_TD))), "cosine": np.asarray(cosine)}
    seen = {name: np.asarray(x) for name, x in taps.items()}
    sums |= _read_sums(layer, seen)
    if "heads" in seen:
        sums["heads"] = _head_sizes(seen["heads"], np.asarray(layer.params["attention"]["o"]))
    if "hidden" in seen:
        sums["channels"] = _channel_sizes(seen["hidden"], layer.params["ffn"]["down"])
    if "shared" in seen:
        sums["shared"] = _channel_sizes(seen["shared"], layer.params["moe"]["shared"]["down"])
    if isinstance(layer.spec.ffn, MoEConfig):
        read_TD = seen["ffn"].reshape(-1, width)
        sums |= expert_sums(layer, read_TD, seen["router_logits"])
        sums["probes"] = read_TD[:PROBES]
    return sums


def _read_sums(layer: Layer, seen: dict[str, np.ndarray]) -> Sums:
    reads, energy = 0.0, []
    for name in ("attention", "ffn"):
        read_TD = seen[name].reshape(-1, seen[name].shape[-1])
        norm = layer.params.get(f"{name}_norm")
        scale_D = np.ones(read_TD.shape[-1]) if norm is None else np.asarray(norm["scale"])
        safe_D = np.where(scale_D == 0, np.inf, scale_D)
        energy.append(((read_TD / safe_D) ** 2).sum(0))
        reads = reads + np.abs(read_TD).sum(0)
    return {"reads": np.asarray(reads), "energy": np.stack(energy)}


def _head_sizes(heads_BLHC: np.ndarray, w_o_HCD: np.ndarray) -> np.ndarray:
    """Sums over tokens of the length of each head's part of the output projection, [H]."""
    rows_HTC = heads_BLHC.reshape(-1, *heads_BLHC.shape[2:]).swapaxes(0, 1)
    gram_HCC = w_o_HCD @ w_o_HCD.swapaxes(1, 2)
    squares_HT = ((rows_HTC @ gram_HCC) * rows_HTC).sum(-1)
    return np.sqrt(np.maximum(squares_HT, 0)).sum(-1)


def _channel_sizes(hidden_BLF: np.ndarray, w_down_FD: Any) -> np.ndarray:
    """Sums over tokens of the length of what each channel adds, [F]."""
    hidden_TF = hidden_BLF.reshape(-1, hidden_BLF.shape[-1])
    return np.abs(hidden_TF).sum(0) * np.linalg.norm(np.asarray(w_down_FD), axis=-1)


@partial(jax.jit, static_argnums=1)
def _route(router_logits_TE: jax.Array, config: Any, state: Any) -> Routing:
    return route(router_logits_TE, config, state)


def routing_of(layer: Layer, router_logits_BLE: Any) -> tuple[np.ndarray, np.ndarray]:
    """Each token's experts, int [T, K], -1 for none, and gates, float [T, K]."""
    assert isinstance(layer.spec.ffn, MoEConfig)
    state = layer.router_state.get("moe", {}).get("state")
    logits_TE = router_logits_BLE.reshape(-1, router_logits_BLE.shape[-1])
    routing = _route(logits_TE, layer.spec.ffn.router, state)
    return np.asarray(routing.expert_ids_TK), np.asarray(routing.gates_TK)


def expert_sums(layer: Layer, x_TD: np.ndarray, router_logits_BLE: np.ndarray) -> Sums:
    """Loads, gates and sizes of each expert's results on the tokens that are its own."""
    ids_TK, gates_TK = routing_of(layer, router_logits_BLE)
    ffn, moe = layer.spec.ffn, layer.params["moe"]
    assert isinstance(ffn, MoEConfig)
    sums: Sums = {name: np.zeros(ffn.num_experts) for name in ("loads", "gates", "sizes", "gated")}
    sums["units"] = np.zeros((ffn.num_experts, ffn.d_ff))
    for e in range(ffn.num_experts):
        tokens, choice = np.nonzero(ids_TK == e)
        if not len(tokens):
            continue
        gates_T = gates_TK[tokens, choice]
        hidden_TF = expert_hidden(ffn, moe, e, x_TD[tokens])
        sizes_T = np.linalg.norm(expert_result(moe, e, hidden_TF), axis=-1)
        for name, value in (
            ("loads", len(tokens)),
            ("gates", gates_T.sum()),
            ("sizes", sizes_T.sum()),
            ("gated", (gates_T * sizes_T).sum()),
        ):
            sums[name][e] = value
        down_F = np.linalg.norm(moe["down"][e], axis=-1)
        sums["units"][e] = (gates_T[:, None] * np.abs(hidden_TF)).sum(0) * down_F
    return sums


def expert_hidden(ffn: MoEConfig, moe: Any, e: int, x_TD: np.ndarray) -> np.ndarray:
    """What an expert's down projection reads, float32 [T, F]."""
    w_D2F = np.asarray(moe["gate_up"][e])
    h_T2F = (x_TD @ w_D2F.reshape(len(w_D2F), -1)).reshape(len(x_TD), 2, -1)
    if ffn.bias:
        h_T2F = h_T2F + moe["gate_up_bias"][e]
    gate_TF, up_TF = h_T2F[:, 0], h_T2F[:, 1]
    if ffn.activation == "clamped_swiglu":
        assert ffn.swiglu_limit is not None
        assert ffn.swiglu_alpha is not None
        gate_TF = np.minimum(gate_TF, ffn.swiglu_limit)
        up_TF = np.clip(up_TF, -ffn.swiglu_limit, ffn.swiglu_limit) + 1
        return up_TF * gate_TF * _sigmoid(ffn.swiglu_alpha * gate_TF)
    return gate_TF * _sigmoid(gate_TF) * up_TF


def expert_result(moe: Any, e: int, hidden_TF: np.ndarray) -> np.ndarray:
    """An expert's result, float32 [T, D]."""
    out_TD = hidden_TF @ np.asarray(moe["down"][e])
    return out_TD + moe["down_bias"][e] if "down_bias" in moe else out_TD


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def influence(sums: Sums) -> float:
    """How far a layer turns the residual stream, 1 - E cos(in, out): block influence."""
    return 1.0 - float(sums["cosine"] / sums["tokens"])


def expert_scores(sums: Sums, by: str) -> np.ndarray:
    """What an expert is judged by, [E]: "reap", mean of gate times size of the result over the
    expert's own tokens; "norm", mean size; "frequency", tokens. 0 for one that nothing chose.
    """
    loads_E = np.maximum(sums["loads"], 1)
    named = {"reap": sums["gated"] / loads_E, "norm": sums["sizes"] / loads_E}
    return named[by] if by in named else sums["loads"]
