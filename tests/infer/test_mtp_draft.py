"""Drafts by the model's own module: what its training's forward pass says, and the model's text."""

import jax
import numpy as np
import pytest

from configs.checks import UserError
from infer.engine import Request
from infer.engine.ahead import MtpDrafter
from infer.engine.drafting import Drafting
from infer.mtp_draft import MtpDraft
from infer.sampling import Sampling
from model.layers import unembed
from model.transformer import output_weights, training_pass
from tests.infer.server.kinds import NEVER, kind_of, run

LENGTH = 96
SMALL = {"max_length": LENGTH, "num_pages": 24, "piece": 32, "block": 32}
KIND = kind_of("latent", **SMALL)
PROMPTS = [
    np.random.RandomState(i).randint(1, 250, n).tolist() for i, n in enumerate((5, 40, 17, 60))
]
HOT = Sampling(0.8, seed=4, logit_bias=NEVER)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Whether drafts pay is another test's."""
    monkeypatch.setattr(Drafting, "_pays", lambda _, num_rows, lengths: bool(lengths))


@jax.jit
def said_ahead(variables, tokens_1L, positions_1L):
    """What the module says after each place, by the forward pass of training, [L]."""
    model = KIND.loaded[0]
    _, sown, _ = training_pass(model, variables, tokens_1L, positions_1L)
    (hidden_1LD,) = sown["multi_token"]["hidden_0"]
    return unembed(hidden_1LD, output_weights(model, variables))[0].argmax(-1)


def wanted_draft(tokens):
    """After the newest token, of one pass over all of them."""
    tokens_1L, positions_1L = np.zeros((1, LENGTH), np.int32), np.full((1, LENGTH), -1, np.int32)
    tokens_1L[0, : len(tokens)], positions_1L[0, : len(tokens)] = tokens, np.arange(len(tokens))
    return int(said_ahead(KIND.loaded[1], tokens_1L, positions_1L)[len(tokens) - 2])


class Checked:
    """Proposals as they come, compared with one pass; some replaced by what the text will be."""

    def __init__(self, monkeypatch, texts):
        self.count, self.texts = 0, texts
        real = MtpDrafter.propose

        def propose(drafter, wanted):
            found = real(drafter, wanted)
            assert set(found) == set(wanted)
            for sequence, draft in found.items():
                known = sequence.tokens(0, sequence.known)
                assert draft[0] == wanted_draft(known)
                self.count += 1
                if self.count % 3:
                    text = self.texts[tuple(sequence.prompt)]
                    at = len(sequence.text)
                    found[sequence] = text[at : at + len(draft)] or draft
            return found

        monkeypatch.setattr(MtpDrafter, "propose", propose)


@pytest.mark.parametrize("length", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_drafts_are_the_modules_and_the_text_is_the_models(monkeypatch, length):
    """Whether they hold or not; rows that others had before, prompts in several pieces."""
    sampling = HOT if length == 1 else Sampling(logit_bias=NEVER)
    asked = [Request(p, 24, sampling=sampling, num_logprobs=0) for p in PROMPTS]
    plain = [a.tokens for a in run(KIND.plain, asked)]
    texts = {tuple(p): text for p, text in zip(PROMPTS, plain, strict=True)}
    checked = Checked(monkeypatch, texts)
    engine = KIND.engine(draft=MtpDraft(length=length), prefix_cache=False)
    steps = []
    found = run(engine, asked, steps.append)
    assert [a.tokens for a in found] == plain
    assert [len(a.nats) for a in found] == [24] * 4
    assert checked.count > 20
    assert len(steps) < (36 if length == 1 else 28)  # two turns of rows, 24 tokens each
    assert engine.stats().free_pages == KIND.free_pages


@pytest.mark.slow
def test_a_prefix_from_the_cache_and_texts_that_are_read_again_change_nothing():
    """The module has not seen those places; its drafts are others, the text is the model's."""
    asked = [Request([*PROMPTS[1], *p[:9]], 20, sampling=HOT) for p in PROMPTS]
    plain = [a.tokens for a in run(KIND.plain, asked)]
    for changes in ({}, {"num_pages": 8}):
        engine = KIND.engine(draft=MtpDraft(length=2), **changes)
        for _ in range(2):
            assert [a.tokens for a in run(engine, asked)] == plain
        assert engine.stats().prefix_hits > 0
    assert engine.stats().preemptions > 0


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up():
    engine, compiled = KIND.engine(draft=MtpDraft(length=2), max_rows=2), []
    engine.warm_up()

    def listen(event, seconds, **_):
        if "compile" in event:
            compiled.append((event, seconds))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(engine, [Request(p, 9, sampling=HOT) for p in PROMPTS])
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_models_without_a_module_are_told_so():
    with pytest.raises(UserError, match="has no multi-token module to draft with"):
        kind_of("windowed").engine(draft=MtpDraft())
    with pytest.raises(UserError, match="length=0 must be greater than 0"):
        MtpDraft(length=0)
