"""What a model that is taught further keeps: weights held by elastic weight consolidation
(Kirkpatrick et al. 2017), or frozen but for new experts.

Both are gradient transformations around the optimiser. The weights that a run began with, and their
Fisher information, are a part of the optimiser's state: they lie in its checkpoints.

L length, E experts.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from configs.further import FurtherConfig
from model.growth import EXPERT_AND_WIDTH
from model.layers import unembed
from model.seeds import seed_key
from model.transformer import Transformer, Variables, hidden_states, output_weights
from train.losses import chunked_loss, cross_entropy

EXPERT_AND_ROUTER_DIMS = {name: dims[0] for name, dims in EXPERT_AND_WIDTH.items()}
EXPERT_AND_ROUTER_DIMS |= {"router": -1, "router_bias": -1}
"""The dim of the experts in their weights and in a router's, counted from the end."""


class ConsolidationState(NamedTuple):
    anchor: Any
    """The weights that the run began with."""
    fisher: Any
    """Their Fisher information for a token, diagonal; like the weights."""


def keeping(
    config: FurtherConfig, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The optimiser with what the config holds back; itself where it holds nothing."""
    if config.consolidation:
        return optax.chain(_consolidate(config.consolidation), optimizer)
    if config.frozen_experts:
        mask = _only_new_experts(config.frozen_experts)
        return optax.chain(mask, optimizer, mask)  # for the norm, and for decay and momentum
    return optimizer


def _consolidate(strength: float) -> optax.GradientTransformation:
    """Adds strength * F * (w - w0) to the gradients."""

    def init(params: Any) -> ConsolidationState:
        return ConsolidationState(params, jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        def pulled(g, w, w0, f):
            return g + strength * f * (w - w0)

        return jax.tree.map(pulled, updates, params, state.anchor, state.fisher), state

    return optax.GradientTransformation(init, update)


def penalty(opt_state: Any, params: Any) -> jax.Array:
    """Half the sum of F (w - w0)^2, float32 [].

    Args:
      opt_state: of an optimiser that consolidates.
    """
    kept: ConsolidationState = opt_state[0]
    parts = jax.tree.map(
        lambda w, w0, f: (f * (w - w0) ** 2).sum(), params, kept.anchor, kept.fisher
    )
    return 0.5 * jnp.stack(jax.tree.leaves(parts)).sum()


def with_fisher(opt_state: Any, fisher: Any) -> Any:
    """The state of an optimiser that consolidates, with the Fisher information in it."""
    return (opt_state[0]._replace(fisher=fisher), *opt_state[1:])


def _only_new_experts(num_old: int) -> optax.GradientTransformation:
    """Nothing of the updates but those of the experts from num_old on, and of their columns in the
    routers."""

    def kept(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        names = [str(getattr(key, "key", "")) for key in path]
        dim = EXPERT_AND_ROUTER_DIMS.get(names[-1])
        if dim is None or "moe" not in names or "shared" in names:
            return jnp.zeros_like(update)
        is_new_E = jnp.arange(update.shape[dim]) >= num_old
        return jnp.where(jnp.expand_dims(is_new_E, range(1, -dim)), update, 0)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(kept, updates))


def mean_square(
    gradient: Callable[[Any, Any, jax.Array], Any], params: Any, rows: Iterator[Any], seed: int
) -> Any:
    """The mean over tokens of the squares of a model's score: its Fisher information, diagonal.

    With outcomes drawn from the model itself, scores of a row's tokens are independent and have
    mean 0: the expected square of their sum is the sum of their squares.

    Args:
      gradient: (params, row, key) -> the gradient of the row's log-probability, with outcomes that
        the key draws from the model, and how many tokens that is.
    """
    total, tokens = jax.tree.map(jnp.zeros_like, params), 0

    @jax.jit
    def add(total: Any, params: Any, row: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        own, count = gradient(params, row, key)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype) ** 2, total, own), count

    for i, row in enumerate(rows):
        total, count = add(total, params, row, jax.random.fold_in(seed_key(seed), i))
        tokens += int(count)
    return jax.tree.map(lambda t: t / max(tokens, 1), total)


def row_gradient(model: Transformer, router_state: Any, params: Any, row: Any, key: Any) -> Any:
    """What `mean_square` takes, of a language model.

    Args:
      row: "tokens", "targets" and "positions" [1, L]; tokens without a target don't count.
    """
    chunks = model.execution.logits_chunks
    is_counted_1L = row["targets"] >= 0

    def variables_of(params: Any) -> Variables:
        return {"params": params, "router_state": router_state}

    variables = variables_of(params)
    hidden_1LD, _ = hidden_states(model, variables, row["tokens"], row["positions"])
    w_DV = output_weights(model, variables)
    pieces = hidden_1LD.reshape(chunks, -1, hidden_1LD.shape[-1])

    def draw(piece):
        hidden_cD, key = piece
        return jax.random.categorical(key, unembed(hidden_cD, w_DV))

    drawn_1L = jax.lax.map(draw, (pieces, jax.random.split(key, chunks))).reshape(1, -1)
    targets = {"targets": jnp.where(is_counted_1L, drawn_1L, -1)}

    def nats(params):
        variables = variables_of(params)
        hidden_1LD, _ = hidden_states(model, variables, row["tokens"], row["positions"])
        w_DV = output_weights(model, variables)
        return chunked_loss(cross_entropy, hidden_1LD, w_DV, targets, None, chunks)[0]

    return jax.grad(nats)(params), is_counted_1L.sum()


def fisher_information(
    model: Transformer, variables: Variables, rows: Iterator[Any], seed: int
) -> Any:
    """The diagonal Fisher information of a token of these rows, like variables["params"]."""
    gradient = partial(row_gradient, model, variables["router_state"])
    return mean_square(gradient, variables["params"], rows, seed)
