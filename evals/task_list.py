"""The tasks there are, by name: every file under evals/tasks/ and a user's own questions."""

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from configs.checks import UserError, require
from configs.near_names import LIKENESS, likeness
from evals import tasks
from evals.samples import Family, Task
from evals.tasks.own_questions import own_task

HELD_OUT = ("stdlib_bpb", "line_completion")
"""What a run's held-out text, or a share of any text, is measured with."""
QUICK = (
    *HELD_OUT,
    *("winogrande_ni", "multiemo_en", "exams_es", "sarcasm", "vitaminc"),
    *("gsm8k", "humaneval", "squad_nyt", "bpb_udhr", "bpb_code"),
)
"""The set "quick": of these, the ones that there are."""
SHORT = (
    *QUICK,
    *("multirc_ni", "exams_es_cloze", "bpb_prose", "line_infilling", "reasoning_gym"),
    *("instructions", "bfcl_simple_python", "bfcl_irrelevance", "coqa_turns", "aime2025"),
)
"""The set "short": something of every kind there is."""
RECORDS = ".jsonl"


@cache
def known_tasks() -> dict[str, Task | Family]:
    """By name, those of a family by the family's."""
    found: dict[str, Task | Family] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(tasks.__path__)):
        for task in getattr(importlib.import_module(f"{tasks.__name__}.{module}"), "TASKS", ()):
            assert task.name not in found, f"two tasks have the name {task.name}"
            found[task.name] = task
    return found


def named_sets() -> dict[str, tuple[str, ...]]:
    """Names that stand for several tasks."""
    sets = {"quick": QUICK, "short": SHORT}
    return {name: tuple(x for x in members if x in known_tasks()) for name, members in sets.items()}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks that names stand for, each once.

    Raises:
      UserError: a name that is no task; it names the nearest.
    """
    found: dict[str, Task] = {}
    for name in names:
        for task in _find(name):
            same = found.setdefault(task.name, task)
            require(
                same.origin == task.origin,
                f"{same.origin} and {task.origin} would both be called {task.name}: rename one",
            )
    if not found:
        raise UserError("no task is named: --tasks list shows them")
    return list(found.values())


def _find(name: str) -> Iterator[Task]:
    known, sets = known_tasks(), named_sets()
    task = known.get(name)
    family = known.get(name.partition(":")[0])
    if isinstance(task, Task):
        yield task
    elif name in sets:
        yield from find_tasks(sets[name])
    elif isinstance(family, Family) and ":" in name:
        yield family.make(name.partition(":")[2])
    elif name.endswith(RECORDS):
        own = own_task(Path(name))
        require(
            own.name not in (*known, *sets),
            f"the questions of {name} would be called {own.name}, as others are: rename the file",
        )
        yield own
    elif isinstance(task, Family):
        raise UserError(f"{name} is a family of tasks: name one of them, {task.form}")
    else:
        raise UserError(f"there is no task {name!r}{_nearest(name, [*known, *sets])}")


def _nearest(name: str, known: Sequence[str]) -> str:
    best = max(known, key=lambda other: likeness(name, other))
    if likeness(name, best) >= LIKENESS:
        return f": did you mean {best}? (--tasks list shows all)"
    return ": --tasks list shows those there are"


def describe_tasks() -> str:
    """A line for each task, family and named set."""
    lines = {
        task.form if isinstance(task, Family) else name: task.description
        for name, task in known_tasks().items()
    }
    lines[f"FILE{RECORDS}"] = 'Your questions: {"context", "choices", "answer"} or {"prompt", ...}.'
    lines |= {name: ", ".join(members) for name, members in named_sets().items()}
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in lines.items())
