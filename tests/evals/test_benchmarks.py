"""Benchmarks: what their loaders ask, on excerpts of our own making, and what their scorers say."""

import itertools
import random
import re

import pytest

from configs.checks import UserError
from evals import few_shot, text_match
from evals.samples import Answer, Choices, Family, Load, Prompt, Task, Text
from evals.scoring import CHOICES, F1, MATTHEWS, ROLLING
from evals.task_list import known_tasks
from evals.tasks import (
    bigbench,
    bits_per_byte,
    coqa,
    exams,
    gsm8k,
    humaneval,
    multiemo,
    natural_instructions,
    sarcasm,
    squad,
)
from tests.evals import packaged
from tests.evals.test_sandbox import needs_sandbox

MODULES = (
    bigbench,
    bits_per_byte,
    coqa,
    exams,
    gsm8k,
    humaneval,
    multiemo,
    natural_instructions,
    sarcasm,
    squad,
)
BIGBENCH_ROWS = [
    {"input": f"Is {i} even?", "target_scores": {"yes": int(i % 2 == 0), "no": int(i % 2 == 1)}}
    for i in range(50)
]


def find(module, name: str) -> Task:
    (task,) = [t for t in module.TASKS if t.name == name and isinstance(t, Task)]
    return task


@pytest.mark.parametrize("name", sorted(known_tasks()))
def test_metrics_are_of_their_own_kind(name):
    """A metric that is like another's by name alone would be aggregated otherwise."""
    task = known_tasks()[name]
    if isinstance(task, Family):
        assert task.form.startswith(name)
    elif task.output_type == "multiple_choice":
        assert set(task.metrics) <= {*CHOICES, F1, MATTHEWS}
    elif task.output_type == "loglikelihood_rolling":
        assert set(task.metrics) <= set(ROLLING)
    else:
        assert {metric.aggregation for metric in task.metrics} == {"mean"}


def prompts(task: Task, load: Load) -> list[Prompt]:
    found = task.load(load)
    assert all(isinstance(s, Prompt) for s in found)
    return [s for s in found if isinstance(s, Prompt)]


def choices(task: Task, load: Load) -> list[Choices]:
    found = task.load(load)
    assert all(isinstance(s, Choices) for s in found)
    return [s for s in found if isinstance(s, Choices)]


def answers(*texts: str) -> list[Answer]:
    return [Answer(text, "stop", 1) for text in texts]


def scored(task: Task, prompt: Prompt, *texts: str) -> dict[str, float]:
    assert task.score is not None
    values = task.score(prompt, answers(*texts))
    assert set(values) == set(task.metrics)
    return {f"{m.name},{m.filter}" if m.filter != "none" else m.name: v for m, v in values.items()}


# --- All of them ---


def test_each_name_is_one_tasks_and_each_says_where_its_data_are_from():
    tasks = [task for module in MODULES for task in module.TASKS]
    assert len({task.name for task in tasks}) == len(tasks)
    for task in tasks:
        assert task.description[0].isupper()
        assert task.description.endswith(".")
        if isinstance(task, Task):
            assert task.origin
            assert task.license
            assert task.metrics
            assert (task.output_type == "generate_until") == (task.score is not None)
            assert task.runs_code == (task.name == "humaneval")


CASES = {
    "gsm8k": (gsm8k, packaged.gsm8k_rows(6), 5),
    "humaneval": (humaneval, packaged.humaneval_rows(), 0),
    "exams_es": (exams, packaged.exams_rows("spanish", 60), 5),
    "exams_es_cloze": (exams, packaged.exams_rows("spanish", 60), 5),
    "sarcasm": (sarcasm, packaged.sarcasm_rows(60), 4),
    "multiemo_en": (multiemo, packaged.multiemo_rows(("en",), 60), 4),
    "multiemo": (multiemo, packaged.multiemo_rows(multiemo.LANGUAGES, 40), 4),
    "vitaminc": (bigbench, packaged.of_bigbench("vitaminc_fact_verification", BIGBENCH_ROWS), 3),
    "winogrande_ni": (natural_instructions, packaged.winogrande_rows(), 0),
    "multirc_ni": (natural_instructions, packaged.multirc_rows(), 0),
    "squad_v1": (squad, packaged.squad_file("squaddev_v1.1.json"), 0),
    "squad_nyt": (squad, packaged.squad_file("nyt_v1.0.json"), 0),
    "coqa_turns": (coqa, packaged.coqa_file(), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_questions_are_unique_the_same_each_time_and_do_not_tell_their_answers(
    name, monkeypatch, tmp_path
):
    module, files, shots = CASES[name]
    packaged.lay(monkeypatch, tmp_path, files)
    task = find(module, name)
    samples = task.load(Load(shots, seed=3))
    assert samples
    assert list(samples) == list(task.load(Load(shots, seed=3)))
    assert len({s.key for s in samples}) == len(samples)
    assert list(task.load(Load(shots, seed=3, limit=2))) == list(samples[:2])
    for sample in samples:
        if isinstance(sample, Choices):
            assert 0 <= sample.answer < len(sample.choices)
            assert len(set(sample.choices)) == len(sample.choices)
            assert not sample.context.endswith(" ")
            assert all(choice.startswith(" ") for choice in sample.choices)
            own = sample.context.rsplit("\n\n", 1)[-1]
            assert sample.choices[sample.answer] + "\n\n" not in own
        else:
            assert isinstance(sample, Prompt)
            assert isinstance(sample.prompt, str)
            assert not sample.prompt.endswith(" ")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2]])
def test_draws_of_examples_differ_and_the_questions_stay(name, monkeypatch, tmp_path):
    module, files, shots = CASES[name]
    packaged.lay(monkeypatch, tmp_path, files)
    task = find(module, name)
    draws = [task.load(Load(shots, seed=seed)) for seed in (1, 2)]
    assert [s.key for s in draws[0]] == [s.key for s in draws[1]]
    assert draws[0] != draws[1]
    alone = task.load(Load(0))
    assert [s.key for s in alone] == [s.key for s in draws[0]]
    for bare, shown in zip(alone, draws[0], strict=True):
        if isinstance(bare, Choices) and isinstance(shown, Choices):
            assert len(shown.context) > len(bare.context)
            assert shown.choices == bare.choices
    with pytest.raises(UserError, match="--num-fewshot 99 must be from 0 to"):
        task.load(Load(99, seed=1))


def test_a_question_is_never_among_its_own_examples():
    """Data sets have questions twice: a copy of an example is not scored."""
    samples = [Choices(str(i), f"question {i % 50}", (" a", " b"), i % 2) for i in range(100)]
    shown = few_shot.choices_with_shots(samples, Load(8))
    assert 0 < len(shown) < 68
    for sample in shown:
        *examples, own = sample.context.split("\n\n")
        assert len(examples) == 8
        assert all(own != example.rpartition(" ")[0] for example in examples)


def test_few_questions_leave_none_for_examples():
    with pytest.raises(UserError, match="20 questions are too few: 32 are kept for examples"):
        few_shot.split_pool(Choices(str(i), str(i), (" a", " b"), 0) for i in range(20))


# --- GSM8K ---


def test_gsm8k_asks_in_the_form_of_lm_evaluation_harness(monkeypatch, tmp_path):
    packaged.lay(monkeypatch, tmp_path, packaged.gsm8k_rows(3))
    task = find(gsm8k, "gsm8k")
    sample = prompts(task, Load(2))[1]
    first, second, own = str(sample.prompt).split("\n\n")
    assert first == f"Question: {gsm8k.EXAMPLES[0][0]}\nAnswer: {gsm8k.EXAMPLES[0][1]}"
    assert second.startswith("Question: ")
    assert own == "Question: Ana has 1 red and 2 blue pens. How many?\nAnswer:"
    assert sample.key == "test/1"


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 1 + 2 = 3\n#### 3", 1, 1),
        (" so 3 pens", 0, 1),
        (" #### 3 pens of 4", 1, 0),
        (" #### 3.", 1, 1),
        (" #### $3", 0, 1),
        (" It is $3.00", 0, 0),
        (" #### 13", 0, 0),
        (" -3", 0, 0),
        ("", 0, 0),
        (" none", 0, 0),
        ("#### 3\n\n#### 5", 1, 0),
    ],
)
def test_gsm8k_finds_the_number_in_two_ways(text, strict, flexible):
    task = find(gsm8k, "gsm8k")
    prompt = Prompt("k", "q", "1 + 2 = <<1+2=3>>3\n#### 3")
    assert scored(task, prompt, text) == {
        "exact_match,strict-match": strict,
        "exact_match,flexible-extract": flexible,
    }


def test_gsm8k_takes_commas_for_nothing():
    task = find(gsm8k, "gsm8k")
    assert scored(task, Prompt("k", "q", "#### 1,200"), "#### 1200") == {
        "exact_match,strict-match": 1.0,
        "exact_match,flexible-extract": 1.0,
    }


def test_the_examples_of_gsm8k_are_right():
    """Each step's arithmetic, and the last number."""
    for _, answer in gsm8k.EXAMPLES:
        steps, _, final = answer.rpartition("\n#### ")
        for line in steps.splitlines():
            for left, right in _equations(line):
                assert eval(left) == pytest.approx(float(right)), line
        assert final in steps


def _equations(line: str) -> list[tuple[str, str]]:
    return re.findall(r"((?:\d+ [-+*/] )+\d+) = \$?(\d+)", line)


# --- HumanEval ---


@pytest.mark.parametrize(
    ("n", "c", "k"), [(1, 1, 1), (5, 0, 3), (10, 3, 1), (10, 3, 4), (20, 1, 10)]
)
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n, c, k):
    """Against counting all draws of k answers, and against drawing at random."""
    right = [i < c for i in range(n)]
    estimate = humaneval.pass_at_k(n, c, k)
    if n <= 10:
        draws = list(itertools.combinations(right, k))
        assert estimate == pytest.approx(sum(map(any, draws)) / len(draws))
    rng = random.Random(0)
    hits = sum(any(rng.sample(right, k)) for _ in range(4000)) / 4000
    assert estimate == pytest.approx(hits, abs=0.03)  # 4 standard deviations


def test_humaneval_metrics_follow_the_number_of_answers(monkeypatch, tmp_path):
    packaged.lay(monkeypatch, tmp_path, packaged.humaneval_rows())
    (family,) = [t for t in humaneval.TASKS if isinstance(t, Family)]
    task = family.make("20")
    assert [m.name for m in task.metrics] == ["pass@1", "pass@10"]
    sample = prompts(task, Load(0))[0]
    assert (sample.num_answers, sample.temperature) == (20, 0.8)
    greedy = prompts(find(humaneval, "humaneval"), Load(0))[0]
    assert (greedy.num_answers, greedy.temperature) == (1, 0.0)
    for bad in ("0", "201", "many", ""):
        with pytest.raises(UserError, match="must name the answers drawn"):
            family.make(bad)


def test_an_answer_is_put_between_prompt_and_tests(monkeypatch, tmp_path):
    packaged.lay(monkeypatch, tmp_path, packaged.humaneval_rows())
    sample = prompts(find(humaneval, "humaneval"), Load(0))[1]
    assert "canonical" not in str(sample)
    for body, is_right in ((" return x + 1", True), (" return x", False), (" oops", False)):
        source = humaneval.program(sample, f"   {body}\n")
        try:
            exec(compile(source, "program", "exec"), {})
            assert is_right
        except (AssertionError, NameError):
            assert not is_right


@needs_sandbox
def test_humaneval_runs_answers_in_the_sandbox(monkeypatch, tmp_path):
    packaged.lay(monkeypatch, tmp_path, packaged.humaneval_rows())
    task = find(humaneval, "humaneval")
    sample = prompts(task, Load(0))[2]
    assert scored(task, sample, "    return x + 2\n") == {"pass@1": 1.0}
    assert scored(task, sample, "    return x - 2\n") == {"pass@1": 0.0}
    assert scored(task, sample, "    import socket; socket.create_connection(('1.1.1.1', 1))") == {
        "pass@1": 0.0
    }
    assert scored(task, sample, "    return 4", "    return 5") == {"pass@1": 0.5}


def test_without_a_sandbox_humaneval_refuses(monkeypatch, tmp_path):
    packaged.lay(monkeypatch, tmp_path, packaged.humaneval_rows())
    task = find(humaneval, "humaneval")
    sample = prompts(task, Load(0))[0]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="bubblewrap is not installed"):
        scored(task, sample, "    return x")
    assert humaneval.score(sample, answers("    return x"), unprotected=True) == {
        task.metrics[0]: 1.0
    }


# --- Multiple choice ---


def test_exams_in_letters_and_in_words(monkeypatch, tmp_path):
    packaged.lay(monkeypatch, tmp_path, packaged.exams_rows("spanish", 40))
    by_letter = {s.key: s for s in choices(find(exams, "exams_es"), Load(0))}
    in_words = {s.key: s for s in choices(find(exams, "exams_es_cloze"), Load(0))}
    assert set(by_letter) == set(in_words)
    assert len(by_letter) == 40 - few_shot.POOL
    key = sorted(by_letter)[0]
    i = int(key.partition("/")[2])
    assert by_letter[key] == Choices(
        key=key,
        context=f"Question: ¿{i} + A. 1 =?\nA. {i + 1}\nB. {i + 2}\nC. {i + 3}, o más\nAnswer:",
        choices=(" A", " B", " C"),
        answer=i % 3,
        group="es",
    )
    assert in_words[key].context == f"Question: ¿{i} + A. 1 =?\nAnswer:"
    assert in_words[key].choices == (f" {i + 1}", f" {i + 2}", f" {i + 3}, o más")


def test_an_exam_of_another_form_is_named():
    row = {"input": [{"content": "Say something.\nAnswer:"}], "ideal": "[A]"}
    with pytest.raises(UserError, match=r"es/7 of EXAMS has another form .*Say something"):
        exams.read("es/7", row)


def test_bigbench_asks_in_its_own_form(monkeypatch, tmp_path):
    rows = BIGBENCH_ROWS
    plain = packaged.of_bigbench("even", rows)
    other = packaged.of_bigbench(
        "odd/inner",
        rows,
        task_prefix="Say it.\n",
        example_input_prefix="\nNumber: ",
        example_output_prefix=" Answer: ",
        append_choices_to_input=False,
    )
    packaged.lay(monkeypatch, tmp_path, plain | other)
    (family,) = [t for t in bigbench.TASKS if isinstance(t, Family)]
    samples = choices(family.make("even"), Load(0))
    assert len(samples) == len(rows)
    sample = next(s for s in samples if s.key == "even/4")
    # The order that numpy's RandomState(42) gives two things.
    assert sample.context == "\nQ: Is 4 even?\n  choice: yes\n  choice: no\nA:"
    assert (sample.choices, sample.answer) == ((" yes", " no"), 0)
    sample = next(s for s in choices(family.make("odd/inner"), Load(0)) if s.key == "odd/inner/3")
    assert sample.context == "Say it.\n\nNumber: Is 3 even? Answer:"
    assert sample.answer == 1


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("evn", r"no task 'evn': did you mean even\?"),
        ("odd", "is several tasks: name one of odd/inner"),
        ("text", "asks for text of its own"),
        ("many", "has several right answers to 50 of its 50"),
    ],
)
def test_bigbench_refuses_what_it_cannot_ask(name, sentence, monkeypatch, tmp_path):
    several = [{"input": "?", "target_scores": {"a": 1, "b": 1}}] * 50
    files = packaged.of_bigbench("even", BIGBENCH_ROWS)
    files |= packaged.of_bigbench("odd", []) | packaged.of_bigbench("odd/inner", BIGBENCH_ROWS)
    files |= packaged.of_bigbench("text", [{"input": "?", "target": "t"}])
    files |= packaged.of_bigbench("many", several)
    packaged.lay(monkeypatch, tmp_path, files)
    with pytest.raises(UserError, match=sentence):
        bigbench.load_task(name, Load(0))


def test_winogrande_has_each_sentence_with_its_twin(monkeypatch, tmp_path):
    packaged.lay(monkeypatch, tmp_path, packaged.winogrande_rows())
    found = {
        s.context + s.choices[s.answer]: s
        for s in choices(find(natural_instructions, "winogrande_ni"), Load(0))
    }
    assert set(found) == {
        "The cup did not fit into the box because the cup was too big.",
        "The cup did not fit into the box because the box was too small.",
        "PersonX asked PersonY for help because PersonX's leg was broken.",
        "PersonX asked PersonY for help because PersonY's leg was strong.",
    }
    sample = found["The cup did not fit into the box because the cup was too big."]
    assert sample.context == "The cup did not fit into the box because the"
    assert sample.choices == (" box was too big.", " cup was too big.")
    assert {s.group for s in found.values()} == {"object", "person"}


def test_multirc_asks_each_option_by_itself(monkeypatch, tmp_path):
    packaged.lay(monkeypatch, tmp_path, packaged.multirc_rows())
    found = choices(find(natural_instructions, "multirc_ni"), Load(0))
    assert {s.key: s.answer for s in found} == {"0/A": 0, "0/B": 1, "0/C": 1}
    sample = next(s for s in found if s.key == "0/C")
    assert sample.context == (
        "Rain fell. The river rose.\nQuestion: What rose?\nAnswer: The water of the river\n"
        "Is this answer right, yes or no?"
    )


def test_multiemo_by_language_and_together(monkeypatch, tmp_path):
    packaged.lay(monkeypatch, tmp_path, packaged.multiemo_rows(multiemo.LANGUAGES, 40))
    together = choices(find(multiemo, "multiemo"), Load(4))
    assert {s.group for s in together} == set(multiemo.LANGUAGES)
    first = together[0]
    assert all(f"in {first.group}." in part for part in first.context.split("\n\n"))
    number = int(first.key.partition("/")[2])
    assert multiemo.CLASSES[first.answer] == multiemo.CLASSES[number % 4]


# --- Answers as text ---


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        ("The cat!", "cat", 1.0, 1.0),
        ("a black cat", "cat", 0.0, 2 / 3),
        ("cat cat", "cat dog", 0.0, 0.5),
        ("dog", "cat", 0.0, 0.0),
        ("", "cat", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),
        ("in 1932", "1932", 0.0, 2 / 3),
        ("U.S.", "us", 1.0, 1.0),
    ],
)
def test_words_are_compared_as_by_hand(answer, reference, exact, f1):
    assert text_match.exact_match(answer, reference) == exact
    assert text_match.f1(answer, reference) == pytest.approx(f1)


def test_squad_takes_the_nearest_reference(monkeypatch, tmp_path):
    packaged.lay(monkeypatch, tmp_path, packaged.squad_file("squaddev_v1.1.json"))
    task = find(squad, "squad_v1")
    sample = next(p for p in prompts(task, Load(0)) if p.key == "q1")
    assert sample.prompt == (
        "Title: A bridge\n\nBackground: The bridge was built in 1932.\n\n"
        "Question: When was it built (1)?\n\nAnswer:"
    )
    assert scored(task, sample, " In 1932.") == {"exact_match": 1.0, "f1": 1.0}
    assert scored(task, sample, " year 1932") == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}


def test_coqa_tells_the_turns_before_and_leaves_each_reference_out(monkeypatch, tmp_path):
    packaged.lay(monkeypatch, tmp_path, packaged.coqa_file())
    task = find(coqa, "coqa_turns")
    second = next(p for p in prompts(task, Load(0)) if p.key == "s1/2")
    assert second.prompt == (
        "Tom has a red boat.\n\nQ: What has Tom?\nA: a boat\n\nQ: Which color?\nA:"
    )
    assert second.reference == ["red", "Red.", "blue"]
    # Against {Red., blue}, {red, blue} and {red, Red.}.
    assert scored(task, second, " red")["em"] == pytest.approx(1.0)
    assert scored(task, second, " blue")["em"] == pytest.approx(2 / 3)


# --- Bits per byte ---

PAGE = """<!doctype html><html><head><title>Title &amp; more</title></head><body>
<h1>Rights</h1><header><h2>Preamble</h2><p>All  are\n equal &amp; free.</p></header>
<ol><li><p>One</p></li><li>Two</li></ol></body></html>"""


def test_a_page_is_its_paragraphs():
    assert bits_per_byte.paragraphs(PAGE) == "Rights\nPreamble\nAll are equal & free.\nOne\nTwo\n"


def test_texts_by_language(monkeypatch, tmp_path):
    folder = bits_per_byte.FOLDER
    files = {f"{folder}{code}.html": PAGE.encode() for code in bits_per_byte.LANGUAGES}
    packaged.lay(monkeypatch, tmp_path, files)
    found = find(bits_per_byte, "bpb_udhr").load(Load(0))
    assert [s.group for s in found] == [s.key for s in found] == list(bits_per_byte.LANGUAGES)
    assert len(found) == 28
    (family,) = [t for t in bits_per_byte.TASKS if isinstance(t, Family)]
    assert [s.key for s in family.make("jpn, fra").load(Load(0))] == ["jpn", "fra"]
    with pytest.raises(UserError, match=r"udhr has no language 'deu': did you mean deu_1996\?"):
        family.make("deu").load(Load(0))


def test_code_and_prose_of_this_python():
    code = find(bits_per_byte, "bpb_code").load(Load(0))
    assert len(code) == bits_per_byte.NUM_MODULES
    assert all(isinstance(s, Text) and "test" not in s.key.split("/") for s in code)
    prose = find(bits_per_byte, "bpb_prose").load(Load(0, limit=3))
    assert len(prose) == 3
    with pytest.raises(UserError, match="have no examples"):
        find(bits_per_byte, "bpb_code").load(Load(1))
