"""`moesaic data show`: documents with what the loss counts."""

import pytest

from configs.checks import UserError
from data.pipeline import prepare_corpus
from scripts import data
from tests import tiny
from tests.data.test_chats import chat_data


def test_answers_stand_between_brackets(tmp_path, capsys):
    prepare_corpus(chat_data(tmp_path), 330)
    data.main(["show", str(tmp_path / "corpus"), "--documents", "2", "--from", "1"])
    out = capsys.readouterr().out
    assert out.count("\n--- ") == 2
    assert "--- 1: chats.jsonl:" in out
    for i in range(60):
        if f"user\nquestion {i}<" in out:
            answer = f"the answer is {i} " * (1 + i % 9)
            assert f"<|im_start|>assistant\n[{answer}<|im_end|>]\n" in out
    assert out.count("[") == 2


def test_of_text_all_tokens_but_the_first_count(tmp_path, capsys):
    tiny.write_sources(tmp_path)
    run = tiny.run(tmp_path)
    file = prepare_corpus(run.data, 300).held_out()
    data.main(["show", run.data.directory, "--held-out", "--documents", "1"])
    begin, end = file.bounds(0)
    out = capsys.readouterr().out
    assert f"{end - begin:,} tokens, the loss counts {end - begin - 1:,}\n<|endoftext|>[def " in out


def test_what_is_no_corpus_or_document_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds neither train.bin nor held_out.bin"):
        data.main(["show", str(tmp_path)])
    tiny.write_sources(tmp_path)
    run = tiny.run(tmp_path)
    prepare_corpus(run.data, 300)
    with pytest.raises(UserError, match="--from 99 are none of"):
        data.main(["show", run.data.directory, "--from", "99"])
