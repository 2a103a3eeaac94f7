"""One optimiser step: gradients over the micro-batches, the update, and what to log.

B rows of a micro-batch, A micro-batches, L length, D d_model, V vocab, E experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from configs.base import RunConfig
from model.balance import RouterStats, load_metrics, merge_stats, updated_state
from model.depth import DepthStats
from model.early_exit import supervised_exits
from model.model_state import ModelState
from model.moe_layers import MoELayer, map_layers, moe_layers
from model.seeds import seed_key
from model.transformer import output_weights, training_pass
from model.warmup import updated_warmup
from parallel.sharding import constrain
from train.losses import (
    ChunkLoss,
    LayerStats,
    auxiliary_loss,
    chunked_loss,
    collect_depth_stats,
    collect_indexer_losses,
    collect_router_stats,
    cross_entropy,
    depth_loss,
    exits_loss,
    weighted_indexer_loss,
)
from train.multi_token import count_ahead, multi_token_loss
from train.quantization_aware import rounded_params
from train.state import TrainSetup, TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    run: RunConfig, setup: TrainSetup, chunk_loss: ChunkLoss = cross_entropy
) -> TrainStep:
    """A jitted (state, batch) -> (state, metrics); the state's buffers are reused.

    Args:
      chunk_loss: the objective on a chunk of logits; see train/losses.py.
    Returns:
      A step that takes batch arrays [A * B, L, ...] ("tokens", "targets", "positions", and what the
      objective reads; "shared" goes to it whole) and reports, the same on every device, float32
      scalars "loss" (the objective, per target token), the objective's own sums per target token,
      "auxiliary", "grad_norm", "learning_rate", with multi-token modules "multi_token"
      (train/multi_token.py), with indexers "indexer", their mean loss in nats; and per MoE layer,
      under "router", and per layer that chooses its tokens, under "depth", arrays [layers of that
      name, ...]. With early_exit, "exits": the cross-entropies [K] of the exits that this step
      supervises, and the periods [K] before them, -1 for none.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics, stats, memory = _gradients(run, setup, chunk_loss, state, batch)
        updates, opt_state = setup.optimizer.update(grads, state.opt_state, state.params)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.float32(setup.schedule(state.step)),
            "router": {name: _layer_metrics(layer) for name, layer in stats.items()},
        }
        if run.model.early_exit is not None:
            periods_K = supervised_exits(run.model, state.step).periods_K
            metrics["exits"] = {"period": periods_K, "cross_entropy": metrics["exits"]}
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            router_state=_updated_routers(run, state.router_state, stats),
            opt_state=opt_state,
            memory=memory,
        )
        return new_state, metrics

    everywhere = NamedSharding(setup.shardings.step.mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(setup.shardings, everywhere))


def _gradients(
    run: RunConfig, setup: TrainSetup, chunk_loss: ChunkLoss, state: TrainState, batch: Batch
) -> tuple[Any, Metrics, LayerStats, ModelState | None]:
    """Gradients of the mean objective over the whole batch plus the auxiliary losses, and the
    memory for the next step.
    """
    shared = batch.get("shared")
    rows = {name: x for name, x in batch.items() if name not in ("shared", "row")}
    num_targets = jnp.maximum((batch["targets"] >= 0).sum(), 1).astype(jnp.float32)
    num_ahead = count_ahead(batch["targets"], batch["positions"], run.model.multi_token)
    chunks = run.execution.logits_chunks

    def loss(params, micro, earlier_counts, depth_key):
        variables = {"params": params, "router_state": state.router_state}
        hidden_BLD, sown, memory = training_pass(
            setup.model, variables, micro["tokens"], micro["positions"], state.memory, depth_key
        )
        w_DV = output_weights(setup.model, variables)
        inputs = {k: v for k, v in micro.items() if k not in ("tokens", "positions")}

        def loss_fn(hidden_BLD):
            return chunked_loss(chunk_loss, hidden_BLD, w_DV, inputs, shared, chunks)

        objective, sums = loss_fn(hidden_BLD)
        if run.model.early_exit is not None:
            finish = partial(setup.model.apply, variables, method="finish")
            objective, sums["exits"] = exits_loss(
                lambda x_BLD: loss_fn(finish(x_BLD)),
                objective,
                sown["exits"]["periods"]["hidden"],
                supervised_exits(run.model, state.step),
            )
        stats, depth = collect_router_stats(sown, run.model), collect_depth_stats(sown, run.model)
        auxiliary = _auxiliary(run, stats, depth, earlier_counts)
        sums = jax.tree.map(lambda x: x / num_targets, sums | {"loss": objective})
        sums |= {"auxiliary": auxiliary, "depth": _depth_metrics(run, depth)}
        total = objective / num_targets + auxiliary
        imitation = collect_indexer_losses(sown)
        if imitation is not None:
            weighted = weighted_indexer_loss(imitation, run.model)
            total += weighted / run.accumulation
            sums["indexer"] = jnp.stack(list(imitation.values())).mean()
        if run.model.multi_token is not None:
            modules, places = sown["multi_token"], micro["positions"]
            ahead = multi_token_loss(
                chunk_loss, modules, w_DV, inputs, places, shared, chunks, num_ahead
            )
            total += run.model.multi_token.loss_weight * ahead
            sums["multi_token"] = ahead
        return total, (sums, stats, memory)

    grad: Callable[..., Any] = jax.grad(loss, has_aux=True)
    params = rounded_params(run, setup.model, state.params, state.step)
    keys = _depth_keys(run, state.step)
    if run.accumulation == 1:
        key = None if keys is None else keys[0]
        grads, (sums, stats, memory) = grad(params, rows, _no_counts(run), key)
    else:  # never with memory: see RunConfig
        grads, sums, stats = _accumulate(run, grad, params, rows, keys)
        memory = None
    return grads, sums, stats, memory


def _auxiliary(
    run: RunConfig,
    stats: LayerStats,
    depth: dict[str, DepthStats],
    earlier_counts: dict[str, jax.Array],
) -> jax.Array:
    """One micro-batch's share of the losses beside the objective."""
    auxiliary = auxiliary_loss(stats, run.model, earlier_counts)
    if depth:
        auxiliary += depth_loss(depth, run.model)
    return auxiliary / run.accumulation


def _depth_keys(run: RunConfig, step: jax.Array) -> jax.Array | None:
    """A key for each micro-batch's skipped rows, the same when the step is done again."""
    if run.model.early_exit is None or run.model.early_exit.dropout == 0:
        return None
    return jax.random.split(jax.random.fold_in(seed_key(run.seed), step), run.accumulation)


def _accumulate(
    run: RunConfig, grad: Callable, params: Any, rows: Batch, keys: jax.Array | None
) -> tuple[Any, Any, Any]:
    """Sums gradients and reports over the micro-batches, handing the expert counts on."""

    def cut(x):
        x = x.reshape(run.accumulation, x.shape[0] // run.accumulation, *x.shape[1:])
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    def accumulate(carry, inputs):
        (grads, counts), (micro, key) = carry, inputs
        new_grads, (sums, stats, _) = grad(params, micro, counts, key)
        counts = {name: counts[name] + layer.counts_E for name, layer in stats.items()}
        return (jax.tree.map(jnp.add, grads, new_grads), counts), (sums, stats)

    zeros = jax.tree.map(jnp.zeros_like, params)
    begin = (zeros, _no_counts(run))
    carry, (sums, stats) = jax.lax.scan(accumulate, begin, (jax.tree.map(cut, rows), keys))
    sums = jax.tree.map(lambda x: x.sum(axis=0), sums)
    return carry[0], sums, {name: merge_stats(layer) for name, layer in stats.items()}


def _no_counts(run: RunConfig) -> dict[str, jax.Array]:
    return {
        name: jnp.zeros((layer.count, layer.config.num_experts), jnp.int32)
        for name, layer in moe_layers(run.model).items()
    }


def _updated_routers(run: RunConfig, router_state: Any, stats: LayerStats) -> Any:
    """Each layer's router after this step, in the tree of the collection router_state."""

    def update_layer(name: str, layer: MoELayer, part: Any) -> Any:
        router, part = layer.config.router, layer.stacked(part)
        if router.warmup is None:
            update = jax.vmap(partial(updated_state, config=router))
            return layer.unstacked({"state": update(part["state"], stats[name])})
        warm = jax.vmap(partial(updated_warmup, config=router))
        state, warmup = warm(part["state"], part["warmup"], stats[name])
        return layer.unstacked({"state": state, "warmup": warmup})

    return map_layers(run.model, router_state, update_layer)


def _layer_metrics(stats: RouterStats) -> Metrics:
    """Metrics of the layers of one name, [layers] each, and their load [layers, E]."""
    counts, tokens = stats.counts_E, stats.num_tokens
    return {
        **jax.vmap(load_metrics)(counts, tokens)._asdict(),
        "router_entropy": stats.entropy,
        "overflow_rows": stats.overflow_rows,
        "bytes_moved": stats.bytes_moved,
        "expert_load": counts / jnp.maximum(counts.mean(axis=-1, keepdims=True), 1e-9),
    }


def _depth_metrics(run: RunConfig, depth: dict[str, DepthStats]) -> Metrics:
    """Metrics of each depth layer, [periods] each; over micro-batches they add up to the mean."""
    return {
        name: {
            "chosen_fraction": layer.chosen_fraction / run.accumulation,
            "predictor_accuracy": layer.predictor_accuracy / run.accumulation,
        }
        for name, layer in depth.items()
    }
