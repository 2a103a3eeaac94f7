"""Losses: the next token, and the routers' auxiliary terms.

Logits exist only a chunk at a time: the output layer and the loss of a chunk are computed together
with their gradients in the forward pass, so no [B, L, V] array is ever kept and no logit is
computed twice.

B batch, L length, N chunks, c = L / N, D d_model, V vocab.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from configs.architecture import ModelConfig
from configs.attention import Attention, IndexerConfig, LatentAttentionConfig
from configs.compressed_attention import CompressedAttentionConfig, EntryIndexerConfig
from kernels.matmul import bfloat16
from model.balance import RouterStats, load_balance_loss, token_expert_information
from model.depth import DepthStats
from model.early_exit import Supervised
from model.layers import CappedOutput
from model.moe_layers import moe_layers

ChunkLoss = Callable[[jax.Array, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]
"""(logits_BcV float32, the chunk's inputs, shared) -> (loss summed over tokens, sums to report)."""


def chunked_loss(
    chunk_loss: ChunkLoss,
    hidden_BLD: jax.Array,
    w_DV: jax.Array | CappedOutput,
    inputs: Any,
    shared: Any,
    num_chunks: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum over chunks of chunk_loss(hidden @ w, inputs, shared), differentiable in hidden and
    w.

    Args:
      inputs: tree of [B, L, ...] arrays, cut along L like hidden; no gradient reaches them.
      shared: tree of arrays that every chunk gets whole; no gradient reaches them.
      num_chunks: must divide L.
    Returns:
      The loss and the other sums, float32; gradients flow through the loss only.
    """
    if isinstance(w_DV, CappedOutput):
        chunk_loss, w_DV = _of_bounded(chunk_loss, w_DV), w_DV.weight
    return cast(Any, _chunked)(chunk_loss, hidden_BLD, w_DV, inputs, shared, num_chunks)


def _of_bounded(chunk_loss: ChunkLoss, w: CappedOutput) -> ChunkLoss:
    """The loss of the logits as they are before their bound."""
    return lambda logits_BcV, inputs, shared: chunk_loss(w.bounded(logits_BcV), inputs, shared)


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def _chunked(chunk_loss, hidden_BLD, w_DV, inputs, shared, num_chunks):
    """Without gradients: the sums alone."""
    chunks = cut_in_chunks((hidden_BLD, inputs), num_chunks)

    def add_loss(_, chunk):
        hidden_BcD, chunk_inputs = chunk
        return None, chunk_loss(logits_of(hidden_BcD, w_DV), chunk_inputs, shared)

    return jax.tree.map(lambda sums: sums.sum(axis=0), jax.lax.scan(add_loss, None, chunks)[1])


def _chunked_forward(chunk_loss, hidden_BLD, w_DV, inputs, shared, num_chunks):
    chunks = cut_in_chunks((hidden_BLD, inputs), num_chunks)
    grad = jax.value_and_grad(chunk_loss, has_aux=True)

    def add_gradient(dw_DV, chunk):
        hidden_BcD, chunk_inputs = chunk
        sums, dlogits_BcV = grad(logits_of(hidden_BcD, w_DV), chunk_inputs, shared)
        dlogits_BcV = dlogits_BcV.astype(w_DV.dtype)
        dhidden_BcD, dw_of_chunk_DV = _gradients(hidden_BcD, w_DV, dlogits_BcV)
        return dw_DV + dw_of_chunk_DV, (sums, dhidden_BcD)

    dw_DV, (sums, dhidden) = jax.lax.scan(add_gradient, jnp.zeros(w_DV.shape, jnp.float32), chunks)
    dhidden_BLD = dhidden.swapaxes(0, 1).reshape(hidden_BLD.shape)
    return jax.tree.map(lambda s: s.sum(axis=0), sums), (dhidden_BLD, dw_DV.astype(w_DV.dtype))


def _chunked_backward(chunk_loss, num_chunks, gradients, cotangents):
    dhidden_BLD, dw_DV = gradients
    scale = cotangents[0]
    dhidden_BLD = scale.astype(dhidden_BLD.dtype) * dhidden_BLD
    return dhidden_BLD, scale.astype(dw_DV.dtype) * dw_DV, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _gradients(hidden_BcD: jax.Array, w_DV: jax.Array, dlogits_BcV: jax.Array):
    """Those of the hidden states, in their dtype, and of the output layer, float32."""
    hidden_TD = hidden_BcD.reshape(-1, hidden_BcD.shape[-1])
    if bfloat16.is_native(hidden_TD.shape[0], hidden_TD.dtype):
        dlogits_TV = dlogits_BcV.reshape(-1, dlogits_BcV.shape[-1])
        dhidden_TD = bfloat16.times_matrix(dlogits_TV, w_DV, transpose=True)
        dw_DV = bfloat16.times_rows(hidden_TD, dlogits_TV, jnp.dtype(jnp.float32))
        return dhidden_TD.reshape(hidden_BcD.shape), dw_DV
    dhidden_BcD = jnp.einsum("BcV,DV->BcD", dlogits_BcV, w_DV)
    dw_DV = jnp.einsum("BcD,BcV->DV", hidden_BcD, dlogits_BcV, preferred_element_type=jnp.float32)
    return dhidden_BcD, dw_DV


def logits_of(hidden_BcD: jax.Array, w_DV: jax.Array | CappedOutput) -> jax.Array:
    """Of a chunk, float32 [B, c, V]."""
    if isinstance(w_DV, CappedOutput):
        return w_DV.bounded(logits_of(hidden_BcD, w_DV.weight))
    hidden_TD = hidden_BcD.reshape(-1, hidden_BcD.shape[-1])
    if bfloat16.is_native(hidden_TD.shape[0], hidden_TD.dtype):
        logits_TV = bfloat16.times_matrix(hidden_TD, w_DV, dtype=jnp.dtype(jnp.float32))
        return logits_TV.reshape(*hidden_BcD.shape[:-1], -1)
    return jnp.einsum("BcD,DV->BcV", hidden_BcD, w_DV, preferred_element_type=jnp.float32)


def cut_in_chunks(tree: Any, num_chunks: int) -> Any:
    """[B, L, ...] to [N, B, c, ...]."""

    def cut(x):
        batch, length = x.shape[:2]
        return x.reshape(batch, num_chunks, length // num_chunks, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, tree)


def cross_entropy(
    logits_BcV: jax.Array, inputs: dict[str, jax.Array], shared: None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-log softmax(logits)[target] summed over tokens whose target is not negative.

    Args:
      inputs: "targets" int32 [B, c].
    """
    targets_Bc = inputs["targets"]
    nats_Bc = token_nats(logits_BcV, targets_Bc)
    loss = jnp.where(targets_Bc >= 0, nats_Bc, 0.0).sum()
    return loss, {"cross_entropy": loss}


def reporting_cross_entropy(chunk_loss: ChunkLoss) -> ChunkLoss:
    """An objective that also reports the cross-entropy of the targets, by which runs are compared,
    where it does not by itself.
    """

    def loss(logits_BcV: jax.Array, inputs: dict[str, jax.Array], shared: Any = None) -> Any:
        total, sums = chunk_loss(logits_BcV, inputs, shared)
        nats, _ = cross_entropy(jax.lax.stop_gradient(logits_BcV), inputs)
        return total, {"cross_entropy": nats} | sums

    return loss


def with_source_sums(chunk_loss: ChunkLoss, num_sources: int) -> ChunkLoss:
    """The objective, and the cross-entropy's sum and count over each source of a mixture, "source"
    [2, sources].

    Its inputs have "source", int32 [B, c]: the source of each token.
    """

    def loss(logits_BcV: jax.Array, inputs: dict[str, jax.Array], shared: Any = None) -> Any:
        own = {name: x for name, x in inputs.items() if name != "source"}
        total, sums = chunk_loss(logits_BcV, own, shared)
        nats_Bc = token_nats(jax.lax.stop_gradient(logits_BcV), inputs["targets"])
        return total, sums | {"source": source_sums(nats_Bc, inputs, num_sources)}

    return loss


def source_sums(nats_Bc: jax.Array, inputs: dict[str, jax.Array], num_sources: int) -> jax.Array:
    """Sum of nats and count of targets of each source, float32 [2, sources]."""
    is_own_BcS = inputs["source"][:, :, None] == jnp.arange(num_sources)
    is_own_BcS &= (inputs["targets"] >= 0)[:, :, None]
    nats_S = jnp.where(is_own_BcS, nats_Bc[:, :, None], 0.0).sum(axis=(0, 1))
    return jnp.stack([nats_S, is_own_BcS.sum(axis=(0, 1)).astype(jnp.float32)])


def token_nats(logits_BcV: jax.Array, targets_Bc: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] of each token, whose target is not negative; float32 [B, c]."""
    vocab_V = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits_BcV.shape[-1]), 2)
    # A masked sum instead of a gather: its gradient is elementwise, a gather's is a scatter.
    target_logit_Bc = jnp.where(vocab_V == targets_Bc[:, :, None], logits_BcV, 0.0).sum(axis=-1)
    return jax.nn.logsumexp(logits_BcV, axis=-1) - target_logit_Bc


LayerStats = dict[str, RouterStats]
"""By name (model/moe_layers.py); every array has dim 0 for the layers of that name."""


def collect_router_stats(sown: dict[str, Any], config: ModelConfig) -> LayerStats:
    """What the MoE layers sowed in one forward pass."""
    return {
        name: layer.stacked(layer.of(sown["router"])["stats"])
        for name, layer in moe_layers(config).items()
    }


def auxiliary_loss(
    stats: LayerStats, config: ModelConfig, earlier_counts: dict[str, jax.Array]
) -> jax.Array:
    """The sum over MoE layers of their routers' weighted losses.

    Args:
      earlier_counts: counts [layers, E] of the micro-batches before this one in the same step, so
        that balance is judged on the batch as far as it is known (Qiu et al. 2025, buffered
        counts).
    """
    total, layers = jnp.float32(0.0), moe_layers(config)
    for name, layer in stats.items():
        router = layers[name].config.router
        counts = layer.counts_E + earlier_counts[name]
        balance = jax.vmap(load_balance_loss)(counts, layer.mean_scores_E).sum()
        total += router.load_balance_weight * balance
        total += router.z_loss_weight * layer.z_loss.sum()
        total += router.sequence_weight * layer.sequence_balance.sum()
        if router.entropy_weight:
            information = jax.vmap(token_expert_information)(layer.mean_scores_E, layer.entropy)
            total -= router.entropy_weight * information.sum()
    return total


def collect_depth_stats(sown: dict[str, Any], config: ModelConfig) -> dict[str, DepthStats]:
    """What the depth layers (Mixture-of-Depths) sowed, by layer as in LayerStats."""
    depth_layers = [f"layer_{i}" for i, spec in enumerate(config.pattern) if spec.depth is not None]
    return {name: sown["router"]["periods"][name]["depth"] for name in depth_layers}


def collect_indexer_losses(sown: dict[str, Any]) -> dict[str, jax.Array] | None:
    """What attentions' indexers have still to learn, by layer: nats, the mean of stacked
    layers; None without any (model/attention/indexer.py: imitation_loss)."""
    found = {
        jax.tree_util.keystr(path): loss.mean()
        for path, loss in jax.tree.leaves_with_path(sown.get("router", {}))
        if path[-1] == jax.tree_util.DictKey("indexer_loss")
    }
    return found or None


def weighted_indexer_loss(losses: dict[str, jax.Array], config: ModelConfig) -> jax.Array:
    """The mean over layers, times the indexers' weight; no gradient of it leaves them."""
    indexers = (_indexer(spec.attention) for spec in config.layer_kinds)
    weights = {indexer.loss_weight for indexer in indexers if indexer is not None}
    return max(weights) * jnp.stack(list(losses.values())).mean()


def _indexer(attention: Attention) -> IndexerConfig | EntryIndexerConfig | None:
    if isinstance(attention, CompressedAttentionConfig):
        return attention.compression and attention.compression.indexer
    return attention.indexer if isinstance(attention, LatentAttentionConfig) else None


def depth_loss(stats: dict[str, DepthStats], config: ModelConfig) -> jax.Array:
    """The sum over depth layers of their predictors' weighted cross-entropies."""
    total = jnp.float32(0.0)
    for name, layer in stats.items():
        depth = config.pattern[int(name.removeprefix("layer_"))].depth
        assert depth is not None
        total += depth.predictor_weight * layer.predictor_loss.sum()
    return total


def exits_loss(
    loss_fn: Callable[[jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    last: jax.Array,
    states_PBLD: jax.Array,
    supervised: Supervised,
) -> tuple[jax.Array, jax.Array]:
    """The weighted mean of the last layer's loss and the supervised exits' (LayerSkip, 2024), and
    the exits' cross-entropies [K], summed over tokens; 0 in an empty place.

    Args:
      loss_fn: a state [B, L, D] after some period -> its loss and sums to report, as chunked_loss.
      last: the last layer's loss.
      states_PBLD: the states after each period.
    """
    total, cross_entropies = supervised.last_weight * last, []
    for k in range(supervised.periods_K.shape[0]):
        period = supervised.periods_K[k]
        state_BLD = jax.lax.dynamic_index_in_dim(
            states_PBLD, jnp.maximum(period, 0), keepdims=False
        )
        loss, sums = loss_fn(state_BLD)
        total += supervised.weights_K[k] * loss
        cross_entropies.append(jnp.where(period >= 0, sums["cross_entropy"], 0.0))
    return total, jnp.stack(cross_entropies)
