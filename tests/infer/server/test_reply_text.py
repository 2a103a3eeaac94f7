"""Shown text against the whole text: no part of a stop text, of a character or of a marker."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.server.reply_text import ReplyText
from infer.server.tool_calls import ToolText
from tests.infer.server.scripted import byte_tokenizer

TOKENIZER = byte_tokenizer(words=["STO", "</thi", "P!"])
LETTERS = st.text("abSTOP<>/think👩한\n", max_size=24)


def shown(text, stops=(), thinking="never"):
    """Pieces of (text, reasoning, tokens), one for each token and one for the end."""
    reply = ReplyText(TOKENIZER, (), stops, thinking)
    ids = TOKENIZER.encode(text)
    pieces = [reply.add([token]) for token in ids]
    return [*pieces, reply.finish()], reply, ids


@given(text=LETTERS, stops=st.lists(st.text("STOPab", min_size=1, max_size=4), max_size=3))
@settings(max_examples=200, deadline=None)
def test_what_is_shown_is_the_text_before_the_first_stop(text, stops):
    """At each moment only what stands before every stop text that has come; the oracle looks at
    the text after each token anew."""
    pieces, reply, ids = shown(text, stops)
    cut, count = text, len(ids)
    for i in range(1, len(ids) + 1):
        known = TOKENIZER.decode(ids[:i])
        found = [at for stop in stops if (at := known.find(stop)) >= 0]
        if found:
            cut = known[: min(found)]
            count = next(n for n in range(i + 1) if len(TOKENIZER.decode(ids[:n])) >= len(cut))
            break
    assert "".join(piece.text for piece in pieces) == cut
    assert reply.is_stopped == (cut != text or count < len(ids))
    assert "\ufffd" not in cut
    total = sum(piece.num_tokens for piece in pieces)
    assert total == count if "�" not in TOKENIZER.decode(ids[:count]) else total >= count


def test_a_stop_text_over_several_tokens_leaks_no_beginning():
    pieces, reply, _ = shown("x STOP! y", stops=["STOP!"])
    assert [piece.text for piece in pieces][:4] == ["x", " ", "", ""]
    assert reply.stopped_by == "STOP!"


def test_a_beginning_that_is_no_stop_text_comes_with_the_next_token():
    pieces, reply, _ = shown("STOPAB", stops=["STOP!"])
    assert [piece.text for piece in pieces] == ["", "", "STOPA", "B", ""]
    assert not reply.is_stopped
    pieces, _, ids = shown("aSTO", stops=["STOP!"])
    assert [piece.text for piece in pieces] == ["a", "", "STO"]
    assert sum(piece.num_tokens for piece in pieces) == len(ids)


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "said"),
    [
        ("<think>\na STOP\n</think>\n\nb", "maybe", "a STOP", "b"),
        ("a\n</think>b STOP c", "begun", "a", "b "),
        ("a</think>", "begun", "a", ""),
        ("all the time", "begun", "all the time", ""),
        ("no <think>", "maybe", "", "no <think>"),
        ("<thin", "maybe", "", "<thin"),
        ("a<think>b</think>", "never", "", "a<think>b</think>"),
    ],
)
def test_thinking_is_told_apart_and_no_stop_text_ends_it(text, thinking, reasoning, said):
    pieces, _, _ = shown(text, stops=["STOP"], thinking=thinking)
    assert "".join(piece.reasoning for piece in pieces) == reasoning
    assert "".join(piece.text for piece in pieces) == said


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "</b>"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("hello", "hello", []),
        (f"Wait. {CALL}", "Wait. ", [("f", '{"x": "</b>"}')]),
        (CALL + "\n" + CALL, "", [("f", '{"x": "</b>"}')] * 2),
        ('{"name": "f", "arguments": {"x": 1}}', "", [("f", '{"x": 1}')]),
        ("[f(x=1), f(x=2)]", "", [("f", '{"x": 1}'), ("f", '{"x": 2}')]),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        ("<tool_call>{broken</tool_call> on", "<tool_call>{broken</tool_call> on", []),
        ('<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        ("a < b and <tool", "a < b and <tool", []),
        ("[1, 2]", "[1, 2]", []),
        (f"{CALL}\n so it is", "so it is", [("f", '{"x": "</b>"}')]),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_found_however_the_text_is_cut(text, said, calls, size):
    tools = ToolText(["f"])
    parts = [tools.add(text[i : i + size]) for i in range(0, len(text), size)]
    parts.append(tools.finish())
    assert "".join(part for part, _ in parts) == said
    assert [(c.name, c.arguments) for _, found in parts for c in found] == calls
