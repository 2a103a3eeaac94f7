"""Losses against numpy, chunks against the whole, gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.base import DistillConfig
from configs.feed_forward import RouterConfig
from model.balance import RouterStats
from model.layers import CappedOutput
from tests import tiny
from train.distill import make_chunk_loss
from train.losses import auxiliary_loss, chunked_loss, cross_entropy

B, L, D, V = 3, 8, 5, 11
random = np.random.RandomState(0)
HIDDEN = random.randn(B, L, D).astype(np.float32)
W = random.randn(D, V).astype(np.float32)
TARGETS = random.randint(0, V, (B, L)).astype(np.int32)
TARGETS[0, :3] = -1  # not scored
TEACHER_HIDDEN = random.randn(B, L, D + 2).astype(np.float32)
W_TEACHER = random.randn(D + 2, V).astype(np.float32)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def nats(logits):
    """Cross-entropy by a loop."""
    log_q = log_softmax(logits)
    return -sum(
        log_q[b, t, TARGETS[b, t]] for b in range(B) for t in range(L) if TARGETS[b, t] >= 0
    )


def teacher_top(k: int, temperature: float):
    log_p = log_softmax(TEACHER_HIDDEN @ W_TEACHER / temperature)
    ids = np.argsort(-log_p, axis=-1)[..., :k].astype(np.int32)
    return ids, np.take_along_axis(log_p, ids, axis=-1).astype(np.float32)


@pytest.mark.parametrize("chunks", [1, 2, 8])
def test_chunked_cross_entropy_is_the_loop(chunks):
    inputs = {"targets": TARGETS}
    whole = jax.jit(chunked_loss, static_argnums=(0, 5))
    loss, sums = whole(cross_entropy, HIDDEN, W, inputs, None, chunks)
    assert float(loss) == pytest.approx(nats(HIDDEN @ W), rel=1e-6)
    assert sums["cross_entropy"] == loss


@pytest.mark.parametrize("chunks", [1, 4])
def test_chunked_gradients_are_those_of_the_whole(chunks):
    def whole(hidden, w):
        return 0.37 * cross_entropy(hidden @ w, {"targets": TARGETS})[0]

    def chunked(hidden, w):
        return 0.37 * chunked_loss(cross_entropy, hidden, w, {"targets": TARGETS}, None, chunks)[0]

    ours = jax.jit(jax.grad(chunked, argnums=(0, 1)))(HIDDEN, W)
    theirs = jax.jit(jax.grad(whole, argnums=(0, 1)))(HIDDEN, W)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_logits_with_a_bound_and_their_gradients():
    cap = 1.3

    def whole(hidden, w):
        return cross_entropy(cap * jnp.tanh(hidden @ w / cap), {"targets": TARGETS})[0]

    def chunked(hidden, w):
        bounded = CappedOutput(w, cap)
        return chunked_loss(cross_entropy, hidden, bounded, {"targets": TARGETS}, None, 4)[0]

    assert float(jax.jit(chunked)(HIDDEN, W)) == pytest.approx(
        nats(cap * np.tanh(HIDDEN @ W / cap))
    )
    ours = jax.jit(jax.grad(chunked, argnums=(0, 1)))(HIDDEN, W)
    theirs = jax.jit(jax.grad(whole, argnums=(0, 1)))(HIDDEN, W)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_no_logits_array_of_the_whole_batch_is_made():
    """The compiled step's temporaries stay below one [B, L, V] float32 array."""
    batch, length, width, vocab = 4, 256, 16, 4096
    hidden = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
    w = jax.ShapeDtypeStruct((width, vocab), jnp.float32)
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def loss(hidden, w, targets):
        return chunked_loss(cross_entropy, hidden, w, {"targets": targets}, None, 16)[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, w, targets).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < batch * length * vocab * 4 / 2


def full(**settings):
    """The loss over the whole vocabulary, and its sums."""
    inputs = {"targets": TARGETS, "teacher_hidden": (TEACHER_HIDDEN,)}
    shared = {"teacher_output": (W_TEACHER,)}
    return jax.jit(make_chunk_loss(DistillConfig(**settings)))(HIDDEN @ W, inputs, shared)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kl_weight", [0.0, 0.7, 1.0])
def test_full_distillation_is_the_equation(temperature, kl_weight):
    loss, sums = full(kl_weight=kl_weight, temperature=temperature)
    log_p = log_softmax(TEACHER_HIDDEN @ W_TEACHER / temperature)
    log_q = log_softmax(HIDDEN @ W / temperature)
    kl = temperature**2 * ((np.exp(log_p) * (log_p - log_q)).sum(-1) * (TARGETS >= 0)).sum()
    assert sums["kl"] == pytest.approx(kl, rel=1e-5)
    assert loss == pytest.approx(kl_weight * kl + (1 - kl_weight) * nats(HIDDEN @ W), rel=1e-5)


def top_k_kl(k: int, temperature: float = 1.0, logits=HIDDEN @ W):
    ids, log_probs = teacher_top(k, temperature)
    inputs = {"targets": TARGETS, "teacher_ids": ids, "teacher_log_probs": log_probs}
    loss = make_chunk_loss(DistillConfig(temperature=temperature, kl_weight=1.0, top_k=k))
    return jax.jit(loss)(logits, inputs, None)[0]


def test_top_k_with_a_tail_is_the_loop_over_bins():
    k, temperature = 4, 2.0
    ids, log_probs = teacher_top(k, temperature)
    log_q = log_softmax(HIDDEN @ W / temperature)
    expected = 0.0
    for b in range(B):
        for t in range(L):
            if TARGETS[b, t] < 0:
                continue
            p = [*np.exp(log_probs[b, t]), 1 - np.exp(log_probs[b, t]).sum()]
            q = np.exp(log_q[b, t, ids[b, t]])
            q = [*q, 1 - q.sum()]
            expected += sum(a * np.log(a / c) for a, c in zip(p, q, strict=True))
    assert top_k_kl(k, temperature) == pytest.approx(temperature**2 * expected, rel=1e-4)


def test_bins_never_exceed_the_full_kl_and_reach_it():
    whole = full(kl_weight=1.0)[0]
    values = [float(top_k_kl(k)) for k in (1, 3, 6, V - 1)]
    assert all(value <= whole * (1 + 1e-5) for value in values)
    assert values == sorted(values)
    assert values[-1] == pytest.approx(float(whole), rel=1e-4)  # one token left in the tail


def test_renormalising_the_top_k_instead_of_a_tail_is_told_apart():
    """The wrong version gives no gradient to a student that moves mass out of the top k."""
    ids, log_probs = teacher_top(3, 1.0)
    log_q = np.take_along_axis(log_softmax(HIDDEN @ W), ids, axis=-1)
    p, q = np.exp(log_probs), np.exp(log_q)
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    naive = ((p * np.log(p / q)).sum(-1) * (TARGETS >= 0)).sum()
    assert abs(naive - float(top_k_kl(3))) > 0.1


def test_distillation_gradients_are_finite_differences():
    ids, log_probs = teacher_top(4, 2.0)
    inputs = {"targets": TARGETS, "teacher_ids": ids, "teacher_log_probs": log_probs}
    loss = jax.jit(make_chunk_loss(DistillConfig(temperature=2.0, kl_weight=0.6, top_k=4)))

    def value(logits):
        return loss(logits, inputs, None)[0]

    logits, direction = HIDDEN @ W, random.randn(B, L, V).astype(np.float32)
    slope = (value(logits + 1e-2 * direction) - value(logits - 1e-2 * direction)) / 2e-2
    exact = (np.asarray(jax.grad(value)(logits)) * direction).sum()
    assert slope == pytest.approx(float(exact), rel=1e-2)  # float32 differences


def stats(counts, scores):
    zeros = jnp.zeros(counts.shape[0])
    return RouterStats(
        counts_E=counts,
        mean_scores_E=scores,
        z_loss=zeros + 4.0,
        entropy=zeros + 0.5,
        sequence_balance=zeros + 3.0,
        quantile_bias_E=jnp.zeros(scores.shape),
        null_logit=jnp.float32(0),
        num_tokens=zeros,
        overflow_rows=zeros,
        bytes_moved=zeros,
    )


def test_auxiliary_loss_sums_layers_and_uses_the_counts_so_far():
    config = tiny.model()
    counts = jnp.asarray(random.randint(0, 9, (2, 8)))
    earlier = jnp.asarray(random.randint(0, 9, (2, 8)))
    scores = jnp.asarray(random.dirichlet(np.ones(8), 2).astype(np.float32))
    loss = auxiliary_loss({"layer_0": stats(counts, scores)}, config, {"layer_0": earlier})
    expected = 0.0
    for layer in range(2):
        total = np.asarray(counts + earlier)[layer]
        expected += 1e-2 * 8 * (total / total.sum() * np.asarray(scores)[layer]).sum() + 1e-3 * 4.0
    assert loss == pytest.approx(expected, rel=1e-5)


def test_auxiliary_loss_adds_the_losses_a_router_asks_for():
    router = RouterConfig(
        top_k=2, load_balance_weight=0, z_loss_weight=0, sequence_weight=0.1, entropy_weight=0.2
    )
    dense = tiny.model().pattern[1]
    config = tiny.model(
        pattern=(LayerSpec(attention=dense.attention, ffn=tiny.moe(router=router)), dense)
    )
    counts = jnp.ones((2, 8), jnp.int32)
    scores = random.dirichlet(np.ones(8), 2).astype(np.float32)
    earlier = {"layer_0": jnp.zeros((2, 8), jnp.int32)}
    loss = auxiliary_loss({"layer_0": stats(counts, jnp.asarray(scores))}, config, earlier)
    information = [-(p * np.log(p)).sum() - 0.5 for p in scores]
    assert loss == pytest.approx(0.1 * 3.0 * 2 - 0.2 * sum(information), rel=1e-5)


def test_a_loss_in_bfloat16_and_its_gradients_are_those_of_rounded_operands():
    """By whatever kernels this machine has: products are rounded, sums are not."""
    rng = np.random.RandomState(4)
    hidden = rng.standard_normal((2, 64, 48)).astype(jnp.bfloat16)
    w = (0.2 * rng.standard_normal((48, 70))).astype(jnp.bfloat16)
    targets = rng.randint(0, 70, (2, 64)).astype(np.int32)

    def loss(hidden, w):
        return chunked_loss(cross_entropy, hidden, w, {"targets": targets}, None, 2)[0]

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (d_hidden, d_w) = both(hidden, w)
    floats = (hidden.astype(np.float32), w.astype(np.float32))
    exact, exact_gradients = both(*floats)
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    for ours, theirs in zip((d_hidden, d_w), exact_gradients, strict=True):
        assert ours.dtype == jnp.bfloat16
        # Gradients of logits are rounded before they are multiplied, products behind it.
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), theirs, rtol=2**-8, atol=2**-8 * np.abs(theirs).max()
        )
