"""A smaller model's drafts: the large one's text, drawn or not, in fewer steps."""

import dataclasses

import pytest

from configs.checks import UserError
from infer.engine import Engine, Request
from infer.engine.drafting import Drafting
from infer.model_draft import ModelDraft
from infer.sampling import Sampling
from model.transformer import Transformer
from tests import tiny
from tests.infer import test_engine_prefixes
from tests.infer.test_engine_answers import MODEL, NEVER, OPTIONS, PROMPTS, VARIABLES, served
from tests.probes import drawn

SMALL = Transformer(tiny.model(num_layers=2, context_length=96))
DRAFTS = {
    "itself": ModelDraft(MODEL, VARIABLES, length=3),
    "another": ModelDraft(SMALL, drawn(SMALL.config, seed=5), length=3),
}
HOT = Sampling(0.3, seed=7, logit_bias=NEVER)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(Drafting, "_pays", lambda _, num_rows, lengths: bool(lengths))


@pytest.fixture(scope="module")
def plain():
    return Engine(MODEL, VARIABLES, OPTIONS)


@pytest.mark.parametrize("name", ["itself", pytest.param("another", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_text_is_the_large_models(plain, name):
    """The model as its own draft is always right, where texts are greedy; a stranger seldom is.
    Rows that other requests had before, and prompts longer than a program."""
    engine = Engine(MODEL, VARIABLES, dataclasses.replace(OPTIONS, draft=DRAFTS[name]))
    for sampling in (Sampling(), HOT):
        requests = [Request(p, 30, sampling=sampling) for p in PROMPTS]
        texts = [[(a.tokens, a.reason) for a in served(e, requests)] for e in (plain, engine)]
        assert texts[0] == texts[1]
    steps = []
    for one in (plain, engine):
        served(one, [Request(PROMPTS[0], 40)], lambda step, _: steps.append(step))
    num_plain = steps.index(1, 1) if 1 in steps[1:] else 0
    assert num_plain == 39
    assert (len(steps) - num_plain < 0.3 * num_plain) == (name == "itself")


def test_models_that_can_not_draft_are_refused():
    recurrent = test_engine_prefixes.RECURRENT
    other = Transformer(tiny.model(vocab_size=64))
    for model, sentence in (
        (recurrent, "can't go back"),
        (other, "has 64 tokens and the model 300"),
    ):
        with pytest.raises(UserError, match=sentence):
            Engine(MODEL, VARIABLES, dataclasses.replace(OPTIONS, draft=ModelDraft(model, {})))
