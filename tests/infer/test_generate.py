"""Generation against repeated full forwards, sampling against probabilities, scoring windows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from configs.architecture import LayerSpec
from configs.attention import LatentAttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from infer.generate import generate
from infer.sampling import Sampling
from infer.score import num_rows, score_documents
from model.model_state import init_state
from model.transformer import Transformer, hidden_states, output_weights
from tests import tiny
from tests.probes import drawn

MODEL = Transformer(tiny.model())
LATENT = Transformer(
    tiny.model(
        pattern=(
            LayerSpec(
                attention=LatentAttentionConfig(
                    num_heads=2,
                    query_rank=None,
                    latent_rank=16,
                    nope_head_dim=8,
                    rope_head_dim=8,
                    value_head_dim=8,
                ),
                ffn=DenseConfig(d_ff=32),
            ),
        )
    )
)
WITH_MEMORY = Transformer(tiny.memory_model(memory_length=20))


@pytest.fixture(scope="module")
def variables():
    return drawn(MODEL.config)


@pytest.fixture(scope="module")
def remembering():
    return drawn(WITH_MEMORY.config)


@partial(jax.jit, static_argnums=3)
def full_logits(variables, tokens, positions, model):
    hidden, _ = hidden_states(model, variables, tokens, positions)
    return hidden @ output_weights(model, variables)


def logits_of(variables, row: list[int], model: Transformer = MODEL) -> np.ndarray:
    """Logits [n, V] of one sequence; padded to one compiled length."""
    tokens = np.zeros((1, 64), np.int32)
    positions = np.full((1, 64), -1, np.int32)
    tokens[0, : len(row)], positions[0, : len(row)] = row, np.arange(len(row))
    return np.asarray(full_logits(variables, tokens, positions, model))[0, : len(row)]


def test_greedy_generation_is_repeated_argmax(variables):
    prompts = [[0, 5, 17, 200], [0, 3], [0, *range(100, 120)]]
    result = generate(MODEL, variables, prompts, max_new_tokens=20)
    for prompt, new in zip(prompts, result.tokens, strict=True):
        row = list(prompt)
        for token in new:
            assert token == logits_of(variables, row)[-1].argmax()
            row.append(token)
    assert result.tokens_per_second > 0


def shapes_of(jaxpr) -> set[tuple[int, ...]]:
    """Of all that a program makes, in its loops and functions, too."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {out.aval.shape for out in equation.outvars}
        for inner in jaxprs_in_params(equation.params):
            found |= shapes_of(inner)
    return found


@pytest.mark.parametrize("is_whole", [True, False])
def test_no_scores_are_made_over_all_slots(variables, is_whole):
    """[heads, L, S + L] in float32 would be 4 GB for a layer of 32 heads at 4,096 tokens."""
    length, slots = 96, 160
    state = init_state(MODEL.config, 1, slots, "float32", spare=length - 1)
    rows = jnp.arange(length, dtype=jnp.int32)[None]
    read = partial(hidden_states, MODEL, is_whole=is_whole)
    program = jax.make_jaxpr(read)(variables, rows, rows, state)
    assert not any(shape[-2:] == (length, slots) for shape in shapes_of(program.jaxpr))


@pytest.mark.parametrize("model", [MODEL, LATENT], ids=["gqa", "latent"])
def test_a_prompt_leaves_the_same_state_either_way(model):
    variables = drawn(model.config)
    tokens = np.array([[0, 5, 17, 200, 9, 3], [0, 3, 8, 0, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, -1, -1, -1]], np.int32)

    @partial(jax.jit, static_argnums=0)
    def read(is_whole):
        state = init_state(model.config, 2, 16, "float32", spare=5)
        return hidden_states(model, variables, tokens, positions, state, is_whole=is_whole)

    (ours, state), (other, other_state) = read(True), read(False)
    is_token = (positions >= 0)[..., None]
    np.testing.assert_allclose(ours * is_token, other * is_token, rtol=2e-5, atol=2e-5)
    assert jax.tree.structure(state) == jax.tree.structure(other_state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)  # of layers after the first


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
    hot = [Sampling(temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    runs = generate(MODEL, variables, [[0, 5]] * 3, max_new_tokens=12, sampling=hot).tokens
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


# --- A model with memory ------------------------------------------------------------------------


@pytest.mark.slow
def test_generation_with_memory_is_repeated_argmax(remembering):
    """Beyond the ring of 21 slots too: prompts of 4 and 23 tokens."""
    prompts = [[0, 5, 17, 200], [0, *range(100, 122)]]
    result = generate(WITH_MEMORY, remembering, prompts, max_new_tokens=20)
    for prompt, new in zip(prompts, result.tokens, strict=True):
        row = list(prompt)
        for token in new:
            assert token == logits_of(remembering, row, WITH_MEMORY)[-1].argmax()
            row.append(token)


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.slow
def test_segments_with_memory_score_as_one_pass(remembering, batch_size):
    """Every token once with its full reach, whoever had the place in the batch before; documents
    that end with a segment and ones that leave padding.
    """
    random = np.random.RandomState(0)
    documents = [
        np.concatenate([[0], random.randint(1, 300, n)]).astype(np.int32) for n in (50, 5, 32, 1)
    ]
    done = []
    scores = score_documents(
        WITH_MEMORY,
        remembering,
        documents,
        length=16,
        batch_size=batch_size,
        progress=done.append,
    )
    for tokens, score in zip(documents, scores, strict=True):
        logits = logits_of(remembering, tokens[:-1].tolist(), WITH_MEMORY)
        log_p = jax.nn.log_softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(score.nats, -log_p, atol=1e-4)  # float32, other sums
        np.testing.assert_array_equal(score.best_ids, logits.argmax(axis=1))
    assert done[-1] == 4 + 1 + 2 + 1
    assert done[-1] == num_rows([len(d) for d in documents], 16, has_memory=True)
