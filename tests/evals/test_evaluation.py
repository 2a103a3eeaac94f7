"""An evaluation: scores by arithmetic, samples asked once, and files that are refused."""

import dataclasses
import json
import math

import numpy as np
import pytest

from configs.checks import UserError
from evals.records import SampleFile
from evals.results import read_results
from evals.results_form import TaskScores
from evals.run import Settings, evaluate, evaluate_task, samples_path
from evals.samples import Choices, Load, Metric, Prompt, Task, Text
from evals.scoring import (
    ACC,
    ACC_NORM,
    BITS_PER_BYTE,
    BYTE_PERPLEXITY,
    CHOICES,
    EXACT_MATCH,
    ROLLING,
    WORD_PERPLEXITY,
)
from evals.tasks.base import Skipped
from tests.evals.planted import Planted, evaluation

LETTERS = ("A", "BB", "CCC", "DDDD")


def task(name: str, samples, **changes) -> Task:
    kinds = {Choices: ("multiple_choice", CHOICES), Text: ("loglikelihood_rolling", ROLLING)}
    output_type, metrics = kinds.get(type(samples[0]), ("generate_until", (EXACT_MATCH,)))
    made = Task(
        name=name,
        version=1,
        description="A task.",
        origin="here",
        license="none",
        output_type=output_type,
        metrics=metrics,
        load=lambda load: samples[: load.limit],
    )
    return dataclasses.replace(made, **changes)


def questions(count: int = 20) -> list[Choices]:
    """Answers 0, 1, 2, 3, 0, ...; contexts of unequal lengths."""
    return [
        Choices(str(i), f"{i}" * (1 + i * 7 % 11), LETTERS, i % 4, "even" if i % 2 == 0 else "odd")
        for i in range(count)
    ]


def perfect(samples) -> Planted:
    right = {(s.context, s.choices[s.answer]) for s in samples}
    return Planted(lambda context, choice: -1.0 if (context, choice) in right else -50.0)


def scores(model, made: Task, path, **settings) -> dict[Metric, float]:
    found = evaluate_task(evaluation(model, path, **settings), made)
    return {metric: score.value for metric, score in found.total.scores.items()}


def test_planted_models_get_what_arithmetic_says(tmp_path):
    made = task("letters", questions())
    always_a = Planted(lambda context, choice: -1.0 if choice == "A" else -2.0)
    assert scores(always_a, made, tmp_path / "a") == {ACC: 0.25, ACC_NORM: 0.25}
    assert scores(perfect(questions()), made, tmp_path / "b") == {ACC: 1.0, ACC_NORM: 1.0}
    # Equally likely bytes: the shortest choice is likeliest, and per byte all are alike.
    uniform = Planted(lambda context, choice: -len(choice) * math.log(256))
    assert scores(uniform, made, tmp_path / "c") == {ACC: 0.25, ACC_NORM: 0.25}
    # A choice as likely as each other one: per byte the longest is likeliest.
    alike = Planted(lambda context, choice: -5.0)
    only_last = [dataclasses.replace(s, answer=3) for s in questions()]
    assert scores(alike, task("last", only_last), tmp_path / "d") == {ACC: 0.0, ACC_NORM: 1.0}


def test_standard_errors_and_groups(tmp_path):
    made = task("letters", questions())
    always_a = Planted(lambda context, choice: -1.0 if choice == "A" else -2.0)
    found = evaluate_task(evaluation(always_a, tmp_path), made)
    hits = np.array([1.0, 0, 0, 0] * 5)
    wanted = hits.std(ddof=1) / np.sqrt(20)
    assert found.total.scores[ACC].standard_error == pytest.approx(wanted, rel=1e-12)
    assert {name: g.scores[ACC].value for name, g in found.groups.items()} == {
        "even": 0.5,
        "odd": 0.0,
    }
    assert [g.count for g in found.groups.values()] == [10, 10]
    one = evaluate_task(evaluation(always_a, tmp_path / "one", limit=1), made)
    assert one.total.scores[ACC].standard_error is None


def test_identical_choices_and_empty_ones_are_scored(tmp_path):
    same = [Choices("0", "x", ("A", "A", "B"), 0), Choices("1", "x", ("B", "A", "A"), 2)]
    likes_a = Planted(lambda context, choice: -1.0 if choice == "A" else -2.0)
    assert scores(likes_a, task("same", same), tmp_path / "a")[ACC] == 0.5  # the first is taken
    empty = [Choices("0", "x", ("", "A"), 0)]
    nothing = Planted(lambda context, choice: 0.0 if not choice else -3.0)
    assert scores(nothing, task("empty", empty), tmp_path / "b") == {ACC: 1.0, ACC_NORM: 1.0}


def test_bytes_of_choices_count_not_characters(tmp_path):
    """3 characters of 9 bytes at -8 nats go before 4 characters of 4 bytes at -4."""
    samples = [Choices("0", "x", ("日本語", "abcd"), 0)]
    model = Planted(lambda context, choice: -8.0 if choice == "日本語" else -4.0)
    assert scores(model, task("bytes", samples), tmp_path) == {ACC: 0.0, ACC_NORM: 1.0}


def test_totals_of_texts_are_divided_by_totals(tmp_path):
    samples = [Text("a", "one two", "x"), Text("b", "日本 语", "y"), Text("c", "z" * 40, "y")]
    model = Planted(lambda _, text: -2.0 * len(text))
    found = evaluate_task(evaluation(model, tmp_path), task("texts", samples))
    nats, size, words = 2.0 * (7 + 4 + 40), 7 + 10 + 40, 2 + 2 + 1
    value = {metric: score.value for metric, score in found.total.scores.items()}
    assert value[BITS_PER_BYTE] == pytest.approx(nats / size / math.log(2))
    assert value[BYTE_PERPLEXITY] == pytest.approx(math.exp(nats / size))
    assert value[WORD_PERPLEXITY] == pytest.approx(math.exp(nats / words))
    assert found.groups["x"].scores[BITS_PER_BYTE].value == pytest.approx(2.0 / math.log(2))
    bits = found.total.scores[BITS_PER_BYTE].standard_error
    # The slope of exp: a perplexity's error is that of its nats times itself.
    nats_error = bits * math.log(2)
    error = found.total.scores[BYTE_PERPLEXITY].standard_error
    assert error == pytest.approx(nats_error * value[BYTE_PERPLEXITY])


def exact(sample: Prompt, answers) -> dict[Metric, float]:
    return {EXACT_MATCH: sum(a.text.strip() == sample.reference for a in answers) / len(answers)}


def prompts(count: int = 8) -> list[Prompt]:
    return [Prompt(str(i), f"say {i}", f"{i}", max_new_tokens=4) for i in range(count)]


def test_empty_and_truncated_answers_are_counted(tmp_path):
    texts = {"say 0": "", "say 1": " \n", "say 2": "2", "say 3": "333333"}
    model = Planted(answer=lambda prompt: texts.get(prompt, prompt[-1]))
    found = evaluate_task(evaluation(model, tmp_path), task("say", prompts(), score=exact))
    assert found.total.scores[EXACT_MATCH].value == 5 / 8
    assert (found.total.empty_rate, found.total.truncated_rate) == (2 / 8, 1 / 8)


def test_draws_of_examples_give_mean_and_deviation(tmp_path):
    """A sample that is alike in two draws is asked once."""

    def load(settings: Load):
        shots = settings.num_fewshot and settings.seed
        return [
            dataclasses.replace(s, context=f"{shots if s.key != '0' else 0} {s.context}")
            for s in questions(8)
        ]

    def in_second(context, choice):
        """Takes A, in the second draw BB: right are questions 0 and 4, there 0 (alike), 1 and 5."""
        wanted = "BB" if context.startswith("1") else "A"
        return -1.0 if choice == wanted else -2.0

    model = Planted(in_second)
    made = task("drawn", questions(8), load=load, num_fewshot=3)
    found = evaluate_task(evaluation(model, tmp_path, num_draws=3), made)
    assert len(model.asked) == 4 * (1 + 3 * 7)
    score = found.total.scores[ACC]
    assert score.draws == (2 / 8, 3 / 8, 2 / 8)
    assert score.value == pytest.approx(7 / 24)
    assert score.deviation == pytest.approx(np.std([2 / 8, 3 / 8, 2 / 8], ddof=1))
    means = np.array([1, 1 / 3, 0, 0, 2 / 3, 1 / 3, 0, 0])
    assert score.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(8))
    alike = evaluate_task(evaluation(model, tmp_path / "b", num_draws=3, num_fewshot=0), made)
    assert alike.total.scores[ACC].deviation == 0.0
    assert len(model.asked) == 4 * (1 + 3 * 7) + 4 * 8


# --- Going on -------------------------------------------------------------------------------------


def cut_last_line(path) -> int:
    """Cuts the file in the middle of its last line; returns the lines that stay whole."""
    content = path.read_bytes()
    path.write_bytes(content[: -len(content.splitlines()[-1]) // 2])
    return content.count(b"\n") - 1


@pytest.mark.parametrize("kind", ["choices", "texts", "prompts"])
def test_an_interrupted_evaluation_goes_on(tmp_path, kind):
    samples = {
        "choices": questions(),
        "texts": [Text(str(i), "x" * (i + 1)) for i in range(20)],
        "prompts": prompts(20),
    }[kind]
    made = task("it", samples, score=exact)
    per_sample = 4 if kind == "choices" else 1

    def model(stop_after=None):
        return Planted(lambda c, x: -float(len(x)), lambda p: p[-1], stop_after=stop_after)

    path = samples_path(tmp_path, made)
    first = model(stop_after=9 * per_sample + per_sample // 2)
    with pytest.raises(KeyboardInterrupt):
        list(evaluate(evaluation(first, tmp_path), [made]))
    whole = cut_last_line(path)
    assert whole == 8
    second = model()
    (found,) = evaluate(evaluation(second, tmp_path), [made])
    assert isinstance(found, TaskScores)
    assert len(second.asked) == (20 - whole) * per_sample
    assert found.num_asked == 12
    unbroken = evaluate_task(evaluation(model(), tmp_path / "unbroken"), made)
    assert found.total == unbroken.total
    assert path.read_bytes() == samples_path(tmp_path / "unbroken", made).read_bytes()
    assert [json.loads(line)["doc_id"] for line in path.open()] == list(range(20))
    third = model()
    (again,) = evaluate(evaluation(third, tmp_path), [made])
    assert third.asked == []
    assert again.total == found.total


def test_more_samples_are_added_to_those_there_are(tmp_path):
    made = task("letters", questions())
    few, more = perfect(questions()), perfect(questions())
    evaluate_task(evaluation(few, tmp_path, limit=5), made)
    found = evaluate_task(evaluation(more, tmp_path, limit=12), made)
    assert (len(few.asked), len(more.asked), found.total.count) == (20, 28, 12)
    again = evaluate_task(evaluation(perfect([]), tmp_path, limit=5), made)
    assert (again.total.count, again.total.scores[ACC].value) == (5, 1.0)
    assert len(samples_path(tmp_path, made).read_text().splitlines()) == 12


def test_two_filters_are_two_lines_and_one_sample(tmp_path):
    strict, loose = Metric("exact_match", filter="strict"), Metric("exact_match", filter="loose")

    def both(sample, answers):
        return {strict: 0.0, loose: exact(sample, answers)[EXACT_MATCH]}

    made = task("say", prompts(), score=both, metrics=(strict, loose))
    model = Planted(answer=lambda prompt: prompt[-1])
    path = samples_path(tmp_path, made)
    found = evaluate_task(evaluation(model, tmp_path), made)
    assert [s.value for s in found.total.scores.values()] == [0.0, 1.0]
    lines = [json.loads(line) for line in path.open()]
    assert [(x["key"], x["filter"]) for x in lines[:2]] == [("0", "strict"), ("0", "loose")]
    path.write_text("".join(path.open().readlines()[:-1]))  # killed between the two
    again = Planted(answer=lambda prompt: prompt[-1])
    evaluate_task(evaluation(again, tmp_path), made)
    assert again.asked == ["7"]
    assert len(path.read_text().splitlines()) == 16


@pytest.mark.parametrize(
    ("changed", "settings", "sentence"),
    [
        ({}, {"weights": "b"}, "results of another model"),
        ({"version": 2}, {}, "holds samples of another model, format, task version or settings"),
        ({}, {"num_fewshot": 2}, "holds samples of another model, format, task version or"),
        (
            {"load": lambda _: [dataclasses.replace(questions(1)[0], context="other")]},
            {},
            "holds an answer to another '0', for the task's data have changed",
        ),
    ],
)
def test_samples_of_something_else_are_refused(tmp_path, changed, settings, sentence):
    made = task("letters", questions(2))
    list(evaluate(evaluation(perfect([]), tmp_path), [made]))
    before = samples_path(tmp_path, made).read_bytes()
    other = dataclasses.replace(made, **changed)
    try:
        (found,) = evaluate(evaluation(perfect([]), tmp_path, **settings), [other])
    except UserError as error:
        found = Skipped("letters", str(error), True)
    assert isinstance(found, Skipped)
    assert found.is_error
    assert sentence in found.reason
    assert "\n" not in found.reason
    assert samples_path(tmp_path, made).read_bytes() == before
    free = dataclasses.replace(evaluation(perfect([]), tmp_path, **settings), may_set_aside=True)
    assert all(isinstance(x, TaskScores) for x in evaluate(free, [other]))
    assert (tmp_path / "samples_letters.1.jsonl").exists() or "results" in sentence


def test_a_damaged_line_is_named(tmp_path):
    made = task("letters", questions(3))
    evaluate_task(evaluation(perfect([]), tmp_path), made)
    path = samples_path(tmp_path, made)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{]\n" + lines[2])
    with pytest.raises(UserError, match=r"samples_letters.jsonl is damaged at line 2: remove it"):
        evaluate_task(evaluation(perfect([]), tmp_path), made)


def test_two_processes_do_not_write_one_file(tmp_path):
    made = task("letters", questions(3))
    with (
        SampleFile(samples_path(tmp_path, made), made, "x"),
        pytest.raises(UserError, match="is being written by another process"),
    ):
        evaluate_task(evaluation(perfect([]), tmp_path), made)


def test_what_fails_does_not_lose_what_is_finished(tmp_path):
    def missing(_):
        raise UserError("the package is not here")

    good, bad = task("good", questions(4)), task("bad", questions(4), load=missing)
    found = list(evaluate(evaluation(perfect([]), tmp_path), [good, bad, good]))
    assert [type(x) for x in found] == [TaskScores, Skipped, TaskScores]
    assert found[1] == Skipped("bad", "the package is not here", True)
    other = task("other", [Text("a", "b")])
    list(evaluate(evaluation(perfect([]), tmp_path), [other]))
    assert [r.task for r in read_results(tmp_path / "results.json")] == ["good", "other"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"limit": 0}, "--limit 0 must be at least 1"),
        ({"num_fewshot": -1}, "--num-fewshot -1 must be at least 0"),
        ({"num_draws": 0}, "--seeds 0 must be at least 1"),
        ({"num_draws": 101}, "--seeds 101 must be at most 100"),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Settings(**settings)
