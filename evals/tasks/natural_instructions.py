"""Sets that Natural Instructions holds in a form of its own: WinoGrande's sentences, MultiRC.

Neither is the split and form under which these benchmarks are reported, so their names end in _ni.
"""

import json
import re
from collections.abc import Iterator

from evals import data_packages
from evals.data_packages import BIGBENCH
from evals.few_shot import choices_with_shots
from evals.samples import Choices, Load, Task
from evals.scoring import ACC, CHOICES
from evals.tasks.bigbench import TASKS_FOLDER

ANSWERS = "subtask033_winogrande_answer_generation"
OBJECTS = "subtask034_winogrande_question_modification_object"
PERSONS = "subtask035_winogrande_question_modification_person"
MULTIRC = "subtask058_multirc_question_answering"
MAX_SAMPLES = 2000
LICENSES = "Apache-2.0 (Natural Instructions'); the package states none for the set"


def _examples(*names: str) -> list[list[dict]]:
    members = [f"{TASKS_FOLDER}natural_instructions/{name}/task.json" for name in names]
    paths = data_packages.member_paths(BIGBENCH, members)
    return [json.loads(path.read_text(encoding="utf-8"))["examples"] for path in paths]


def load_winogrande(load: Load) -> list[Choices]:
    answers, objects, persons = _examples(ANSWERS, OBJECTS, PERSONS)
    samples = list(winogrande(answers, objects, persons))
    return choices_with_shots(samples, load, most=MAX_SAMPLES, pool=0)  # a twin would tell


def winogrande(answers: list[dict], objects: list[dict], persons: list[dict]) -> Iterator[Choices]:
    """A sentence and its twin, in which a changed word turns the answer: the two answers are the
    choices of both.

    A rewritten question's answer is looked up among the questions with answers; in a sentence about
    two persons the first is PersonX and the answer, and PersonY the twin's.
    """
    known = {}
    for row in answers:
        sentence = row["input"].partition("Question:")[2]
        known[_plain(sentence)] = _name(row["target"][0])
    asked = [_twins(row) for row in objects]
    known |= {sentence: answer for sentence, answer, _ in asked}
    seen = set()
    for sentence, answer, twin in asked:
        other = known.get(twin, answer)
        if other.lower() != answer.lower():
            for text, right, wrong in ((sentence, answer, other), (twin, other, answer)):
                if text.count("_") == 1 and text not in seen:
                    seen.add(text)
                    yield _sentence(text, right, wrong, "object", len(seen))
    for sentence, _, twin in map(_twins, persons):
        for text, right, wrong in ((sentence, "PersonX", "PersonY"), (twin, "PersonY", "PersonX")):
            is_whole = text.count("_") == 1 and "PersonX" in text and "PersonY" in text
            if is_whole and text not in seen:
                seen.add(text)
                yield _sentence(text, right, wrong, "person", len(seen))


def _twins(row: dict) -> tuple[str, str, str]:
    """A sentence, its answer, and its twin."""
    asked = row["input"].partition("Question:")[2]
    sentence, _, answer = asked.rpartition("Answer:")
    return _plain(sentence), _name(answer), _plain(row["target"][0])


def _plain(text: str) -> str:
    return " ".join(text.split())


def _name(answer: str) -> str:
    return answer.strip().rstrip(".").strip()


def _sentence(text: str, right: str, wrong: str, group: str, number: int) -> Choices:
    """The choices go on from the blank to the sentence's end; which comes first is no hint."""
    before, _, after = text.partition("_")
    names = sorted((right, wrong), key=str.lower)
    rest = re.sub(r"^ (?=['.,;:!?])", "", after)
    space = " " if before.strip() else ""
    choices = tuple(f"{space}{name}{rest}" for name in names)
    return Choices(f"{group}/{number}", before.rstrip(), choices, names.index(right), group)


def load_multirc(load: Load) -> list[Choices]:
    (rows,) = _examples(MULTIRC)
    samples = [s for i, row in enumerate(rows) for s in multirc(i, row)]
    return choices_with_shots(samples, load, most=MAX_SAMPLES, pool=0)  # options share a passage


def multirc(number: int, row: dict) -> Iterator[Choices]:
    """One question for each option: is it a right answer?"""
    passage, _, asked = row["input"].partition("\nQuestion: ")
    question, *parts = re.split(r" ?\(([A-Z])\) ", asked)
    right = {letter.strip() for letter in row["target"][0].strip(" .").split(",")}
    passage = _plain(re.sub(r"Sent \d+: ", " ", passage.removeprefix("Paragraph- ")))
    for letter, option in zip(parts[::2], parts[1::2], strict=True):
        context = (
            f"{passage}\nQuestion: {question.strip()}\nAnswer: {option.strip(' .')}\n"
            "Is this answer right, yes or no?"
        )
        is_right = letter in right
        yield Choices(f"{number}/{letter}", context, (" no", " yes"), int(is_right))


TASKS = (
    Task(
        name="winogrande_ni",
        version=1,
        description=(
            "Which of two names fills a sentence's blank: sentences of WinoGrande as Natural "
            f"Instructions has them, not its test split; {MAX_SAMPLES:,} of them."
        ),
        origin=(
            f"{BIGBENCH.name} {BIGBENCH.version}, natural_instructions/subtask033, 034 and 035; "
            "Sakaguchi et al., 2019, arXiv:1907.10641"
        ),
        license=LICENSES,
        output_type="multiple_choice",
        metrics=CHOICES,
        load=load_winogrande,
        metadata={"num_samples": MAX_SAMPLES},
    ),
    Task(
        name="multirc_ni",
        version=1,
        description=(
            "Whether an answer to a question on a passage is right: MultiRC as Natural "
            f"Instructions has it, one question an option; {MAX_SAMPLES:,} of them."
        ),
        origin=(
            f"{BIGBENCH.name} {BIGBENCH.version}, natural_instructions/{MULTIRC}; Khashabi et al., "
            "2018, Looking beyond the surface"
        ),
        license=LICENSES,
        output_type="multiple_choice",
        metrics=(ACC,),
        load=load_multirc,
        metadata={"num_samples": MAX_SAMPLES},
    ),
)
