"""A user's own questions: one JSON object a line, and no line of code.

    {"context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}
    {"prompt": "Q: What is 2 + 3?\\nA:", "answer": "5", "match": "number"}

A choice is appended to the context exactly as it is written. A prompt is text, or the messages of a
chat; its answer matches
  exact     if it is the text, blanks around it aside (its first line, unless "stop" is given);
  contains  if it holds the text;
  regex     if the expression is found in it;
  number    if the last number in it is this one.
Either kind may have a "group"; a prompt "stop" (strings that end the answer) and "max_new_tokens".
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from configs.checks import UserError, require
from evals.samples import Answer, Choices, Load, Metric, Prompt, Sample, Task
from evals.scoring import CHOICES, EXACT_MATCH
from formats.small_files import UNLIMITED, read_small_file

Match = Literal["exact", "contains", "regex", "number"]

MAX_NEW_TOKENS = 256
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
VERSION = 1


def own_task(path: Path) -> Task:
    """The task of a file of questions, all of one kind.

    Raises:
      UserError: a line that is no question, named by file and line.
    """
    samples = read_questions(path)
    is_choices = isinstance(samples[0], Choices)
    return Task(
        name=path.stem,
        version=VERSION,
        description=f"{len(samples)} questions of {path.name}.",
        origin=str(path),
        license="the user's own",
        output_type="multiple_choice" if is_choices else "generate_until",
        metrics=CHOICES if is_choices else (EXACT_MATCH,),
        load=partial(_limited, samples),
        score=None if is_choices else score_answer,
        metadata={"num_samples": len(samples)},
    )


def _limited(samples: Sequence[Sample], settings: Load) -> Sequence[Sample]:
    return samples[: settings.limit]


def read_questions(path: Path) -> list[Sample]:
    """
    Raises:
      UserError: see `own_task`.
    """
    advice = 'write {"context", "choices", "answer"} or {"prompt", "answer", "match"} in each line'
    try:
        text = read_small_file(path, advice, UNLIMITED)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {advice}") from error
    samples: list[Sample] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            samples.append(_question(_object(line, where), str(number), where))
            require(
                type(samples[-1]) is type(samples[0]),
                f"{where} is of another kind than the lines before: put choices and prompts into "
                "files of their own",
            )
    require(bool(samples), f"{path} has no questions: {advice}")
    return samples


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}): mend or remove it") from error
    require(isinstance(found, dict), f"{where} is no JSON object: mend or remove it")
    return found


def _question(found: dict[str, Any], key: str, where: str) -> Sample:
    kinds = {"choices": _choices, "prompt": _prompt}
    names = [name for name in kinds if name in found]
    require(
        len(names) == 1,
        f'{where} needs either "choices" (with "context" and "answer") or "prompt" (with "answer" '
        f'and "match"), it has {", ".join(map(repr, found)) or "nothing"}',
    )
    return kinds[names[0]](found, key, where)


def _choices(found: dict[str, Any], key: str, where: str) -> Choices:
    _check_names(found, ("context", "choices", "answer"), ("group",), where)
    choices, answer = found["choices"], found["answer"]
    require(
        isinstance(choices, list) and bool(choices) and all(isinstance(x, str) for x in choices),
        f'{where}: "choices" must be a list of texts, it is {_shown(choices)}',
    )
    require(
        type(answer) is int and 0 <= answer < len(choices),
        f'{where}: "answer" must be the index of one of the {len(choices)} choices, from 0 on, it '
        f"is {_shown(answer)}",
    )
    context = _text(found, "context", where)
    return Choices(key, context, tuple(choices), answer, _text(found, "group", where, ""))


def _prompt(found: dict[str, Any], key: str, where: str) -> Prompt:
    _check_names(found, ("prompt", "answer"), ("match", "stop", "max_new_tokens", "group"), where)
    prompt, match = found["prompt"], found.get("match", "exact")
    is_chat = isinstance(prompt, list) and bool(prompt) and all(map(_is_message, prompt))
    require(
        isinstance(prompt, str) or is_chat,
        f'{where}: "prompt" must be text or a list of messages with "role" and "content", it is '
        f"{_shown(prompt)}",
    )
    require(
        match in get_args(Match),
        f'{where}: "match" must be one of {", ".join(get_args(Match))}, it is {_shown(match)}',
    )
    stops = found.get("stop", ["\n"] if match == "exact" and not is_chat else [])
    stops = [stops] if isinstance(stops, str) else stops
    require(
        isinstance(stops, list) and all(isinstance(x, str) and x for x in stops),
        f'{where}: "stop" must be a text or a list of texts, it is {_shown(stops)}',
    )
    count = found.get("max_new_tokens", MAX_NEW_TOKENS)
    require(
        type(count) is int and count > 0,
        f'{where}: "max_new_tokens" must be a number of tokens, it is {_shown(count)}',
    )
    return Prompt(
        key=key,
        prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        reference={"answer": _checked(found["answer"], match, where), "match": match},
        stops=tuple(stops),
        max_new_tokens=count,
        group=_text(found, "group", where, ""),
    )


def _checked(answer: Any, match: str, where: str) -> str | float:
    """The answer to compare with, as the kind of match needs it."""
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    require(
        is_number or isinstance(answer, str),
        f'{where}: "answer" must be a text or a number, it is {_shown(answer)}',
    )
    if match == "number":
        number = _last_number(str(answer))
        if number is None:
            raise UserError(f'{where}: "answer" must hold a number, it is {_shown(answer)}')
        return number
    if match == "regex":
        try:
            re.compile(str(answer))
        except re.error as error:
            raise UserError(f'{where}: "answer" is no regular expression ({error})') from error
    return str(answer)


def _check_names(
    found: Mapping[str, Any], needed: Sequence[str], others: Sequence[str], where: str
) -> None:
    missing = [name for name in needed if name not in found]
    require(not missing, f"{where} has no {', '.join(map(repr, missing))}: add it")
    unknown = [name for name in found if name not in (*needed, *others)]
    require(
        not unknown,
        f"{where} has {', '.join(map(repr, unknown))}, which nothing reads: there are "
        f"{', '.join((*needed, *others))}",
    )


def _text(found: Mapping[str, Any], name: str, where: str, default: str | None = None) -> str:
    value = found.get(name, default)
    require(isinstance(value, str), f'{where}: "{name}" must be text, it is {_shown(value)}')
    assert isinstance(value, str)
    return value


def _is_message(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(found.get(name), str) for name in ("role", "content")
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- Scoring --------------------------------------------------------------------------------------


def score_answer(sample: Prompt, answers: Sequence[Answer]) -> Mapping[Metric, float]:
    """Share of the answers that match."""
    wanted, match = sample.reference["answer"], sample.reference["match"]
    hits = [is_match(answer.text, wanted, match) for answer in answers]
    return {EXACT_MATCH: sum(hits) / len(hits)}


def is_match(text: str, wanted: str | float, match: Match) -> bool:
    """Whether an answer's text is what was wanted."""
    if match == "exact":
        return text.strip() == str(wanted).strip()
    if match == "contains":
        return str(wanted) in text
    if match == "regex":
        return re.search(str(wanted), text) is not None
    number = _last_number(text)
    return number is not None and abs(number - float(wanted)) <= 1e-9 * max(1.0, abs(number))


def _last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
