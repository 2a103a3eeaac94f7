"""Acceptance of drafts: against draws that are accepted or not; a model that is its own target."""

import jax
import numpy as np
import pytest

from infer.acceptance import acceptance, tokens_per_step
from model.transformer import Transformer, hidden_states, init_variables, output_weights
from tests import tiny


def test_tokens_of_a_step_are_those_of_drafts_that_end_at_the_first_refusal():
    rng = np.random.RandomState(0)
    rates = np.array([[0.9, 0.5, 0.7, 0.8, np.nan]])
    for length, begins in ((1, 4), (2, 3), (3, 2)):
        drawn = []
        for _ in range(4000):
            begin = rng.randint(begins)
            is_kept = rng.rand(length) < rates[0, begin : begin + length]
            drawn.append(1 + np.cumprod(is_kept).sum())
        error = 4 * np.std(drawn) / len(drawn) ** 0.5
        assert tokens_per_step(rates, length) == pytest.approx(np.mean(drawn), abs=error)
    assert np.isnan(tokens_per_step(rates, 6))


@pytest.mark.slow
def test_the_share_that_a_target_accepts():
    model = Transformer(tiny.model(pattern=tiny.model().pattern[1:], num_layers=1))
    draw = jax.jit(init_variables, static_argnums=(0, 1))
    target, draft = draw(model, 0), draw(model, 1)
    tokens = np.random.RandomState(1).randint(0, 300, (1, 2, 16))
    positions = np.broadcast_to(np.arange(16), tokens.shape)
    targets = np.where(positions < 12, 1, -1)
    batches = {"tokens": tokens, "targets": targets, "positions": positions}
    found = acceptance((model, target), (model, draft), batches, 2)
    look, read = (jax.jit(f, static_argnums=0) for f in (hidden_states, output_weights))

    def distribution(variables):
        hidden, _ = look(model, variables, tokens[0], positions[0])
        return np.asarray(jax.nn.softmax(hidden @ read(model, variables)))

    p, q = distribution(target), distribution(draft)
    counted = targets[0] >= 0
    assert found.sampled == pytest.approx(np.minimum(p, q).sum(-1)[counted].mean(), rel=1e-5)
    assert found.greedy == (p.argmax(-1) == q.argmax(-1))[counted].mean()
    assert found.num_places == 24
    own = acceptance((model, target), (model, target), batches, 2)
    assert (own.sampled, own.greedy) == (pytest.approx(1.0, abs=1e-6), 1.0)
    assert own.tokens_per_step[4] == pytest.approx(5.0, abs=1e-5)
