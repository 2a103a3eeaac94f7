"""Benchmarks whose data no package holds, read in their official form from a folder of yours.

mmlu:FOLDER        MMLU's csv files: test/SUBJECT_test.csv, and dev/SUBJECT_dev.csv for examples
glue:FOLDER/SST-2  a task of GLUE, the folder named as GLUE names it, with its dev.tsv
arc:FILE           ARC's jsonl, as its authors or Hugging Face's datasets write it
hellaswag:FILE     HellaSwag's jsonl

Prompts are those of lm-evaluation-harness 0.4, so that scores can stand beside its own.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from configs.checks import UserError, require
from evals.few_shot import by_hash, draw, with_shots
from evals.samples import Choices, Family, Load, Metric, Task
from evals.scoring import ACC, ACC_NORM, F1, MATTHEWS

LETTERS = "ABCD"
LICENSE = "as the data's"


# --- MMLU ---


def load_mmlu(folder: Path, load: Load) -> list[Choices]:
    """Every subject's questions, after examples of its own."""
    files = sorted((folder / "test").glob("*_test.csv"))
    require(
        bool(files),
        f"{folder} has no test/SUBJECT_test.csv: give MMLU's data folder, with dev and test in it",
    )
    found = []
    for path in files:
        subject = path.name.removesuffix("_test.csv")
        intro = (
            "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n"
        )
        shots = []
        if load.num_fewshot:
            shown = list(_mmlu(folder / "dev" / f"{subject}_dev.csv", subject))
            require(
                load.num_fewshot <= len(shown),
                f"--num-fewshot {load.num_fewshot} is more than the {len(shown)} examples of "
                f"{subject}",
            )
            shots = shown[: load.num_fewshot] if load.seed == 0 else draw(shown, load)
        found += with_shots(list(_mmlu(path, subject)), shots, intro)
    return by_hash(found)[: load.limit]


def _mmlu(path: Path, subject: str) -> Iterator[Choices]:
    with _opened(path) as file:
        for number, row in enumerate(csv.reader(file), 1):
            require(
                len(row) == 6 and row[5].strip() in tuple(LETTERS),
                f"{path}, line {number}, has {len(row)} columns, the last {row[-1:]}: MMLU's files "
                "have a question, four choices and a letter from A to D, and no header",
            )
            listed = "".join(f"{x}. {c}\n" for x, c in zip(LETTERS, row[1:5], strict=True))
            context = f"{row[0].strip()}\n{listed}Answer:"
            answer = LETTERS.index(row[5].strip())
            choices = tuple(f" {letter}" for letter in LETTERS)
            yield Choices(f"{path.stem}/{number}", context, choices, answer, subject)


# --- GLUE ---


@dataclass(frozen=True)
class GlueTask:
    """A task of GLUE: its file, how a row is asked, and what each label says."""

    labels: Mapping[str, str]
    ask: str
    """With columns in braces."""
    columns: tuple[str, ...]
    label: str
    file: str = "dev.tsv"
    metrics: tuple[Metric, ...] = (ACC,)
    """GLUE's own."""
    header: tuple[str, ...] = ()
    """Of a file without one."""


YES_NO = {"0": " no", "1": " yes"}
GLUE = {
    "CoLA": GlueTask(
        YES_NO,
        "{sentence}\nQuestion: Does this sentence make sense?\nAnswer:",
        ("sentence",),
        "label",
        metrics=(MATTHEWS, ACC),
        header=("source", "label", "star", "sentence"),
    ),
    "SST-2": GlueTask(
        {"0": " negative", "1": " positive"},
        "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        ("sentence",),
        "label",
    ),
    "MRPC": GlueTask(
        YES_NO,
        "Sentence 1: {#1 String}\nSentence 2: {#2 String}\n"
        "Question: Do both sentences mean the same thing?\nAnswer:",
        ("#1 String", "#2 String"),
        "Quality",
        metrics=(ACC, F1),
    ),
    "QQP": GlueTask(
        YES_NO,
        "Question 1: {question1}\nQuestion 2: {question2}\n"
        "Question: Do both questions ask the same thing?\nAnswer:",
        ("question1", "question2"),
        "is_duplicate",
        metrics=(ACC, F1),
    ),
    "MNLI": GlueTask(
        {"entailment": " True", "neutral": " Neither", "contradiction": " False"},
        "{sentence1}\nQuestion: {sentence2} True, False or Neither?\nAnswer:",
        ("sentence1", "sentence2"),
        "gold_label",
        file="dev_matched.tsv",
    ),
    "QNLI": GlueTask(
        {"entailment": " yes", "not_entailment": " no"},
        "{question}\n{sentence}\nQuestion: Does this response answer the question?\nAnswer:",
        ("question", "sentence"),
        "label",
    ),
    "RTE": GlueTask(
        {"entailment": " True", "not_entailment": " False"},
        "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
        ("sentence1", "sentence2"),
        "label",
    ),
    "WNLI": GlueTask(
        {"0": " False", "1": " True"},
        "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
        ("sentence1", "sentence2"),
        "label",
    ),
}


def load_glue(folder: Path, load: Load) -> list[Choices]:
    """A task's development set, after examples of its training set."""
    task = _glue(folder)
    shots = []
    if load.num_fewshot:
        shown = list(_glue_rows(folder / "train.tsv", task))
        shots = draw(shown, load)
    rows = list(_glue_rows(folder / task.file, task))
    return with_shots(rows[: load.limit], shots)


def _glue(folder: Path) -> GlueTask:
    if folder.name not in GLUE:
        raise UserError(
            f"{folder.name!r} is no task of GLUE: name a folder called {', '.join(GLUE)}, as in "
            "glue:data/SST-2"
        )
    return GLUE[folder.name]


def _glue_rows(path: Path, task: GlueTask) -> Iterator[Choices]:
    choices = tuple(task.labels.values())
    for number, row in _table(path, task.header, (*task.columns, task.label)):
        label = row[task.label]
        require(
            label in task.labels,
            f"{path}, line {number}: label {label!r} is none of {', '.join(task.labels)}",
        )
        answer = list(task.labels).index(label)
        yield Choices(f"{path.stem}/{number}", _filled(task.ask, row), choices, answer)


def _filled(ask: str, row: Mapping[str, str]) -> str:
    return re.sub(r"\{(.+?)\}", lambda found: row[found[1]].strip(), ask)


def _table(
    path: Path, header: Sequence[str], wanted: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a file of columns between tabs, with their lines' numbers; quotes are text."""
    with _opened(path) as file:
        lines = [line.rstrip("\n").split("\t") for line in file]
    names = list(header) or (lines[0] if lines else [])
    missing = [name for name in wanted if name not in names]
    require(
        not missing,
        f"{path} has no column {', '.join(missing)}: its columns are {', '.join(names)}",
    )
    for number, cells in enumerate(lines, 1):
        if number == 1 and not header:
            continue
        require(
            len(cells) == len(names),
            f"{path}, line {number}, has {len(cells)} columns, and {len(names)} were needed",
        )
        yield number, dict(zip(names, cells, strict=True))


# --- ARC and HellaSwag ---


def load_arc(path: Path, load: Load) -> list[Choices]:
    """Questions whose choices are asked by their text."""
    _zero_shot("arc", load)
    return [_arc(path, number, row) for number, row in _rows(path)][: load.limit]


def _arc(path: Path, number: int, row: Mapping[str, Any]) -> Choices:
    """The authors' form has stem and choices under question, Hugging Face's has columns of texts
    and labels."""
    try:
        asked, choices = row["question"], row.get("choices")
        if isinstance(asked, Mapping):
            asked, choices = asked["stem"], asked["choices"]
        if isinstance(choices, Mapping):
            texts, labels = choices["text"], choices["label"]
        else:
            texts, labels = zip(*((c["text"], c["label"]) for c in choices or ()), strict=True)
        answer = list(labels).index(row["answerKey"])
    except (KeyError, TypeError, ValueError) as error:
        raise _bad_row(path, number, "question, choices with text and label, answerKey") from error
    context = f"Question: {asked}\nAnswer:"
    return Choices(_key(row, number), context, tuple(f" {text}" for text in texts), answer)


def load_hellaswag(path: Path, load: Load) -> list[Choices]:
    """Endings of a text, without the marks of the pages that the texts are from."""
    _zero_shot("hellaswag", load)
    return [_hellaswag(path, number, row) for number, row in _rows(path)][: load.limit]


def _hellaswag(path: Path, number: int, row: Mapping[str, Any]) -> Choices:
    try:
        begun = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
        context = _cleaned(f"{row['activity_label']}: {begun}")
        endings, label = tuple(f" {_cleaned(text)}" for text in row["endings"]), row["label"]
    except (KeyError, TypeError, AttributeError) as error:
        raise _bad_row(path, number, "activity_label, ctx_a, ctx_b, endings, label") from error
    labels = [str(i) for i in range(len(endings))]
    require(
        str(label) in labels,
        f"{path}, line {number}: label {label!r} is no ending (the test set's are secret: take "
        "hellaswag_val.jsonl)",
    )
    return Choices(_key(row, number), context.rstrip(), endings, labels.index(str(label)))


def _cleaned(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


def _key(row: Mapping[str, Any], number: int) -> str:
    name = row.get("id", row.get("ind"))
    return str(number) if name is None else f"{number}/{name}"


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Objects of a jsonl file, with their lines' numbers."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}, is no JSON: {error}") from error
            require(isinstance(row, dict), f"{path}, line {number}, is no JSON object")
            yield number, row


def _bad_row(path: Path, number: int, wanted: str) -> UserError:
    return UserError(f"{path}, line {number}, has another form: {wanted} were needed")


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """The file, whose own faults, while it is read, are named.

    Raises:
      UserError: it is not there, no text in UTF-8, or no csv file.
    """
    require(path.is_file(), f"{path} is not there: give the benchmark's own files")
    newline = "" if path.suffix == ".csv" else None
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: give the benchmark's own files") from error
    except csv.Error as error:
        raise UserError(f"{path} is no csv file ({error}): give the benchmark's own") from error


def _zero_shot(name: str, load: Load) -> None:
    require(load.num_fewshot == 0, f"{name} is asked without examples: leave --num-fewshot out")


def _family(
    name: str,
    what: str,
    title: str,
    loader: Callable[[Path, Load], list[Choices]],
    metrics: tuple[Metric, ...] | Callable[[Path], tuple[Metric, ...]],
    origin: str,
    num_fewshot: int = 0,
) -> Family:
    def make(text: str) -> Task:
        require(bool(text), f"{name} needs a path: {name}:{what}")
        return Task(
            name=f"{name}:{text}",
            version=1,
            description=f"{title}, from {text}.",
            origin=f"{text}; {origin}",
            license=LICENSE,
            output_type="multiple_choice",
            metrics=metrics(Path(text)) if callable(metrics) else metrics,
            load=partial(loader, Path(text)),
            num_fewshot=num_fewshot,
        )

    return Family(f"{name}:{what}", f"{title}, in its official form.", make)


TASKS = (
    _family("mmlu", "FOLDER", "MMLU", load_mmlu, (ACC,), "Hendrycks et al., arXiv:2009.03300", 5),
    _family(
        "glue",
        "FOLDER/SST-2",
        "A task of GLUE, by its own metrics",
        load_glue,
        lambda folder: _glue(folder).metrics,
        "Wang et al., arXiv:1804.07461",
    ),
    _family(
        "arc", "FILE", "ARC", load_arc, (ACC, ACC_NORM), "Clark et al., 2018, arXiv:1803.05457"
    ),
    _family(
        "hellaswag",
        "FILE",
        "HellaSwag",
        load_hellaswag,
        (ACC, ACC_NORM),
        "Zellers et al., 2019, arXiv:1905.07830",
    ),
)
