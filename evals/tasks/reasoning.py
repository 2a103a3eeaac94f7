"""Questions made by reasoning-gym's generators, scored by its verifiers (Stojanovski et al., 2025).

They are made anew from a seed, without end, so no model has been trained on them. reasoning_gym is
a mixture of short ones, reasoning_gym_only:NAME one generator of the package's.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from configs.checks import UserError, require
from configs.near_names import hint
from evals.few_shot import by_hash
from evals.optional_packages import optional_module
from evals.samples import Answer, Family, Load, Metric, Prompt, Task

REQUIREMENT = "reasoning-gym==0.1.25"
SCORE = Metric("score")
SEED = 20261127
NUM_EACH, NUM_ALONE = 25, 200
MIXTURE = (
    *("basic_arithmetic", "chain_sum", "coin_flip", "count_primes", "fraction_simplification"),
    *("gcd", "lcm", "leg_counting", "letter_counting", "number_sequence", "number_sorting"),
    *("simple_equations", "spell_backward", "word_sorting"),
)
STOPS = ("</answer>",)
MAX_NEW_TOKENS = 128


@cache
def generator(name: str, size: int) -> Any:
    """A data set of the package, the same one for the same name and size.

    Raises:
      UserError: the package is not installed, or has no such generator.
    """
    gym = optional_module("reasoning_gym", REQUIREMENT, "making the questions")
    known = sorted(optional_module("reasoning_gym.factory", REQUIREMENT, "finding them").DATASETS)
    if name not in known:
        raise UserError(f"reasoning-gym has no generator {name!r}{hint(name, {}, known)}")
    return gym.create_dataset(name, size=size, seed=SEED)


def load(names: Sequence[str], size: int, load: Load) -> list[Prompt]:
    require(load.num_fewshot == 0, "reasoning_gym has no examples: leave --num-fewshot out")
    made = [_prompt(name, size, i) for name in names for i in range(size)]
    return (by_hash(made) if len(names) > 1 else made)[: load.limit]


def _prompt(name: str, size: int, i: int) -> Prompt:
    return Prompt(
        key=f"{name}/{i}",
        prompt=(
            f"Question: {generator(name, size)[i]['question'].strip()}\n\n"
            "The answer alone, between <answer> and </answer>:\n<answer>"
        ),
        reference={"generator": name, "size": size, "index": i},
        stops=STOPS,
        max_new_tokens=MAX_NEW_TOKENS,
        group=name,
    )


def score(prompt: Prompt, answers: Sequence[Answer]) -> dict[Metric, float]:
    """What the generator's own verifier gives, 0 to 1."""
    of = prompt.reference
    made = generator(of["generator"], of["size"])
    return {SCORE: float(made.score_answer(answers[0].text.strip(), made[of["index"]]))}


def _task(name: str, names: Sequence[str], size: int) -> Task:
    of = f"{len(names)} generators" if len(names) > 1 else names[0]
    kwargs = {"until": list(STOPS), "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False}
    return Task(
        name=name,
        version=1,
        description=f"Questions of {of}, scored by their verifiers.",
        origin=f"made by {REQUIREMENT}, seed {SEED}; Stojanovski et al., 2025, arXiv:2505.24760",
        license="Apache-2.0",
        output_type="generate_until",
        metrics=(SCORE,),
        load=lambda asked: load(names, size, asked),
        score=score,
        metadata={"num_samples": size * len(names), "generation_kwargs": kwargs},
    )


def _named(name: str) -> Task:
    require(bool(name), "name a generator, as in reasoning_gym_only:gcd")
    return _task(f"reasoning_gym_only:{name}", (name,), NUM_ALONE)


TASKS = (
    _task("reasoning_gym", MIXTURE, NUM_EACH),
    Family("reasoning_gym_only:NAME", "Questions of one of reasoning-gym's generators.", _named),
)
