"""Sarcasm in headlines of news: a satirical paper's against a serious one's (Misra and Arora,
2019)."""

import json

from evals import data_packages
from evals.data_packages import OPENAI_EVALS
from evals.few_shot import choices_with_shots
from evals.samples import Choices, Load, Task
from evals.scoring import ACC

MEMBER = "evals/registry/data/sarcasm/samples.jsonl"
MAX_SAMPLES = 2000
"""Of 28,614, the first ones by hash."""


def load(load: Load) -> list[Choices]:
    path = data_packages.member_path(OPENAI_EVALS, MEMBER)
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    samples = [
        Choices(
            key=str(i),
            context=f"Headline: {row['input'][-1]['content'].strip()}\nSarcastic (yes or no):",
            choices=(" no", " yes"),
            answer=int(row["ideal"]),
        )
        for i, row in enumerate(rows)
    ]
    return choices_with_shots(samples, load, most=MAX_SAMPLES)


TASKS = (
    Task(
        name="sarcasm",
        version=1,
        description=f"Whether a headline of news is sarcastic; {MAX_SAMPLES:,} headlines.",
        origin=(
            f"{OPENAI_EVALS.name} {OPENAI_EVALS.version}, {MEMBER}; Misra and Arora, 2019, "
            "arXiv:1908.07414"
        ),
        license="CC-BY-4.0 (the data set's); the package: MIT",
        output_type="multiple_choice",
        metrics=(ACC,),
        load=load,
        num_fewshot=4,
        metadata={"num_samples": MAX_SAMPLES},
    ),
)
