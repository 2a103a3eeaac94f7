"""Function calls matched by hand-made rules and data, and the tasks that need optional packages."""

import importlib.util
import json
import sys

import pytest

from configs.checks import UserError
from evals.data_packages import BFCL
from evals.function_calls import are_wanted
from evals.samples import Answer, Family, Load, Prompt, Task
from evals.tasks import aime, function_calling, instructions, reasoning
from infer.function_calls import read_calls
from tests.evals import packaged


def needs(module: str, requirement: str):
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None, reason=f"{requirement} is not installed"
    )


needs_gym = needs("reasoning_gym", reasoning.REQUIREMENT)
needs_verifiable = needs("if_verifiable", instructions.REQUIREMENT)
needs_math_verify = needs("math_verify", aime.REQUIREMENT)

ADD = {
    "name": "math.add",
    "parameters": {
        "type": "dict",
        "properties": {
            "a": {"type": "float"},
            "b": {"type": "integer"},
            "unit": {"type": "string"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "exact": {"type": "boolean"},
            "options": {"type": "dict"},
        },
        "required": ["a", "b"],
    },
}


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[f(a=1, b='x')]", [("f", {"a": 1, "b": "x"})]),
        ("f(a=[1, 2]), g.h(c={'d': None})", [("f", {"a": [1, 2]}), ("g.h", {"c": {"d": None}})]),
        ("```python\n[f(a=-1.5)]\n```", [("f", {"a": -1.5})]),
        ('{"name": "f", "arguments": {"a": 1}}', [("f", {"a": 1})]),
        ('[{"name": "f", "parameters": {}}]', [("f", {})]),
        ('{"function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', [("f", {"a": 1})]),
        (
            'Sure.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
            '<tool_call>{"name": "g", "arguments": {}}',
            [("f", {}), ("g", {})],
        ),
        ("I cannot do that.", []),
        ("[f(1)]", []),
        ("[f(a=open('x'))]", []),
        ("[f(a=1)", []),
        ("[]", []),
        ("", []),
        ("(" * 5000, []),
    ],
)
def test_calls_are_read_from_answers(text, calls):
    assert read_calls(text) == calls


@pytest.mark.parametrize(
    ("arguments", "is_right"),
    [
        ({"a": 1.5, "b": 2}, True),
        ({"a": 1.5, "b": 2, "unit": "K.m/H"}, True),  # texts without case and punctuation
        ({"a": 1.5, "b": 2, "unit": "mph"}, False),
        ({"a": 1.5}, False),  # b is needed
        ({"a": 1.5, "b": 2, "c": 3}, False),  # not declared
        ({"a": 1.5, "b": 2.0}, False),  # declared an integer
        ({"a": 1.5, "b": True}, False),
        ({"a": "1.5", "b": 2}, False),
        ({"a": 1.5, "b": 2, "tags": ["One", "two"]}, True),
        ({"a": 1.5, "b": 2, "tags": ["two", "one"]}, False),
        ({"a": 1.5, "b": 2, "exact": True}, True),
        ({"a": 1.5, "b": 2, "exact": 1}, False),
        ({"a": 1.5, "b": 2, "options": {"mode": "Fast"}}, True),
        ({"a": 1.5, "b": 2, "options": {"mode": "slow"}}, False),
        ({"a": 1.5, "b": 2, "options": {}}, False),
        ({"a": 1.5, "b": 2, "options": {"mode": "fast", "x": 1}}, False),
    ],
)
def test_a_call_is_matched_as_by_hand(arguments, is_right):
    wanted = {
        "math.add": {
            "a": [1.5],
            "b": [2, 3],
            "unit": ["km/h", ""],
            "tags": [["one", "two"], ""],
            "exact": [True, ""],
            "options": ["", {"mode": ["fast"]}],
        }
    }
    assert are_wanted([("math.add", arguments)], [wanted], [ADD]) == is_right
    assert not are_wanted([("add", arguments)], [wanted], [ADD])


def test_an_argument_that_may_not_be_left_out_is_missed():
    assert not are_wanted([("math.add", {"a": 1, "b": 2})], [_add(unit=["m"])], [ADD])


def _add(**values) -> dict:
    return {"math.add": {"a": [1], "b": [2], **values}}


def test_several_calls_match_in_any_order_and_each_once():
    one, two = _add(), {"math.add": {"a": [3], "b": [4]}}
    first, second = ("math.add", {"a": 1, "b": 2}), ("math.add", {"a": 3, "b": 4})
    assert are_wanted([second, first], [one, two], [ADD])
    assert not are_wanted([first, first], [one, two], [ADD])
    assert not are_wanted([first], [one, two], [ADD])
    assert not are_wanted([first, second, second], [one, two], [ADD])
    assert are_wanted([], [], [ADD])


def test_the_leaderboards_sets(monkeypatch, tmp_path):
    folder = function_calling.FOLDER
    row = {
        "id": "multiple_0",
        "question": [[{"role": "user", "content": "Add 1 and 2."}]],
        "function": [ADD],
    }
    files = {
        f"{folder}/BFCL_v4_multiple.json": packaged.jsonl([row]),
        f"{folder}/possible_answer/BFCL_v4_multiple.json": packaged.jsonl(
            [{"id": "multiple_0", "ground_truth": [_add()]}]
        ),
        f"{folder}/BFCL_v4_irrelevance.json": packaged.jsonl([row | {"id": "irrelevance_0"}]),
    }
    packaged.lay(monkeypatch, tmp_path, files)
    tasks = {task.name: task for task in function_calling.TASKS}
    assert len(tasks) == 5
    (sample,) = tasks["bfcl_multiple"].load(Load(0))
    assert isinstance(sample, Prompt)
    system, user = sample.prompt
    assert isinstance(system, dict)
    assert json.dumps([ADD]) in system["content"]
    assert user == {"role": "user", "content": "Add 1 and 2."}
    assert score(tasks["bfcl_multiple"], sample, "[math.add(a=1, b=2)]") == {"acc": 1.0}
    assert score(tasks["bfcl_multiple"], sample, "[math.add(a=1, b=3)]") == {"acc": 0.0}
    (sample,) = tasks["bfcl_irrelevance"].load(Load(0))
    assert score(tasks["bfcl_irrelevance"], sample, "None of them helps.") == {"acc": 1.0}
    assert score(tasks["bfcl_irrelevance"], sample, "[math.add(a=1, b=2)]") == {"acc": 0.0}
    assert BFCL.license == "Apache-2.0"


def score(task: Task, prompt, text: str) -> dict[str, float]:
    assert task.score is not None
    return {m.name: value for m, value in task.score(prompt, [Answer(text, "end", 1)]).items()}


@pytest.mark.parametrize(
    ("task", "package"),
    [
        (reasoning.TASKS[0], "reasoning_gym"),
        (instructions.TASKS[0], "if_verifiable"),
        (aime.TASKS[0], "math_verify"),
    ],
)
def test_a_missing_package_is_named_with_its_version(task, package, monkeypatch):
    for name in [m for m in sys.modules if m == package or m.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    reasoning.generator.cache_clear()
    name = package.replace("_", "-")
    with pytest.raises(UserError, match=rf"pip install {name}==[\d.]+, or -e '\.\[evaluation\]'"):
        task.load(Load(0))


@needs_gym
def test_reasoning_gyms_answers_score_one_and_others_less():
    task = reasoning.TASKS[0]
    assert isinstance(task, Task)
    samples = [s for s in task.load(Load(0)) if isinstance(s, Prompt)]
    assert len(samples) == len(reasoning.MIXTURE) * reasoning.NUM_EACH
    assert len({s.key for s in samples}) == len(samples)
    for sample in samples[:40]:
        of = sample.reference
        entry = reasoning.generator(of["generator"], of["size"])[of["index"]]
        assert score(task, sample, f" {entry['answer']}\n") == {"score": 1.0}
        assert score(task, sample, "no idea")["score"] < 0.1
        assert str(sample.prompt).endswith("<answer>")
    (family,) = [t for t in reasoning.TASKS if isinstance(t, Family)]
    assert len(family.make("gcd").load(Load(0, limit=3))) == 3
    with pytest.raises(UserError, match="has no generator 'gdc'"):
        family.make("gdc").load(Load(0))


@needs_verifiable
def test_instructions_are_followed_or_not():
    task = instructions.TASKS[0]
    samples = {s.key: s for s in task.load(Load(0)) if isinstance(s, Prompt)}
    assert len(samples) == 60
    first = samples["0/0"]  # no commas, and an end
    assert not isinstance(first.prompt, str)
    assert first.prompt[0]["content"].startswith(instructions.REQUESTS[0])
    names = [m.name for m in task.metrics]
    good = "Dear neighbour please keep the dog inside. That is all for now"
    assert score(task, first, good) == dict.fromkeys(names, 1.0)
    half = score(task, first, "Dear neighbour, the dog. That is all for now")
    assert half == dict(zip(names, (0.0, 0.5, 0.0, 0.5), strict=True))
    assert score(task, first, "") == dict.fromkeys(names, 0.0)
    # Loose: without the first line, in which the comma is.
    loose = score(task, first, f"Sure, here it is:\n{good}")
    assert loose == dict(zip(names, (0.0, 0.5, 1.0, 1.0), strict=True))


@needs_math_verify
def test_answers_of_mathematics_are_compared_as_mathematics(monkeypatch, tmp_path):
    rows = packaged.jsonl([{"question": "Half of one?", "answer": "0.5"}])
    packaged.lay(monkeypatch, tmp_path, dict.fromkeys(aime.MEMBERS, rows))
    task = aime.TASKS[0]
    samples = list(task.load(Load(0)))
    assert len(samples) == 2
    name = "exact_match"
    assert score(task, samples[0], r"So it is \boxed{\frac{1}{2}}.") == {name: 1.0}
    assert score(task, samples[0], r"So it is \boxed{2}.") == {name: 0.0}
    assert score(task, samples[0], "no number") == {name: 0.0}
