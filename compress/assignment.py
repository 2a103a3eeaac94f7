"""Which grid each weight gets: by what its rounding costs for each byte that it saves.

The cost of rounding a weight is estimated by its Fisher information, 1/2 sum F (Q(w) - w)^2, where
F is the mean square of the gradient of a token's loss when the token is drawn from the model's own
prediction (the diagonal form of HAWQ-V2's score, 2020): to second order the KL divergence in nats
per token. Experts count by their load, as a token that does not go to one has no gradient there.
The choice is a knapsack: the least cost within a number of bytes.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.grids import Grid, as_parameter, matrices, round_to_nearest
from compress.layered import LayeredModel, Tree
from compress.rounding import END_DIMS, Assignment, layer_dims, leaf
from kernels.quantize import MatrixDims
from model.layers import unembed
from model.step import Step
from model.transformer import Transformer, forward

BUCKETS = 4000
"""Parts of a budget of bytes that choices are counted in."""
PLAIN_BYTES = 2
"""Of a weight that is not rounded, in bfloat16 or float16."""
Choice = Grid | None
"""None leaves a weight as it is."""


def weights_of(model: LayeredModel) -> dict[str, tuple[np.ndarray, MatrixDims]]:
    """Every weight that may have few bits, and its dims, by path: "3.attention.q", "embedding"."""
    found: dict[str, tuple[np.ndarray, MatrixDims]] = {
        path: (model.ends[path], dims) for path, dims in END_DIMS.items() if path in model.ends
    }
    for i, layer in enumerate(model.layers):
        for path, dims in layer_dims(model.config, layer.spec).items():
            found[f"{i}.{path}"] = leaf(layer.params, path), dims
    return found


def num_inputs(w: np.ndarray, dims: MatrixDims) -> int:
    return int(np.prod(dims.split(w.shape)[1]))


def fisher(model: LayeredModel, steps: Sequence[Step]) -> dict[str, np.ndarray]:
    """The diagonal of the Fisher information of a token, by path of `weights_of`, of each weight's
    shape; from one gradient for each row, whose tokens' errors are independent of each other.
    """
    config, variables = model.assembled()
    transformer = Transformer(config, model.execution)
    total: Tree | None = None
    count = 0
    for step in steps:
        for b in range(len(step.tokens_BL)):
            row = jax.tree.map(lambda x, b=b: x[b : b + 1], step)
            squares = _squares(transformer, variables, row, jax.random.key(count))
            total = squares if total is None else jax.tree.map(np.add, total, squares)
            count += 1
    assert total is not None
    means = jax.tree.map(lambda x: np.asarray(x) / count, total)
    return _by_path(model, config, means)


@partial(jax.jit, static_argnums=0)
def _squares(model: Transformer, variables: Any, step: Step, key: jax.Array) -> Tree:
    """The squared gradient of one row's loss on drawn tokens, over how many there are."""

    def loss(params: Tree) -> jax.Array:
        own = variables | {"params": params}
        hidden_BLD, _ = forward(model, own, step)
        w_DV: Any = model.apply(own, method="unembedding")
        logp_BLV = jax.nn.log_softmax(unembed(hidden_BLD, w_DV))
        drawn_BL = jax.random.categorical(key, jax.lax.stop_gradient(logp_BLV))
        return -jnp.take_along_axis(logp_BLV, drawn_BL[..., None], axis=-1).sum()

    count = step.tokens_BL.size
    return jax.tree.map(lambda g: g * g / count, jax.grad(loss)(variables["params"]))


def _by_path(model: LayeredModel, config: Any, tree: Tree) -> dict[str, np.ndarray]:
    found = {path: tree[path] for path in END_DIMS if path in tree}
    prefix, period = len(config.prefix), len(config.pattern)
    for i, layer in enumerate(model.layers):
        if i < prefix:
            own = tree[f"prefix_{i}"]
        else:
            p, place = divmod(i - prefix, period)
            own = jax.tree.map(lambda x, p=p: x[p], tree["periods"][f"layer_{place}"])
        for path in layer_dims(model.config, layer.spec):
            found[f"{i}.{path}"] = leaf(own, path)
    return found


def costs(
    weights: Mapping[str, tuple[np.ndarray, MatrixDims]],
    choices: Sequence[Choice],
    information: Mapping[str, np.ndarray],
) -> dict[str, list[tuple[Choice, float, int]]]:
    """For each weight the choices that fit it, each with its cost in nats and its bytes.

    Args:
      weights: of `weights_of`.
      information: of `fisher`.
    """
    found: dict[str, list[tuple[Choice, float, int]]] = {}
    for path, (w, dims) in weights.items():
        options: list[tuple[Choice, float, int]] = []
        for grid in choices:
            if grid is None:
                options.append((None, 0.0, PLAIN_BYTES * w.size))
            elif grid.fits(num_inputs(w, dims)):
                rows = [round_to_nearest(w_NK, grid) for w_NK in matrices(w, dims)]
                rounded = as_parameter(rows, w.shape, dims, grid)
                error = rounded.values() - w
                cost = 0.5 * float((information[path] * error * error).sum())
                options.append((grid, cost, rounded.num_bytes))
        found[path] = options or [(None, 0.0, PLAIN_BYTES * w.size)]
    return found


def knapsack(options: Sequence[Sequence[tuple[float, int]]], budget: int) -> list[int] | None:
    """The choice of each item, by number, of the least cost in all within a budget of bytes; None:
    there is none. Exact up to a BUCKETS-th of the bytes above the least, counted upwards.

    Args:
      options: (cost, bytes) of each item's choices.
    """
    least = [min(size for _, size in item) for item in options]
    room = budget - sum(least)
    if room < 0:
        return None
    unit = max(-(-room // BUCKETS), 1)
    count = room // unit
    best = np.zeros(count + 1)
    taken = np.zeros((len(options), count + 1), np.int16)
    for i, item in enumerate(options):
        new = np.full(count + 1, np.inf)
        for c, (cost, size) in enumerate(item):
            step = -(-(size - least[i]) // unit)
            if step > count:
                continue
            tried = np.full(count + 1, np.inf)
            tried[step:] = best[: count + 1 - step] + cost
            better = tried < new
            new = np.where(better, tried, new)
            taken[i][better] = c
        best = new
    chosen = [0] * len(options)
    place = int(np.argmin(best))
    for i in reversed(range(len(options))):
        chosen[i] = int(taken[i][place])
        place -= -(-(options[i][chosen[i]][1] - least[i]) // unit)
    return chosen


def assigned(
    options: Mapping[str, Sequence[tuple[Choice, float, int]]], budget: int
) -> tuple[Assignment, float, int] | None:
    """The assignment of the least cost within a budget of bytes, its cost and its bytes; None: it
    can't be met.
    """
    paths = list(options)
    chosen = knapsack([[(cost, size) for _, cost, size in options[p]] for p in paths], budget)
    if chosen is None:
        return None
    picked = {p: options[p][c] for p, c in zip(paths, chosen, strict=True)}
    grids = {p: grid for p, (grid, _, _) in picked.items() if grid is not None}
    return grids, sum(cost for _, cost, _ in picked.values()), sum(n for _, _, n in picked.values())
