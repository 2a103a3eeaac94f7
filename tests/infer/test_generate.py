"""Generation against repeated full forwards, sampling against probabilities, scoring windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.checks import UserError
from infer.generate import generate
from infer.sampling import Sampling, sample
from infer.score import num_rows, score_documents
from model.transformer import Transformer, hidden_states, init_variables, output_weights
from tests import tiny

MODEL = Transformer(tiny.model())


@pytest.fixture(scope="module")
def variables():
    return jax.jit(lambda: init_variables(MODEL, 0))()


@jax.jit
def full_logits(variables, tokens, positions):
    hidden, _ = hidden_states(MODEL, variables, tokens, positions)
    return hidden @ output_weights(MODEL, variables)


def logits_of(variables, row: list[int]) -> np.ndarray:
    """Logits [n, V] of one sequence; padded to one compiled length."""
    tokens = np.zeros((1, 64), np.int32)
    positions = np.full((1, 64), -1, np.int32)
    tokens[0, : len(row)], positions[0, : len(row)] = row, np.arange(len(row))
    return np.asarray(full_logits(variables, tokens, positions))[0, : len(row)]


def test_greedy_generation_is_repeated_argmax(variables):
    prompts = [[0, 5, 17, 200], [0, 3], [0, *range(100, 120)]]
    result = generate(MODEL, variables, prompts, max_new_tokens=20)
    for prompt, new in zip(prompts, result.tokens, strict=True):
        row = list(prompt)
        for token in new:
            assert token == logits_of(variables, row)[-1].argmax()
            row.append(token)
    assert result.tokens_per_second > 0


def test_a_stop_token_ends_its_row_alone(variables):
    prompts = [[0, 5, 17, 200], [0, 3]]
    free = generate(MODEL, variables, prompts, max_new_tokens=10).tokens
    stop = free[0][3]
    seen = []
    result = generate(
        MODEL,
        variables,
        prompts,
        max_new_tokens=10,
        stop_ids=frozenset({stop}),
        on_tokens=seen.append,
    )
    assert result.tokens[0] == free[0][: free[0].index(stop)]
    expected = free[1][: free[1].index(stop)] if stop in free[1] else free[1]
    assert result.tokens[1] == expected
    assert len(seen) >= len(expected)
    assert seen[len(result.tokens[0])][0] == -1


def test_sampling_is_seeded(variables):
    hot = Sampling(temperature=1.0)
    runs = [
        generate(MODEL, variables, [[0, 5]], max_new_tokens=12, sampling=hot, seed=seed).tokens
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("prompts", "new", "sentence"),
    [
        ([[]], 4, "a prompt is empty"),
        ([[0, 300]], 4, r"outside \[0, 300\)"),
        ([[0] * 60], 5, "exceed the model's context_length=64"),
        ([[0]], 0, "max_new_tokens=0 must be at least 1"),
    ],
)
def test_impossible_requests_are_refused(variables, prompts, new, sentence):
    with pytest.raises(UserError, match=sentence):
        generate(MODEL, variables, prompts, max_new_tokens=new)


def frequencies(sampling: Sampling, logits, draws=4000):
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = jax.jit(jax.vmap(lambda k: sample(logits, k, sampling)[0]))(keys)
    return np.bincount(np.asarray(tokens), minlength=logits.shape[1]) / draws


def test_sampled_frequencies_are_the_softmax():
    logits = jnp.asarray([[2.0, 1.0, 0.0, -1.0]])
    expected = jax.nn.softmax(logits[0] / 0.7)
    # 4 standard deviations of a frequency over 4000 draws
    np.testing.assert_allclose(frequencies(Sampling(0.7), logits), expected, atol=0.032)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = jnp.log(jnp.asarray([[0.15, 0.5, 0.05, 0.3]]))
    found = frequencies(Sampling(1.0, top_p=0.7), logits)
    np.testing.assert_allclose(found, [0, 0.625, 0, 0.375], atol=0.032)
    assert frequencies(Sampling(1.0, top_p=0.01), logits)[1] == 1.0


def test_sampling_settings_that_contradict_are_refused():
    for bad in ({"temperature": -1.0}, {"temperature": 1.0, "top_p": 0.0}, {"top_p": 0.5}):
        with pytest.raises(UserError):
            Sampling(**bad)


@pytest.mark.parametrize("length", [16, 64])
def test_scores_are_log_probabilities_of_each_window(variables, length):
    """Every token is scored once, from at least half a window of context."""
    random = np.random.RandomState(0)
    documents = [
        np.concatenate([[0], random.randint(1, 300, n)]).astype(np.int32) for n in (50, 5, 1)
    ]
    scores = score_documents(MODEL, variables, documents, length=length, batch_size=3)
    stride = length // 2
    for tokens, score in zip(documents, scores, strict=True):
        for t in range(len(tokens) - 1):
            start = 0 if t < length else ((t - length) // stride + 1) * stride
            logits = logits_of(variables, tokens[start : t + 1].tolist())[-1]
            log_p = logits - np.log(np.exp(logits).sum())
            assert score.nats[t] == pytest.approx(-log_p[tokens[t + 1]], abs=1e-4)
            assert score.best_ids[t] == logits.argmax()


def test_the_number_of_windows_is_known_beforehand(variables):
    documents = [np.zeros(n, np.int32) for n in (2, 16, 17, 18, 40)]
    done = []
    score_documents(MODEL, variables, documents, length=16, batch_size=2, progress=done.append)
    assert done[-1] == num_rows([len(d) for d in documents], 16)
