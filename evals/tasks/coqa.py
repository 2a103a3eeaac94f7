"""CoQA: questions on a story, turn after turn (Reddy et al., 2018).

Each turn is asked after the story and the turns before it with their right answers. The package
holds dialogues in the form of the test set, with the references of four people.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs.checks import require
from evals import data_packages
from evals.data_packages import BIGBENCH
from evals.few_shot import by_hash
from evals.samples import Answer, Load, Metric, Prompt, Task
from evals.tasks.bigbench import TASKS_FOLDER
from evals.text_match import exact_match, f1, leave_one_out

MEMBER = f"{TASKS_FOLDER}coqa_conversational_question_answering/coqa.test.json"
EXACT, F1 = Metric("em"), Metric("f1")
STOPS = ("\n", "Q:")
MAX_NEW_TOKENS = 48


def load(load: Load) -> list[Prompt]:
    require(load.num_fewshot == 0, "coqa shows the turns before, and no other examples")
    path = data_packages.member_path(BIGBENCH, MEMBER)
    stories = json.loads(path.read_text(encoding="utf-8"))["data"]
    return by_hash(p for story in stories for p in turns(story))[: load.limit]


def turns(story: Mapping[str, Any]) -> Iterator[Prompt]:
    """Each question of a dialogue, with the references of all who answered it."""
    told = f"{story['story'].strip()}\n\n"
    for i, (asked, answer) in enumerate(zip(story["questions"], story["answers"], strict=True)):
        assert asked["turn_id"] == answer["turn_id"] == i + 1
        others = [answers[i]["input_text"] for answers in story["additional_answers"].values()]
        told += f"Q: {asked['input_text'].strip()}\nA:"
        yield Prompt(
            key=f"{story['id']}/{i + 1}",
            prompt=told,
            reference=[answer["input_text"], *others],
            stops=STOPS,
            max_new_tokens=MAX_NEW_TOKENS,
            group=story["source"],
        )
        told += f" {answer['input_text'].strip()}\n\n"


def score(prompt: Prompt, answers: Sequence[Answer]) -> dict[Metric, float]:
    text = answers[0].text
    return {
        EXACT: leave_one_out(exact_match, text, prompt.reference),
        F1: leave_one_out(f1, text, prompt.reference),
    }


TASKS = (
    Task(
        name="coqa_turns",
        version=1,
        description=(
            "Questions on a story, each after the turns before it; the package's 700 dialogues, "
            "not CoQA's development set."
        ),
        origin=(
            f"{BIGBENCH.name} {BIGBENCH.version}, coqa.test.json; Reddy et al., 2018, "
            "arXiv:1808.07042"
        ),
        license="several, by the stories' sources (CoQA's site lists them)",
        output_type="generate_until",
        metrics=(EXACT, F1),
        load=load,
        score=score,
        metadata={
            "generation_kwargs": {
                "until": list(STOPS),
                "max_gen_toks": MAX_NEW_TOKENS,
                "do_sample": False,
            },
        },
    ),
)
