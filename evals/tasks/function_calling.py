"""The Berkeley Function-Calling Leaderboard's single-turn sets: the calls that a request needs
(Patil et al., 2025).

bfcl_simple_python   one function, one call
bfcl_multiple        several functions, one call
bfcl_parallel        one function, several calls
bfcl_parallel_multiple   several of both
bfcl_irrelevance     functions of which none helps: no call is right

Functions are declared in a system message, as the leaderboard does for models without function
calling of their own. Scores are not its "overall", of which these sets are a part.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from configs.checks import require
from evals import data_packages
from evals.data_packages import BFCL
from evals.function_calls import are_wanted
from evals.samples import Answer, Load, Metric, Prompt, Task
from infer.function_calls import read_calls

SETS = {
    "simple_python": 400,
    "multiple": 200,
    "parallel": 200,
    "parallel_multiple": 200,
    "irrelevance": 240,
}
NO_CALL = "irrelevance"
FOLDER = "bfcl_eval/data"
ACC = Metric("acc")
MAX_NEW_TOKENS = 256
SYSTEM = (
    "You can call functions. If the request needs some of them, answer with the calls alone, in "
    "this form: [name(argument=value, other=value), name(argument=value)]. If none of them helps, "
    "or an argument that is needed is not given, say so and call none. These are the functions, as "
    "JSON:\n"
)


def load(kind: str, load: Load) -> list[Prompt]:
    require(load.num_fewshot == 0, "bfcl has no examples: leave --num-fewshot out")
    file = f"BFCL_v4_{kind}.json"
    members = [f"{FOLDER}/{file}"]
    members += [] if kind == NO_CALL else [f"{FOLDER}/possible_answer/{file}"]
    asked, *answers = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in data_packages.member_paths(BFCL, members)
    )
    wanted = {row["id"]: row["ground_truth"] for row in (answers[0] if answers else ())}
    return [_prompt(row, wanted.get(row["id"], [])) for row in asked][: load.limit]


def _prompt(row: Mapping[str, Any], wanted: Sequence[Any]) -> Prompt:
    (messages,) = row["question"]  # one turn
    declared = {"role": "system", "content": SYSTEM + json.dumps(row["function"])}
    return Prompt(
        key=row["id"],
        prompt=(declared, *(m for m in messages if m["role"] != "system")),
        reference={"wanted": wanted, "functions": row["function"]},
        max_new_tokens=MAX_NEW_TOKENS,
    )


def score(prompt: Prompt, answers: Sequence[Answer]) -> dict[Metric, float]:
    calls = read_calls(answers[0].text)
    wanted, functions = prompt.reference["wanted"], prompt.reference["functions"]
    return {ACC: float(are_wanted(calls, wanted, functions) if wanted else not calls)}


def _task(kind: str, number: int) -> Task:
    kwargs = {"until": [], "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False}
    return Task(
        name=f"bfcl_{kind}",
        version=1,
        description=f"Calls of functions, {kind.replace('_', ' ')}; needs a chat template.",
        origin=(
            f"{BFCL.name} {BFCL.version}, {FOLDER}/BFCL_v4_{kind}.json; Patil et al., 2025, The "
            "Berkeley function calling leaderboard"
        ),
        license=BFCL.license,
        output_type="generate_until",
        metrics=(ACC,),
        load=lambda asked: load(kind, asked),
        score=score,
        metadata={"num_samples": number, "generation_kwargs": kwargs},
    )


TASKS = tuple(_task(kind, number) for kind, number in SETS.items())
