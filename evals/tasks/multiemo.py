"""MultiEmo: the sentiment of sentences from reviews, in 11 languages (Kocoń et al., 2021).

multiemo_en is one language, multiemo all of them, each also reported by itself. Its examples are
drawn by a seed: evaluated with several, mean and standard deviation over the draws are the figure
that articles give for a classification benchmark.
"""

import dataclasses
import json

from evals import data_packages
from evals.data_packages import BIGBENCH
from evals.few_shot import by_hash, choices_with_shots
from evals.samples import Choices, Load, Task
from evals.scoring import ACC
from evals.tasks.bigbench import TASKS_FOLDER

LANGUAGES = ("de", "en", "es", "fr", "it", "ja", "nl", "pl", "pt", "ru", "zh")
CLASSES = ("positive", "negative", "neutral", "ambivalent")
MAX_SAMPLES = 1000
"""Of each language's 57,466 sentences, the first ones by hash: a standard error of at most 1.6
points."""


def load_languages(codes: tuple[str, ...], load: Load) -> list[Choices]:
    members = [f"{TASKS_FOLDER}multiemo/all_sentence_{code}/task.json" for code in codes]
    paths = data_packages.member_paths(BIGBENCH, members)
    whole, found = dataclasses.replace(load, limit=None), []
    for code, path in zip(codes, paths, strict=True):
        rows = json.loads(path.read_text(encoding="utf-8"))["examples"]
        samples = [_sample(str(i), row) for i, row in enumerate(rows)]
        for s in choices_with_shots(samples, whole, most=MAX_SAMPLES):
            found.append(Choices(f"{code}/{s.key}", s.context, s.choices, s.answer, code))
    return (found if len(codes) == 1 else by_hash(found))[: load.limit]


def _sample(key: str, row: dict) -> Choices:
    context = f"Opinion: {row['input'].strip()}\nSentiment ({', '.join(CLASSES)}):"
    answer = max(CLASSES, key=lambda name: row["target_scores"][name])
    return Choices(key, context, tuple(f" {name}" for name in CLASSES), CLASSES.index(answer))


def _task(code: str | None) -> Task:
    codes = LANGUAGES if code is None else (code,)
    of = f"{len(LANGUAGES)} languages" if code is None else f"language {code}"
    return Task(
        name="multiemo" if code is None else f"multiemo_{code}",
        version=1,
        description=f"Sentiment of a sentence of a review, one of four, {of}.",
        origin=(
            f"{BIGBENCH.name} {BIGBENCH.version}, multiemo/all_sentence_LANGUAGE; Kocoń et al., "
            "2021, MultiEmo: multilingual, multilevel, multidomain sentiment analysis corpus"
        ),
        license="not stated by the package",
        output_type="multiple_choice",
        metrics=(ACC,),
        load=lambda load: load_languages(codes, load),
        num_fewshot=4,
        metadata={"num_samples": MAX_SAMPLES * len(codes)},
    )


TASKS = (_task(None), *map(_task, LANGUAGES))
