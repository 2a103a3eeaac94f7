"""The model in plain numpy, token by token, written from the equations and not from the code.

Parameters are the model's own tree; everything is float64.
"""

import dataclasses

import numpy as np

from configs.architecture import LayerSpec, ModelConfig
from configs.attention import (
    AttentionConfig,
    LatentAttentionConfig,
    LocalSparseAttentionConfig,
    RelativeAttentionConfig,
)
from configs.compressed_attention import CompressedAttentionConfig
from configs.feed_forward import DenseConfig, MoEConfig
from configs.recurrent_attention import GatedDeltaConfig, Mamba2Config, ShortConvConfig
from tests.oracle_compressed import compressed_attention


def transformer(params, config: ModelConfig, tokens: np.ndarray, positions: np.ndarray, wrong=""):
    """Hidden states [L, D] of one row of packed documents, and logits [L, V].

    wrong: a plausible mistake that the parts below know by this name; tests/probes.py looks for it.
    """
    params = _float64(params)
    documents = np.cumsum(np.concatenate([[0], positions[1:] != positions[:-1] + 1]))
    x = params["embedding"][tokens] * config.embedding_scale
    if config.hyper_connections is not None:
        x = np.stack([x] * config.hyper_connections.num_streams, axis=1)
    layers = [(spec, params[f"prefix_{i}"]) for i, spec in enumerate(config.prefix)]
    for period in range(config.num_periods):
        layers += [
            (spec, _pick(params["periods"][f"layer_{i}"], period))
            for i, spec in enumerate(config.pattern)
        ]
    made, added = {}, config.per_layer_embeddings
    vectors = per_layer_vectors(params, config, tokens, x, wrong) if added else None
    for number, (spec, layer) in enumerate(layers):
        eps, scale = config.norm_eps, config.residual_scale
        if isinstance(spec.attention, AttentionConfig | LatentAttentionConfig):
            layer = layer | {"attention": layer["attention"] | {"made": made}}
        if added is not None:
            layer = layer | {"given": (vectors[:, number], added.activation)}
        if config.zero_centered_norms:
            layer = layer | {k: {"scale": 1 + v["scale"]} for k, v in layer.items() if "norm" in k}
        if config.hyper_connections is not None:
            x = over_streams(x, layer, spec, config, positions, documents, wrong)
            continue
        x = block(x, layer, spec, eps, positions, documents, wrong, scale)
    if config.hyper_connections is not None:
        x = last_streams(x, params["final_streams"], config, wrong)
    last = params["final_norm"]["scale"] + (1 if config.zero_centered_norms else 0)
    x = rms_norm(x, last, config.norm_eps) * config.logit_scale
    w = params["embedding"].T if config.tie_embeddings else params["output"]
    return x, bounded(x @ w, config.logit_cap)


def bounded(y, cap):
    return y if cap is None else cap * np.tanh(y / cap)


def block(x, layer, spec: LayerSpec, eps, positions, documents, wrong="", scale=1.0):
    """One layer, of the tokens that it chooses where it has a Mixture-of-Depths router."""
    if spec.depth is None:
        x = x + block_update(x, layer, spec, eps, positions, documents, wrong, scale)
        if "given" in layer:
            x = x + per_layer_update(x, layer, eps, wrong)
        return x * layer["output_scale"] if spec.output_scale else x
    r = x @ layer["depth_router"]
    chosen = np.flatnonzero(r > 0)
    if spec.depth.selection == "top_capacity":
        chosen = np.sort(np.argsort(-r)[: int(np.ceil(spec.depth.capacity * len(x)))])
    gates = 1 / (1 + np.exp(-r[chosen]))
    x = x.copy()
    update = block_update(x[chosen], layer, spec, eps, positions[chosen], documents[chosen])
    x[chosen] += gates[:, None] * update
    return x


def per_layer_vectors(params, config: ModelConfig, tokens, x, wrong=""):
    """Of each token and layer, [L, N, W]. wrong: "widths first" reads the table's columns with the
    layer inside; "normed together" takes one norm over all layers; "no context" leaves out the
    embedding's projection."""
    w, width = params["per_layer_embeddings"], config.per_layer_embeddings.width
    count, d_model = config.num_layers, x.shape[1]

    def by_layer(y):
        if wrong == "widths first":
            return y.reshape(len(y), width, count).swapaxes(1, 2)
        return y.reshape(len(y), count, width)

    scale = w["norm"]["scale"] + (1 if config.zero_centered_norms else 0)
    seen = x @ w["projection"] / np.sqrt(d_model)
    if wrong == "normed together":
        seen = rms_norm(seen, np.tile(scale, count), config.norm_eps)
        return (by_layer(seen) + by_layer(w["table"][tokens]) * np.sqrt(width)) / np.sqrt(2)
    seen = rms_norm(by_layer(seen), scale, config.norm_eps) * (wrong != "no context")
    return (seen + by_layer(w["table"][tokens]) * np.sqrt(width)) / np.sqrt(2)


def per_layer_update(x, layer, eps, wrong=""):
    """What a layer adds of its vectors. wrong: "vector gated" puts the activation on the vector."""
    (given, activation), w = layer["given"], layer["per_layer"]
    gate = x @ w["gate"]
    if wrong == "vector gated":
        gate, given = given, gate
    added = (silu_or_gelu(gate, activation) * given) @ w["projection"]
    return rms_norm(added, layer["per_layer_norm"]["scale"], eps)


def over_streams(x, layer, spec: LayerSpec, config: ModelConfig, positions, documents, wrong=""):
    """One layer on the streams x [L, N, D]."""
    eps, rest = config.norm_eps, (positions, documents, wrong)
    branches = (
        ("attention_streams", lambda y: attention_update(y, layer, spec, eps, *rest)),
        ("ffn_streams", lambda y: ffn_update(y, layer, spec, eps, *rest)),
    )
    for name, branch in branches:
        mixed = [mixing(token, layer[name], config, wrong) for token in x]
        read = np.stack([pre @ token for (pre, _, _), token in zip(mixed, x, strict=True)])
        pairs = zip(mixed, branch(read), x, strict=True)
        x = np.stack([np.outer(post, y) + share.T @ token for (_, post, share), y, token in pairs])
    return x


def mixing(token, w, config: ModelConfig, wrong=""):
    """Weights of reading [N] and writing [N], and the sharing [N, N], of one token's streams
    [N, D]. wrong: "shared the other way"; "rows first" of Sinkhorn's scaling; "normed apart" each
    stream by itself."""
    c = config.hyper_connections
    n, eps = c.num_streams, c.eps
    axis = -1 if wrong == "normed apart" else None
    flat = token / np.sqrt((token**2).mean(axis, keepdims=True) + config.norm_eps)
    logits = np.einsum("nd,ndk->k", flat, w["mix"]) * np.repeat(w["scale"], [n, n, n * n])
    logits = logits + w["bias"]
    pre, post = (1 / (1 + np.exp(-part)) for part in (logits[:n], logits[n : 2 * n]))
    share = np.exp(logits[2 * n :].reshape(n, n))
    share = share / share.sum(1, keepdims=True) + eps
    for step in range(2 * c.sinkhorn_steps - 1):
        axis = (step + (wrong == "rows first")) % 2
        share = share / (share.sum(axis, keepdims=True) + eps)
    return pre + eps, 2 * post, share.T if wrong == "shared the other way" else share


def last_streams(x, w, config: ModelConfig, wrong=""):
    """The sum of each token's streams. wrong: "mean of streams"."""
    if wrong == "mean of streams":
        return x.mean(1)
    out = []
    for token in x:
        flat = token / np.sqrt((token**2).mean() + config.norm_eps)
        logits = np.einsum("nd,ndk->k", flat, w["mix"]) * w["scale"] + w["bias"]
        out.append((1 / (1 + np.exp(-logits)) + config.hyper_connections.eps) @ token)
    return np.stack(out)


def block_update(x, layer, spec: LayerSpec, eps, positions, documents, wrong="", scale=1.0):
    """attention(norm(x)) + ffn(norm(x + attention(norm(x)))), or with the norms around or after."""
    first = 0.0
    if spec.has_attention:
        first = scale * attention_update(x, layer, spec, eps, positions, documents, wrong)
    if not spec.has_feed_forward:
        return first
    middle = x + first
    return first + scale * ffn_update(middle, layer, spec, eps, positions, documents, wrong)


def attention_update(x, layer, spec: LayerSpec, eps, positions, documents, wrong=""):
    def normed(y, name):
        return rms_norm(y, layer[name]["scale"], eps) if name in layer else y

    h = normed(x, "attention_norm")
    attend = ATTENTIONS[type(spec.attention)]
    mistake = {"wrong": wrong} if wrong else {}
    first = attend(h, layer["attention"], spec.attention, positions, documents, **mistake)
    return normed(first, "attention_norm_after")


def ffn_update(middle, layer, spec: LayerSpec, eps, positions, documents, wrong=""):
    """Of what attention left. With "token_experts" [L, K] among the layer's weights, those."""

    def normed(y, name):
        return rms_norm(y, layer[name]["scale"], eps) if name in layer else y

    h = normed(middle, "ffn_norm")
    if isinstance(spec.ffn, DenseConfig):
        kind = {"activation": spec.ffn.activation, "limit": spec.ffn.swiglu_limit}
        second = np.stack([swiglu(t, **layer["ffn"], **kind) for t in h])
    else:
        beside = 0.0
        if spec.dense is not None:
            kind = spec.dense.activation
            beside = np.stack([swiglu(t, **layer["ffn"], activation=kind) for t in h])
            beside, h = normed(beside, "dense_norm_after"), normed(middle, "moe_norm")
        read = h
        if spec.ffn.router.input_norm:
            read = rms_norm(middle, layer["moe"]["router_norm"]["scale"], eps)
            read = read / np.sqrt(middle.shape[1])
        logits = router_logits(read, layer["moe"], spec.ffn, positions, documents)
        given = layer["moe"].get("token_experts", [None] * len(h))
        rows = zip(h, logits, given, strict=True)
        second = np.stack([moe(t, row, layer["moe"], spec.ffn, wrong, g) for t, row, g in rows])
        second = beside + normed(second, "moe_norm_after")
    return normed(second, "ffn_norm_after")


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def turned(vector, position, w_norm, config: AttentionConfig, eps=1e-6):
    """A head of queries or keys with RoPE in its first entries, or in all, and the norm after it.
    w_norm: that norm's scale."""
    width = len(vector) if config.rotary_dim is None else config.rotary_dim
    if config.rotary_pairs == "across":
        half, out = len(vector) // 2, vector.copy()
        for d in range(width // 2):
            angle = position * config.rope_base ** (-2 * d / len(vector))
            a, b = vector[d], vector[d + half]
            out[d] = a * np.cos(angle) - b * np.sin(angle)
            out[d + half] = b * np.cos(angle) + a * np.sin(angle)
        return out
    first = rotate(vector[:width], position, config.rope_base)
    vector = np.concatenate([first, vector[width:]])
    return rms_norm(vector, w_norm, eps) if config.qk_norm_after_rope else vector


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


def projections(x, w, config: AttentionConfig, eps=1e-6, wrong=""):
    """Queries [L, H, C], keys and values [L, G, C], before RoPE. wrong: "clipped before the
    norm"."""
    both = (w["k"], w["k"]) if config.values_from_keys else (w["kv"][:, 0], w["kv"][:, 1])
    q, k, v = (np.einsum("ld,dhc->lhc", x, m) for m in (w["q"], *both))
    if config.bias:
        q, k, v = q + w["q_bias"], k + w["kv_bias"][0], v + w["kv_bias"][1]
    if config.value_norm:
        v = rms_norm(v, 1.0, eps)
    bound = np.inf if config.clip_qkv is None else config.clip_qkv
    if wrong == "clipped before the norm":
        q, k = np.clip(q, -bound, bound), np.clip(k, -bound, bound)
    if config.qk_norm is not None and not config.qk_norm_after_rope:
        axes = (-2, -1) if config.qk_norm == "all" else -1
        q, k = (
            y / np.sqrt((y**2).mean(axes, keepdims=True) + eps) * qk_scale(w, name, config)
            for y, name in ((q, "q_norm"), (k, "k_norm"))
        )
    if wrong == "clipped before the norm":
        return q, k, np.clip(v, -bound, bound)
    return tuple(np.clip(y, -bound, bound) for y in (q, k, v))


def qk_scale(w, name, config: AttentionConfig):
    """What normed queries or keys are multiplied by; 1 without a norm."""
    return w[name]["scale"] + (1 if config.zero_centered_qk_norm else 0) if name in w else 1.0


def attention(x, w, config: AttentionConfig, positions, documents, wrong=""):
    """wrong: "sink of the group" takes the logit of the key/value head; "sink with a value" counts
    the sink as one more token with the first one's value; "gate without a sigmoid" multiplies by
    the projection itself; "keys of its own tokens" lets a layer that shares keys make them of what
    it reads itself, "first of its kind" takes those of the first such layer; or of `projections`.
    """
    length, (_, heads, width) = len(x), w["q"].shape
    out = np.zeros((length, w["o"].shape[-1]))
    made, own = w.get("made", {}), dataclasses.replace(config, shares_keys=False)
    if not config.shares_keys and (wrong != "first of its kind" or own not in made):
        made[own] = (x, w)
    from_x, from_w = made[own] if config.shares_keys else (x, w)
    if config.shares_keys and wrong == "keys of its own tokens":
        from_x = x
    queries = projections(x, from_w | w, config, wrong=wrong)[0]
    _, keys, all_values = projections(from_x, from_w, config, wrong=wrong)
    q_scale, k_scale = qk_scale(w, "q_norm", config), qk_scale(from_w, "k_norm", config)
    score_scale = width**-0.5 if config.score_scale is None else config.score_scale
    warm = config.query_temperature

    def growth(i):
        if warm is None:
            return 1.0
        return 1 + warm.growth * np.log(
            1 + np.floor((positions[i] + warm.counts_itself) / warm.length)
        )

    for i in range(length):
        for head in range(heads):
            group = head // (heads // config.num_kv_heads)
            q = turned(queries[i, head], positions[i], q_scale, config)
            scores, values = [], []
            for j in range(length):
                distance = positions[i] - positions[j]
                if documents[i] != documents[j] or distance < 0:
                    continue
                is_far = config.window_size is not None and distance >= config.window_size
                if is_far and positions[j] >= config.num_sink_tokens:
                    continue
                size = config.chunk_size
                if size is not None and positions[i] // size != positions[j] // size:
                    continue
                k = turned(keys[j, group], positions[j], k_scale, config)
                scores.append(bounded(q @ k * score_scale * growth(i), config.score_cap))
                values.append(all_values[j, group])
            weights = np.exp(np.array(scores) - max(scores))
            sink = 0.0
            if config.sink_logits:
                own = group if wrong == "sink of the group" else head
                sink = np.exp(w["sink_logits"][own] - max(scores))
            weights /= weights.sum() + sink
            if wrong == "sink with a value":
                weights[0] += 1 - weights.sum()
            mixed = (weights[:, None] * np.array(values)).sum(0)
            if config.output_gate:
                z = x[i] @ w["gate"][:, head] + (w["gate_bias"][head] if config.bias else 0)
                mixed = mixed * z if wrong == "gate without a sigmoid" else mixed / (1 + np.exp(-z))
            out[i] += mixed @ w["o"][head]
    return out + w["o_bias"] if config.bias and config.output_bias else out


def local_sparse_attention(
    x, w, config: LocalSparseAttentionConfig, positions, documents, wrong=""
):
    """wrong: "from the window's edge" counts powers of two from there; "too early" shows a bucket
    one block before it lies beyond the window."""
    out, size = np.zeros((len(x), w["o"].shape[-1])), config.block_size
    groups = range(config.num_kv_heads)
    k = [
        [rotate(x[j] @ w["kv"][:, 0, g], positions[j], config.rope_base) for g in groups]
        for j in range(len(x))
    ]
    v = [[x[j] @ w["kv"][:, 1, g] for g in groups] for j in range(len(x))]
    for i in range(len(x)):
        if size is None:
            buckets = [[j] for j in _seen_by_powers(i, config, positions, documents, wrong)]
        else:
            buckets = _fenwick_buckets(i, size, config.window_size, wrong)
            buckets = [b for b in buckets if documents[b[0]] == documents[i]]
        for head in range(config.num_heads):
            g = head // (config.num_heads // config.num_kv_heads)
            q = rotate(x[i] @ w["q"][:, head], positions[i], config.rope_base)
            scores, values = [], []
            for bucket in buckets:
                pool = w["pool"][g] if size is not None else np.zeros(len(q))
                share = np.exp([pool @ k[j][g] for j in bucket])
                share /= share.sum()
                key = sum(s * k[j][g] for s, j in zip(share, bucket, strict=True))
                scores.append(q @ key / np.sqrt(len(q)) + np.log(len(bucket)))
                values.append(sum(s * v[j][g] for s, j in zip(share, bucket, strict=True)))
            weights = np.exp(np.array(scores) - max(scores))
            weights /= weights.sum()
            out[i] += (weights[:, None] * np.array(values)).sum(0) @ w["o"][head]
    return out


def _seen_by_powers(i, config, positions, documents, wrong):
    start = config.window_size - 1 if wrong == "from the window's edge" else 0
    powers = {start + 2**p for p in range(20)}
    for j in range(i + 1):
        distance = i - j
        is_seen = distance < config.window_size or distance in powers
        if documents[i] == documents[j] and (is_seen or positions[j] < config.num_sink_tokens):
            yield j


def _fenwick_buckets(i, size, window, wrong):
    """Rows that count as one key: those of the window's blocks one by one, those before by the
    greatest powers of two of blocks, from the front."""
    near = int(np.ceil((window - 1) / size))
    whole = max(i // size - near, 0)
    alone = [[j] for j in range(whole * size, i + 1)]
    if wrong == "too early":
        whole += 1
    done, buckets = 0, []
    while done < whole:
        blocks = 2 ** int(np.log2(whole - done))
        buckets.append(list(range(done * size, (done + blocks) * size)))
        done += blocks
    return buckets + alone


def latent_attention(x, w, config: LatentAttentionConfig, positions, documents, wrong=""):
    """Every head's own keys and values. wrong: "all turned" turns all of a key and not its last
    part; "bias past norm" of the latents; "first of its kind" lets a layer that shares an indexer
    take the choice of the first such layer, "no choice" lets it see all keys; or of `indexed`."""
    turns_all = wrong == "all turned"
    nope, base, rank = config.nope_head_dim, config.rope_base, config.latent_rank
    bias = w["kv_down_bias"] if config.bias else np.zeros(rank + config.rope_head_dim)
    down = x @ w["kv_down"] + bias
    latent = rms_norm(down[:, :rank], w["kv_norm"]["scale"], 1e-6)
    if wrong == "bias past norm":
        latent = rms_norm((x @ w["kv_down"])[:, :rank], w["kv_norm"]["scale"], 1e-6) + bias[:rank]
    bottleneck = x
    if config.query_rank is not None:
        bias = w["q_down_bias"] if config.bias else 0.0
        bottleneck = rms_norm(x @ w["q_down"] + bias, w["q_norm"]["scale"], 1e-6)
    made, own = w.get("made", {}), dataclasses.replace(config, shares_indexer=False)
    seen = [[j for j in range(i + 1) if documents[j] == documents[i]] for i in range(len(x))]
    if config.shares_indexer:
        seen = seen if wrong == "no choice" else made[own]
    elif config.indexer is not None:
        seen = [
            indexed(i, seen[i], x, bottleneck, w["indexer"], config, positions, wrong)
            for i in range(len(x))
        ]
        if wrong != "first of its kind" or own not in made:
            made[own] = seen
    out = np.zeros_like(x)
    for head in range(config.num_heads):
        keys, values = [], []
        for j in range(len(x)):
            up = latent[j] @ w["kv_up"][:, head]
            shared = rotate(down[j, rank:], positions[j] * config.has_rope, base)
            own = rotate(up[:nope], positions[j], base) if turns_all else up[:nope]
            keys.append(np.concatenate([own, shared]))
            values.append(up[nope:])
        for i in range(len(x)):
            q = bottleneck[i] @ w["q"][:, head]
            own = rotate(q[:nope], positions[i], base) if turns_all else q[:nope]
            q = np.concatenate([own, rotate(q[nope:], positions[i] * config.has_rope, base)])
            scores = np.array([q @ keys[j] / np.sqrt(len(q)) for j in seen[i]])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            mixed = sum(weight * values[j] for weight, j in zip(p, seen[i], strict=True))
            out[i] += mixed @ w["o"][head]
    return out + w["o_bias"] if config.bias else out


def indexed(i, seen, x, bottleneck, w, config: LatentAttentionConfig, positions, wrong=""):
    """The keys among `seen` that query i's indexer scores best. wrong: "no relu"; "last turned"
    turns the last entries instead of the first; "no norm" leaves the keys as they are."""
    turned, indexer = config.rope_head_dim, config.indexer

    def turn(vector, position):
        if wrong == "last turned":
            return np.concatenate([vector[:-turned], rotate(vector[-turned:], position, base)])
        return np.concatenate([rotate(vector[:turned], position, base), vector[turned:]])

    base, scores = config.rope_base, []
    for j in seen:
        k = x[j] @ w["k"]
        if wrong != "no norm":
            k = (k - k.mean()) / np.sqrt(k.var() + 1e-6) * w["k_norm"]["scale"] + w["k_norm"][
                "bias"
            ]
        k, score = turn(k, positions[j]), 0.0
        for head in range(indexer.num_heads):
            product = turn(bottleneck[i] @ w["q"][:, head], positions[i]) @ k
            product = product if wrong == "no relu" else max(product, 0.0)
            score += (x[i] @ w["weights"][:, head]) * product
        scores.append(score)
    best = np.argsort(-np.array(scores), kind="stable")[: indexer.top_k]
    return [seen[j] for j in sorted(best)]


def relative_attention(
    x, w, config: RelativeAttentionConfig, positions, documents, r_index=lambda distance: distance
):
    """Every pair's r looked up by its distance; another `r_index` is a wrong version."""
    length, (width, heads, head_dim) = len(x), w["q"].shape
    rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
    out = np.zeros_like(x)
    for head in range(heads):
        r = {}
        for distance in range(-1, config.memory_length + 2):
            angles = distance * rates
            code = np.concatenate([np.sin(angles), np.cos(angles)])
            r[distance] = code @ w["r"][:, head]
        for i in range(length):
            q = x[i] @ w["q"][:, head]
            scores, values = [], []
            for j in range(length):
                distance = positions[i] - positions[j]
                if documents[i] != documents[j] or not 0 <= distance <= config.memory_length:
                    continue
                content = (q + w["content_bias"][head]) @ (x[j] @ w["kv"][:, 0, head])
                position = (q + w["position_bias"][head]) @ r[r_index(distance)]
                scores.append((content + position) / np.sqrt(head_dim))
                values.append(x[j] @ w["kv"][:, 1, head])
            weights = np.exp(np.array(scores) - max(scores))
            weights /= weights.sum()
            out[i] += (weights[:, None] * np.array(values)).sum(0) @ w["o"][head]
    return out


def gated_delta(x, w, config: GatedDeltaConfig, positions, documents, wrong=""):
    """Each head's matrix, token by token."""
    c, taps = config, w["conv"]
    groups = c.num_key_heads or c.num_heads
    q_end, k_end = groups * c.key_head_dim, 2 * groups * c.key_head_dim
    entering, out = x @ w["qkv"], np.zeros_like(x)
    states = [np.zeros((c.value_head_dim, c.key_head_dim)) for _ in range(c.num_heads)]
    for i, token in enumerate(x):
        if i > 0 and documents[i] != documents[i - 1] and wrong != "document goes on":
            states = [0 * s for s in states]
        mixed = np.zeros(entering.shape[1])
        for back in range(c.conv_width):
            if back <= i and (documents[i - back] == documents[i] or wrong == "taps see before"):
                mixed += taps[-1 - back] * entering[i - back]
        mixed = mixed / (1 + np.exp(-mixed))
        q, k = (m.reshape(groups, -1) for m in (mixed[:q_end], mixed[q_end:k_end]))
        v = mixed[k_end:].reshape(c.num_heads, -1)
        for h in range(c.num_heads):
            g = h % groups if wrong == "heads interleaved" else h // (c.num_heads // groups)
            q_h, k_h = (u / np.sqrt(u @ u + 1e-6) for u in (q[g], k[g]))
            beta = (2 if c.doubled_beta else 1) / (1 + np.exp(-token @ w["beta"][:, h]))
            moved = _through(token, w, "decay", h, c) + w["decay_bias"][h]
            alpha = np.exp(-np.exp(w["log_rate"][h]) * np.log1p(np.exp(moved)))
            s = states[h] * alpha[None]
            erased = s @ k_h if wrong != "only adds" else 0.0
            states[h] = s + np.outer(beta * (v[h] - erased), k_h)
            o = states[h] @ q_h / np.sqrt(c.key_head_dim)
            o = rms_norm(o, w["norm"]["scale"], c.norm_eps or 1e-6)
            if c.output_gate is not None:
                z = _through(token, w, "gate", h, c)
                o = o * (z if c.output_gate == "silu" else 1.0) / (1 + np.exp(-z))
            out[i] += o @ w["o"][h]
    return out


def _through(token, w, name, head, config: GatedDeltaConfig):
    """A head's row of one matrix, or of two."""
    if f"{name}_in" in w:
        return token @ w[f"{name}_in"] @ w[f"{name}_out"][:, head]
    return token @ w[name][:, head]


def mamba2(x, w, config: Mamba2Config, positions, documents, wrong=""):
    """Each head's matrix, token by token."""
    c, taps = config, w["conv"]
    entering = x @ w["in"] + (w["in_bias"] if c.bias else 0.0)
    steps = x @ w["step"] + w["step_bias"] + (w["step_in_bias"] if c.bias else 0.0)
    steps = np.maximum(np.log1p(np.exp(steps)), c.least_step)
    gates = np.einsum("ld,dhv->lhv", x, w["gate"]) + (w["gate_bias"] if c.bias else 0.0)
    states, out = np.zeros((c.num_heads, c.head_dim, c.state_dim)), np.zeros_like(x)
    for i in range(len(x)):
        if i > 0 and documents[i] != documents[i - 1] and wrong != "document goes on":
            states = 0 * states
        mixed = w["conv_bias"] if c.conv_bias else np.zeros(entering.shape[1])
        for back in range(c.conv_width):
            if back <= i and (documents[i - back] == documents[i] or wrong == "taps see before"):
                mixed = mixed + taps[-1 - back] * entering[i - back]
        mixed = mixed / (1 + np.exp(-mixed))
        v, keys, queries = np.split(mixed, [c.out_width, c.out_width + c.num_groups * c.state_dim])
        v, y = v.reshape(c.num_heads, -1), np.zeros((c.num_heads, c.head_dim))
        for h in range(c.num_heads):
            g = h * c.num_groups // c.num_heads
            g = h % c.num_groups if wrong == "heads interleaved" else g
            at = slice(g * c.state_dim, (g + 1) * c.state_dim)
            forgotten = np.exp(-np.exp(w["log_rate"][h]) * steps[i, h])
            written = v[h] * (1.0 if wrong == "writes all" else steps[i, h])
            states[h] = forgotten * states[h] + np.outer(written, keys[at])
            y[h] = states[h] @ queries[at] + w["skip"][h] * v[h]
        if wrong != "norm before gate":
            y = y * gates[i] / (1 + np.exp(-gates[i]))
        parts = y.reshape(c.num_groups if c.norm_by_group else 1, -1)
        y = np.stack([rms_norm(part, 1.0, 1e-6) for part in parts]).reshape(y.shape)
        if wrong == "norm before gate":
            y = y * gates[i] / (1 + np.exp(-gates[i]))
        out[i] = np.einsum("hv,hvd->d", y * w["norm_scale"], w["o"])
    return out + (w["o_bias"] if c.bias else 0.0)


def short_conv(x, w, config: ShortConvConfig, positions, documents, wrong=""):
    """Token by token, tap by tap. wrong: "taps turned round"."""
    b, c, v = (x @ w["in"][:, i] for i in range(3))
    if config.bias:
        b, c, v = (y + w["in_bias"][i] for i, y in enumerate((b, c, v)))
    mixed, taps = np.zeros_like(v), w["conv"]
    for i in range(len(x)):
        for back in range(min(i + 1, config.conv_width)):
            if documents[i - back] == documents[i]:
                at = back if wrong == "taps turned round" else -1 - back
                mixed[i] += taps[at] * b[i - back] * v[i - back]
    if config.bias:
        mixed = mixed + w["conv_bias"]
    return (c * mixed) @ w["o"] + (w["o_bias"] if config.bias else 0.0)


ATTENTIONS = {
    CompressedAttentionConfig: compressed_attention,
    ShortConvConfig: short_conv,
    Mamba2Config: mamba2,
    GatedDeltaConfig: gated_delta,
    AttentionConfig: attention,
    LatentAttentionConfig: latent_attention,
    LocalSparseAttentionConfig: local_sparse_attention,
    RelativeAttentionConfig: relative_attention,
}


def swiglu(
    x, gate_up, down, gate_up_bias=(0.0, 0.0), down_bias=0.0, activation="swiglu", limit=None
):
    if activation == "relu2":
        return np.maximum(x @ gate_up[:, 0] + gate_up_bias[0], 0) ** 2 @ down + down_bias
    gate, up = x @ gate_up[:, 0] + gate_up_bias[0], x @ gate_up[:, 1] + gate_up_bias[1]
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (silu_or_gelu(gate, activation) * up) @ down + down_bias


def silu_or_gelu(x, activation):
    """GELU in its tanh form for "geglu"."""
    if activation == "geglu":
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-x))


def router_logits(x, w, config: MoEConfig, positions, documents):
    context = config.router.context
    bias = w["router_bias"] if config.router.bias else 0.0
    if context is None:
        return x @ w["router"] + bias
    if context.kind == "causal":
        seen = attention(x, w["context"], context.attention(), positions, documents)
        return x @ w["router"] + seen + bias
    out = []
    for t in x:
        q, k, v = (t @ w["correlation"]["qkv"][:, i] for i in range(3))
        affinity = np.exp(np.outer(q, k))
        out.append(affinity / affinity.sum(1, keepdims=True) @ v)
    return np.stack(out) + bias


def expert(x, w, e, config: MoEConfig, wrong=""):
    """wrong: "up without 1"; "gate bounded below" too; "no bounds"; "one bias" is the first
    expert's for all."""
    if config.activation == "relu2":
        bias = (w["gate_up_bias"][e], w["down_bias"][e]) if config.bias else ((0.0,), 0.0)
        return swiglu(x, w["gate_up"][e], w["down"][e], *bias, activation="relu2")
    gate, up = x @ w["gate_up"][e][:, 0], x @ w["gate_up"][e][:, 1]
    of = 0 if wrong == "one bias" else e
    if config.bias:
        gate, up = gate + w["gate_up_bias"][of][0], up + w["gate_up_bias"][of][1]
    if config.activation == "bounded_swiglu" and wrong != "no bounds":
        low = -config.swiglu_limit if wrong == "gate bounded below" else -np.inf
        gate = np.clip(gate, low, config.swiglu_limit)
        up = np.clip(up, -config.swiglu_limit, config.swiglu_limit)
    if config.activation != "clamped_swiglu":
        h = silu_or_gelu(gate, config.activation) * up
    else:
        limit = config.swiglu_limit
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        if wrong == "gate bounded below":
            gate = np.maximum(gate, -limit)
        h = (up + (wrong != "up without 1")) * gate / (1 + np.exp(-config.swiglu_alpha * gate))
    return h @ w["down"][e] + (w["down_bias"][of] if config.bias else 0.0)


def moe(x, logits, w, config: MoEConfig, wrong="", given=None):
    """given: the experts, where a table names them. wrong: "chosen by scores" all the same, or of
    `expert`."""
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    if config.router.scores == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    if config.router.scores == "sqrt_softplus":
        scores = np.sqrt(np.log1p(np.exp(logits)))
    chosen = np.argsort(-scores, kind="stable")[: config.router.top_k]
    if given is not None and wrong != "chosen by scores":
        chosen = given.astype(int)
    gates = scores[chosen]
    if config.router.normalize_gates:
        gates = gates / gates.sum()
    gates = gates * config.router.gate_scale
    if config.router.expert_scales:
        gates = gates * w["expert_scales"][chosen]
    read = x if config.latent_width is None else x @ w["latent_in"]
    if config.router.gates_on == "inputs":
        pairs = zip(gates, chosen, strict=True)
        out = sum(expert(g * read, w, e, config, wrong) for g, e in pairs)
    else:
        pairs = zip(gates, chosen, strict=True)
        out = sum(g * expert(read, w, e, config, wrong) for g, e in pairs)
    if config.latent_width is not None:
        out = out @ w["latent_out"]
    if config.num_shared_experts:
        gate = 1 / (1 + np.exp(-x @ w["shared_gate"])) if config.shared_gate else 1.0
        limit = config.swiglu_limit if config.activation == "bounded_swiglu" else None
        own = {"activation": config.activation, "limit": limit}
        out = out + gate * swiglu(x, **w["shared"], **own)
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
