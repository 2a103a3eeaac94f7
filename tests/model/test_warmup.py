"""The bias warm-up of reserved twins on a synthetic router: exact at first, families keep their
load, twins end with their share, and twins that enter at once are told apart.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.checks import UserError
from configs.feed_forward import BiasWarmupConfig, RouterConfig
from model.balance import router_stats
from model.router import RouterState, route
from model.warmup import initial_warmup, updated_warmup, warmup_stats
from tests import tiny

TOKENS, PARENTS, STEPS = 4096, 8, 40
IS_TOKEN = jnp.ones((1, TOKENS), jnp.bool_)
BOUND = 0.25
"""Of a family's load against what it was, in units of the mean family load: the bias answers one
batch late, and a choice moves twice the load once twins stand side by side."""
CONFIG = RouterConfig(
    top_k=2,
    scores="sigmoid",
    balance="loss_free",
    bias_rate=1e-3,
    warmup=BiasWarmupConfig(steps=STEPS),
)


def logits(key, factor: int, spread: float):
    """Each token prefers one of the first four families and then one of the others, so a family of
    the first kind that counted twice would take the load of one of the second. Twins differ by
    `spread`."""
    first, second, base, own = jax.random.split(key, 4)
    x_TP = 0.5 * jax.random.normal(base, (TOKENS, PARENTS))
    half = PARENTS // 2
    x_TP += 2.5 * jax.nn.one_hot(jax.random.randint(first, (TOKENS,), 0, half), PARENTS)
    x_TP += 0.8 * jax.nn.one_hot(jax.random.randint(second, (TOKENS,), half, PARENTS), PARENTS)
    x_TE = jnp.concatenate([x_TP] * factor, axis=1)
    return x_TE + spread * jax.random.normal(own, x_TE.shape)


@partial(jax.jit, static_argnums=(3, 4))
def one_step(key, state, warmup, config, spread):
    """Routes a batch; the router after it and the choices of each member of each family, [n, P]."""
    factor = config.warmup.factor
    x_TE = logits(key, factor, spread)
    routing = route(x_TE, config, state)
    moved = {"overflow_rows": jnp.int32(0), "bytes_moved": jnp.float32(0)}
    stats = router_stats(x_TE, routing, IS_TOKEN, config, **moved)
    seen = warmup_stats(routing, IS_TOKEN[0], state, warmup, config.warmup)
    state, warmup = updated_warmup(state, warmup, stats._replace(warmup=seen), config)
    return state, warmup, routing.counts_E.reshape(factor, -1)


def history(config: RouterConfig, spread: float, reserve: float = 2.0) -> np.ndarray:
    """Choices of each member at each step, [1 + STEPS, n, P], from parents of equal bias."""
    assert config.warmup is not None
    factor = config.warmup.factor
    bias_E = jnp.zeros(factor * PARENTS).at[PARENTS:].add(-reserve)
    state, warmup = RouterState(bias_E, jnp.float32(0)), initial_warmup(len(bias_E), config.warmup)
    counts = []
    for i in range(1 + STEPS):
        state, warmup, members = one_step(jax.random.key(i), state, warmup, config, spread)
        counts.append(np.asarray(members))
    return np.stack(counts)


def family_error(counts) -> float:
    """The greatest change of a family's load since the first step, in mean family loads."""
    share = counts.sum(axis=1) / counts.sum(axis=(1, 2))[:, None]
    return float(np.abs(share[1:] - share[0]).max() * PARENTS)


CASES = {
    "twins alike": (CONFIG, 0.0),
    "twins that differ": (CONFIG, 0.3),
    "softmax, threes": (
        dataclasses.replace(CONFIG, scores="softmax", warmup=BiasWarmupConfig(steps=40, factor=3)),
        0.3,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(2)
def test_families_keep_their_load_while_twins_enter(name):
    config, spread = CASES[name]
    counts = history(config, spread)
    assert counts[0, 1:].sum() == 0  # exact at first
    assert counts[1, 1:].sum() < 0.01 * counts[1].sum()  # then one in a thousand, about
    print(name, family_error(counts))
    assert family_error(counts) < BOUND
    entered = counts[:, 1:].sum(axis=(1, 2)) / counts.sum(axis=(1, 2))
    assert (np.diff(entered[::8]) > -0.02).all()  # more and more of them
    load = counts[-1] / counts[-1].mean()
    assert load.min() > 0.5
    assert load.max() < 2.0


@pytest.mark.slow
def test_twins_that_enter_at_once_are_told_apart():
    """The plausible mistake, the parents' bias from the first step on: the families that tokens
    prefer count about twice, and the others starve."""
    counts = np.stack([history(CONFIG, 0.0, reserve)[0] for reserve in (2.0, 0.0)])
    assert family_error(counts) > 3 * BOUND
    share_P = counts[1].sum(axis=0) / counts[0].sum(axis=0)
    assert share_P[: PARENTS // 2].min() > 1.6
    assert share_P[PARENTS // 2 :].max() < 0.4


def test_the_balance_takes_over_afterwards():
    """Every step then moves each bias by the rate, for each expert alone."""
    state, warmup = RouterState(jnp.zeros(16), jnp.float32(0)), initial_warmup(16, CONFIG.warmup)
    warmup = warmup.replace(step=jnp.int32(STEPS), share_P=jnp.full(8, 1 / 8), gap=jnp.float32(0.4))
    after, _, counts = one_step(jax.random.key(0), state, warmup, CONFIG, 0.3)
    counts = np.asarray(counts)
    expected = 1e-3 * np.sign(counts.mean() - counts.reshape(-1))
    np.testing.assert_allclose(after.bias_E, expected, atol=1e-9)


def test_settings_that_contradict_are_refused():
    with pytest.raises(UserError, match="moves a router's bias"):
        RouterConfig(top_k=2, warmup=BiasWarmupConfig(steps=10))
    with pytest.raises(UserError, match=r"steps=0 must be greater than 0"):
        BiasWarmupConfig(steps=0)
    with pytest.raises(UserError, match=r"num_experts=15 must be divisible by router\.warmup"):
        tiny.moe(num_experts=15, router=CONFIG)
