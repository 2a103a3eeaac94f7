"""SQuAD 1.1: the words of a passage that answer a question (Rajpurkar et al., 2016).

squad_v1 is the development set, squad_amazon, squad_new_wiki, squad_nyt and squad_reddit are the
four sets of other sources made in the same way (Miller et al., 2020).
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
from evals.text_match import best, exact_match, f1

SETS = {
    "squad_v1": ("squaddev_v1.1.json", 10_565),
    "squad_amazon": ("amazon_reviews_v1.0.json", 9_877),
    "squad_new_wiki": ("new_wiki_v1.0.json", 7_936),
    "squad_nyt": ("nyt_v1.0.json", 10_056),
    "squad_reddit": ("reddit_v1.0.json", 9_767),
}
EXACT, F1 = Metric("exact_match"), Metric("f1")
STOPS = ("\n",)
MAX_NEW_TOKENS = 48


def load(file: str, load: Load) -> list[Prompt]:
    require(load.num_fewshot == 0, "squad has no examples: leave --num-fewshot out")
    path = data_packages.member_path(BIGBENCH, f"{TASKS_FOLDER}squad_shifts/{file}")
    data = json.loads(path.read_text(encoding="utf-8"))["data"]
    return by_hash(prompts(data))[: load.limit]


def prompts(data: Sequence[Mapping[str, Any]]) -> Iterator[Prompt]:
    for article in data:
        title = article.get("title", "").replace("_", " ").strip()
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                yield Prompt(
                    key=asked["id"],
                    prompt=(
                        f"Title: {title}\n\nBackground: {paragraph['context'].strip()}\n\n"
                        f"Question: {asked['question'].strip()}\n\nAnswer:"
                    ),
                    reference=[answer["text"].strip() for answer in asked["answers"]],
                    stops=STOPS,
                    max_new_tokens=MAX_NEW_TOKENS,
                )


def score(prompt: Prompt, answers: Sequence[Answer]) -> dict[Metric, float]:
    """Against the nearest of the references."""
    text = answers[0].text
    return {
        EXACT: best(exact_match, text, prompt.reference),
        F1: best(f1, text, prompt.reference),
    }


def _task(name: str, file: str, number: int) -> Task:
    paper = (
        "Rajpurkar et al., 2016, arXiv:1606.05250"
        if name == "squad_v1"
        else "Miller et al., 2020, arXiv:2004.14444"
    )
    kwargs = {"until": list(STOPS), "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False}
    return Task(
        name=name,
        version=1,
        description="The words of a passage that answer a question, without examples.",
        origin=f"{BIGBENCH.name} {BIGBENCH.version}, squad_shifts/{file}; {paper}",
        license="CC-BY-SA-4.0 (SQuAD's); the package states none for it",
        output_type="generate_until",
        metrics=(EXACT, F1),
        load=lambda asked: load(file, asked),
        score=score,
        metadata={"num_samples": number, "generation_kwargs": kwargs},
    )


TASKS = tuple(_task(name, *file) for name, file in SETS.items())
