"""A user's own questions: both kinds, every match, and each slip named by file and line."""

import json
import re

import pytest

from configs.checks import UserError
from evals.run import evaluate_task
from evals.samples import Choices, Load
from evals.scoring import ACC, ACC_NORM, EXACT_MATCH
from evals.task_list import find_tasks
from evals.tasks.own_questions import is_match, own_task
from tests.evals.planted import Planted, evaluation

QUESTION = {"context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}
PROMPT = {"prompt": "2 + 3 =", "answer": "5", "match": "number"}


def write(path, *lines):
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return path


def test_choices_are_appended_as_they_are_written(tmp_path):
    second = {**QUESTION, "choices": [" Rome", " a place called Paris"], "answer": 1}
    path = write(tmp_path / "mine.jsonl", QUESTION, "\n", second)
    (task,) = find_tasks([str(path)])
    assert (task.name, task.output_type) == ("mine", "multiple_choice")
    samples = task.load(Load(0))
    assert samples[0] == Choices("1", "The capital of France is", (" Paris", " Rome"), 0)
    assert [s.key for s in samples] == ["1", "3"]
    model = Planted(lambda context, choice: -3.0 if "called" in choice else -2.0)
    found = evaluate_task(evaluation(model, tmp_path / "out"), task)
    assert {m: s.value for m, s in found.total.scores.items()} == {ACC: 0.5, ACC_NORM: 1.0}


def test_prompts_are_answered_and_matched(tmp_path):
    chat = {"prompt": [{"role": "user", "content": "hello"}], "answer": "H.llo", "match": "regex"}
    word = {"prompt": "Say yes.", "answer": "yes", "stop": ["\n\n"], "max_new_tokens": 7}
    task = own_task(write(tmp_path / "it.jsonl", PROMPT, chat, word))
    number, _, exact = task.load(Load(0))
    assert (number.stops, number.max_new_tokens) == ((), 256)
    assert (exact.stops, exact.max_new_tokens) == (("\n\n",), 7)
    replies = {"2 + 3 =": "that is 5.", "Say yes.": " no"}
    model = Planted(answer=lambda prompt: replies.get(prompt, "Hallo"))
    found = evaluate_task(evaluation(model, tmp_path / "out"), task)
    assert found.total.scores[EXACT_MATCH].value == 2 / 3
    assert found.uses_chat_template


@pytest.mark.parametrize(
    ("text", "wanted", "match", "is_right"),
    [
        (" Paris\n", "Paris", "exact", True),
        ("Paris.", "Paris", "exact", False),
        ("It is Paris.", "Paris", "contains", True),
        ("It is paris.", "Paris", "contains", False),
        ("no", "^[yn]", "regex", True),
        ("a no", "^[yn]", "regex", False),
        ("12 and then 1,234.5 in all", 1234.5, "number", True),
        ("5 or 6", 5.0, "number", False),
        ("-3", -3.0, "number", True),
        ("none", 0.0, "number", False),
        ("", "x", "exact", False),
    ],
)
def test_matches(text, wanted, match, is_right):
    assert is_match(text, wanted, match) == is_right


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{nonsense\n", "is not valid JSON"),
        ("[1, 2]\n", "is no JSON object"),
        ({"question": "?"}, 'needs either "choices"'),
        ({**QUESTION, **PROMPT}, 'needs either "choices"'),
        ({"choices": ["a"], "answer": 0}, "has no 'context': add it"),
        ({**QUESTION, "answers": 1}, "has 'answers', which nothing reads: there are context"),
        ({**QUESTION, "answer": 2}, '"answer" must be the index of one of the 2 choices'),
        ({**QUESTION, "answer": True}, '"answer" must be the index of one of the 2 choices'),
        ({**QUESTION, "answer": "Paris"}, '"answer" must be the index of one of the 2 choices'),
        ({**QUESTION, "choices": []}, '"choices" must be a list of texts'),
        ({**QUESTION, "choices": ["a", 1]}, '"choices" must be a list of texts'),
        ({**QUESTION, "context": 3}, '"context" must be text, it is 3'),
        (PROMPT, "is of another kind than the lines before"),
    ],
)
def test_a_slip_is_named_by_file_and_line(tmp_path, line, sentence):
    path = write(tmp_path / "mine.jsonl", QUESTION, line)
    with pytest.raises(UserError, match=re.escape(f"{path}, line 2")) as error:
        own_task(path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"match": "fuzzy"}, '"match" must be one of exact, contains, regex, number'),
        ({"answer": None}, '"answer" must be a text or a number'),
        ({"answer": "many"}, '"answer" must hold a number'),
        ({"match": "regex", "answer": "("}, '"answer" is no regular expression'),
        ({"prompt": 3}, '"prompt" must be text or a list of messages'),
        ({"prompt": [{"role": "user"}]}, '"prompt" must be text or a list of messages'),
        ({"prompt": []}, '"prompt" must be text or a list of messages'),
        ({"stop": [""]}, '"stop" must be a text or a list of texts'),
        ({"max_new_tokens": 0}, '"max_new_tokens" must be a number of tokens'),
    ],
)
def test_slips_of_prompts(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        own_task(write(tmp_path / "mine.jsonl", PROMPT | changes))


def test_files_without_questions_are_refused(tmp_path):
    for content, sentence in (("", "has no questions"), ("\n \n", "has no questions")):
        with pytest.raises(UserError, match=sentence):
            own_task(write(tmp_path / "empty.jsonl", content))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match="is no UTF-8 text"):
        own_task(tmp_path / "latin.jsonl")


def test_questions_never_have_anothers_name(tmp_path):
    """Neither a benchmark's, nor one that a second file's would have, too."""
    for name in ("gsm8k", "quick"):
        path = write(tmp_path / f"{name}.jsonl", QUESTION)
        with pytest.raises(UserError, match=f"would be called {name}, as others are: rename"):
            find_tasks([str(path)])
    (tmp_path / "more").mkdir()
    paths = [str(write(tmp_path / x, QUESTION)) for x in ("mine.jsonl", "more/mine.jsonl")]
    with pytest.raises(UserError, match=r"more/mine\.jsonl would both be called mine: rename one"):
        find_tasks(paths)
    assert len(find_tasks([paths[0], paths[0]])) == 1
