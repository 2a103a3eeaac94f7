"""The experts that an engine tells of each token: those that the model's router chooses."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.checks import UserError
from configs.feed_forward import DenseConfig, RouterConfig
from infer.engine import Engine, EngineOptions, Request
from infer.engine.routed import RoutedExperts, Span
from infer.engine.sequence import TokenSequence
from infer.ngram_draft import NgramDraft
from infer.sampling import Sampling
from model.step import make_step
from model.transformer import Transformer, forward_and_experts
from tests import tiny
from tests.infer.server import kinds
from tests.infer.server.kinds import NEVER, run

PROMPTS = [np.random.RandomState(i).randint(1, 250, n).tolist() for i, n in enumerate((5, 150, 17))]
SAMPLING = Sampling(logit_bias=NEVER | {3: 36.0, 8: 35.8})
FEW = {"max_length": 192, "num_pages": 40}


def asked(new=9, **changes):
    return [Request(p, new, sampling=SAMPLING, wants_experts=True, **changes) for p in PROMPTS]


one_pass = jax.jit(forward_and_experts, static_argnums=0)


def of_one_pass(kind, tokens):
    """[tokens, layers, K] of one pass without a state; layers by depth."""
    model, variables = kind.loaded
    padded_1L, positions_1L = np.zeros((1, 192), np.int32), np.full((1, 192), -1, np.int32)
    padded_1L[0, : len(tokens)], positions_1L[0, : len(tokens)] = tokens, np.arange(len(tokens))
    *_, chosen = one_pass(model, variables, make_step(padded_1L, positions_1L))
    periods = range(model.config.num_periods)
    layers = [np.asarray(chosen[name])[p, 0] for p in periods for name in sorted(chosen)]
    return np.stack(layers, axis=1)[: len(tokens)]


def engine_of(kind, **changes):
    small = {"max_length": 192} if kind.options.num_pages is None else FEW
    return kind.engine(**{**small, **changes})


@pytest.mark.parametrize(
    "name",
    ["windowed", *(pytest.param(n, marks=pytest.mark.slow) for n in ("latent", "recurrent"))],
)
def test_experts_are_those_of_one_pass(name):
    """Of every token but the last, with a prefix that is in the cache, and counted by layer."""
    kind = kinds.kind_of(name)
    engine = engine_of(kind)
    total = 0
    for _ in range(2):
        made = run(engine, asked())
        for prompt, answer in zip(PROMPTS, made, strict=True):
            tokens = [*prompt, *answer.tokens][:-1]
            np.testing.assert_array_equal(answer.experts_TNK, of_one_pass(kind, tokens))
            assert answer.cached_tokens == 0
            total += len(tokens)
    counts = engine.stats().expert_tokens
    assert [x.sum() for x in counts] == [2 * total] * len(counts)


def test_one_that_is_stopped_by_a_token_has_read_all_of_its_text():
    kind = kinds.kind_of("windowed")
    text = run(engine_of(kind), asked()[:1])[0].tokens
    engine = engine_of(kind)
    stop = text[-1]
    made = run(engine, asked(stop_ids=frozenset({stop}))[:1])[0]
    assert made.reason == "stop"
    assert len(made.experts_TNK) == len(PROMPTS[0]) + text.index(stop)


@pytest.mark.slow
def test_drafts_and_texts_that_are_read_again_tell_the_same(monkeypatch):
    monkeypatch.setattr("infer.engine.drafting.Drafting._pays", lambda *_: True)
    kind = kinds.kind_of("windowed")
    wanted = run(engine_of(kind), asked(30))
    asked_plainly = [dataclasses.replace(r, wants_experts=False) for r in asked(30)]
    plain = run(engine_of(kind, keeps_experts=False), asked_plainly)
    assert [a.tokens for a in plain] == [a.tokens for a in wanted]
    draft = NgramDraft(length=3, longest=3, shortest=1)
    drafted = engine_of(kind, draft=draft)
    preempted = engine_of(kind, num_pages=14)
    for engine in (drafted, preempted):
        found = run(engine, asked(30))
        for one, other in zip(wanted, found, strict=True):
            assert one.tokens == other.tokens
            np.testing.assert_array_equal(one.experts_TNK, other.experts_TNK)
    assert preempted.stats().preemptions > 0
    assert drafted.stats().generated_tokens == 90


def test_layers_lie_by_depth_and_one_with_fewer_experts_has_none_in_the_last_places():
    layers = tiny.model().pattern
    fewer = dataclasses.replace(layers[0], ffn=tiny.moe(router=RouterConfig(top_k=1)))
    routed = RoutedExperts(tiny.model(pattern=(layers[0], fewer), num_layers=4))
    sequence = TokenSequence(0, Request([1, 2, 3], 2, wants_experts=True), 16, b"")
    two_PBLK = np.arange(2 * 4 * 2).reshape(2, 1, 4, 2) % 8
    one_PBLK = np.array([[[[5], [6], [7], [-1]]], [[[1], [2], [3], [-1]]]])
    routed.note({"layer_0": two_PBLK, "layer_1": one_PBLK}, [Span(sequence, 0, 1, 0, 3)])
    found_TNK = routed.told(sequence, is_read_whole=True)
    assert found_TNK[0].tolist() == [[2, 3], [6, -1], [2, 3], [2, -1]]
    assert found_TNK[2].tolist() == [[6, 7], [-1, -1], [6, 7], [-1, -1]]
    assert [x.tolist() for x in routed.counts()][1] == [0, 0, 0, 0, 0, 0, 1, 1]


def test_engines_without_are_told_so():
    dense = tiny.model(
        pattern=tuple(
            dataclasses.replace(spec, ffn=DenseConfig(d_ff=8)) for spec in tiny.model().pattern
        )
    )
    with pytest.raises(UserError, match="keeps_experts has no effect: the model has no layers"):
        Engine(Transformer(dense), {}, EngineOptions(keeps_experts=True))
    with pytest.raises(UserError, match="this engine does not keep them"):
        kinds.kind_of("windowed", keeps_experts=False).plain.add(asked()[0])
    with pytest.raises(UserError, match="exit_threshold and keeps_experts can't go together"):
        EngineOptions(exit_threshold=0.5, keeps_experts=True)
