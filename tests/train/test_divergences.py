"""Divergences against numpy's float64, data processing, gradients against finite differences, and a
student that is its teacher."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import DistillConfig
from configs.checks import UserError
from configs.distill import Divergence, LossTerm
from train.distillation_loss import make_chunk_loss
from train.divergences import accepted, distance, divergence, kept_and_tail
from train.losses import chunked_loss

B, L, D, V = 2, 4, 5, 9
KINDS = get_args(Divergence)
random = np.random.RandomState(0)
W = random.randn(D, V).astype(np.float32)
HIDDEN = random.randn(B, L, D).astype(np.float32)
LOGITS = random.randn(B, L, V).astype(np.float32)
TARGETS = random.randint(0, V, (B, L)).astype(np.int32)
TARGETS[0, :2] = -1


def softmax(x):
    x = np.exp(np.asarray(x, np.float64) - np.max(x, axis=-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def kl(a, b):
    return (a * np.log(a / b)).sum(-1)


def equation(kind: str, p, q, beta: float | None = None):
    """As the papers write them: Hinton et al. 2015, GKD 2023, DistiLLM 2024."""
    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    if kind == "jsd":
        beta = 0.5 if beta is None else beta
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    beta = 0.1 if beta is None else beta
    if kind == "skewed_kl":
        return kl(p, beta * p + (1 - beta) * q)
    if kind == "skewed_reverse_kl":
        return kl(q, beta * q + (1 - beta) * p)
    return np.abs(p - q).sum(-1) / 2


def loss_of(kind: str, logits, *, weight: float = 1.0, top_k: int | None = None, **settings):
    config = DistillConfig(losses=(LossTerm(kind=kind, weight=weight),), top_k=top_k, **settings)
    inputs, shared = {"targets": TARGETS}, None
    if top_k is None:
        inputs |= {"teacher_hidden": (HIDDEN,)}
        shared = {"teacher_output": (jnp.asarray(W),)}
    else:
        log_p = jax.nn.log_softmax(HIDDEN @ W / config.temperature)
        log_probs, ids = jax.lax.top_k(log_p, top_k)
        inputs |= {"teacher_ids": ids, "teacher_log_probs": log_probs}
    return make_chunk_loss(config)(jnp.asarray(logits), inputs, shared)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_its_equation(kind):
    temperature = 2.0
    p, q = softmax(HIDDEN @ W / temperature), softmax(LOGITS / temperature)
    expected = temperature**2 * (equation(kind, p, q) * (TARGETS >= 0)).sum()
    loss = loss_of(kind, LOGITS, temperature=temperature)
    assert loss == pytest.approx(expected, rel=1e-5)  # float32 logarithms


@pytest.mark.parametrize("kind", ["jsd", "skewed_kl", "skewed_reverse_kl"])
def test_beta_is_the_equations(kind):
    p, q = softmax(HIDDEN @ W), softmax(LOGITS)
    found = divergence(kind, [(jnp.log(p), jnp.log(q))], 0.3)
    np.testing.assert_allclose(found, equation(kind, p, q, 0.3), rtol=1e-5)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.thinned(2)
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(kind, top_k):
    logits = jnp.asarray(HIDDEN @ W)
    loss, gradient = jax.jit(jax.value_and_grad(lambda x: loss_of(kind, x, top_k=top_k)))(logits)
    assert abs(loss) < 1e-6
    assert np.abs(np.asarray(gradient)).max() < 1e-6


def test_what_differs_by_rounding_has_no_distance_and_no_gradient():
    """Of total variation and of sorted distances (other vocabularies): |x| jumps at zero."""
    p = jnp.asarray(softmax(HIDDEN @ W).astype(np.float32))
    slope = jax.grad(lambda q: distance(p, q).sum())
    np.testing.assert_array_equal(slope(jnp.nextafter(p, 1.0)), 0.0)
    np.testing.assert_array_equal(slope(p * 1.001), 1.0)
    np.testing.assert_array_equal(slope(p * 0.999), -1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_bins_are_never_above_the_whole(kind):
    whole = loss_of(kind, LOGITS)
    values = [float(loss_of(kind, LOGITS, top_k=k)) for k in (1, 4, V - 1)]
    assert all(value <= whole * (1 + 1e-5) for value in values)
    assert values == sorted(values)
    assert values[-1] == pytest.approx(float(whole), rel=1e-4)  # one token is left in the tail


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences_of_the_equation(kind):
    """Differences in numpy's float64, of the equation, not of our float32 code."""
    direction, p, step = random.randn(B, L, V), softmax(HIDDEN @ W), 1e-5

    def value(t):
        q = softmax(LOGITS.astype(np.float64) + t * direction)
        return (equation(kind, p, q) * (TARGETS >= 0)).sum()

    slope = (value(step) - value(-step)) / (2 * step)
    gradient = jax.jit(jax.grad(lambda x: loss_of(kind, x)))(LOGITS)
    exact = (np.asarray(gradient) * direction).sum()
    assert slope == pytest.approx(float(exact), rel=1e-4)


def test_places_that_keep_nothing_change_nothing():
    """A teacher behind a server names fewer tokens in some places: -1 fills them up."""
    log_p = jnp.log(softmax(HIDDEN @ W).astype(np.float32))
    log_q = jnp.log(softmax(LOGITS).astype(np.float32))
    best, ids = jax.lax.top_k(log_p, 3)
    tail = jnp.log1p(-jnp.exp(best).sum(-1))
    fuller = jnp.pad(ids, ((0, 0), (0, 0), (0, 2)), constant_values=-1)
    logs = jnp.pad(best, ((0, 0), (0, 0), (0, 2)))
    for kind in KINDS:
        expected = divergence(kind, kept_and_tail(log_q, ids, best, tail))
        found = divergence(kind, kept_and_tail(log_q, fuller, logs, tail))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_drafts_are_accepted_as_often_as_rejection_sampling_accepts_them():
    """The count of accepted draws (Leviathan et al. 2023, algorithm 1), 40,000 of them."""
    p, q = softmax(HIDDEN[0, 0] @ W), softmax(LOGITS[0, 0])
    drafts = random.choice(V, size=40_000, p=q)
    kept = (random.rand(40_000) < p[drafts] / q[drafts]).mean()
    found = accepted([(jnp.log(p), jnp.log(q))])
    assert found == pytest.approx(kept, abs=4 * 0.5 / 200)  # four standard deviations
    assert found == pytest.approx(1 - equation("total_variation", p, q), rel=1e-5)


def test_several_teachers_are_mixed_by_their_shares():
    other, shares = random.randn(B, L, D).astype(np.float32), np.float32([0.75, 0.25])
    config = DistillConfig(kl_weight=1.0)
    inputs = {
        "targets": TARGETS,
        "teacher_hidden": (HIDDEN, other),
        "teacher_shares": np.broadcast_to(shares, (B, L, 2)),
    }
    shared = {"teacher_output": (jnp.asarray(W), jnp.asarray(W))}
    loss, _ = make_chunk_loss(config)(jnp.asarray(LOGITS), inputs, shared)
    p = 0.75 * softmax(HIDDEN @ W) + 0.25 * softmax(other @ W)
    assert loss == pytest.approx((kl(p, softmax(LOGITS)) * (TARGETS >= 0)).sum(), rel=1e-5)


def test_cross_entropy_does_not_count_what_the_student_wrote():
    config = DistillConfig(losses=(LossTerm(kind="cross_entropy"), LossTerm(kind="reverse_kl")))
    is_data = np.array([[True] * L, [False] * L])
    inputs = {"targets": TARGETS, "teacher_hidden": (HIDDEN,), "is_data": is_data}
    shared = {"teacher_output": (jnp.asarray(W),)}
    loss, sums = make_chunk_loss(config)(jnp.asarray(LOGITS), inputs, shared)
    log_q, kept = np.log(softmax(LOGITS)), (TARGETS >= 0) & is_data
    nats = -sum(log_q[b, t, TARGETS[b, t]] for b, t in zip(*np.nonzero(kept), strict=True))
    assert sums["cross_entropy"] == pytest.approx(nats, rel=1e-5)
    assert loss == pytest.approx(nats + float(sums["reverse_kl"]), rel=1e-5)


def test_a_step_has_a_chunk_of_both_ones_logits_and_no_more():
    """The compiled temporaries stay below one [B, L, V] float32 array."""
    batch, length, width, vocab = 4, 256, 16, 4096
    loss_of_chunk = make_chunk_loss(DistillConfig(divergence="jsd"))
    shapes = [(batch, length, width), (width, vocab), (batch, length, width), (width, vocab)]
    floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def loss(hidden, w, teacher_hidden, w_teacher, targets):
        inputs = {"targets": targets, "teacher_hidden": (teacher_hidden,)}
        shared = {"teacher_output": (w_teacher,)}
        return chunked_loss(loss_of_chunk, hidden, w, inputs, shared, 32)[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*floats, targets).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < batch * length * vocab * 4


def test_a_schedule_of_terms():
    config = DistillConfig(
        losses=(
            LossTerm(kind="forward_kl", weight=1.0, final_weight=0.0, end=0.5),
            LossTerm(kind="reverse_kl", weight=0.5, begin=0.5),
            LossTerm(kind="cross_entropy", weight=0.1),
        )
    )
    found = [config.weights_at(step, 10) for step in range(10)]
    np.testing.assert_allclose([w[0] for w in found], [1, 0.75, 0.5, 0.25, 0, *[0] * 5], atol=1e-9)
    assert [w[1] for w in found] == [0] * 5 + [0.5] * 5
    assert {w[2] for w in found} == {0.1}
    inputs = {"targets": TARGETS, "teacher_hidden": (HIDDEN,)}
    shared = {"teacher_output": (jnp.asarray(W),), "weights": jnp.float32(found[1])}
    loss, sums = make_chunk_loss(config)(jnp.asarray(LOGITS), inputs, shared)
    assert loss == pytest.approx(float(0.75 * sums["kl"] + 0.1 * sums["cross_entropy"]), rel=1e-6)
    with pytest.raises(UserError, match=r"begin=0.5 and end=0.5, shares of the run"):
        LossTerm(kind="jsd", begin=0.5, end=0.5)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"divergence": "reverse_kl", "beta": 0.5}, "has no beta, got 0.5"),
        ({"divergence": "jsd", "beta": 1.0}, r"beta=1.0 must lie in \(0, 1\)"),
        ({"losses": (LossTerm(kind="jsd"),), "kl_weight": 0.5}, "no effect beside distill.losses"),
        ({"cache_directory": "x"}, "it needs the distill.top_k"),
        ({"drafter": True, "temperature": 2.0}, "drafter=True needs distill.temperature=1"),
        ({"unmatched_weight": 1.0}, "no effect with distill.vocabulary='same'"),
        ({"vocabulary": "bytes", "top_k": 3}, "leave top_k out"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
def test_settings_that_contradict_each_other(settings, match):
    with pytest.raises(UserError, match=match):
        DistillConfig(**settings)
