"""One optimiser step: gradients over the micro-batches, the update, and what to log.

B rows of a micro-batch, A micro-batches, L length, D d_model, V vocab, E experts.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

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
from model.transformer import Variables, output_weights, training_pass
from model.warmup import updated_warmup
from parallel.sharding import constrain
from train.consolidation import penalty
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
    with_source_sums,
)
from train.matching import Matching, matching_loss, projection_optimizer
from train.multi_token import count_ahead, multi_token_loss
from train.preference import log_probs, num_pairs, preference_loss, row_log_probs
from train.quantization_aware import rounded_params
from train.spikes import is_spike, updated_means
from train.state import TrainSetup, TrainState, is_trained

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


BESIDE_LOGITS = ("tokens", "positions", "teacher_layers", "chosen")
"""Parts of a batch that no chunk of logits is given."""


def make_train_step(
    run: RunConfig,
    setup: TrainSetup,
    chunk_loss: ChunkLoss = cross_entropy,
    matching: Matching | None = None,
) -> TrainStep:
    """A jitted (state, batch) -> (state, metrics); the state's buffers are reused.

    Args:
      chunk_loss: the objective on a chunk of logits; see train/losses.py.
      matching: the layers that are compared with "teacher_layers" of the batch.
    Returns:
      A step that takes batch arrays [A * B, L, ...] ("tokens", "targets", "positions", and what the
      objective reads; "shared" goes to it whole; "chosen", the experts of each token where they are
      given, by layer as in model/step.py with dim 0 of the rows) and reports, the same on every
      device, float32 scalars "loss" (the objective, per target token, of preferences per pair), the
      objective's own sums likewise, "auxiliary", "grad_norm", "learning_rate", with
      optimizer.skip_above "skipped" (1: the step changed nothing), with multi-token modules
      "multi_token" (train/multi_token.py), with indexers "indexer", their mean loss in nats, with
      given experts "routing_changed", the share of them that routers would have chosen otherwise;
      and per MoE layer, under "router", and per layer that chooses its tokens, under "depth",
      arrays [layers of that name, ...]. With early_exit, "exits": the cross-entropies [K] of the
      exits that this step supervises, and the periods [K] before them, -1 for none.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics, stats, memory = _gradients(run, setup, chunk_loss, state, batch, matching)
        projections = state.projections
        if matching is not None:
            grads, projections = _updated_projections(setup, grads, projections)
        updates, opt_state = setup.optimizer.update(grads, state.opt_state, state.trained)
        if run.further.consolidation:
            metrics["consolidation"] = run.further.consolidation * penalty(
                state.opt_state, state.params
            )
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.float32(setup.schedule(state.step)),
            "router": {name: _layer_metrics(layer) for name, layer in stats.items()},
        }
        if run.model.early_exit is not None:
            periods_K = supervised_exits(run.model, state.step).periods_K
            metrics["exits"] = {"period": periods_K, "cross_entropy": metrics["exits"]}
        trained = optax.apply_updates(state.trained, updates)
        changed = {"step": state.step + 1, "opt_state": opt_state, "memory": memory}
        changed |= {"projections": projections}
        if run.lora is None:
            routers = _updated_routers(run, state.router_state, stats)
            changed |= {"params": trained, "router_state": routers}
        else:
            changed |= {"adapters": trained}
        if run.optimizer.average is not None:
            decay = _average_decay(run.optimizer.average, state.step)
            changed["averaged"] = optax.incremental_update(trained, state.averaged, 1 - decay)
        new_state = state.replace(**changed)
        if run.optimizer.skip_above is not None:
            new_state, metrics = _without_spike(run.optimizer.skip_above, state, new_state, metrics)
        return new_state, metrics

    everywhere = NamedSharding(setup.shardings.step.mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(setup.shardings, everywhere))


def _updated_projections(setup: TrainSetup, grads: Any, projections: Any) -> tuple[Any, Any]:
    """The gradients of the model, and the projections after their own step."""
    grads, own = grads["model"], grads["projections"]
    optimizer = projection_optimizer(setup.schedule)
    updates, opt_state = optimizer.update(own, projections["opt_state"], projections["params"])
    params = optax.apply_updates(projections["params"], updates)
    return grads, {"params": params, "opt_state": opt_state}


def _gradients(
    run: RunConfig,
    setup: TrainSetup,
    chunk_loss: ChunkLoss,
    state: TrainState,
    batch: Batch,
    matching: Matching | None,
) -> tuple[Any, Metrics, LayerStats, ModelState | None]:
    """Gradients of the mean objective over the whole batch plus the auxiliary losses, and the
    memory for the next step. With matching, those of "model" and "projections".
    """
    shared = batch.get("shared")
    rows = {name: x for name, x in batch.items() if name not in ("shared", "row")}
    if run.preference is None:
        num_targets = jnp.maximum((batch["targets"] >= 0).sum(), 1).astype(jnp.float32)
    else:
        num_targets = num_pairs(batch["targets"])
    num_ahead = count_ahead(batch["targets"], batch["positions"], run.model.multi_token)
    if "source" in rows:
        rows["source"] = jnp.broadcast_to(rows["source"][:, None], rows["targets"].shape)
        chunk_loss = with_source_sums(chunk_loss, len(run.data.mixture))

    def loss(trained, micro, earlier_counts, depth_key):
        projections = None
        if matching is not None:
            trained, projections = trained["model"], trained["projections"]
        variables = state.variables_with(_with_stopped_gradients(run, trained))
        hidden_BLD, sown, memory = training_pass(
            setup.model,
            variables,
            micro["tokens"],
            micro["positions"],
            state.memory,
            depth_key,
            chosen=_by_period(micro.get("chosen")),
            is_replayed=run.distill is None or run.distill.on_policy.replay,
            with_activations=matching is not None,
        )
        w_DV = output_weights(setup.model, variables)
        inputs = {k: v for k, v in micro.items() if k not in BESIDE_LOGITS}
        read = _Read(variables, hidden_BLD, w_DV, sown)
        objective, sums = _objective(run, setup, chunk_loss, state, read, micro, inputs, shared)
        if matching is not None:
            more, own_sums = _matching_loss(run, matching, projections, sown, micro, shared)
            objective, sums = objective + more, sums | own_sums
        if "chosen" in micro:
            sums["routing_changed"] = _routing_changed(run, sown) * num_targets
        stats, depth = collect_router_stats(sown, run.model), collect_depth_stats(sown, run.model)
        auxiliary = _auxiliary(run, stats, depth, earlier_counts)
        sums = jax.tree.map(lambda x: x / num_targets, sums | {"loss": objective})
        sums |= {"auxiliary": auxiliary, "depth": _depth_metrics(run, depth)}
        total = objective / num_targets + auxiliary
        for name, value, weighted in _losses_beside(
            run, chunk_loss, read, micro, inputs, shared, num_ahead
        ):
            total += weighted
            sums[name] = value
        return total, (sums, stats, memory)

    grad: Callable[..., Any] = jax.grad(loss, has_aux=True)
    keys = _depth_keys(run, state.step)
    trained = rounded_params(run, setup.model, state.trained, state.step)
    if matching is not None:
        trained = {"model": trained, "projections": state.projections["params"]}
    if run.accumulation == 1:
        key = None if keys is None else keys[0]
        grads, (sums, stats, memory) = grad(trained, rows, _no_counts(run), key)
    else:  # never with memory: see RunConfig
        grads, sums, stats = _accumulate(run, grad, trained, rows, keys)
        memory = None
    return grads, sums, stats, memory


class _Read(NamedTuple):
    """What a forward pass of a micro-batch gave."""

    variables: Variables
    hidden_BLD: jax.Array
    w_DV: jax.Array
    """Of the output layer."""
    sown: Any


def _objective(
    run: RunConfig,
    setup: TrainSetup,
    chunk_loss: ChunkLoss,
    state: TrainState,
    read: _Read,
    micro: Batch,
    inputs: Batch,
    shared: Any,
) -> tuple[jax.Array, Metrics]:
    """The objective summed over the targets (of preferences over the pairs) of a micro-batch, of
    all exits that are trained, and the sums that are reported."""
    chunks = run.execution.logits_chunks

    def loss_fn(hidden_BLD: jax.Array) -> tuple[jax.Array, Metrics]:
        return chunked_loss(chunk_loss, hidden_BLD, read.w_DV, inputs, shared, chunks)

    if run.preference is None:
        objective, sums = loss_fn(read.hidden_BLD)
    else:
        reference_B = log_probs(setup.model, state.reference_variables, micro)
        log_probs_B = row_log_probs(read.hidden_BLD, read.w_DV, micro["targets"], chunks)
        objective, sums = preference_loss(log_probs_B, reference_B, run.preference)
    if run.model.early_exit is not None:
        finish = partial(setup.model.apply, read.variables, method="finish")
        objective, sums["exits"] = exits_loss(
            lambda x_BLD: loss_fn(cast(jax.Array, finish(x_BLD))),
            objective,
            read.sown["exits"]["periods"]["hidden"],
            supervised_exits(run.model, state.step),
        )
    return objective, sums


def _losses_beside(
    run: RunConfig,
    chunk_loss: ChunkLoss,
    read: _Read,
    micro: Batch,
    inputs: Batch,
    shared: Any,
    num_ahead: Any,
) -> Iterator[tuple[str, jax.Array, jax.Array]]:
    """What indexers and multi-token modules learn from beside the objective: name, loss, and what
    it adds to the total."""
    imitation = collect_indexer_losses(read.sown)
    if imitation is not None:
        weighted = weighted_indexer_loss(imitation, run.model)
        yield "indexer", jnp.stack(list(imitation.values())).mean(), weighted / run.accumulation
    if run.model.multi_token is not None:
        modules, places = read.sown["multi_token"], micro["positions"]
        chunks = run.execution.logits_chunks
        ahead = multi_token_loss(
            chunk_loss, modules, read.w_DV, inputs, places, shared, chunks, num_ahead
        )
        yield "multi_token", ahead, run.model.multi_token.loss_weight * ahead


def _by_period(chosen: Any) -> Any:
    """Experts by layer, [B, periods, L, K] as rows of a batch lie, to [periods, B, L, K]."""
    return None if chosen is None else {name: x.swapaxes(0, 1) for name, x in chosen.items()}


def _routing_changed(run: RunConfig, sown: Any) -> jax.Array:
    """The share of given experts that the routers would have chosen otherwise, over all layers; of
    one micro-batch, its share of that."""
    layers = [layer for layer in moe_layers(run.model).values() if layer.periods]
    shares = [layer.stacked(layer.of(sown["router"])["changed"]) for layer in layers]
    return jnp.concatenate(shares).mean() / run.accumulation


def _matching_loss(run, matching, projections, sown, micro, shared):
    assert run.distill is not None
    terms = run.distill.terms
    is_constant = all(term.is_constant for term in terms)
    weights = [term.weight for term in terms] if is_constant else shared["weights"]
    own, teacher = sown["activations"], micro["teacher_layers"]
    targets_BL = micro["targets"]
    return matching_loss(matching, weights, projections, own, run.model, teacher, targets_BL)


def _average_decay(decay: float, step: jax.Array) -> jax.Array:
    """Of the moving average after `step` steps: less in the first, which the weights leave soon."""
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + step) / (10 + step))


def _without_spike(
    factor: float, state: TrainState, new_state: TrainState, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """The new state; of a step that is a spike the old one, a step further."""
    loss, grad_norm = metrics["loss"], metrics["grad_norm"]
    is_left_out = is_spike(state.means, loss, grad_norm, factor)
    counted = new_state.replace(means=updated_means(state.means, loss, grad_norm))
    chosen = jax.tree.map(
        lambda old, new: jnp.where(is_left_out, old, new), state.replace(step=0), counted
    )
    metrics |= {"skipped": is_left_out.astype(jnp.float32)}
    return chosen.replace(step=new_state.step), metrics


def _with_stopped_gradients(run: RunConfig, params: Any) -> Any:
    """The parameters, of which those that are not trained have no gradient."""
    trained = is_trained(run, params)
    if trained is None:
        return params
    return jax.tree.map(lambda x, own: x if own else jax.lax.stop_gradient(x), params, trained)


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
        if "state" not in part:  # a table that goes by token
            return part
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
        "z_loss": stats.z_loss,
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
