"""Finished samples of a task as lines of JSON, in lm-evaluation-harness' form.

A line is a sample under one filter (most tasks have one, "none"). Beside what that program writes
it holds the sample's key, group and draw of few-shot examples, log-likelihoods of choices, an
answer's texts and why they ended, and the identity of the model and settings it is of. A sample's
lines are written at once when it is finished: the same identity never asks it again.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from configs.checks import UserError
from configs.serialization import finite_json
from evals.samples import Answer, Choices, Likelihood, Metric, Prompt, Sample, Task, Text, Tokens
from evals.scoring import Value, Values, as_value, is_empty
from formats.atomic_folder import replace_text

Line = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A finished sample."""

    key: str
    group: str
    draw: int
    sample_hash: str
    values: Mapping[Metric, Value]
    lines: list[Line]
    """One for each filter of the task."""
    num_answers: int = 0
    num_empty: int = 0
    num_truncated: int = 0
    """Answers that were cut off before their end."""
    is_cut: bool = False
    """Whether tokens of its context or prompt were left out on the left."""


def sample_hash(sample: Sample) -> str:
    """SHA-256 of everything the sample holds: another text, another answer, another hash."""
    return _sha256(json.dumps(_document(sample), ensure_ascii=True, sort_keys=True))


def filters_of(task: Task) -> list[str]:
    """The filters of its metrics, in order."""
    return list(dict.fromkeys(metric.filter for metric in task.metrics))


def choices_record(
    task: Task, sample: Choices, likelihoods: Sequence[Likelihood], values: Values, draw: int
) -> Record:
    """A question whose choices were scored."""
    pairs = [(sample.context, choice) for choice in sample.choices]
    responses = [[str(x.nats), str(x.is_greedy)] for x in likelihoods]
    extra = {
        "log_likelihoods": [x.nats for x in likelihoods],
        "num_dropped": max((x.num_dropped for x in likelihoods), default=0),
    }
    target = str(sample.answer)
    lines = _lines(
        task, sample, values, draw, pairs, [[x] for x in responses], responses, target, extra
    )
    return record_of(task, lines)


def text_record(
    task: Task, sample: Text | Tokens, nats: float, num_tokens: int, values: Values, draw: int
) -> Record:
    """A text whose tokens were scored."""
    text = sample.text if isinstance(sample, Text) else ""
    extra = {"nats": nats, "num_tokens": num_tokens}
    responses = [str(nats)]
    lines = _lines(task, sample, values, draw, [(text,)], [responses], responses, text, extra)
    return record_of(task, lines)


def prompt_record(
    task: Task, sample: Prompt, answers: Sequence[Answer], values: Values, draw: int
) -> Record:
    """A prompt that was answered."""
    settings = {
        "until": list(sample.stops),
        "max_gen_toks": sample.max_new_tokens,
        "do_sample": sample.temperature > 0,
        "temperature": sample.temperature,
    }
    texts = [answer.text for answer in answers]
    extra = {
        "texts": texts,
        "ended": [answer.ended for answer in answers],
        "num_tokens": [answer.num_tokens for answer in answers],
        "is_empty": [is_empty(answer) for answer in answers],
        "num_dropped": max((answer.num_dropped for answer in answers), default=0),
    }
    is_text = isinstance(sample.prompt, str)
    prompt = sample.prompt if is_text else json.dumps(sample.prompt, ensure_ascii=False)
    target = sample.reference if isinstance(sample.reference, str) else _dumps(sample.reference)
    lines = _lines(task, sample, values, draw, [(prompt, settings)], [texts], texts, target, extra)
    return record_of(task, lines)


def _lines(
    task: Task,
    sample: Sample,
    values: Values,
    draw: int,
    arguments: Sequence[tuple[Any, ...]],
    responses: Any,
    filtered: Any,
    target: str,
    extra: Line,
) -> list[Line]:
    document = _document(sample)
    common: Line = {
        "doc_id": -1,
        "doc": document,
        "target": target,
        "arguments": {
            f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(given)}
            for i, given in enumerate(arguments)
        },
        "resps": responses,
        "filtered_resps": filtered,
    }
    hashes: Line = {
        "doc_hash": _sha256(_dumps(document)),
        "prompt_hash": _sha256(str(arguments[0][0]) if arguments else ""),
        "target_hash": _sha256(target),
    }
    own = {"key": sample.key, "group": sample.group, "draw": draw, **extra}
    own["sample_hash"] = sample_hash(sample)
    lines = []
    for name in filters_of(task):
        found = {metric.name: value for metric, value in values.items() if metric.filter == name}
        lines.append({**common, "filter": name, "metrics": list(found), **hashes, **found, **own})
    return lines


def record_of(task: Task, lines: list[Line]) -> Record:
    """The sample that lines of a file are of."""
    metrics = {(metric.name, metric.filter): metric for metric in task.metrics}
    first = lines[0]
    ended, empty = first.get("ended", []), first.get("is_empty", [])
    return Record(
        key=first["key"],
        group=first["group"],
        draw=first["draw"],
        sample_hash=first["sample_hash"],
        values={
            metrics[name, line["filter"]]: as_value(_plain(line[name]))
            for line in lines
            for name in line["metrics"]
            if (name, line["filter"]) in metrics
        },
        lines=lines,
        num_answers=len(ended),
        num_empty=sum(empty),
        num_truncated=sum(x == "length" for x in ended),
        is_cut=first.get("num_dropped", 0) > 0,
    )


class OtherSamples(UserError):
    """The samples of a file are of another model, other settings or other data."""


@dataclass
class SampleFile:
    """samples_TASK.jsonl: what is finished, and where the next one goes.

    `with SampleFile(...) as file`: locked for this process meanwhile.
    """

    path: Path
    task: Task
    identity: str
    """Of the model, its format, the task's version and settings: see evals/run.py."""
    records: dict[str, Record] = field(default_factory=dict)
    """By the samples' hashes."""
    _file: BinaryIO | None = None

    def __enter__(self) -> "SampleFile":
        """
        Raises:
          OtherSamples: the file is of something else.
          UserError: it is damaged, or written by another process.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"{self.path} is being written by another process: wait for it, or choose "
                    "another --output"
                ) from error
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def add(self, record: Record) -> None:
        """Appends a finished sample."""
        assert self._file is not None
        for line in record.lines:
            line["identity"] = self.identity
        text = "".join(finite_json(line, ensure_ascii=False) + "\n" for line in record.lines)
        self._file.write(text.encode(errors="backslashreplace"))
        self.records[record.sample_hash] = record

    def finish(self, records: Sequence[Record]) -> None:
        """Replaces the file by these samples in their order, numbered as the task numbers them."""
        known = list(dict.fromkeys(record.sample_hash for record in records))
        kept = [self.records[name] for name in known]
        kept += [record for name, record in self.records.items() if name not in set(known)]
        for i, record in enumerate(kept):
            for line in record.lines:
                line["doc_id"] = i
        text = "".join(
            finite_json(line, ensure_ascii=False) + "\n" for record in kept for line in record.lines
        )
        replace_text(self.path, text.encode(errors="backslashreplace").decode())

    def _read(self) -> None:
        """What is there; a half-written sample at the end is cut off."""
        assert self._file is not None
        whole, filters, waiting = 0, filters_of(self.task), []
        for number, end, line in _read_lines(self.path):
            if line.get("identity") != self.identity:
                raise OtherSamples(
                    f"{self.path} holds samples of another model, format, task version or "
                    "settings: choose another --output, or remove it"
                )
            waiting.append(line)
            if len(waiting) == len(filters):
                with _damaged(self.path, number):
                    record = record_of(self.task, waiting)
                self.records[record.sample_hash] = record
                waiting, whole = [], end
        self._file.truncate(whole)


def read_samples(path: Path, task: Task) -> list[Record]:
    """The whole samples of a file, in their order.

    Raises:
      UserError: it is damaged.
    """
    found, waiting, count = [], [], len(filters_of(task))
    for number, _, line in _read_lines(path):
        waiting.append(line)
        if len(waiting) == count:
            with _damaged(path, number):
                found.append(record_of(task, waiting))
            waiting = []
    return found


def set_aside(path: Path) -> Path:
    """Renames a file to the first free name.1, name.2, ..., and returns that."""
    numbers = (path.with_name(f"{path.stem}.{i}{path.suffix}") for i in itertools.count(1))
    free = next(other for other in numbers if not other.exists())
    path.rename(free)
    return free


def _read_lines(path: Path) -> Iterator[tuple[int, int, Line]]:
    """Number, end in bytes and JSON of each whole line."""
    end = 0
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                return
            end += len(text)
            with _damaged(path, number):
                line = json.loads(text)
                if not isinstance(line, dict):
                    raise ValueError("no JSON object")
            yield number, end, line


@contextlib.contextmanager
def _damaged(path: Path, number: int) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path} is damaged at line {number}: remove it, and its samples are asked again"
        ) from error


def _document(sample: Sample) -> Line:
    if isinstance(sample, Tokens):
        tokens = np.ascontiguousarray(sample.tokens, np.int32)
        return {
            "key": sample.key,
            "tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
            "num_bytes": sample.num_bytes,
            "num_answer": sample.num_answer,
            "group": sample.group,
        }
    return dataclasses.asdict(sample)


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _dumps(tree: Any) -> str:
    return json.dumps(tree, ensure_ascii=False, indent=2)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
