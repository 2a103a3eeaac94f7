"""One optimiser step: gradients over the micro-batches, the update, and what to log.

B rows of a micro-batch, A micro-batches, L length, D d_model, V vocab, E experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from configs.base import RunConfig
from model.balance import RouterStats, load_figures, merge_stats, updated_state
from model.routed_layers import RoutedLayer, map_layers, routed_layers
from model.transformer import hidden_and_router, output_weights
from model.warmup import updated_warmup
from parallel.sharding import constrain
from train.losses import (
    ChunkLoss,
    LayerStats,
    auxiliary_loss,
    chunked_loss,
    collect_router_stats,
    cross_entropy,
)
from train.multi_token import count_ahead, multi_token_loss
from train.state import Trainee, TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    run: RunConfig, trainee: Trainee, chunk_loss: ChunkLoss = cross_entropy
) -> TrainStep:
    """A jitted (state, batch) -> (state, metrics); the state's buffers are reused.

    Args:
      chunk_loss: the objective on a chunk of logits; see train/losses.py.
    Returns:
      A step that takes batch arrays [A * B, L, ...] ("tokens", "targets", "positions", and what the
      objective reads; "shared" goes to it whole) and reports float32 scalars "loss" (the objective,
      per target token), the objective's own sums per target token, "auxiliary", "grad_norm",
      "learning_rate", with multi-token modules "multi_token" (train/multi_token.py); and per MoE
      layer, under "router", arrays [layers of that name, ...].
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics, stats = _gradients(run, trainee, chunk_loss, state, batch)
        updates, opt_state = trainee.optimizer.update(grads, state.opt_state, state.params)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.float32(trainee.schedule(state.step)),
            "router": {name: _layer_metrics(layer) for name, layer in stats.items()},
        }
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            router_state=_updated_routers(run, state.router_state, stats),
            opt_state=opt_state,
        )
        return new_state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(trainee.shardings, None))


def _gradients(
    run: RunConfig, trainee: Trainee, chunk_loss: ChunkLoss, state: TrainState, batch: Batch
) -> tuple[Any, Metrics, LayerStats]:
    """Gradients of the mean objective over the whole batch plus the auxiliary losses."""
    shared = batch.get("shared")
    rows = {name: x for name, x in batch.items() if name not in ("shared", "row")}
    num_targets = jnp.maximum((batch["targets"] >= 0).sum(), 1).astype(jnp.float32)
    num_ahead = count_ahead(batch["targets"], batch["positions"], run.model.multi_token)

    def loss(params, micro, earlier_counts):
        variables = {"params": params, "router_state": state.router_state}
        hidden_BLD, sown = hidden_and_router(
            trainee.model, variables, micro["tokens"], micro["positions"], multi_token=True
        )
        w_DV = output_weights(trainee.model, variables)
        inputs = {k: v for k, v in micro.items() if k not in ("tokens", "positions")}
        objective, sums = chunked_loss(
            chunk_loss, hidden_BLD, w_DV, inputs, shared, run.execution.logits_chunks
        )
        stats = collect_router_stats(sown, run.model)
        auxiliary = auxiliary_loss(stats, run.model, earlier_counts) / run.accumulation
        sums = jax.tree.map(lambda x: x / num_targets, sums | {"loss": objective})
        total, sums = objective / num_targets + auxiliary, sums | {"auxiliary": auxiliary}
        if run.model.multi_token is not None:
            ahead = multi_token_loss(
                chunk_loss,
                sown["multi_token"],
                w_DV,
                inputs,
                micro["positions"],
                shared,
                run.execution.logits_chunks,
                num_ahead,
            )
            total += run.model.multi_token.loss_weight * ahead
            sums |= {"multi_token": ahead}
        return total, (sums, stats)

    grad: Callable[..., Any] = jax.grad(loss, has_aux=True)
    if run.accumulation == 1:
        grads, (sums, stats) = grad(state.params, rows, _no_counts(run))
    else:
        grads, sums, stats = _accumulate(run, grad, state.params, rows)
    return grads, sums, stats


def _accumulate(run: RunConfig, grad: Callable, params: Any, rows: Batch) -> tuple[Any, Any, Any]:
    """Sums gradients and reports over the micro-batches, handing the expert counts on."""

    def cut(x):
        x = x.reshape(run.accumulation, x.shape[0] // run.accumulation, *x.shape[1:])
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    def one(carry, micro):
        grads, counts = carry
        new_grads, (sums, stats) = grad(params, micro, counts)
        counts = {name: counts[name] + layer.counts_E for name, layer in stats.items()}
        return (jax.tree.map(jnp.add, grads, new_grads), counts), (sums, stats)

    zeros = jax.tree.map(jnp.zeros_like, params)
    carry, (sums, stats) = jax.lax.scan(one, (zeros, _no_counts(run)), jax.tree.map(cut, rows))
    sums = jax.tree.map(lambda x: x.sum(axis=0), sums)
    return carry[0], sums, {name: merge_stats(layer) for name, layer in stats.items()}


def _no_counts(run: RunConfig) -> dict[str, jax.Array]:
    return {
        name: jnp.zeros((layer.count, layer.config.num_experts), jnp.int32)
        for name, layer in routed_layers(run.model).items()
    }


def _updated_routers(run: RunConfig, router_state: Any, stats: LayerStats) -> Any:
    """Each layer's router after this step, in the tree of the collection router_state."""

    def one(name: str, layer: RoutedLayer, part: Any) -> Any:
        router, part = layer.config.router, layer.stacked(part)
        if router.warmup is None:
            update = jax.vmap(partial(updated_state, config=router))
            return layer.unstacked({"state": update(part["state"], stats[name])})
        warm = jax.vmap(partial(updated_warmup, config=router))
        state, warmup = warm(part["state"], part["warmup"], stats[name])
        return layer.unstacked({"state": state, "warmup": warmup})

    return map_layers(run.model, router_state, one)


def _layer_metrics(stats: RouterStats) -> Metrics:
    """Figures of the layers of one name, [layers] each, and their load [layers, E]."""
    counts, tokens = stats.counts_E, stats.num_tokens
    return {
        **jax.vmap(load_figures)(counts, tokens)._asdict(),
        "router_entropy": stats.entropy,
        "overflow_rows": stats.overflow_rows,
        "bytes_moved": stats.bytes_moved,
        "expert_load": counts / jnp.maximum(counts.mean(axis=-1, keepdims=True), 1e-9),
    }
