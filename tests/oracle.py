"""The model in plain numpy, token by token, written from the equations and not from the code.

Parameters are the model's own tree; everything is float64.
"""

import dataclasses

import numpy as np

from configs.architecture import (
    AttentionConfig,
    DenseConfig,
    LatentAttentionConfig,
    ModelConfig,
    MoEConfig,
)


def transformer(params, config: ModelConfig, tokens: np.ndarray, positions: np.ndarray):
    """Hidden states [L, D] of one row of packed documents, and logits [L, V]."""
    params = _float64(params)
    documents = np.cumsum(np.concatenate([[0], positions[1:] != positions[:-1] + 1]))
    x = params["embedding"][tokens]
    layers = [(spec, params[f"prefix_{i}"]) for i, spec in enumerate(config.prefix)]
    for period in range(config.num_periods):
        layers += [
            (spec, _pick(params["periods"][f"layer_{i}"], period))
            for i, spec in enumerate(config.pattern)
        ]
    for spec, layer in layers:
        h = rms_norm(x, layer["attention_norm"]["scale"], config.norm_eps)
        attend = attention if isinstance(spec.attention, AttentionConfig) else latent_attention
        x = x + attend(h, layer["attention"], spec.attention, positions, documents)
        h = rms_norm(x, layer["ffn_norm"]["scale"], config.norm_eps)
        if isinstance(spec.ffn, DenseConfig):
            x = x + np.stack([swiglu(t, **layer["ffn"]) for t in h])
        else:
            logits = router_logits(h, layer["moe"], spec.ffn, positions, documents)
            x = x + np.stack(
                [moe(t, row, layer["moe"], spec.ffn) for t, row in zip(h, logits, strict=True)]
            )
    x = rms_norm(x, params["final_norm"]["scale"], config.norm_eps)
    w = params["embedding"].T if config.tie_embeddings else params["output"]
    return x, x @ w


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotate(vector, position, base):
    """RoPE on one head: the pair (d, d + C/2) turns by position * base^(-2d/C)."""
    half = len(vector) // 2
    out = np.empty_like(vector)
    for d in range(half):
        angle = position * base ** (-2 * d / len(vector))
        a, b = vector[d], vector[d + half]
        out[d] = a * np.cos(angle) - b * np.sin(angle)
        out[d + half] = b * np.cos(angle) + a * np.sin(angle)
    return out


def attention(x, w, config: AttentionConfig, positions, documents):
    length, (_, heads, width) = len(x), w["q"].shape
    out = np.zeros((length, w["o"].shape[-1]))
    for i in range(length):
        for head in range(heads):
            group = head // (heads // config.num_kv_heads)
            q = rotate(x[i] @ w["q"][:, head], positions[i], config.rope_base)
            scores, values = [], []
            for j in range(length):
                distance = positions[i] - positions[j]
                if documents[i] != documents[j] or distance < 0:
                    continue
                is_far = config.window_size is not None and distance >= config.window_size
                if is_far and positions[j] >= config.num_sinks:
                    continue
                k = rotate(x[j] @ w["kv"][:, 0, group], positions[j], config.rope_base)
                scores.append(q @ k / np.sqrt(width))
                values.append(x[j] @ w["kv"][:, 1, group])
            weights = np.exp(np.array(scores) - max(scores))
            weights /= weights.sum()
            out[i] += (weights[:, None] * np.array(values)).sum(0) @ w["o"][head]
    return out


def latent_attention(
    x, w, config: LatentAttentionConfig, positions, documents, rope_everything=False
):
    """Every head's own keys and values; `rope_everything` is a wrong version that turns all of a
    key."""
    nope, base, rank = config.nope_head_dim, config.rope_base, config.latent_rank
    down = x @ w["kv_down"]
    latent = rms_norm(down[:, :rank], w["kv_norm"]["scale"], 1e-6)
    bottleneck = x
    if config.query_rank is not None:
        bottleneck = rms_norm(x @ w["q_down"], w["q_norm"]["scale"], 1e-6)
    out = np.zeros_like(x)
    for head in range(config.num_heads):
        keys, values = [], []
        for j in range(len(x)):
            up = latent[j] @ w["kv_up"][:, head]
            shared = rotate(down[j, rank:], positions[j], base)
            own = rotate(up[:nope], positions[j], base) if rope_everything else up[:nope]
            keys.append(np.concatenate([own, shared]))
            values.append(up[nope:])
        for i in range(len(x)):
            q = bottleneck[i] @ w["q"][:, head]
            own = rotate(q[:nope], positions[i], base) if rope_everything else q[:nope]
            q = np.concatenate([own, rotate(q[nope:], positions[i], base)])
            seen = [j for j in range(i + 1) if documents[j] == documents[i]]
            scores = np.array([q @ keys[j] / np.sqrt(len(q)) for j in seen])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            mixed = sum(weight * values[j] for weight, j in zip(p, seen, strict=True))
            out[i] += mixed @ w["o"][head]
    return out


def swiglu(x, gate_up, down):
    gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
    return (gate / (1 + np.exp(-gate)) * up) @ down


def router_logits(x, w, config: MoEConfig, positions, documents):
    context = config.router.context
    if context is None:
        return x @ w["router"]
    if context.kind == "causal":
        seen = attention(x, w["context"], context.attention(), positions, documents)
        return x @ w["router"] + seen
    out = []
    for t in x:
        q, k, v = (t @ w["correlation"]["qkv"][:, i] for i in range(3))
        affinity = np.exp(np.outer(q, k))
        out.append(affinity / affinity.sum(1, keepdims=True) @ v)
    return np.stack(out)


def moe(x, logits, w, config: MoEConfig):
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    chosen = np.argsort(-scores, kind="stable")[: config.router.top_k]
    gates = scores[chosen]
    if config.router.normalize_gates:
        gates = gates / gates.sum()
    out = sum(
        g * swiglu(x, w["gate_up"][e], w["down"][e]) for g, e in zip(gates, chosen, strict=True)
    )
    if config.num_shared_experts:
        out = out + swiglu(x, **w["shared"])
    return out


def _float64(tree):
    if isinstance(tree, dict):
        return {k: _float64(v) for k, v in tree.items()}
    return np.asarray(tree, np.float64)


def _pick(tree, index):
    if isinstance(tree, dict):
        return {k: _pick(v, index) for k, v in tree.items()}
    return tree[index]


def multi_token(params, config: ModelConfig, hidden, tokens, positions, read_current=False):
    """Hidden states [depth, L, D] of the modules that predict further ahead, of one row.

    A module is a model of one layer whose embeddings are the projected pairs. `read_current` is a
    wrong version whose modules read the embedding of a place too early.
    """
    params, layer = _float64(params), config.multi_token.layer
    single = dataclasses.replace(
        config, prefix=(), pattern=(layer,), num_layers=1, tie_embeddings=False, multi_token=None
    )
    states = []
    for k in range(1, config.multi_token.depth + 1):
        w = params[f"multi_token_{k - 1}"]
        pairs = []
        for t in range(len(tokens)):
            place = t + k - 1 if read_current else t + k
            token = params["embedding"][tokens[place]] if place < len(tokens) else 0 * hidden[t]
            h = rms_norm(hidden[t], w["hidden_norm"]["scale"], config.norm_eps)
            e = rms_norm(token, w["token_norm"]["scale"], config.norm_eps)
            pairs.append(np.concatenate([h, e]) @ w["projection"])
        one = {
            "embedding": np.stack(pairs),
            "periods": {"layer_0": _stacked(w["layer"])},
            "final_norm": w["norm"],
            "output": params["embedding"].T,
        }
        hidden, _ = transformer(one, single, np.arange(len(tokens)), positions)
        states.append(hidden)
    return np.stack(states)


def _stacked(tree):
    if isinstance(tree, dict):
        return {k: _stacked(v) for k, v in tree.items()}
    return tree[None]
