"""Attention over a window and compressed entries in plain numpy, query by query, written from the
equations; float64.
"""

import numpy as np

from configs.compressed_attention import CompressedAttentionConfig

EPS = 1e-6


def compressed_attention(x, w, config: CompressedAttentionConfig, positions, documents, wrong=""):
    """wrong: "result not turned back"; "too early" shows an entry from its first token on; "entry
    at its end" turns it by its last position; "no blocks before" of entries that overlap; "series
    exchanged"; "one softmax for all channels"; "a matrix for all" output groups; "dense" leaves the
    indexer out; "without the sink"."""
    c = config.compression
    out = np.zeros_like(x)
    keys = [turn(norm(x[j] @ w["kv"], w["kv_norm"]), positions[j], config) for j in range(len(x))]
    bottleneck = norm(x @ w["q_down"], w["q_norm"])
    starts = sorted({int(np.flatnonzero(documents == d)[0]) for d in documents})
    entries, index = {}, {}
    for d, start in zip(sorted(set(documents)), starts, strict=True):
        rows = x[documents == d]
        assert start + len(rows) <= len(x)
        entries[d] = [] if c is None else compress(rows, w["compressor"], config, wrong)
        if c is not None and c.indexer is not None:
            index[d] = compress(rows, w["indexer"]["compressor"], config, wrong)
    for i in range(len(x)):
        p, d = positions[i], documents[i]
        near = [
            keys[j]
            for j in range(len(x))
            if documents[j] == d and 0 <= p - positions[j] < config.window_size
        ]
        rate = 1 if c is None else c.rate
        done = [e for e in range(len(entries[d])) if (e + (wrong != "too early")) * rate <= p + 1]
        if c is not None and c.indexer is not None and wrong != "dense":
            own = x[i] @ w["indexer"]["weights"]
            asked = [
                turn(bottleneck[i] @ w["indexer"]["q"][:, h], p, config) for h in range(len(own))
            ]
            scores = [
                sum(a * max(q @ index[d][e], 0.0) for a, q in zip(own, asked, strict=True))
                for e in done
            ]
            best = np.argsort(-np.array(scores), kind="stable")[: c.indexer.top_k]
            done = [done[b] for b in best]
        seen = np.array(near + [entries[d][e] for e in done])
        groups = []
        for head in range(config.num_heads):
            q = norm(bottleneck[i] @ w["q"][:, head], None)
            q = turn(q, p, config)
            scores = seen @ q / np.sqrt(config.head_dim)
            sink = -np.inf if wrong == "without the sink" else w["sink_logits"][head]
            top = max(scores.max(), sink)
            weights = np.exp(scores - top)
            weights /= weights.sum() + np.exp(sink - top)
            mixed = weights @ seen
            groups.append(mixed if wrong == "result not turned back" else turn(mixed, -p, config))
        size = config.num_heads // config.num_output_groups
        for g in range(config.num_output_groups):
            own = np.array(groups[g * size : (g + 1) * size])
            matrix = w["o_down"][0 if wrong == "a matrix for all" else g]
            out[i] += np.einsum("kc,kcr->r", own, matrix) @ w["o_up"][g]
    return out


def compress(rows, w, config: CompressedAttentionConfig, wrong=""):
    """The entries of one document's tokens, which begin at position 0."""
    c = config.compression
    entries = []
    for e in range(len(rows) // c.rate):
        values, gates = [], []
        for block in (e - 1, e) if c.overlaps and wrong != "no blocks before" else (e,):
            if block < 0:
                continue
            series = c.num_series - 1 if block == e else 0
            if wrong == "series exchanged":
                series = c.num_series - 1 - series
            for place in range(c.rate):
                token = rows[block * c.rate + place]
                values.append(token @ w["kv"][:, series])
                gates.append(token @ w["gate"][:, series] + w["place_bias"][place, series])
        gates = np.array(gates)
        if wrong == "one softmax for all channels":
            gates = gates.mean(1, keepdims=True)
        share = np.exp(gates - gates.max(0))
        entry = norm((share / share.sum(0) * np.array(values)).sum(0), w["norm"])
        at = (e + 1) * c.rate - 1 if wrong == "entry at its end" else e * c.rate
        entries.append(turn(entry, at, config))
    return entries


def norm(x, w):
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    return normed if w is None else normed * w["scale"]


def turn(vector, position, config: CompressedAttentionConfig):
    """RoPE on the last rotary_dim entries: pair (d, d + half) by position * base^(-2d / dims)."""
    count = config.rotary_dim
    half, first, out = count // 2, len(vector) - count, vector.copy()
    for d in range(half):
        angle = position * config.rope_base ** (-2 * d / count)
        a, b = vector[first + d], vector[first + d + half]
        out[first + d] = a * np.cos(angle) - b * np.sin(angle)
        out[first + d + half] = b * np.cos(angle) + a * np.sin(angle)
    return out
