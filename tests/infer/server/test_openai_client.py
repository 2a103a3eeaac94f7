"""The openai client, unmodified, over a real socket."""

import asyncio
import json

import openai
import pytest

from tests.infer.server.conftest import TEXT, user

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'


def collected(stream):
    """Content, finish reasons, and chunks of a stream of one choice."""
    chunks = list(stream)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    return text, [c.finish_reason for c in choices if c.finish_reason], chunks


def test_a_stream_is_the_whole_answer_and_whole_characters(client):
    whole = client.chat.completions.create(model="tiny", messages=user("hi"))
    assert whole.choices[0].message.content == TEXT
    stream = client.chat.completions.create(
        model="tiny", messages=user("hi"), stream=True, stream_options={"include_usage": True}
    )
    text, finish, chunks = collected(stream)
    assert (text, finish) == (TEXT, ["stop"])
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all("\ufffd" not in (c.choices[0].delta.content or "") for c in chunks if c.choices)
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert len(usages) == 1
    assert not chunks[-1].choices
    assert usages[0] == whole.usage
    assert whole.usage.completion_tokens == len(TEXT.encode())
    assert whole.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens // 2
    hits, misses = (getattr(whole.usage, f"prompt_cache_{kind}_tokens") for kind in ("hit", "miss"))
    assert hits + misses == whole.usage.prompt_tokens


def test_stop_texts_leak_nothing_and_log_probabilities_align(client):
    ask = {"model": "tiny", "messages": user("hi"), "stop": ["STOP", "never"], "logprobs": True}
    whole = client.chat.completions.create(**ask, top_logprobs=2).choices[0]
    before = TEXT.partition("STOP")[0]
    assert (whole.message.content, whole.finish_reason) == (before, "stop")
    entries = whole.logprobs.content
    assert b"".join(bytes(e.bytes) for e in entries).decode() == before
    assert all(len(e.top_logprobs) == 2 for e in entries)
    text, finish, chunks = collected(client.chat.completions.create(**ask, stream=True))
    assert (text, finish) == (before, ["stop"])
    streamed = [
        (e.token, e.logprob)
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for e in chunk.choices[0].logprobs.content
    ]
    assert streamed == [(e.token, e.logprob) for e in entries]


def test_the_asynchronous_client(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            asked = [
                client.chat.completions.create(model="tiny", messages=user(f"say:answer {i}"))
                for i in range(8)
            ]
            whole = [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]
            stream = await client.chat.completions.create(
                model="tiny", messages=user("say:piece by piece"), stream=True
            )
            parts = [c.choices[0].delta.content or "" async for c in stream if c.choices]
            return whole, "".join(parts)

    whole, streamed = asyncio.run(ask())
    assert whole == [f"answer {i}" for i in range(8)]
    assert streamed == "piece by piece"


def test_settings_reach_the_engine(client, engine):
    client.chat.completions.create(
        model="tiny",
        messages=user("hi"),
        n=2,
        seed=7,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"5": -100},
        max_completion_tokens=3,
        extra_body={
            "top_k": 20,
            "min_p": 0.05,
            "repetition_penalty": 1.2,
            "cache_salt": "a",
            "expert_preference": ["algorithm_design"],
            "ignore_eos": True,
        },
    )
    first, second = engine.seen[-2:]
    assert (first.sampling.seed, second.sampling.seed) == (7, 8)
    sampling = first.sampling
    got = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
    assert got == (0.5, 0.9, 20, 0.05)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
    assert (sampling.repetition_penalty, sampling.biases) == (1.2, ((5, -100.0),))
    assert (first.max_new_tokens, first.cache_salt, first.stop_ids) == (3, "a", frozenset())
    assert first.preference["layer_0"].tolist() == [1]


def test_greedy_takes_no_cut(client, engine):
    """Clients send top_p beside temperature 0; the best token is in every cut."""
    client.chat.completions.create(model="tiny", messages=user("x"), temperature=0, top_p=0.5)
    assert (engine.seen[-1].sampling.temperature, engine.seen[-1].sampling.top_p) == (0.0, 1.0)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tool_calls_whole_and_in_fragments(client, choice):
    ask = {"model": "tiny", "tools": [TOOL], "tool_choice": choice}
    ask["messages"] = user(f"say:{CALL}")
    whole = client.chat.completions.create(**ask).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    (call,) = whole.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo", "days": 3}
    _, finish, chunks = collected(client.chat.completions.create(**ask, stream=True))
    deltas = [d for c in chunks if c.choices for d in c.choices[0].delta.tool_calls or ()]
    assert [d.function.name for d in deltas if d.id] == ["weather"]
    assert json.loads("".join(d.function.arguments for d in deltas))["days"] == 3
    assert len(deltas) > 2
    assert finish == ["tool_calls"]


def test_a_required_call_is_valid_whatever_the_model_would_say(client):
    """The script does not call anything: the grammar makes it."""
    made = client.chat.completions.create(
        model="tiny", messages=user("say:no"), tools=[TOOL], tool_choice="required", max_tokens=300
    ).choices[0]
    if made.finish_reason == "tool_calls":
        assert "city" in json.loads(made.message.tool_calls[0].function.arguments)
    else:  # it never closed its string
        assert made.finish_reason == "length"
        assert made.message.content.startswith('<tool_call>\n{"name"')


def test_history_with_broken_arguments_and_results_is_read(client, engine, tokenizer):
    broken = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{oops"}}
    messages = [
        *user("hi"),
        {"role": "assistant", "content": None, "tool_calls": [broken]},
        {"role": "tool", "tool_call_id": "1", "content": "cold"},
        *user("say:so it is"),
    ]
    made = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL])
    assert made.choices[0].message.content == "so it is"
    prompt = tokenizer.decode(engine.seen[-1].prompt, specials=True)
    assert "{oops" in prompt
    assert "<tool_response>\ncold" in prompt


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA}}, '{"a":1,"b":"y"}'),
        ({"type": "json_object"}, '{"any":[1]}'),
        ({"type": "regex", "pattern": "[ab]{3}"}, "abxyz"),
        ({"type": "grammar", "grammar": 'start: "yes" | "no"'}, "maybe"),
    ],
)
def test_structured_output(client, form, said):
    made = client.chat.completions.create(
        model="tiny", messages=user(f"say:{said}"), response_format=form, max_tokens=200
    ).choices[0]
    text = made.message.content
    if form["type"].startswith("json"):
        assert json.loads(text) == json.loads(said)
    elif form["type"] == "regex":
        assert len(text) == 3
        assert set(text) <= {"a", "b"}
    else:
        assert text in ("yes", "no")


NONSENSE = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nonsense"}}}
ENDLESS = {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}
PICTURE = [{"type": "image_url", "image_url": {"url": ""}}]
JSON = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"response_format": NONSENSE}, "response_format can't be followed"),
        ({"extra_body": {"guided_regex": "(a"}}, "guided_regex can't be followed"),
        ({"extra_body": {"guided_json": ENDLESS}}, "guided_json can't be followed"),
        ({"extra_body": {"guided_grammar": "start: nothing"}}, "guided_grammar can't be followed"),
        (JSON | {"extra_body": {"guided_regex": "a"}}, "can't go together"),
        ({"extra_body": {"temprature": 1}}, "did you mean temperature"),
        ({"extra_body": {"expert_preference": ["cooking"]}}, "unknown domain 'cooking'"),
        ({"top_logprobs": 3}, "top_logprobs goes with logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "leave one out"),
        ({"logit_bias": {"x": 1}}, "token ids"),
        ({"tool_choice": "required"}, "tools has none"),
        ({"messages": user("x" * 1100)}, "maximum context length is 1024"),
        ({"messages": [{"role": "user", "content": PICTURE}]}, "reads text"),
        ({"reasoning_effort": "high"}, "knows no reasoning_effort"),
    ],
)  # fmt: skip
def test_what_can_not_be_followed_is_a_clear_400_and_the_next_request_is_fine(
    client, body, sentence
):
    ask = {"model": "tiny", "messages": user("say:fine")}
    with pytest.raises(openai.BadRequestError, match=sentence) as caught:
        client.chat.completions.create(**(ask | body))
    assert caught.value.body["type"] == "invalid_request_error"
    assert client.chat.completions.create(**ask).choices[0].message.content == "fine"


def test_names_of_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 1024
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=user("hi"))


def test_a_message_that_begins_the_answer(client, engine, tokenizer):
    messages = [*user("hi"), {"role": "assistant", "content": "Once upon", "prefix": True}]
    client.chat.completions.create(model="tiny", messages=messages)
    assert tokenizer.decode(engine.seen[-1].prompt).endswith("assistant\nOnce upon")
