"""EXAMS: school examinations in 16 languages, multiple choice (Hardalov et al., 2020).

Each language is a task in two forms, as OLMES asks (Gu et al., 2024, arXiv:2406.08446):
exams_es lists the choices by letter and asks for the letter, exams_es_cloze asks for the answer's
text. exams and exams_cloze are all languages together, each also reported by itself.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from configs.checks import UserError
from evals import data_packages
from evals.data_packages import OPENAI_EVALS
from evals.few_shot import by_hash, choices_with_shots
from evals.samples import Choices, Load, Task
from evals.scoring import ACC, CHOICES

LANGUAGES = {
    "ar": "arabic",
    "bg": "bulgarian",
    "de": "german",
    "es": "spanish",
    "fr": "french",
    "hr": "croatian",
    "hu": "hungarian",
    "it": "italian",
    "lt": "lithuanian",
    "mk": "macedonian",
    "pl": "polish",
    "pt": "portuguese",
    "sq": "albanian",
    "sr": "serbian",
    "tr": "turkish",
    "vi": "vietnamese",
}
LETTERS = "ABCDEFGH"
ORIGIN = (
    f"{OPENAI_EVALS.name} {OPENAI_EVALS.version}, evals/registry/data/LANGUAGE-exams-qa/"
    "samples.jsonl; Hardalov et al., 2020, arXiv:2011.03080"
)


def load_language(code: str, load: Load, *, cloze: bool) -> list[Choices]:
    """A language's questions after examples of the same language."""
    member = f"evals/registry/data/{LANGUAGES[code]}-exams-qa/samples.jsonl"
    path = data_packages.member_path(OPENAI_EVALS, member)
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = (read(f"{code}/{i}", json.loads(line)) for i, line in enumerate(lines))
    return choices_with_shots([sample(*row, code, cloze=cloze) for row in rows], load)


def read(key: str, row: Mapping[str, Any]) -> tuple[str, str, list[str], int]:
    """Key, question, choices, and which is right.

    Raises:
      UserError: the row has another form.
    """
    text, ideal = row["input"][-1]["content"], row["ideal"].strip("[] ")
    text = text.removesuffix("Answer:").rstrip()
    starts, at = [], 0
    for letter in LETTERS:  # each at a line's beginning, behind the one before
        found = re.compile(rf"^{letter}\. ?", re.MULTILINE).search(text, at)
        if found is None:
            break
        starts.append(found.span())
        at = found.end()
    if len(starts) < 2 or ideal not in LETTERS[: len(starts)]:
        raise UserError(f"{key} of EXAMS has another form than was expected: {text[:80]!r}")
    ends = [begin for begin, _ in starts[1:]] + [len(text)]
    choices = [
        " ".join(text[begin:end].split()) for (_, begin), end in zip(starts, ends, strict=True)
    ]
    return key, text[: starts[0][0]].strip(), choices, LETTERS.index(ideal)


def sample(
    key: str, question: str, choices: list[str], answer: int, code: str, *, cloze: bool
) -> Choices:
    if cloze:
        context = f"Question: {question}\nAnswer:"
        return Choices(key, context, tuple(f" {c}" for c in choices), answer, code)
    listed = "".join(f"{x}. {c}\n" for x, c in zip(LETTERS, choices, strict=False))
    letters = tuple(f" {x}" for x in LETTERS[: len(choices)])
    return Choices(key, f"Question: {question}\n{listed}Answer:", letters, answer, code)


def load_all(load: Load, *, cloze: bool) -> list[Choices]:
    whole = dataclasses.replace(load, limit=None)
    found = [s for code in LANGUAGES for s in load_language(code, whole, cloze=cloze)]
    return by_hash(found)[: load.limit]


def _task(code: str | None, *, cloze: bool) -> Task:
    form = "the answer's text" if cloze else "the letter"
    of = "16 languages" if code is None else (LANGUAGES[code].capitalize())
    return Task(
        name="_".join(["exams", *([code] if code else []), *(["cloze"] if cloze else [])]),
        version=1,
        description=f"Questions of school examinations, {of}; the model is asked for {form}.",
        origin=ORIGIN,
        license="CC-BY-SA-4.0 (EXAMS'); the package: MIT",
        output_type="multiple_choice",
        metrics=CHOICES if cloze else (ACC,),
        load=(
            (lambda load: load_all(load, cloze=cloze))
            if code is None
            else (lambda load: load_language(code, load, cloze=cloze))
        ),
        num_fewshot=5,
    )


TASKS = tuple(_task(code, cloze=cloze) for code in (None, *LANGUAGES) for cloze in (False, True))
