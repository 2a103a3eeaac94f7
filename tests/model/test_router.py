"""The router and the load metrics against double loops and closed forms."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.feed_forward import RouterConfig
from model import router
from model.balance import (
    load_balance_loss,
    load_metrics,
    matching_null,
    router_stats,
    token_expert_information,
    updated_state,
)
from model.router import RouterState, initial_state
from model.router_scores import SCORES

T, E = 50, 6
traced = jax.jit(router.route, static_argnums=1)


def route(logits, config: RouterConfig, state: RouterState | None = None, **masks):
    """A program to a config, and arrays of numpy: each operation alone would be a program, too."""
    return jax.device_get(traced(logits, config, state, **masks))


def logits(seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randn(T, E).astype(np.float32)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_route_equals_a_loop(top_k, normalize):
    x = logits()
    routing = route(x, RouterConfig(top_k=top_k, normalize_gates=normalize))
    for t in range(T):
        scores = np.exp(x[t]) / np.exp(x[t]).sum()
        best = sorted(range(E), key=lambda e, s=scores: -s[e])[:top_k]
        gates = scores[best] / (scores[best].sum() if normalize else 1.0)
        assert routing.expert_ids_TK[t].tolist() == best
        np.testing.assert_allclose(routing.gates_TK[t], gates, rtol=1e-5)
    ids = np.asarray(routing.expert_ids_TK)
    np.testing.assert_array_equal(routing.counts_E, np.bincount(ids.reshape(-1), minlength=E))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_each_token_meets_distinct_experts_and_whole_gates(seed):
    routing = route(logits(seed), RouterConfig(top_k=3))
    ids = np.asarray(routing.expert_ids_TK)
    assert all(len(set(row)) == 3 for row in ids.tolist())
    np.testing.assert_allclose(routing.gates_TK.sum(axis=1), 1.0, rtol=1e-6)
    assert routing.counts_E.sum() == 3 * T


def test_permuting_experts_permutes_the_routing():
    x, order = logits(), np.random.RandomState(1).permutation(E)
    base = route(x, RouterConfig(top_k=2))
    moved = route(x[:, order], RouterConfig(top_k=2))
    np.testing.assert_array_equal(order[np.asarray(moved.expert_ids_TK)], base.expert_ids_TK)


def test_padding_goes_nowhere():
    is_token = np.arange(T) < 30
    routing = route(logits(), RouterConfig(top_k=2), is_token_T=is_token)
    assert (np.asarray(routing.expert_ids_TK)[30:] == -1).all()
    assert (np.asarray(routing.gates_TK)[30:] == 0).all()
    assert routing.counts_E.sum() == 60


def test_gates_that_are_not_renormalised_are_told_apart():
    plain = route(logits(), RouterConfig(top_k=2, normalize_gates=False))
    assert np.abs(np.asarray(plain.gates_TK.sum(axis=1)) - 1).max() > 0.1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="float32"):
        route(logits().astype(jnp.bfloat16), RouterConfig(top_k=2))
    with pytest.raises(ValueError, match="top_k=9 must not exceed the 6"):
        route(logits(), RouterConfig(top_k=9))


def test_load_balance_closed_forms():
    uniform = jnp.full((E,), 1 / E)
    assert load_balance_loss(jnp.full((E,), 7), uniform) == pytest.approx(1.0)
    one = jnp.zeros(E, jnp.int32).at[2].set(9)
    assert load_balance_loss(one, jnp.eye(E)[2]) == pytest.approx(E)


def test_load_balance_equals_a_double_loop_and_pushes_scores_only():
    counts = np.array([5, 0, 3, 1, 0, 1], np.int32)
    scores = np.random.RandomState(0).dirichlet(np.ones(E)).astype(np.float32)
    expected = E * sum(counts[i] / counts.sum() * scores[i] for i in range(E))
    assert load_balance_loss(jnp.asarray(counts), jnp.asarray(scores)) == pytest.approx(expected)
    gradient = jax.grad(lambda p: load_balance_loss(jnp.asarray(counts), p))(jnp.asarray(scores))
    np.testing.assert_allclose(gradient, E * counts / counts.sum(), rtol=1e-6)


@partial(jax.jit, static_argnums=3)
def stats_of_rows(x, routing, is_token_BL, config):
    moved = {"overflow_rows": jnp.int32(0), "bytes_moved": jnp.float32(0)}
    return router_stats(x, routing, is_token_BL, config, **moved)


def stats_of(x, routing, is_token, config):
    """Of one row that holds all tokens."""
    return stats_of_rows(x, routing, is_token[None], config)


def test_router_stats_equal_a_loop_over_real_tokens():
    x, is_token = logits(), np.arange(T) % 3 != 0
    config = RouterConfig(top_k=2)
    routing = route(x, config, is_token_T=is_token)
    stats = stats_of(x, routing, is_token, config)
    rows = x[is_token].astype(np.float64)
    scores = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    np.testing.assert_allclose(stats.mean_scores_E, scores.mean(0), rtol=1e-5)
    lse = np.log(np.exp(rows).sum(1))
    np.testing.assert_allclose(stats.z_loss, (lse**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(stats.entropy, -(scores * np.log(scores)).sum(1).mean(), rtol=1e-5)


def test_load_figures():
    counts = jnp.asarray([40, 40, 0, 0, 10, 10])
    metrics = load_metrics(counts, jnp.float32(50))
    relative = np.array([40, 40, 0, 0, 10, 10]) * 6 / 100
    assert metrics.load_cv == pytest.approx(relative.std(), rel=1e-6)
    assert metrics.max_violation == pytest.approx(1.4)
    assert metrics.dead_experts == 2
    assert metrics.peak_load == pytest.approx(0.8)
    assert metrics.mean_k == pytest.approx(2.0)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(64, 2, 2048), (16, 2, 4096)])
def test_the_floor_is_what_uniform_routing_shows(experts, top_k, tokens):
    """floor^2 is the mean of CV^2 over draws; 200 draws know it to 3% at 15 degrees of freedom."""
    random = np.random.RandomState(0)
    squares = []
    for _ in range(200):
        ids = np.argpartition(random.rand(tokens, experts), top_k, axis=1)[:, :top_k]
        counts = np.bincount(ids.reshape(-1), minlength=experts)
        squares.append((counts * experts / (tokens * top_k)).var())
    metrics = load_metrics(jnp.full(experts, tokens * top_k // experts), jnp.float32(tokens))
    assert np.mean(squares) == pytest.approx(float(metrics.load_cv_floor) ** 2, rel=0.1)


# --- scores, groups, bias, null experts ---------------------------------------------------------


def scored(x, kind):
    if kind == "softmax":
        return np.exp(x) / np.exp(x).sum()
    return 1 / (1 + np.exp(-x)) if kind == "sigmoid" else np.sqrt(np.log1p(np.exp(x)))


def route_one(x, config: RouterConfig, bias, null_logit):
    """The oracle: one token's ids (nulls are -1) and gates, in float64, from the equations."""
    x = x.astype(np.float64)
    everything = np.concatenate([x, np.full(config.num_null_experts, null_logit)])
    scores = scored(everything, config.scores)
    wanted = scores + np.concatenate([bias, np.zeros(config.num_null_experts)])
    allowed = set(range(len(everything)))
    if config.num_groups:
        size = len(x) // config.num_groups
        groups = [range(j * size, (j + 1) * size) for j in range(config.num_groups)]
        judged = {"best_two": 2, "best": 1}[config.group_score]
        ranked = sorted(groups, key=lambda g: -sum(sorted(wanted[list(g)])[-judged:]))
        best = ranked[: config.top_groups]
        allowed = {e for group in best for e in group} | set(range(len(x), len(everything)))
    chosen = sorted(allowed, key=lambda e: -wanted[e])[: config.top_k]
    real = [e for e in chosen if e < len(x)]
    total = scores[real].sum() if config.normalize_gates else 1.0
    gates = [config.gate_scale * scores[e] / total if e in real else 0.0 for e in chosen]
    return [e if e in real else -1 for e in chosen], gates


VARIANTS = {
    "DeepSeek-V3": RouterConfig(
        top_k=3,
        scores="sigmoid",
        gate_scale=2.5,
        num_groups=4,
        top_groups=2,
        balance="loss_free",
        bias_rate=1e-3,
    ),
    "DeepSeek-V4": RouterConfig(
        top_k=2, scores="sqrt_softplus", gate_scale=1.5, balance="loss_free", bias_rate=1e-3
    ),
    "one to three": RouterConfig(top_k=3, num_null_experts=2, target_k=2.0),
    "one to three, biased": RouterConfig(
        top_k=3, num_null_experts=2, target_k=2.0, balance="quantile", bias_rate=1.0
    ),
    "groups without bias": RouterConfig(top_k=2, num_groups=2, top_groups=1, normalize_gates=False),
    "DeepSeek-V2": RouterConfig(
        top_k=3,
        num_groups=4,
        top_groups=2,
        group_score="best",
        normalize_gates=False,
        gate_scale=16.0,
    ),
    "groups of one": RouterConfig(top_k=2, num_groups=8, top_groups=3, group_score="best"),
}
WIDE = np.random.RandomState(5).randn(200, 8).astype(np.float32)
BIAS = 0.3 * np.random.RandomState(6).randn(8).astype(np.float32)


def state_of(config: RouterConfig, bias=BIAS, null_logit=0.4):
    biased = bias if config.balance != "none" else np.zeros(8, np.float32)
    return RouterState(biased, np.float32(null_logit))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_equals_the_oracle(config):
    state = state_of(config)
    routing = route(WIDE, config, state)
    for t, x in enumerate(WIDE):
        ids, gates = route_one(x, config, np.asarray(state.bias_E), float(state.null_logit))
        assert routing.expert_ids_TK[t].tolist() == ids
        np.testing.assert_allclose(routing.gates_TK[t], gates, rtol=1e-5)


def test_a_bias_in_the_gates_is_rejected_by_the_oracle():
    config = VARIANTS["DeepSeek-V3"]
    ids, gates = route_one(WIDE[0], config, BIAS, 0.0)
    biased = scored(WIDE[0].astype(np.float64), "sigmoid")[ids] + BIAS[ids]
    assert np.abs(config.gate_scale * biased / biased.sum() - gates).max() > 1e-2


def test_a_constant_added_to_all_biases_changes_nothing():
    config = VARIANTS["DeepSeek-V3"]
    base = route(WIDE, config, state_of(config))
    moved = route(WIDE, config, state_of(config, BIAS + 0.25))
    np.testing.assert_array_equal(base.expert_ids_TK, moved.expert_ids_TK)
    np.testing.assert_array_equal(base.gates_TK, moved.gates_TK)


def test_no_gradient_reaches_the_bias():
    config = VARIANTS["DeepSeek-V4"]

    def gates(bias_E):
        state = RouterState(bias_E, jnp.float32(0))
        return jnp.square(traced(WIDE, config, state).gates_TK).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(gates))(BIAS), 0)


def test_tokens_stay_in_their_best_groups():
    config = VARIANTS["DeepSeek-V3"]
    ids = np.asarray(route(WIDE, config, state_of(config)).expert_ids_TK)
    assert max(len(set(row // 2)) for row in ids) <= 2


def test_judging_groups_by_two_experts_is_told_apart_from_the_best_one():
    config = VARIANTS["DeepSeek-V2"]
    other = dataclasses.replace(config, group_score="best_two")
    chosen = [route(WIDE, c).expert_ids_TK for c in (config, other)]
    assert (chosen[0] != chosen[1]).any(axis=1).mean() > 0.1


@pytest.mark.parametrize("null_logit", [-9.0, 0.0, 0.7, 9.0])
def test_null_experts_leave_one_to_three(null_logit):
    config = VARIANTS["one to three"]
    routing = route(WIDE, config, state_of(config, null_logit=null_logit))
    k_T = (np.asarray(routing.expert_ids_TK) >= 0).sum(axis=1)
    assert k_T.min() >= 1
    assert k_T.max() <= 3
    assert routing.counts_E.sum() == k_T.sum()
    np.testing.assert_allclose(routing.gates_TK.sum(axis=1), 1.0, rtol=1e-6)
    if abs(null_logit) == 9.0:
        assert set(k_T) == {3 if null_logit < 0 else 1}


def test_raising_an_experts_logit_never_takes_experts_away():
    config = VARIANTS["one to three"]
    state = state_of(config)
    before = np.asarray(route(WIDE, config, state).expert_ids_TK >= 0).sum(axis=1)
    for expert in range(8):
        raised = WIDE.copy()
        raised[:, expert] += np.float32(0.8)
        after = np.asarray(route(raised, config, state).expert_ids_TK >= 0).sum(axis=1)
        assert (after >= before).all()


def test_a_router_without_the_state_it_needs_is_refused():
    with pytest.raises(ValueError, match="router_state"):
        route(WIDE, VARIANTS["one to three"])


def test_preference_raises_the_load_of_the_preferred():
    config = RouterConfig(top_k=2)
    loads = []
    for beta in (0.0, 0.1, 0.2, 0.4):
        preference = np.zeros(8, np.float32)
        preference[[1, 6]] = beta
        routing = route(WIDE, config, preference_E=preference)
        loads.append(int(routing.counts_E[[1, 6]].sum()))
    plain = route(WIDE, config)
    assert loads[0] == int(plain.counts_E[[1, 6]].sum())
    assert loads == sorted(loads)
    assert loads[-1] > 1.5 * loads[0]


# --- controllers --------------------------------------------------------------------------------


def settle(config: RouterConfig, draw, steps: int, state=None) -> tuple[list, RouterState]:
    """Runs the controllers on fresh logits each step; load CV and mean k by step."""
    state, history = state or initial_state(64), []

    @jax.jit
    def step(x, state):
        routing = traced(x, config, state)
        stats = stats_of(x, routing, np.ones(len(x), bool), config)
        metrics = load_metrics(stats.counts_E, stats.num_tokens)
        return metrics.load_cv, metrics.mean_k, updated_state(state, stats, config)

    for i in range(steps):
        cv, mean_k, state = step(draw(i), state)
        history.append((float(cv), float(mean_k)))
    return history, state


SKEW = 2.0 * np.random.RandomState(3).randn(64)


def skewed(step: int, shift: float = 0.0) -> np.ndarray:
    noise = np.random.RandomState(100 + step).randn(4096, 64)
    return (noise + SKEW + shift).astype(np.float32)


def test_the_quantile_bias_evens_the_load_in_one_step_and_more_in_ten():
    """From a CV of about 2 to 0.6 at once and 0.15 after ten; uniform routing shows 0.087."""
    config = RouterConfig(top_k=2, balance="quantile", bias_rate=1.0)
    history, state = settle(config, skewed, 12)
    loads = [cv for cv, _ in history]
    assert loads[0] > 1.5
    assert loads[1] < 0.5 * loads[0]
    assert loads[11] < 0.2
    assert float(jnp.abs(state.bias_E.mean())) < 1e-6


def test_the_loss_free_bias_evens_the_load_step_by_step():
    config = RouterConfig(top_k=2, scores="sigmoid", balance="loss_free", bias_rate=3e-3)
    history, _ = settle(config, skewed, 200)
    assert history[0][0] > 1.0
    assert history[-1][0] < 0.2


def test_a_single_loss_free_step_is_the_sign_of_the_load_error():
    config = RouterConfig(top_k=2, balance="loss_free", bias_rate=1e-3)
    routing = route(WIDE, config, initial_state(8))
    stats = stats_of(WIDE, routing, np.ones(200, bool), config)
    counts = np.bincount(np.asarray(routing.expert_ids_TK).reshape(-1), minlength=8)
    expected = 1e-3 * np.sign(counts.mean() - counts)
    np.testing.assert_allclose(updated_state(initial_state(8), stats, config).bias_E, expected)


@pytest.mark.slow
def test_the_mean_number_of_experts_is_held_under_a_shift():
    config = RouterConfig(top_k=3, num_null_experts=2, target_k=2.0)

    def plain(step: int) -> np.ndarray:
        return np.random.RandomState(step).randn(4096, 64).astype(np.float32)

    _, state = settle(config, plain, 60)
    history, _ = settle(config, lambda step: plain(step) + 1.0, 200, state)
    assert abs(history[0][1] - 2.0) > 0.3
    assert np.mean([k for _, k in history[-20:]]) == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("scores", SCORES)
def test_the_matching_null_logit_gives_the_wanted_mean(scores):
    """One look at a batch finds the logit, whatever the router's scale and padding."""
    config = RouterConfig(top_k=3, num_null_experts=2, target_k=1.7, scores=scores)
    is_token = np.arange(200) < 150
    for scale in (0.1, 5.0):
        logits = np.float32(scale) * WIDE
        routing = route(logits, config, initial_state(8), is_token_T=is_token)
        found = jax.jit(matching_null, static_argnums=2)(routing, is_token, config)
        state = initial_state(8).replace(null_logit=found)
        again = route(logits, config, state, is_token_T=is_token)
        # An expert that draws with the null at the border wins.
        assert float(again.counts_E.sum() / 150) == pytest.approx(1.7, abs=1.5 / 150)


@pytest.mark.slow
def test_the_mean_is_held_while_logits_grow():
    """Where a controller with a fixed gain lags: the router's scale grows by 2% a step."""
    config = RouterConfig(top_k=3, num_null_experts=2, target_k=1.5)

    def growing(step: int) -> np.ndarray:
        x = np.random.RandomState(step).randn(4096, 64).astype(np.float32)
        return np.float32(0.5 * 1.02**step) * x

    history, _ = settle(config, growing, 100)
    # One step behind; the wanted logit moves by 2% of the scale a step, which is 5% of the mean.
    assert np.mean([k for _, k in history[-50:]]) == pytest.approx(1.5, rel=0.06)


def test_the_quantile_bias_equals_a_loop():
    config = RouterConfig(top_k=2, balance="quantile", bias_rate=1.0)
    routing = route(WIDE, config, state_of(config))
    scores = np.stack([scored(x.astype(np.float64), "softmax") for x in WIDE])
    thresholds = [sorted(row + BIAS)[-3] for row in scores]
    share = 200 * 2 // 8
    expected = [-sorted(scores[:, e] - thresholds)[::-1][share] for e in range(8)]
    stats = stats_of(WIDE, routing, np.ones(200, bool), config)
    np.testing.assert_allclose(stats.quantile_bias_E, expected - np.mean(expected), atol=1e-6)


# --- losses -------------------------------------------------------------------------------------


def test_sequence_balance_equals_a_loop_over_rows():
    config = RouterConfig(top_k=2, scores="sigmoid", sequence_weight=1.0)
    is_token = np.ones((4, 50), bool)
    is_token[1, 30:] = False
    routing = route(WIDE, config, is_token_T=is_token.reshape(-1))
    stats = stats_of_rows(WIDE, routing, is_token, config)
    expected = []
    for row in range(4):
        x = WIDE[row * 50 : (row + 1) * 50][is_token[row]]
        scores = np.stack([scored(t.astype(np.float64), "sigmoid") for t in x])
        p = (scores / scores.sum(1, keepdims=True)).mean(0)
        best = np.argsort(-scores, axis=1)[:, :2]
        share = np.bincount(best.reshape(-1), minlength=8) / best.size
        expected.append(8 * (share * p).sum())
    assert float(stats.sequence_balance) == pytest.approx(np.mean(expected), rel=1e-5)


def test_token_expert_information_closed_forms():
    even = jnp.full((8,), 1 / 8)
    assert token_expert_information(even, jnp.float32(0)) == pytest.approx(np.log(8))
    assert token_expert_information(even, jnp.float32(np.log(8))) == pytest.approx(0, abs=1e-6)
