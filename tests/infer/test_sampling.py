"""Sampling per row: frequencies against probabilities in numpy, and rows that don't see others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.checks import UserError
from infer.sampling import MOST_BIASES, Sampling, TokenCounts, no_counts, sample, sampling_rows

DRAWS = 4000
TOLERANCE = 0.032  # 4 standard deviations of a frequency over so many draws


def counts_of(generated, prompt) -> TokenCounts:
    return TokenCounts(jnp.asarray(generated, jnp.int32), jnp.asarray(prompt, bool))


def frequencies(sampling: Sampling, logits_V, counts: TokenCounts | None = None) -> np.ndarray:
    """Of one row's draws at many positions."""
    rows = sampling_rows([sampling])
    counts = counts or no_counts(1, len(logits_V))
    logits_BV = jnp.asarray(logits_V, jnp.float32)[None]
    draw = jax.jit(jax.vmap(lambda p: sample(logits_BV, rows, counts, p[None])[0]))
    tokens = draw(jnp.arange(DRAWS, dtype=jnp.int32))
    return np.bincount(np.asarray(tokens), minlength=len(logits_V)) / DRAWS


def softmax(logits) -> np.ndarray:
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def test_frequencies_are_the_softmax():
    logits = [2.0, 1.0, 0.0, -1.0]
    expected = softmax(np.array(logits) / 0.7)
    np.testing.assert_allclose(frequencies(Sampling(0.7), logits), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0, top_p=0.7), [1, 3]),
        (Sampling(1.0, top_p=0.01), [1]),
        (Sampling(1.0, top_k=3), [0, 1, 3]),
        (Sampling(1.0, min_p=0.25), [0, 1, 3]),
        (Sampling(1.0, min_p=0.35), [1, 3]),
        (Sampling(1.0, top_k=3, top_p=0.82), [1, 3]),
    ],
)
def test_filters_keep_the_best(sampling, kept):
    """top_p counts among what top_k left: 0.8 of 0.95 is 0.842, which reaches 0.82."""
    p = np.array([0.15, 0.5, 0.05, 0.3])
    expected = np.zeros(4)
    expected[kept] = p[kept] / p[kept].sum()
    np.testing.assert_allclose(frequencies(sampling, np.log(p)), expected, atol=TOLERANCE)


def test_the_coldest_temperature_is_greedy():
    logits = np.array([0.1, 3.0, 2.9, -5.0])
    for temperature in (0.0, 1e-38):
        assert frequencies(Sampling(temperature), logits)[1] == 1.0


def test_penalties_and_biases_move_the_logits():
    """Greedy by the logits that the formulas give, and sampled by their softmax."""
    logits = np.array([2.0, -1.0, 1.5, 0.5, 0.0])
    counts = counts_of([[3, 1, 0, 0, 0]], [[0, 0, 1, 0, 0]])
    sampling = Sampling(
        1.0,
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        logit_bias={4: 0.75},
    )
    moved = np.array([2.0 / 2 - 3 * 0.5 - 0.25, -1.0 * 2 - 1 * 0.5 - 0.25, 1.5 / 2, 0.5, 0.75])
    found = frequencies(sampling, logits, counts)
    np.testing.assert_allclose(found, softmax(moved), atol=TOLERANCE)
    greedy = sampling_rows([Sampling(logit_bias={4: 2.5})])
    assert sample(jnp.asarray(logits)[None], greedy, no_counts(1, 5), jnp.zeros(1, int)) == 4


def test_a_row_does_not_depend_on_the_others():
    """Bit for bit: its settings, its seed and its position alone decide."""
    random = np.random.RandomState(0)
    logits = jnp.asarray(random.randn(4, 50) * 2, jnp.float32)
    settings = [
        Sampling(1.0, seed=5),
        Sampling(),
        Sampling(0.8, top_p=0.9, seed=5),
        Sampling(1.5, top_k=7, min_p=0.01, presence_penalty=0.5, seed=9),
    ]
    counts = counts_of(random.randint(0, 2, (4, 50)), random.randint(0, 2, (4, 50)))
    positions = jnp.asarray([3, 9, 27, 4], jnp.int32)
    draw = jax.jit(sample)
    together = draw(logits, sampling_rows(settings), counts, positions)
    for row, setting in enumerate(settings):
        one = slice(row, row + 1)
        own = jax.tree.map(lambda x, one=one: x[one], counts)
        alone = draw(logits[one], sampling_rows([setting]), own, positions[one])
        assert alone[0] == together[row]


def test_other_settings_compile_nothing():
    logits, counts = jnp.zeros((2, 9)), no_counts(2, 9)
    draw = jax.jit(lambda *operands: sample(*operands))
    for settings in (
        [Sampling(), Sampling()],
        [Sampling(1.0, top_k=3), Sampling(0.3, top_p=0.5, seed=2**40)],
        [Sampling(logit_bias={1: 4.0}), Sampling(repetition_penalty=1.3)],
    ):
        draw(logits, sampling_rows(settings), counts, jnp.zeros(2, jnp.int32))
    assert draw._cache_size() == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number; 0 is greedy"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 0.5}, "top_p=0.5 has no effect with temperature=0"),
        ({"top_k": 5}, "top_k=5 has no effect with temperature=0"),
        ({"min_p": 0.1}, "min_p=0.1 has no effect with temperature=0"),
        ({"temperature": 1.0, "top_k": -1}, "top_k=-1 must not be negative"),
        ({"temperature": 1.0, "min_p": 1.5}, r"min_p=1.5 must lie in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be greater than 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty=inf must be a finite number"),
        ({"logit_bias": {-2: 1.0}}, r"logit_bias\[-2\]=1.0 must be a finite number for a token"),
        ({"logit_bias": {3: float("nan")}}, r"logit_bias\[3\]=nan must be a finite number"),
        ({"logit_bias": dict.fromkeys(range(MOST_BIASES + 1), 1.0)}, "has 301 tokens, at most 300"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Sampling(**settings)
