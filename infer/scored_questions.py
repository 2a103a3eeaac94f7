"""Questions that two models have answered, with the scores of their answers, as lines of JSON."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.checks import UserError


@dataclass(frozen=True)
class Question:
    """A question that both models have answered."""

    prompt: str
    small: float
    """The score of the small model's answer, of the same measure as `large`."""
    large: float


def read_questions(path: Path) -> list[Question]:
    """
    Raises:
      UserError: a line that is no scored question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: give another file") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                tree = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number} is not valid JSON ({error})") from error
            found.append(question_of(tree, f"{path}, line {number}"))
    return found


def question_of(tree: object, where: str) -> Question:
    """A line of a file of scored questions.

    Raises:
      UserError: it is no object with "prompt", "small" and "large".
    """
    if not isinstance(tree, dict):
        raise UserError(f'{where} is no object: write {{"prompt": ..., "small": 0, "large": 1}}')
    prompt, scores = tree.get("prompt"), [tree.get("small"), tree.get("large")]
    is_text = isinstance(prompt, str) and bool(prompt.strip())
    are_numbers = all(isinstance(x, int | float) and np.isfinite(x) for x in scores)
    if not is_text or not are_numbers:
        raise UserError(
            f'{where} needs "prompt", a text, and "small" and "large", the scores of both models\' '
            f"answers as numbers: it has {', '.join(map(repr, tree)) or 'nothing'}"
        )
    return Question(str(prompt), float(scores[0] or 0), float(scores[1] or 0))
