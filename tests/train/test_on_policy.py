"""Rows that a student writes: what lies in them, whose experts they have, how they are drawn."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import DistillConfig
from configs.checks import UserError
from configs.distill import OnPolicyConfig
from infer.routing import chosen_experts
from infer.sampling import Sampling, no_counts, sample, sampling_rows
from model.step import OWN_CHOICE, make_step
from model.transformer import Transformer, training_pass
from tests import tiny
from tests.probes import drawn
from train.loop import mesh_of
from train.on_policy import Written, with_written_rows

RNG = np.random.RandomState(0)


def test_the_rows_hold_what_was_written(tmp_path):
    """Of four rows two, by a pen that writes 100, 101, ... and ends the second text early."""
    settings = OnPolicyConfig(share=0.5, prompt_length=6)
    run = tiny.run(tmp_path, batch_size=4, distill=DistillConfig(on_policy=settings), seed=1)
    asked = {}

    def write(variables, prompts, *, max_new_tokens, temperature, seeds):
        asked.update(prompts=prompts, new=max_new_tokens, seeds=seeds, variables=variables)
        texts = [list(range(100, 100 + max_new_tokens)), [100, 0]]
        chosen = np.full((2, 1, 32, 2), 5, np.int32)
        return Written(texts, {"layer_0": chosen})

    tokens = RNG.randint(1, 300, (4, 32)).astype(np.int32)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), (4, 32)).copy()
    positions[:, 2:] -= 2  # a document begins within the prompt: it is all that is kept
    names = ("tokens", "targets", "positions")
    batch = {n: jnp.asarray(x) for n, x in zip(names, (tokens, tokens, positions), strict=True)}
    with jax.set_mesh(mesh_of(run)):
        extend = with_written_rows(run, mesh_of(run), lambda mesh: write)

        class State:
            variables = "of this step"

        made = extend(batch, State(), 3)  # pyright: ignore[reportArgumentType]
        again = extend(batch, State(), 3)  # pyright: ignore[reportArgumentType]
    first_seeds = asked["seeds"]
    assert asked["variables"] == "of this step"
    assert asked["new"] == 32 + 1 - 4
    written = np.flatnonzero(~np.asarray(made["is_data"])[:, 0])
    assert len(written) == 2
    assert asked["prompts"] == [tokens[row, 2:6].tolist() for row in written]
    a, b = written
    found = {n: np.asarray(made[n]) for n in names}
    np.testing.assert_array_equal(found["tokens"][a], [*tokens[a, 2:6], *range(100, 128)])
    np.testing.assert_array_equal(found["targets"][a], [-1, -1, -1, *range(100, 129)])
    np.testing.assert_array_equal(found["positions"][a], np.arange(32))
    np.testing.assert_array_equal(found["targets"][b], [-1, -1, -1, 100, 0, *[-1] * 27])
    np.testing.assert_array_equal(found["positions"][b], [*range(6), *[-1] * 26])
    others = [row for row in range(4) if row not in written]
    for name in names:
        np.testing.assert_array_equal(found[name][others], np.asarray(batch[name])[others])
    chosen = np.asarray(made["chosen"]["layer_0"])
    assert (chosen[written] == 5).all()
    assert (chosen[others] == OWN_CHOICE).all()
    np.testing.assert_array_equal(again["tokens"], made["tokens"])  # the step decides, no state
    assert asked["seeds"] == first_seeds


def test_experts_while_generating_are_those_of_training_and_decide_when_replayed():
    """Read token by token through a state, or whole: the same experts; given ones are obeyed."""
    model = Transformer(tiny.model(pattern=tiny.model().pattern[:1], num_layers=1))
    variables = drawn(model.config)
    text = RNG.randint(1, 300, 24)
    found = chosen_experts(model, variables, [text[:9].tolist()], [text[9:].tolist()], 24)
    assert found is not None
    assert found["layer_0"].shape == (1, 1, 24, 2)
    tokens, positions = jnp.asarray(text[None]), jnp.arange(24)[None]
    apply = jax.jit(functools.partial(model.apply, mutable=["experts"]))
    whole: Any = apply(variables, make_step(tokens, positions))[1]
    own = np.asarray(whole["experts"]["periods"]["layer_0"]["moe"]["ids"])[0]
    np.testing.assert_array_equal(found["layer_0"][0, 0], own[0])

    look = jax.jit(training_pass, static_argnums=0, static_argnames="is_replayed")

    def run(chosen, **how):
        given = {"layer_0": jnp.asarray(chosen)[None]}
        hidden, sown, _ = look(model, variables, tokens, positions, chosen=given, **how)
        layer = sown["router"]["periods"]["layer_0"]["moe"]
        return np.asarray(hidden), float(layer["changed"][0]), layer["stats"].counts_E[0]

    free, _, _ = look(model, variables, tokens, positions)
    same, changed, _ = run(own)
    np.testing.assert_array_equal(same, free)
    assert changed == 0
    other = (own + 3) % 8  # of 8 experts
    moved, changed, counts = run(other)
    agree = [len(set(a) & set(b)) for a, b in zip(own[0], other[0], strict=True)]
    assert changed == pytest.approx(1 - sum(agree) / own.size)
    np.testing.assert_array_equal(counts, np.bincount(other.reshape(-1), minlength=8))
    assert np.abs(moved - np.asarray(free)).max() > 1e-3
    compared, changed_too, _ = run(other, is_replayed=False)
    np.testing.assert_array_equal(compared, free)
    assert changed_too == changed
    unset = np.full_like(own, OWN_CHOICE)
    np.testing.assert_array_equal(run(unset)[0], free)


@pytest.mark.slow
def test_the_gradient_on_drawn_texts_is_unbiased():
    """A toy whose texts of two tokens can be counted: the mean gradient over draws by the engine's
    sampler is that over all texts, weighted by what the student gives them."""
    vocab, draws = 4, 600
    params = jnp.asarray(RNG.randn(vocab + 1, vocab).astype(np.float32))  # by the token before
    log_p = jax.nn.log_softmax(jnp.asarray(RNG.randn(vocab + 1, vocab).astype(np.float32)))

    def marked(params, before):
        """The reverse KL at the places behind these tokens, summed over texts."""
        log_q = jax.nn.log_softmax(params[before])
        return (jnp.exp(log_q) * (log_q - log_p[before])).sum()

    q = np.asarray(jax.nn.softmax(params))
    start = jnp.full(draws, vocab)
    rows = sampling_rows([Sampling(temperature=1.0, seed=seed) for seed in range(draws)])
    place = jnp.zeros(draws, jnp.int32)
    first = sample(params[start], rows, no_counts(draws, vocab), place)
    found = jax.grad(marked)(params, jnp.stack([start, first])) / draws
    weights = jnp.asarray(q[vocab])
    each = jnp.stack([jax.grad(marked)(params, jnp.array([vocab, x])) for x in range(vocab)])
    exact = (weights[:, None, None] * each).sum(axis=0)
    spread = np.sqrt((weights[:, None, None] * (each - exact) ** 2).sum(axis=0) / draws)
    rounding = 1e-4  # float32 sums of as many texts
    assert (np.abs(found - exact) <= 4 * spread + rounding).all()  # four standard errors
    greedy = jax.grad(marked)(params, jnp.stack([start, params[start].argmax(-1)])) / draws
    assert (np.abs(greedy - exact) > 4 * spread + rounding).any()  # what a biased pen would give


def test_runs_that_nobody_can_write_for(tmp_path):
    run = tiny.run(tmp_path, distill=DistillConfig(on_policy=OnPolicyConfig(share=1.0)))
    with pytest.raises(UserError, match="needs the engine"):
        with_written_rows(run, mesh_of(run), None)
    full = dataclasses.replace(run, data=dataclasses.replace(run.data, seq_len=64))
    with pytest.raises(UserError, match=r"shorten data\.seq_len by one"):
        with_written_rows(full, mesh_of(full), lambda mesh: None)  # pyright: ignore
    longer = OnPolicyConfig(share=1.0, prompt_length=33)
    run = dataclasses.replace(run, distill=DistillConfig(on_policy=longer))
    with pytest.raises(UserError, match=r"prompt_length=33 must be at most data\.seq_len=32"):
        with_written_rows(run, mesh_of(run), lambda mesh: None)  # pyright: ignore
