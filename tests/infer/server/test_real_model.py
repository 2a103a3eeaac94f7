"""A small model of ours behind the server: its texts, scores, structures and vectors."""

import concurrent.futures
import json

import httpx
import numpy as np
import openai
import pytest

from configs.base import ExecutionConfig
from configs.checks import UserError
from evals.http_model import HttpModel
from evals.local_model import LocalModel
from evals.samples import Prompt
from infer.engine import Engine, EngineOptions
from infer.engine.programs import WholeModel
from infer.generate import generate
from infer.logits import full_logits
from infer.sampling import Sampling
from infer.server.embeddings import Embedder
from infer.server.token_texts import TokenTexts
from model.transformer import Transformer, hidden_states
from scripts import evaluate
from scripts.evaluated_model import open_named
from tests import tiny
from tests.infer.server.conftest import user
from tests.infer.server.scripted import byte_tokenizer, served
from tests.probes import drawn

ROWS, LENGTH, NEW = 2, 64, 8
TOKENIZER = byte_tokenizer()
TEXTS = ["The capital", "of France", "is Paris, said", "x", "def f(x):", "return x + 1"]


@pytest.fixture(scope="module")
def model():
    made = Transformer(tiny.model(), ExecutionConfig(transport="gather", capacity_factor=None))
    return made, drawn(made.config, seed=3)


@pytest.fixture(scope="module")
def server(model):
    options = EngineOptions(
        max_rows=ROWS, max_length=LENGTH, piece=16, page_size=8, num_pages=24, prefix_cache=True
    )
    engine = Engine(*model, options)
    settings = {"max_rows": ROWS, "max_length": LENGTH, "vocab_size": 300}
    settings["embed"] = Embedder(WholeModel(*model))
    with served(engine, TOKENIZER, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as made:
        yield made


def complete(client, prompt, **settings):
    settings = {"max_tokens": NEW, "extra_body": {"ignore_eos": True}} | settings
    return client.completions.create(model="tiny", prompt=prompt, **settings)


def test_texts_are_those_of_generate_alone_whoever_else_asks(client, model):
    ids = [TOKENIZER.encode(text) for text in TEXTS]
    samplings = [Sampling(0.7, seed=i) for i in range(len(ids))]
    alone = [
        generate(*model, [x], max_new_tokens=NEW, sampling=s, rows=ROWS, piece=16).tokens[0]
        for x, s in zip(ids, samplings, strict=True)
    ]

    def ask(i):
        return complete(client, ids[i], temperature=0.7, seed=i, logprobs=0).choices[0]

    with concurrent.futures.ThreadPoolExecutor(len(ids)) as pool:
        made = list(pool.map(ask, range(len(ids))))
    texts = TokenTexts(TOKENIZER, 300)
    for choice, tokens in zip(made, alone, strict=True):
        assert choice.logprobs.tokens == [texts.text_of(token) for token in tokens]


def test_echoed_log_probabilities_are_the_models(client, model):
    """Against the logits of one pass over everything, and the same for a prefix that was kept."""
    ids = TOKENIZER.encode("The capital of France is Paris")
    logits_LV = np.asarray(full_logits(*model, [*ids, *[0] * (LENGTH - len(ids))]), np.float64)
    log_p_LV = logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True))
    wanted = [log_p_LV[i - 1, token] for i, token in enumerate(ids) if i]
    for _ in range(2):
        got = complete(client, ids, max_tokens=1, echo=True, logprobs=1, temperature=0).choices[0]
        assert np.allclose(got.logprobs.token_logprobs[1:-1], wanted, atol=1e-4)
        best = [max(top.values()) for top in got.logprobs.top_logprobs[1:]]
        assert np.allclose(best[:-1], log_p_LV[: len(ids) - 1].max(-1), atol=1e-4)
        assert got.logprobs.token_logprobs[-1] == best[-1]  # greedy: exactly the best


PAIRS = [("The capital", " of France"), ("x ", "is Paris"), ("", "The"), ("x" * 80, " y")]


@pytest.fixture(scope="module")
def local(model):
    return LocalModel(*model, lambda: TOKENIZER, window=LENGTH - 2, max_rows=ROWS)


def test_what_the_harness_makes_of_it(client, local):
    """lm-evaluation-harness' request and its sum over a continuation, against our own scoring."""
    batch, lengths = [], []
    for context, continuation in PAIRS[:1]:
        before = TOKENIZER.encode(context)
        batch.append([*before, *TOKENIZER.encode(continuation)])
        lengths.append(len(before))
    settings = {"max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0, "seed": 1234}
    answer = complete(client, batch, **settings)
    wanted = local.log_likelihoods(PAIRS[:1])
    for choice, length, known in zip(answer.choices, lengths, wanted, strict=True):
        nats = choice.logprobs.token_logprobs[length:-1]
        assert sum(nats) == pytest.approx(known.nats, abs=1e-3)
        tops = choice.logprobs.top_logprobs[length:-1]
        is_greedy = all(x == max(top.values()) for x, top in zip(nats, tops, strict=True))
        assert is_greedy == known.is_greedy


def test_an_evaluation_through_the_server_is_the_same(server, local):
    """The three verbs of evals/samples.py, asked over HTTP and in this process."""
    remote = HttpModel(f"{server.url}/v1")
    assert remote.context_length == LENGTH
    for got, wanted in zip(
        remote.log_likelihoods(PAIRS), local.log_likelihoods(PAIRS), strict=True
    ):
        assert got.num_tokens == wanted.num_tokens
        # The server reads two tokens less: the last one is scored, and it makes one.
        assert got.num_dropped == wanted.num_dropped + 2 * bool(wanted.num_dropped)
        if not wanted.num_dropped:
            assert got.nats == pytest.approx(wanted.nats, abs=1e-3)
            assert got.is_greedy == wanted.is_greedy
    texts = ["The capital of France", "x" * 90]
    for got, wanted in zip(remote.rolling(texts), local.rolling(texts), strict=True):
        assert (got.num_tokens, got.num_bytes) == (wanted.num_tokens, wanted.num_bytes)
        assert got.nats == pytest.approx(wanted.nats, abs=2e-3)
    prompts = [
        Prompt("a", "The capital", None, max_new_tokens=NEW),
        Prompt("b", tuple(user("hi")), None, max_new_tokens=4, num_answers=2, temperature=0.7),
        Prompt("c", "y" * 90, None, max_new_tokens=NEW),
    ]
    for got, wanted in zip(remote.generate(prompts), local.generate(prompts), strict=True):
        assert [(a.text, a.ended) for a in got] == [(a.text, a.ended) for a in wanted]
        assert [a.num_dropped for a in got] == [a.num_dropped for a in wanted]


def test_servers_that_can_not_be_evaluated(server):
    with pytest.raises(UserError, match="does not answer /v1/models"):
        HttpModel("http://127.0.0.1:9/v1").describe()
    with pytest.raises(UserError, match="refuses /v1/completions with 400: prompt"):
        HttpModel(server.url).ask("/v1/completions", {"prompt": []})
    arguments = evaluate.make_parser().parse_args([server.url, "--weights", "int8"])
    with pytest.raises(UserError, match="is a server, which says itself how it computes"):
        open_named(server.url, arguments, [], None, None)


def test_a_prefix_that_comes_again_is_in_the_cache_and_changes_nothing(client):
    prompt = "a prefix of several pages, and"
    first, second = (complete(client, prompt, temperature=0) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    assert second.usage.prompt_tokens_details.cached_tokens >= 16
    other = complete(client, prompt, temperature=0, extra_body={"cache_salt": "b"})
    assert other.usage.prompt_tokens_details.cached_tokens == 0


def test_a_structure_is_kept_by_a_model_that_knows_nothing(client):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    made = client.chat.completions.create(
        model="tiny", messages=user("a"), response_format=form, max_tokens=40, logit_bias=SPACES
    ).choices[0]
    assert made.finish_reason == "stop"
    assert isinstance(json.loads(made.message.content)["ok"], bool)


SPACES = {str(TOKENIZER.encode(blank)[0]): -100 for blank in " \n\t\r"}
"""A model that knows nothing would put blanks between for ever."""


def test_pages_come_back_whoever_goes(server, client):
    def free():
        complete(client, "z", max_tokens=1)
        return server.service.metrics.latest.free_pages

    before = free()
    for _ in range(4):
        stream = complete(client, "gone soon", max_tokens=40, stream=True)
        next(iter(stream))
        stream.close()
    for _ in range(50):
        if free() == before:
            return
    raise AssertionError("pages are missing")


def test_vectors_of_texts(server, client, model):
    data = client.embeddings.create(model="tiny", input=["The capital", "x"]).data
    raw = httpx.post(f"{server.url}/v1/embeddings", json={"input": "x"}).json()["data"][0]
    vectors = [np.array(each.embedding) for each in data]
    assert np.allclose(raw["embedding"], vectors[1], atol=1e-6)
    assert np.allclose([np.linalg.norm(v) for v in vectors], 1, atol=1e-5)
    network, variables = model
    ids = TOKENIZER.encode("The capital")
    hidden_1LD, _ = hidden_states(network, variables, np.array([ids]), np.arange(len(ids))[None])
    mean_D = np.asarray(hidden_1LD)[0].mean(0)
    assert np.allclose(vectors[0], mean_D / np.linalg.norm(mean_D), atol=1e-4)
