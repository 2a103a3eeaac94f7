"""SmolLM2 beside what transformers said, recorded by tests/evals/parity/check.py."""

import json
from pathlib import Path

import pytest

from configs.checks import UserError
from data.smollm2 import packaged_gguf
from evals.local_model import LocalModel
from evals.samples import Prompt
from infer.sources import open_source

RECORDED = json.loads((Path(__file__).parent / "parity" / "smollm2.json").read_text())


def is_there() -> bool:
    try:
        return packaged_gguf().exists()
    except UserError:
        return False


pytestmark = pytest.mark.skipif(not is_there(), reason="make model brings SmolLM2")


@pytest.fixture(scope="module")
def smollm2() -> LocalModel:
    source = open_source("smollm2")
    return LocalModel(*source.load(), source.tokenizer)


def test_log_likelihoods_are_transformers(smollm2):
    """To 1e-3 nats; tokens of context and continuation are its own reading of the file's, too."""
    found = smollm2.log_likelihoods([(a, b) for a, b in RECORDED["pairs"]])
    for one, (nats, is_greedy) in zip(found, RECORDED["answers"]["pairs"], strict=True):
        assert one.nats == pytest.approx(nats, abs=1e-3)
        assert one.is_greedy == is_greedy


@pytest.mark.slow
def test_greedy_answers_are_transformers(smollm2):
    prompts = [
        Prompt(str(i), r["prompt"], None, tuple(r["stops"]), r["max_new_tokens"])
        for i, r in enumerate(RECORDED["prompts"])
    ]
    texts = [answers[0].text for answers in smollm2.generate(prompts)]
    assert texts == RECORDED["answers"]["texts"]
