"""Work done again for its gradient: the same numbers, and less memory, even where a compiler
would share what is computed twice (the CPU's).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from parallel.recompute import recomputed

LAYERS, ROWS, WIDTH = 6, 512, 128


def layer(operands, weights):
    """Reads rows by number and keeps the first product alone: silu and the rows are made again."""
    x_TD, rows_R = operands
    h_RF = checkpoint_name(x_TD[rows_R] @ weights["up"], "product")
    return jax.nn.silu(h_RF) @ weights["down"]


def operands():
    random = np.random.RandomState(0)
    x = random.randn(ROWS, WIDTH).astype(np.float32)
    shapes = {"up": (LAYERS, WIDTH, WIDTH), "down": (LAYERS, WIDTH, WIDTH)}
    weights = {name: random.randn(*shape).astype(np.float32) for name, shape in shapes.items()}
    return x, weights, random.permutation(ROWS)


def compiled_gradient(work):
    def total(x, weights, rows):
        for i in range(LAYERS):
            x = jnp.tanh(work((x, rows), {name: w[i] for name, w in weights.items()}))
        return x.sum()

    return jax.jit(jax.grad(total, argnums=(0, 1))).lower(*operands()).compile()


@functools.cache
def plain():
    return compiled_gradient(layer)


@pytest.mark.parametrize("kept", [(), ("product",)], ids=["nothing kept", "a product kept"])
def test_gradients_are_those_of_the_plain_function(kept):
    ours = compiled_gradient(recomputed(layer, kept))(*operands())
    # The same operations; a compiler may fuse a product with a sum here and not there.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, ours, plain()(*operands()))


def test_what_is_made_again_is_not_kept():
    array = ROWS * WIDTH * 4
    ours = compiled_gradient(recomputed(layer, ("product",)))
    before, after = plain().memory_analysis(), ours.memory_analysis()
    assert before is not None
    assert after is not None
    saved = before.temp_size_in_bytes - after.temp_size_in_bytes
    # Of each layer but the one at work: the sorted rows, silu, and its factor.
    assert saved >= 2 * (LAYERS - 2) * array


def test_gradients_of_a_gradient_are_those_of_the_plain_function():
    x, weights, rows = operands()
    first = jax.tree.map(lambda w: w[0] / WIDTH, weights)

    def curvature(work):
        grad = jax.grad(lambda x: jnp.tanh(work((x, rows), first)).sum())
        return jax.jvp(grad, (x,), (jnp.ones_like(x),))[1]

    np.testing.assert_allclose(curvature(recomputed(layer)), curvature(layer), rtol=1e-4, atol=1e-5)
