"""Multiple choice of BIG-bench by the task's name, and sets that came into it from elsewhere.

The form of a question (prefixes, and the choices listed before the answer) is BIG-bench's own
(Srivastava et al., 2022, arXiv:2206.04615; bigbench/api/json_task.py). Its score
multiple_choice_grade is acc here, as every question that is asked has one right answer.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs.checks import UserError, require
from configs.near_names import hint
from evals import data_packages
from evals.data_packages import BIGBENCH
from evals.few_shot import POOL, choices_with_shots
from evals.samples import Choices, Family, Load, Task
from evals.scoring import CHOICES

TASKS_FOLDER = "bigbench-1.0.0/bigbench/benchmark_tasks/"
MAX_SAMPLES = 2000
"""Of a set that has more, the first ones by hash: a standard error of at most 1.1 points."""
MAX_LEFT_OUT = 0.1
"""Share of questions with several right answers; a task with more is refused."""
MOST_NAMED = 10
ORDER_SEED = 42
"""Of the order in which choices are listed: BIG-bench's own."""


def read(name: str) -> dict[str, Any]:
    """A task's file.

    Raises:
      UserError: there is none, or its answers are no choices.
    """
    names = {
        member[len(TASKS_FOLDER) : -len("/task.json")]: member
        for member in data_packages.has_members(BIGBENCH, "/task.json")
        if member.startswith(TASKS_FOLDER)
    }
    if name not in names:
        raise UserError(
            f"BIG-bench has no task {name!r}{hint(name, {}, sorted(names))} (bigbench:winowhy and "
            "bigbench:logical_deduction/three_objects are two of its)"
        )
    path = data_packages.member_path(BIGBENCH, names[name])
    task = json.loads(path.read_text(encoding="utf-8"))
    examples = task.get("examples", [])
    if not examples:
        inner = sorted(other for other in names if other.startswith(f"{name}/"))
        require(bool(inner), f"bigbench:{name} has no questions")
        others = ", ..." if len(inner) > MOST_NAMED else ""
        raise UserError(
            f"bigbench:{name} is several tasks: name one of {', '.join(inner[:MOST_NAMED])}{others}"
        )
    require(
        all(example.get("target_scores") for example in examples),
        f"bigbench:{name} asks for text of its own, not for one of several choices",
    )
    return task


def samples(name: str, task: Mapping[str, Any]) -> list[Choices]:
    """The task's questions with one right answer, in the file's order."""
    found = []
    for i, example in enumerate(task["examples"]):
        scores = example["target_scores"]
        best = [choice for choice, score in scores.items() if score == max(scores.values())]
        if len(best) == 1 and len(scores) > 1:
            context = question(task, example["input"], scores)
            answer = list(scores).index(best[0])
            found.append(Choices(f"{name}/{i}", context, tuple(f" {c}" for c in scores), answer))
    left_out = len(task["examples"]) - len(found)
    require(
        left_out <= MAX_LEFT_OUT * len(task["examples"]),
        f"bigbench:{name} has several right answers to {left_out} of its {len(task['examples'])} "
        "questions, which acc does not say",
    )
    return found


def question(task: Mapping[str, Any], text: str, choices: Mapping[str, float]) -> str:
    """A question as BIG-bench writes it, up to where the answer begins; the space before the answer
    goes to the choice."""
    listed = ""
    if task.get("append_choices_to_input", True) not in (False, "False"):
        order = np.random.RandomState(ORDER_SEED).permutation(sorted(choices))
        prefix = task.get("choice_prefix", "\n  choice: ")
        listed = prefix + prefix.join(order)
    before, after = task.get("example_input_prefix", "\nQ: "), task.get("example_output_prefix")
    return before + text + listed + ("\nA: " if after is None else after).rstrip(" ")


def load_task(
    name: str, load: Load, *, most: int | None = None, pool: int = 0
) -> Sequence[Choices]:
    """A task's questions after examples, where they are asked for.

    Args:
      pool: questions kept for examples; where there are examples, at least their usual number.
    """
    task = read(name)
    pool = max(pool, POOL if load.num_fewshot else 0)
    intro = task.get("task_prefix", "")
    return choices_with_shots(samples(name, task), load, intro=intro, most=most, pool=pool)


def _named(name: str) -> Task:
    require(bool(name), "name a task of BIG-bench, as in bigbench:winowhy")
    return Task(
        name=f"bigbench:{name}",
        version=1,
        description=f"{name} of BIG-bench, multiple choice in BIG-bench's own form.",
        origin=(
            f"{BIGBENCH.name} {BIGBENCH.version}, {name}/task.json; Srivastava et al., 2022, "
            "arXiv:2206.04615"
        ),
        license=BIGBENCH.license,
        output_type="multiple_choice",
        metrics=CHOICES,
        load=lambda load: load_task(name, load),
    )


VITAMINC = Task(
    name="vitaminc",
    version=1,
    description=(
        f"Whether a passage supports a claim, refutes it or neither; {MAX_SAMPLES:,} questions."
    ),
    origin=(
        f"{BIGBENCH.name} {BIGBENCH.version}, vitaminc_fact_verification; Schuster et al., 2021, "
        "arXiv:2103.08541"
    ),
    license="CC-BY-SA-3.0 (VitaminC's, of Wikipedia's text); the package states none for it",
    output_type="multiple_choice",
    metrics=CHOICES,
    load=lambda load: load_task("vitaminc_fact_verification", load, most=MAX_SAMPLES, pool=POOL),
    metadata={"num_samples": MAX_SAMPLES},
)

TASKS = (
    VITAMINC,
    Family("bigbench:NAME", "Multiple choice of BIG-bench, by its name there.", _named),
)
