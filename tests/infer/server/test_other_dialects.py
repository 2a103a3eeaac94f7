"""The anthropic client and OpenAI's responses, unmodified, over a real socket."""

import importlib

import openai
import pytest

from tests.infer.server.conftest import TEXT, user
from tests.infer.server.scripted import ScriptedEngine, byte_tokenizer, served
from tests.infer.server.test_openai_client import CALL

WEATHER = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def anthropic():
    """The package, whose 3,200 modules only the worker that runs these tests imports."""
    return importlib.import_module("anthropic")


@pytest.fixture(scope="module")
def claude(server, anthropic):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made


def test_a_message_whole_and_streamed(claude):
    ask = {"model": "tiny", "max_tokens": 100, "messages": user("hi")}
    whole = claude.messages.create(**ask, system="Be brief.")
    assert [block.text for block in whole.content] == [TEXT]
    assert (whole.stop_reason, whole.usage.output_tokens) == ("end_turn", len(TEXT.encode()))
    counted = claude.messages.count_tokens(model="tiny", messages=user("hi"), system="Be brief.")
    read = whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert counted.input_tokens == read
    with claude.messages.stream(**ask) as stream:
        assert "".join(stream.text_stream) == TEXT
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == (TEXT, "end_turn")


@pytest.mark.parametrize(
    ("changes", "reason", "stop"),
    [
        ({"stop_sequences": ["STOP"]}, "stop_sequence", "STOP"),
        ({"max_tokens": 3}, "max_tokens", None),
    ],
)
def test_why_a_message_ended(claude, changes, reason, stop):
    ask = {"model": "tiny", "max_tokens": 100, "messages": user("hi")} | changes
    made = claude.messages.create(**ask)
    assert (made.stop_reason, made.stop_sequence) == (reason, stop)
    with claude.messages.stream(**ask) as stream:
        assert stream.get_final_message().stop_reason == reason


def test_tools_of_messages_and_their_results(claude, engine, tokenizer):
    ask = {"model": "tiny", "max_tokens": 200, "tools": [WEATHER], "messages": user(f"say:{CALL}")}
    whole = claude.messages.create(**ask)
    (block,) = whole.content
    assert (block.name, block.input, whole.stop_reason) == (
        "weather",
        {"city": "Oslo", "days": 3},
        "tool_use",
    )
    with claude.messages.stream(**ask) as stream:
        assert stream.get_final_message().content[0].input == block.input
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "say:cold"}
    history = [
        *user("hi"),
        {"role": "assistant", "content": [block.model_dump(exclude_none=True)]},
        {"role": "user", "content": [result]},
    ]
    made = claude.messages.create(**(ask | {"messages": history}))
    assert made.content[0].text.startswith("cold")
    assert '"city": "Oslo"' in tokenizer.decode(engine.seen[-1].prompt, specials=True)


def test_a_message_that_begins_the_answer(claude, engine, tokenizer):
    messages = [*user("hi"), {"role": "assistant", "content": "Once"}]
    claude.messages.create(model="tiny", max_tokens=5, messages=messages)
    assert tokenizer.decode(engine.seen[-1].prompt).endswith("assistant\nOnce")


def test_errors_in_the_shape_of_the_dialect(claude, anthropic):
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model="tiny", max_tokens=5, messages=user("x" * 1100))
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="other", max_tokens=5, messages=user("hi"))


def test_a_response_whole_and_streamed(client):
    whole = client.responses.create(model="tiny", input="hi", instructions="Be brief.")
    assert (whole.output_text, whole.status) == (TEXT, "completed")
    assert whole.usage.total_tokens == whole.usage.input_tokens + len(TEXT.encode())
    events = list(client.responses.create(model="tiny", input="hi", stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert deltas == events[-1].response.output_text == TEXT
    with client.responses.stream(model="tiny", input="hi") as stream:
        assert stream.get_final_response().output_text == TEXT
    events = list(
        client.responses.create(model="tiny", input="hi", max_output_tokens=3, stream=True)
    )
    final = events[-1].response
    assert (final.status, final.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_tools_of_a_response(client):
    tool = {"type": "function", "name": "weather", "parameters": WEATHER["input_schema"]}
    asked = [{"role": "user", "content": f"say:{CALL}"}]
    whole = client.responses.create(model="tiny", input=asked, tools=[tool])
    (call,) = whole.output
    assert (call.type, call.name) == ("function_call", "weather")
    events = list(client.responses.create(model="tiny", input=asked, tools=[tool], stream=True))
    written = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(written) == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "say:cold"}
    history = [*asked, call.model_dump(exclude_none=True), result]
    made = client.responses.create(model="tiny", input=history, tools=[tool])
    assert made.output_text.startswith("cold")


def test_thinking_is_a_field_of_its_own(anthropic):
    """In all three dialects; stop texts don't apply to it, and a budget that it used up leaves an
    empty answer."""
    template = byte_tokenizer().chat_template + "{# <think></think> enable_thinking #}"
    tokenizer = byte_tokenizer(template)
    said = tokenizer.encode("<think>\nIt is STOP.\n</think>\n\nSo: yes STOP no")
    with served(ScriptedEngine(tokenizer, lambda request: said), tokenizer) as made:
        ask = {"model": "tiny", "messages": user("hi"), "stop": ["STOP"]}
        client = openai.OpenAI(base_url=f"{made.url}/v1", api_key="x")
        whole = client.chat.completions.create(**ask)
        message = whole.choices[0].message
        assert (message.content, message.reasoning) == ("So: yes ", "It is STOP.")
        assert message.reasoning_content == message.reasoning
        assert whole.usage.completion_tokens_details.reasoning_tokens > 0
        chunks = list(client.chat.completions.create(**ask, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(d.content or "" for d in deltas) == message.content
        thought = "".join(getattr(d, "reasoning", None) or "" for d in deltas)
        assert thought == message.reasoning
        cut = client.chat.completions.create(**ask, max_tokens=12).choices[0]
        assert (cut.finish_reason, cut.message.content) == ("length", "")
        assert cut.message.reasoning == "It i"  # 7 bytes of the 12 are the marker
        items = client.responses.create(model="tiny", input="hi").output
        assert [item.type for item in items] == ["reasoning", "message"]
        claude = anthropic.Anthropic(base_url=made.url, api_key="x")
        blocks = claude.messages.create(model="tiny", max_tokens=99, messages=user("hi")).content
        assert [block.type for block in blocks] == ["thinking", "text"]
        assert blocks[0].thinking == message.reasoning
