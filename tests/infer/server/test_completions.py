"""Completions: what lm-evaluation-harness, editors and the legacy interface ask for."""

import itertools
import json

import numpy as np
import openai
import pytest

from tests.infer.server.conftest import TEXT
from tests.infer.server.scripted import logprob_of


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_log_probabilities(http, tokenizer, max_tokens):
    """The request of lm-evaluation-harness (token ids, batched), answered as it reads it."""
    prompts = [tokenizer.encode(text) for text in ("ab c", "Grüße")]
    body = {
        "model": "tiny",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = http.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(prompt) + max_tokens
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        wanted = [logprob_of(token, 1).logprob for token in prompt[1:]]
        assert logprobs["token_logprobs"][1 : len(prompt)] == wanted
        offsets = [*logprobs["text_offset"], len(choice["text"])]
        if choice["index"] == 0:
            pieces = [choice["text"][a:b] for a, b in itertools.pairwise(offsets)]
            assert pieces == logprobs["tokens"]
        for mine, best in zip(
            logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True
        ):
            assert mine in best.values()  # exactly: the harness compares them
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens


def test_prompts_of_every_kind(http, tokenizer):
    ids = tokenizer.encode("say:x")
    for prompt, count in (("say:x", 1), (["say:x", "say:y"], 2), (ids, 1), ([ids, ids], 2)):
        choices = http.post("/v1/completions", json={"prompt": prompt}).json()["choices"]
        assert [c["text"] for c in choices] == ["x", "y"][:count] if count == 1 else True
        assert len(choices) == count


def test_a_stream_with_echo_and_n(client):
    chunks = list(
        client.completions.create(model="tiny", prompt="say:yes", n=3, stream=True, echo=True)
    )
    texts = [
        "".join(c.choices[0].text for c in chunks if c.choices[0].index == i) for i in range(3)
    ]
    assert texts == ["say:yesyes"] * 3


def test_the_default_is_sixteen_tokens(client):
    made = client.completions.create(model="tiny", prompt="go").choices[0]
    assert made.finish_reason == "length"
    assert made.text == TEXT.encode()[:16].decode(errors="replace")  # cut in a character


FIM = "<fim_prefix>def f():<fim_suffix>return x<fim_middle>"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "def f():", "suffix": "return x"}),
        ("/beta/completions", {"prompt": "def f():", "suffix": "return x"}),
        ("/infill", {"input_prefix": "def ", "prompt": "f():", "input_suffix": "return x"}),
    ],
)
def test_what_belongs_between_two_texts(http, engine, tokenizer, path, body):
    limit = {"n_predict": 4} if path == "/infill" else {"max_tokens": 4}
    answer = http.post(path, json=body | limit).json()
    assert tokenizer.decode(engine.seen[-1].prompt, specials=True) == FIM
    assert (answer["content"] if path == "/infill" else answer["choices"][0]["text"]) == "Grü"


def test_the_form_of_mistrals_interface(http):
    body = {"prompt": "say:", "suffix": "b", "max_tokens": 4}
    whole = http.post("/v1/fim/completions", json=body).json()
    assert whole["choices"][0]["message"]["content"]
    text = http.post("/v1/fim/completions", json=body | {"stream": True}).text
    *chunks, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    deltas = [json.loads(chunk)["choices"][0]["delta"]["content"] for chunk in chunks]
    assert "".join(deltas) == whole["choices"][0]["message"]["content"]
    assert last == "[DONE]"


def test_what_an_editor_sends_before_anything_else(http):
    """llama.vscode warms a server up with n_predict 0 and no samplers."""
    body = {
        "input_prefix": "a", "input_suffix": "", "input_extra": [{"filename": "b.py", "text": "c"}],
        "prompt": "", "n_predict": 0, "samplers": [], "cache_prompt": True, "t_max_prompt_ms": 1,
        "t_max_predict_ms": 1, "id_slot": 0, "n_indent": 0, "top_k": 40, "top_p": 0.99,
        "stream": False, "n_cmpl": 1,
    }  # fmt: skip
    answer = http.post("/infill", json=body)
    assert answer.status_code == 200
    assert answer.json()["content"] == ""
    assert http.get("/props").json()["n_ctx"] == 1024


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"prompt": "a", "suffix": "b", "echo": True}, "can't go together"),
        ({"prompt": [1, 2], "suffix": "b"}, "a suffix goes with a prompt of text"),
        ({"prompt": "a", "max_tokens": 0}, "asks for nothing without echo"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, "is not streamed"),
        ({"prompt": [5] * 1024}, "leaves no room"),
    ],
)
def test_what_can_not_be_completed(client, http, body, sentence):
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]["message"]


def test_the_longest_prompt_has_room_for_one_token(client):
    made = client.completions.create(model="tiny", prompt=[5] * 1023, max_tokens=40)
    assert made.usage.completion_tokens == 1


def test_tokens_and_back(http, tokenizer):
    text = "Grüße <|im_end|> 한"
    tokens = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert tokens["tokens"] == tokenizer.encode(text)
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"] == text
    info = http.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("<|end|>", "<|end|>")
    assert "im_start" in info["chat_template"]
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).json()
    assert tokenizer.decode(chat["tokens"], specials=True).endswith("<|im_start|>assistant\n")


def test_metrics_have_the_names_that_dashboards_know(http, client):
    client.completions.create(model="tiny", prompt="say:a", max_tokens=4)
    text = http.get("/metrics").text
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
        "prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_total",
        "generation_tokens_total", "num_preemptions_total", "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket", "e2e_request_latency_seconds_count",
        "request_time_per_output_token_seconds_sum", "admission_rejections_total",
        "corrupted_requests_total", "prompt_tokens_cached_total",
    ):  # fmt: skip
        assert f"\nvllm:{name}{{" in text, name
    assert 'request_success_total{finished_reason="stop",model_name="tiny"}' in text


def test_embeddings_are_not_made_without_a_model(client):
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model="tiny", input="a")


def test_log_probabilities_of_a_stream_add_up(client):
    whole = client.completions.create(
        model="tiny", prompt="say:abc", logprobs=2, max_tokens=3, temperature=0
    ).choices[0]
    chunks = client.completions.create(
        model="tiny", prompt="say:abc", logprobs=2, max_tokens=3, temperature=0, stream=True
    )
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [x for part in parts for x in getattr(part, name)]
        assert joined == getattr(whole.logprobs, name)
    assert np.allclose(whole.logprobs.text_offset, [0, 1, 2])
