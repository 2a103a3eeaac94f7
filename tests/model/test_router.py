"""The router and the load figures against double loops and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.base import RouterConfig
from model.balance import load_balance_loss, load_figures, router_stats
from model.router import route

T, E = 50, 6


def logits(seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randn(T, E).astype(np.float32)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_route_equals_a_loop(top_k, normalize):
    x = logits()
    routing = route(jnp.asarray(x), RouterConfig(top_k=top_k, normalize_gates=normalize))
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
    routing = route(jnp.asarray(logits(seed)), RouterConfig(top_k=3))
    ids = np.asarray(routing.expert_ids_TK)
    assert all(len(set(row)) == 3 for row in ids.tolist())
    np.testing.assert_allclose(routing.gates_TK.sum(axis=1), 1.0, rtol=1e-6)
    assert routing.counts_E.sum() == 3 * T


def test_permuting_experts_permutes_the_routing():
    x, order = logits(), np.random.RandomState(1).permutation(E)
    base = route(jnp.asarray(x), RouterConfig(top_k=2))
    moved = route(jnp.asarray(x[:, order]), RouterConfig(top_k=2))
    np.testing.assert_array_equal(order[np.asarray(moved.expert_ids_TK)], base.expert_ids_TK)


def test_padding_goes_nowhere():
    is_token = np.arange(T) < 30
    routing = route(jnp.asarray(logits()), RouterConfig(top_k=2), jnp.asarray(is_token))
    assert (np.asarray(routing.expert_ids_TK)[30:] == -1).all()
    assert (np.asarray(routing.gates_TK)[30:] == 0).all()
    assert routing.counts_E.sum() == 60


def test_gates_that_are_not_renormalised_are_told_apart():
    plain = route(jnp.asarray(logits()), RouterConfig(top_k=2, normalize_gates=False))
    assert np.abs(np.asarray(plain.gates_TK.sum(axis=1)) - 1).max() > 0.1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="float32"):
        route(jnp.asarray(logits()).astype(jnp.bfloat16), RouterConfig(top_k=2))
    with pytest.raises(ValueError, match="top_k=9 must not exceed the 6"):
        route(jnp.asarray(logits()), RouterConfig(top_k=9))


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


def test_router_stats_equal_a_loop_over_real_tokens():
    x, is_token = logits(), np.arange(T) % 3 != 0
    zero = jnp.int32(0)
    counts = jnp.zeros(E, jnp.int32)
    stats = router_stats(jnp.asarray(x), counts, jnp.asarray(is_token), zero, jnp.float32(0))
    rows = x[is_token].astype(np.float64)
    scores = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    np.testing.assert_allclose(stats.mean_scores_E, scores.mean(0), rtol=1e-5)
    lse = np.log(np.exp(rows).sum(1))
    np.testing.assert_allclose(stats.z_loss, (lse**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(stats.entropy, -(scores * np.log(scores)).sum(1).mean(), rtol=1e-5)


def test_load_figures():
    counts = jnp.asarray([40, 40, 0, 0, 10, 10])
    figures = load_figures(counts, jnp.float32(50))
    relative = np.array([40, 40, 0, 0, 10, 10]) * 6 / 100
    assert figures.load_cv == pytest.approx(relative.std(), rel=1e-6)
    assert figures.max_violation == pytest.approx(1.4)
    assert figures.dead_experts == 2
    assert figures.peak_load == pytest.approx(0.8)
    assert figures.mean_k == pytest.approx(2.0)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(64, 2, 2048), (16, 2, 4096)])
def test_the_floor_is_what_uniform_routing_shows(experts, top_k, tokens):
    """floor^2 is the mean of CV^2 over draws; 200 draws know it to 3% at 15 degrees of freedom."""
    random = np.random.RandomState(0)
    squares = []
    for _ in range(200):
        ids = np.argpartition(random.rand(tokens, experts), top_k, axis=1)[:, :top_k]
        counts = np.bincount(ids.reshape(-1), minlength=experts)
        squares.append((counts * experts / (tokens * top_k)).var())
    figures = load_figures(jnp.full(experts, tokens * top_k // experts), jnp.float32(tokens))
    assert np.mean(squares) == pytest.approx(float(figures.load_cv_floor) ** 2, rel=0.1)
