"""Chats as tokens, their loss masks against a reading token by token, and their rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from configs.base import DataConfig
from configs.checks import UserError
from data import packed_chats
from data.chats import loss_mask, render_chat
from data.packed_chats import PackedChats, _fitted
from data.pipeline import Corpus, batches, prepare_corpus
from data.tokenizers.public_tokenizer import PublicTokenizer, read_public_tokenizer
from data.tokenizers.tokenizer_export import write_public_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
CALLING = (
    "{% if tools %}<|im_start|>system\nFunctions:{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}<call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}</call>{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that writes functions, calls and what they gave."""
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(template: str | None = CHATML) -> PublicTokenizer:
    """A BPE over bytes, with ChatML's tokens, and numbers for all text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["assistant user system the answer is\n\n of"] * 9, trainer)
    return PublicTokenizer(
        tokenizer, bos_id=0, eos_ids=frozenset({2}), add_bos=False, chat_template=template
    )


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of user and assistant by turns."""
    begin = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return begin + [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


CHATS = [
    chat("hi", "the answer is 4"),
    chat("häßlich ☕", "\nthe\n\nanswer", "of what?", "of you ☕☕", system="be brief"),
    chat("a", "b", "c", "d", "and a question that stays open"),
    chat("x " * 40, "y " * 30),
    chat("no", "yes\n\n"),
]


def reference_mask(ids: list[int], tokenizer: PublicTokenizer) -> list[int]:
    """ChatML read token by token: a turn's role is between its start and the first line's end."""
    mask, role, state = [], "", "outside"
    for token in ids:
        piece = tokenizer.tokenizer.decode([token], skip_special_tokens=False)
        mask.append(int(state == "inside" and role == "assistant"))
        if token == 1:
            role, state = "", "role"
        elif token == 2:
            state = "outside"
        elif state == "role":
            role += piece.split("\n")[0]
            state = "inside" if "\n" in piece else "role"
    return mask


@pytest.mark.parametrize("number", range(len(CHATS)))
def test_the_mask_is_that_of_a_reading_token_by_token(number):
    tokenizer = make_tokenizer()
    text, spans = render_chat(CHATS[number], tokenizer, "here")
    (encoding,) = tokenizer.encode_rendered([text])
    assert encoding.ids == tokenizer.encode(text, specials=True, bos=False)
    mask = loss_mask(encoding.ids, encoding.offsets, spans, tokenizer.eos_ids)
    expected = reference_mask(encoding.ids, tokenizer)
    assert mask.tolist() == expected
    assert sum(expected) > 0


ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
DECLARED = {"type": "function", "function": ADD}


def calls(arguments: object) -> list[dict[str, object]]:
    """A chat in which a function is called, as Parquet's columns give it."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    nothing = {"tool_calls": None, "tool_call_id": None}
    return [
        {"role": "user", "content": "2 + 3?", **nothing},
        {"role": "assistant", "content": None, "tool_calls": [call], "tool_call_id": None},
        {"role": "tool", "content": "5", "tool_calls": None, "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 5.", **nothing},
    ]


@pytest.mark.parametrize(
    "tools", [[ADD], [{"type": "function", "function": ADD}], json.dumps([ADD])]
)
@pytest.mark.parametrize("arguments", [{"a": 2, "b": 3}, '{"a": 2, "b": 3}'])
@pytest.mark.parametrize("answers", ["each", "last"])
def test_calls_of_functions_are_answers_in_the_words_of_the_template(tools, arguments, answers):
    tokenizer = make_tokenizer(CALLING)
    text, spans = render_chat(calls(arguments), tokenizer, "here", tools=tools, answers=answers)
    told = json.dumps(DECLARED)
    assert text.startswith(f"<|im_start|>system\nFunctions:{told}<|im_end|>\n")
    said = ["<call>add a=2 b=3</call><|im_end|>\n", "It is 5.<|im_end|>\n"]
    assert [text[a:b] for a, b in spans] == (said if answers == "each" else said[1:])
    (encoding,) = tokenizer.encode_rendered([text])
    mask = loss_mask(encoding.ids, encoding.offsets, spans, tokenizer.eos_ids)
    expected = np.array(reference_mask(encoding.ids, tokenizer))
    if answers == "last":  # the first answer's tokens go, up to the tool's turn
        expected[: np.flatnonzero(np.array(encoding.ids) == 1)[-1]] = 0
    assert mask.tolist() == expected.tolist()
    assert sum(expected) > 0


def test_a_template_without_functions_gets_them_as_a_server_tells_them():
    text, spans = render_chat(calls('{"a": 2}'), make_tokenizer(), "here", tools=[ADD])
    assert text.startswith("<|im_start|>system\nYou may call functions.")
    assert json.dumps(ADD) in text
    assert "<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>" in text
    first, last = [text[a:b] for a, b in spans]
    call = json.dumps({"name": "add", "arguments": {"a": 2}})
    assert first == f"<tool_call>\n{call}\n</tool_call><|im_end|>\n"
    assert last == "It is 5.<|im_end|>\n"


def test_the_last_answer_alone_is_learnt_where_earlier_turns_are_written_otherwise():
    messages = chat("a", "b", "c", "d")
    shortened = LAST_ONLY.replace("if loop.last", "if loop.last or m.role == 'user'")
    with pytest.raises(UserError, match="writes turn 2 otherwise"):
        render_chat(messages, make_tokenizer(shortened), "here")
    for template in (CHATML, shortened):
        text, spans = render_chat(messages, make_tokenizer(template), "here", answers="last")
        assert [text[a:b] for a, b in spans] == ["d<|im_end|>\n"]


def test_answers_without_a_prompt_before_them_are_found_where_the_template_is_of_that_kind():
    tokenizer = make_tokenizer(INSTRUCT.replace("eos_token", "'<|im_end|>'"))
    text, spans = render_chat(chat("2 + 2", "4", "and 3?", "7"), tokenizer, "here")
    assert [text[a:b] for a, b in spans] == [" 4<|im_end|>", " 7<|im_end|>"]


NO_PROMPT = CHATML.partition("{% if")[0]
LAST_ONLY = CHATML.replace(
    "{{ m.content }}", "{% if loop.last %}{{ m.content }}{% else %}...{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "sentence"),
    [
        (NO_PROMPT, CHATS[0], "f line 3: the chat template has no generation prompt"),
        (LAST_ONLY, CHATS[2], "writes turn 2 otherwise when others follow it"),
        (None, CHATS[0], "needs a chat template, and data.tokenizer has none"),
        ("{{ nothing.at_all() }}", CHATS[0], "f line 3: the chat template can't be rendered"),
        (CHATML, chat("a", " \n"), "f line 3 message 2 is an empty turn of the assistant"),
        (CHATML, chat("a"), "f line 3 has no turn of the assistant to learn from"),
        (CHATML, [], r"f line 3 has \[\], expected a list of messages"),
        (CHATML, "a", "f line 3 has 'a', expected a list of messages"),
        (
            CHATML,
            [{"role": "assistant", "content": None}],
            r"message 1 is \{.*expected a role and a",
        ),
        (CHATML, [{"role": "assistant", "tool_calls": [3]}], "message 1 has the tool call 3, exp"),
        (CHATML, [{"role": "assistant", "tool_calls": "f"}], "has tool_calls 'f', not a list"),
        (NO_PROMPT + "{# tools #}", calls("{}"), "the chat template has no generation prompt"),
        (CHATML + "{# tools #}", calls("{}"), "does not write the call of add in turn 2"),
        (CHATML, [{"role": "user"}], r"message 1 is \{'role': 'user'\}, expected a role and a"),
    ],
)
def test_chats_that_nothing_can_be_learnt_from_are_named(template, messages, sentence):
    with pytest.raises(UserError, match=sentence):
        render_chat(messages, make_tokenizer(template), "f line 3")


@pytest.mark.parametrize("tools", ["add", [3], {"name": "add"}, [{"function": {}}]])
def test_tools_that_are_none_are_refused(tools):
    with pytest.raises(UserError, match=r"f line 3 has the tools .*, expected a list of functions"):
        render_chat(CHATS[0], make_tokenizer(CALLING), "f line 3", tools=tools)


def test_functions_and_answers_come_from_the_records_of_every_form(tmp_path):
    """Parquet's columns are read as jsonl's objects, and a corpus keeps which answers count."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "model").mkdir()
    write_public_tokenizer(tmp_path / "model", make_tokenizer(CALLING))
    records = [{"tools": json.dumps([ADD]), "messages": calls(f'{{"a": {i}}}')} for i in range(40)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")

    def data(name: str, answers: Literal["each", "last"]) -> DataConfig:
        return DataConfig(
            source=str(tmp_path / name),
            form="chat",
            answers=answers,
            tokenizer=str(tmp_path / "model"),
            directory=str(tmp_path / f"{name}_{answers}"),
            holdout_fraction=0.2,
        )

    def corpus(name: str, answers: Literal["each", "last"]) -> Corpus:
        return prepare_corpus(data(name, answers), 330)

    for answers in ("each", "last"):
        made = [corpus(name, answers).training() for name in ("a.jsonl", "a.parquet")]
        documents = [
            {
                name.split(":")[1]: file.tokens[slice(*file.bounds(i))].tolist()
                for i, name in enumerate(file.sidecar.names)
            }
            for file in made
        ]
        shared = documents[0].keys() & documents[1].keys()
        assert len(shared) > 10
        assert all(documents[0][name] == documents[1][name] for name in shared)
    masks = [corpus("a.jsonl", answers).training().loss_mask for answers in ("each", "last")]
    assert masks[0] is not None
    assert masks[1] is not None
    assert 0 < masks[1].sum() < masks[0].sum()
    assert not (masks[1] > masks[0]).any()
    made = tmp_path / "a.jsonl_each"
    with pytest.raises(UserError, match="made with answers='each', this run asks for 'last'"):
        prepare_corpus(replace(data("a.jsonl", "last"), directory=str(made)), 330)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return prepare_corpus(chat_data(tmp_path_factory.mktemp("chats")), 330)


def chat_data(tmp_path: Path, count: int = 60) -> DataConfig:
    """Chats of many lengths and the tokenizer of a model that chats, in a folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_public_tokenizer(folder, make_tokenizer())
    records = [
        {"messages": chat(f"question {i}", f"the answer is {i} " * (1 + i % 9))}
        for i in range(count)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(
        source=str(path),
        form="chat",
        tokenizer=str(folder),
        directory=str(tmp_path / "corpus"),
        seq_len=64,
        holdout_fraction=0.2,
    )


def test_a_corpus_of_chats_has_what_the_template_writes_and_keeps_the_template(corpus):
    tokenizer = make_tokenizer()
    file = corpus.training()
    assert file.loss_mask is not None
    for i, (name, ids, _) in enumerate(file.documents()):
        number = int(name.split(":")[1]) - 1
        messages = chat(f"question {number}", f"the answer is {number} " * (1 + number % 9))
        text, _ = render_chat(messages, tokenizer, name)
        assert ids.tolist() == tokenizer.encode(text, specials=True, bos=False)
        begin, end = file.bounds(i)
        mask = file.loss_mask[begin:end].tolist()
        assert mask == reference_mask(ids.tolist(), tokenizer)
    kept = read_public_tokenizer(corpus.directory)
    assert kept.chat_template == CHATML
    assert (kept.bos_id, kept.eos_ids, kept.add_bos) == (0, {2}, False)


def test_rows_hold_whole_chats_and_every_target_once(corpus):
    """Token by token: what a row feeds at a place, its target and position, by the chat's own."""
    file = corpus.training()
    rows = PackedChats(file, 64)
    assert file.loss_mask is not None
    seen: list[int] = []
    for number, row in enumerate(rows.rows):
        made, place = rows[number], 0
        for index in row:
            begin, end = file.bounds(index)
            for i in range(begin, min(end - 1, begin + 64)):
                assert made["tokens"][place] == file.tokens[i]
                assert made["positions"][place] == i - begin
                wanted = file.tokens[i + 1] if file.loss_mask[i + 1] else -1
                assert made["targets"][place] == wanted
                place += 1
            seen.append(index)
        assert (made["positions"][place:] == -1).all()
        assert (made["targets"][place:] == -1).all()
    assert sorted(seen) == list(range(len(file.sidecar.starts)))
    assert "rows, " in rows.describe()
    assert rows.num_cut > 0


@pytest.mark.parametrize("at_once", [3, 4096])
def test_a_chat_whose_beginning_teaches_nothing_is_left_out(corpus, monkeypatch, at_once):
    monkeypatch.setattr(packed_chats, "CHATS_AT_ONCE", at_once)
    file = corpus.training()
    assert file.loss_mask is not None
    for seq_len in (20, 21, 23, 30):
        rows = PackedChats(file, seq_len)
        expected = []
        for i in range(len(file.sidecar.starts)):
            begin, end = file.bounds(i)
            seen = range(begin + 1, min(end, begin + seq_len + 1))
            if any(file.loss_mask[place] for place in seen):
                expected.append(i)
        assert sorted(i for row in rows.rows for i in row) == expected
        assert (rows.num_chats, rows.num_skipped) == (
            len(expected),
            len(file.sidecar.starts) - len(expected),
        )
    with pytest.raises(UserError, match="has no chat whose first"):
        PackedChats(file, 5)


def test_rows_are_filled_well_and_never_over():
    lengths = np.random.default_rng(0).integers(1, 65, 500)
    rows = _fitted(np.arange(500), lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(500))
    filled = sorted(sum(int(lengths[i]) for i in row) for row in rows)
    assert filled[-1] <= 64
    assert filled[0] + filled[1] > 64  # no two rows would go into one


def test_batches_of_chats_resume(corpus):
    iterator = batches(corpus.training(), seq_len=64, batch_size=4, seed=0)
    next(iterator)
    state = iterator.get_state()
    expected = next(iterator)
    fresh = batches(corpus.training(), seq_len=64, batch_size=4, seed=0)
    fresh.set_state(state)
    found = next(fresh)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_settings_of_chats_that_contradict_each_other(tmp_path):
    with pytest.raises(UserError, match=r"data.form='chat' needs data.order='shuffled'"):
        DataConfig(source="a.jsonl", form="chat", order="streams")
    (tmp_path / "a.txt").write_text("text")
    folder = tmp_path / "model"
    folder.mkdir()
    write_public_tokenizer(folder, make_tokenizer())
    data = DataConfig(
        source=str(tmp_path / "a.txt"),
        form="chat",
        tokenizer=str(folder),
        directory=str(tmp_path / "c"),
    )
    with pytest.raises(UserError, match=r"is no file of records, which data.form='chat' needs"):
        prepare_corpus(data, 330)
