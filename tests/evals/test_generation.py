"""Answers: greedy ones against a plain loop, stop strings, ends, chats and what does not fit."""

import dataclasses
import json

import numpy as np
import pytest

from configs.base import ExecutionConfig
from configs.checks import UserError
from data.tokenizers.public_tokenizer import PublicTokenizer
from evals.local_model import LocalModel
from evals.samples import Prompt
from infer.logits import full_logits
from model.transformer import Transformer
from tests import tiny
from tests.checkpoint.tiny_folder import TEXT, byte_level
from tests.probes import drawn

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ tools or '' }}"


@pytest.fixture(scope="module")
def local():
    tokenizer = PublicTokenizer(
        byte_level(), bos_id=None, eos_ids=frozenset({0}), add_bos=False, chat_template=TEMPLATE
    )
    model = Transformer(tiny.model(), ExecutionConfig(transport="gather", capacity_factor=None))
    variables = drawn(model.config, 2)
    return LocalModel(model, variables, lambda: tokenizer, max_rows=4, window=32)


def greedy(local: LocalModel, ids: list[int], count: int) -> list[int]:
    """The likeliest next token, again and again, each time by a pass over everything."""
    made: list[int] = []
    while len(made) < count:
        whole = [*ids, *made]
        padded = [*whole, *[0] * (64 - len(whole))]
        best = int(full_logits(local.model, local.variables, padded)[len(whole) - 1].argmax())
        if best in local.tokenizer.eos_ids:
            break
        made.append(best)
    return made


def ask(local: LocalModel, text, **changes):
    made = dataclasses.replace(Prompt("0", text, None, max_new_tokens=12), **changes)
    return local.generate([made])[0]


def test_greedy_answers_are_those_of_a_plain_loop(local):
    texts = ["The capital", "hello world", "France is", "P", TEXT]
    found = local.generate([Prompt(t, t, None, max_new_tokens=12) for t in texts])
    for text, (answer,) in zip(texts, found, strict=True):
        ids = local.tokenizer.encode(text)
        wanted = greedy(local, ids, 12)
        assert answer.num_tokens == len(wanted)
        assert answer.text == local.tokenizer.decode(wanted)
        assert answer.ended == ("length" if len(wanted) == 12 else "end")
        assert answer.num_dropped == 0


def test_answers_come_with_their_prompts(local):
    """Longer ones end later, and each is told of once."""
    prompts = [Prompt(str(n), "The capital", None, max_new_tokens=n) for n in (9, 1, 5, 2, 7, 3)]
    came: dict[int, object] = {}
    found = local.generate(prompts, lambda i, answers: came.setdefault(i, answers))
    assert [came[i] for i in range(6)] == found
    assert [answers[0].num_tokens for answers in found] == [9, 1, 5, 2, 7, 3]
    assert next(iter(came)) in (1, 3)


def test_a_stop_string_of_several_tokens_ends_the_text_and_is_no_part_of_it(local):
    (whole,) = ask(local, "The capital")
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 4]
    at = whole.text.find(stop)
    assert len(local.tokenizer.encode(stop)) > 1
    (cut,) = ask(local, "The capital", stops=("never this", stop))
    assert cut.text == whole.text[:at]
    assert cut.ended == "stop"
    assert cut.num_tokens < whole.num_tokens or at + 4 >= len(whole.text)
    (first,) = ask(local, "The capital", stops=(stop, whole.text[1:3]))
    assert first.text == whole.text[: min(1, at)]


def test_the_end_of_text_ends_an_answer(local):
    tokens = greedy(local, local.tokenizer.encode("hello"), 6)
    ending = dataclasses.replace(local.tokenizer, eos_ids=frozenset({tokens[3]}))
    stopping = dataclasses.replace(local, find_tokenizer=lambda: ending)
    (answer,) = ask(stopping, "hello")
    count = tokens.index(tokens[3])
    assert (answer.ended, answer.num_tokens) == ("end", count)
    assert answer.text == ending.decode(tokens[:count])


def test_seeds_give_several_answers_and_the_same_ones_again(local):
    first = ask(local, "hello", num_answers=3, temperature=1.0)
    again = ask(local, "hello", num_answers=3, temperature=1.0)
    assert first == again
    assert len({answer.text for answer in first}) > 1
    alike = ask(local, "hello", num_answers=2)
    assert alike[0] == alike[1] == ask(local, "hello")[0]


def test_a_prompt_that_does_not_fit_loses_its_beginning(local):
    """The model reads 64 tokens; an answer gets what is asked, but at most half of them."""
    text = "The capital of France is Paris " * 8
    ids = local.tokenizer.encode(text)
    assert len(ids) > 64
    for new, kept in ((12, 52), (60, 32), (1000, 32)):
        (answer,) = ask(local, text, max_new_tokens=new)
        assert answer.num_dropped == len(ids) - kept
        wanted = greedy(local, ids[-kept:], min(new, 64 - kept))
        assert answer.text == local.tokenizer.decode(wanted)


def test_an_empty_prompt_is_the_end_of_text(local):
    (answer,) = ask(local, "")
    assert answer.text == local.tokenizer.decode(greedy(local, [0], 12))


def test_chats_take_the_template_and_tools(local):
    chat = ({"role": "user", "content": "hello"},)
    (answer,) = ask(local, chat)
    ids = local.tokenizer.encode("<user>hello", specials=True)
    assert answer.text == local.tokenizer.decode(greedy(local, ids, 12))
    (other,) = ask(local, chat, tools=[{"name": "f"}])
    assert other.text != answer.text
    without = dataclasses.replace(local.tokenizer, chat_template=None)
    plain = dataclasses.replace(local, find_tokenizer=lambda: without)
    with pytest.raises(UserError, match="this model has no chat template: give it a plain prompt"):
        ask(plain, chat)


def test_without_a_tokenizer_tokens_alone_are_scored(local):
    def missing():
        raise UserError("tokenizer.json is missing")

    bare = dataclasses.replace(local, find_tokenizer=missing)
    (found,) = bare.score_tokens([np.arange(5, dtype=np.int32)])
    assert found.nats.shape == (4,)
    for verb in (
        lambda: bare.generate([Prompt("0", "x", None)]),
        lambda: bare.rolling(["x"]),
        lambda: bare.log_likelihoods([("x", "y")]),
    ):
        with pytest.raises(UserError, match=r"tokenizer.json is missing"):
            verb()


def test_texts_are_read_in_windows_after_the_token_that_begins_one(local):
    texts = ["hello", "", "日本", TEXT * 3]
    found = local.rolling(texts)
    for text, rolling in zip(texts, found, strict=True):
        ids = [0, *local.tokenizer.encode(text)]
        assert (rolling.num_tokens, rolling.num_bytes) == (len(ids) - 1, len(text.encode()))
        if 1 < len(ids) <= 33:
            padded = [*ids, *[0] * (64 - len(ids))]
            logits = full_logits(local.model, local.variables, padded)[: len(ids) - 1]
            logits = logits.astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            wanted = log_p[np.arange(len(ids) - 1), ids[1:]].sum()
            assert rolling.nats == pytest.approx(wanted, abs=1e-4)
    assert json.dumps(found[1].nats) == "0.0"
    with pytest.raises(UserError, match="a text is no UTF-8 at character 2"):
        local.rolling(["a\udcff"])


@pytest.mark.parametrize("name", ["batch_tokens", "max_rows", "window"])
def test_sizes_below_one_are_refused(local, name):
    with pytest.raises(UserError, match=f"{name}=0 must be at least 1"):
        dataclasses.replace(local, **{name: 0})
