"""Excerpts of benchmarks' packages: of our own making, in the packages' form. Real data are never
committed."""

import gzip
import json
from pathlib import Path

import pytest

from evals import data_packages
from evals.data_packages import Package
from evals.tasks import coqa, gsm8k, humaneval, multiemo, natural_instructions, sarcasm
from evals.tasks.bigbench import TASKS_FOLDER

Files = dict[str, bytes]


def jsonl(rows: list) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def lay(monkeypatch: pytest.MonkeyPatch, folder: Path, files: Files) -> None:
    """Lays files where packages' members are looked for."""

    def member_paths(package: Package, members) -> list[Path]:
        missing = [name for name in members if name not in files]
        assert not missing, f"{package.name} is asked for {missing}"
        paths = [folder / name for name in members]
        for path, name in zip(paths, members, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
        return paths

    monkeypatch.setattr(data_packages, "member_paths", member_paths)
    monkeypatch.setattr(
        data_packages,
        "has_members",
        lambda package, suffix: sorted(name for name in files if name.endswith(suffix)),
    )


def of_bigbench(name: str, examples: list[dict], **fields) -> Files:
    task = {"name": name, "examples": examples, **fields}
    return {f"{TASKS_FOLDER}{name}/task.json": json.dumps(task).encode()}


def gsm8k_rows(count: int) -> Files:
    rows = [
        {
            "question": f"Ana has {i} red and {i + 1} blue pens. How many?",
            "answer": f"{i} + {i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}\n#### {2 * i + 1}",
        }
        for i in range(count)
    ]
    return {gsm8k.MEMBER: jsonl(rows)}


def humaneval_rows() -> Files:
    rows = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def add_{i}(x: int) -> int:\n    """x plus {i}."""\n',
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(2) == {i + 2}\n",
            "entry_point": f"add_{i}",
        }
        for i in range(3)
    ]
    return {humaneval.MEMBER: gzip.compress(jsonl(rows))}


def exams_rows(language: str, count: int) -> Files:
    rows = [
        {
            "input": [
                {"role": "system", "content": "Please answer with the letter."},
                {
                    "role": "user",
                    "content": (
                        f"¿{i} + A. 1 =?\nA. {i + 1}\nB. {i + 2}\nC. {i + 3},\n  o más\nAnswer:"
                    ),
                },
            ],
            "ideal": f"[{'ABC'[i % 3]}]",
        }
        for i in range(count)
    ]
    return {f"evals/registry/data/{language}-exams-qa/samples.jsonl": jsonl(rows)}


def sarcasm_rows(count: int) -> Files:
    rows = [
        {"input": [{"role": "user", "content": f"headline {i}"}], "ideal": str(i % 2)}
        for i in range(count)
    ]
    return {sarcasm.MEMBER: jsonl(rows)}


def multiemo_rows(codes: tuple[str, ...], count: int) -> Files:
    files = {}
    for code in codes:
        rows = [
            {
                "input": f"Sentence {i} in {code}. ",
                "target_scores": {c: int(j == i % 4) for j, c in enumerate(multiemo.CLASSES)},
            }
            for i in range(count)
        ]
        files |= of_bigbench(f"multiemo/all_sentence_{code}", rows)
    return files


def winogrande_rows() -> Files:
    def row(text: str, target: str) -> dict:
        return {"input": f"Context Word: w. \nQuestion: {text}", "target": [target]}

    big = "The cup did not fit into the box because the _ was too big."
    small = "The cup did not fit into the box because the _ was too small."
    answers = [row(small, "box.")]
    objects = [row(f"{big} \nAnswer: cup.", small)]
    first = "PersonX asked PersonY for help because _ 's leg was broken."
    second = "PersonX asked PersonY for help because _ 's leg was strong."
    persons = [row(f"{first} \nAnswer: PersonX", second)]
    names = (
        natural_instructions.ANSWERS,
        natural_instructions.OBJECTS,
        natural_instructions.PERSONS,
    )
    files = {}
    for name, rows in zip(names, (answers, objects, persons), strict=True):
        files |= of_bigbench(f"natural_instructions/{name}", rows)
    return files


def multirc_rows() -> Files:
    row = {
        "input": (
            "Paragraph- Sent 1: Rain fell.Sent 2: The river rose. \n"
            "Question: What rose? (A) The rain (B) The river (C) The water of the river."
        ),
        "target": ["B, C."],
    }
    return of_bigbench(f"natural_instructions/{natural_instructions.MULTIRC}", [row])


def squad_file(file: str) -> Files:
    paragraph = {
        "context": " The bridge was built in 1932. ",
        "qas": [
            {
                "id": f"q{i}",
                "question": f"When was it built ({i})?",
                "answers": [{"text": "1932", "answer_start": 24}, {"text": "in 1932"}],
            }
            for i in range(3)
        ],
    }
    data = {"version": "1.1", "data": [{"title": "A_bridge", "paragraphs": [paragraph]}]}
    return {f"{TASKS_FOLDER}squad_shifts/{file}": json.dumps(data).encode()}


def coqa_file() -> Files:
    def answers(*texts: str) -> list[dict]:
        return [{"input_text": text, "turn_id": i + 1} for i, text in enumerate(texts)]

    story = {
        "id": "s1",
        "source": "race",
        "story": "Tom has a red boat.",
        "questions": answers("What has Tom?", "Which color?"),
        "answers": answers("a boat", "red"),
        "additional_answers": {"0": answers("A red boat", "Red."), "1": answers("boat", "blue")},
    }
    return {coqa.MEMBER: json.dumps({"data": [story]}).encode()}
