"""SmolLM2's likelihoods and greedy answers beside transformers', on questions of benchmarks.

    python -m tests.evals.parity.check --peer PYTHON            # a Python with the parity extra
    python -m tests.evals.parity.check --peer PYTHON --record   # the fixture of the fast tests

Prints the largest difference of log-likelihoods (below 1e-3 nats) and how many answers are the
same; exits with 1 where that does not hold.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from data.smollm2 import packaged_gguf
from evals.local_model import LocalModel
from evals.samples import Choices, Load, Prompt
from evals.task_list import find_tasks
from infer.sources import open_source

HERE = Path(__file__).parent
FIXTURE = HERE / "smollm2.json"
MOST_NATS = 1e-3

PAIRS = [
    ["The capital of France is", " Paris"],
    ["The capital of France is", " Rome"],
    ["The capital of France is ", "Paris"],
    ["The capital of France is:\n\n", "Paris, of course"],
    ["", "Once upon a time there was a fox."],
    ["def add(a, b):\n    return", " a + b\n"],
    ["Die Hauptstadt von Japan heißt", " Tokio (東京)"],
    ["東京は日本の", "首都です🙂"],
    ["Question: Is water wet?\nAnswer:", " yes"],
    ["Question: Is water wet?\nAnswer:", " no"],
    ["Question: Is water wet?\nAnswer:", " maybe"],
    ["x" * 300, "x"],
]
PROMPTS = [
    {
        "prompt": "Question: Tom has 3 bags of 4 apples. How many apples has he?\nAnswer:",
        "stops": ["Question:", "\n\n"],
        "max_new_tokens": 40,
    },
    {"prompt": "def fibonacci(n):\n", "stops": ["\ndef", "\nclass"], "max_new_tokens": 48},
    {"prompt": "The three largest cities of Italy are", "stops": ["."], "max_new_tokens": 32},
]
"""Our own, for the fixture: benchmarks' questions are not kept here."""


def requests_of(tasks: list[str], count: int, prompts: int, shots: int, new: int) -> dict[str, Any]:
    """Each choice of the first questions of these tasks, and GSM8K's first problems."""
    pairs = []
    for task in find_tasks(tasks):
        for sample in list(task.load(Load(0, 0, count)))[:count]:
            assert isinstance(sample, Choices)
            pairs += [[sample.context, choice] for choice in sample.choices]
    (gsm8k,) = find_tasks(["gsm8k"])
    asked = []
    for sample in list(gsm8k.load(Load(shots, 0, prompts)))[:prompts]:
        assert isinstance(sample, Prompt)
        given = {"prompt": sample.prompt, "stops": list(sample.stops), "max_new_tokens": new}
        asked.append(given)
    return {"pairs": pairs, "prompts": asked}


def ours(requests: dict[str, Any]) -> dict[str, Any]:
    source = open_source("smollm2")
    model = LocalModel(*source.load(for_decoding=True), source.tokenizer)
    pairs = model.log_likelihoods([(a, b) for a, b in requests["pairs"]])
    prompts = [
        Prompt(str(i), r["prompt"], None, tuple(r["stops"]), r["max_new_tokens"])
        for i, r in enumerate(requests["prompts"])
    ]
    texts = [answers[0].text for answers in model.generate(prompts)]
    return {"pairs": [[x.nats, x.is_greedy] for x in pairs], "texts": texts}


def theirs(python: str, requests: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "requests.json", Path(folder) / "answers.json"
        asked.write_text(json.dumps(requests))
        command = [python, str(HERE / "peer.py"), *map(str, (packaged_gguf(), asked, answered))]
        subprocess.run(command, cwd=folder, check=True, env=dict(os.environ))
        return json.loads(answered.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="a Python with torch, transformers and gguf")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--tasks", default="winogrande_ni,multiemo_en,exams_es")
    parser.add_argument("--questions", type=int, default=67, help="of each task")
    parser.add_argument("--prompts", type=int, default=50, help="problems of GSM8K")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    arguments = parser.parse_args()
    if arguments.record:
        requests: dict[str, Any] = {"pairs": PAIRS, "prompts": PROMPTS}
    else:
        sizes = (arguments.questions, arguments.prompts, arguments.shots, arguments.max_new_tokens)
        requests = requests_of(arguments.tasks.split(","), *sizes)
    requests["eos_id"] = open_source("smollm2").tokenizer().eos_id
    found = theirs(arguments.peer, requests)
    if arguments.record:
        FIXTURE.write_text(json.dumps(requests | {"answers": found}, indent=1) + "\n")
    made = ours(requests)
    differences = [abs(a[0] - b[0]) for a, b in zip(made["pairs"], found["pairs"], strict=True)]
    alike = sum(a[1] == b[1] for a, b in zip(made["pairs"], found["pairs"], strict=True))
    same = sum(a == b for a, b in zip(made["texts"], found["texts"], strict=True))
    count, texts = len(differences), len(found["texts"])
    print(f"log-likelihoods: {count} pairs, largest difference {max(differences):.2e} nats")
    print(f"greedy or not: {alike} of {count} alike; answers: {same} of {texts} the same")
    return 0 if max(differences) < MOST_NATS and (same, alike) == (texts, count) else 1


if __name__ == "__main__":
    raise SystemExit(main())
