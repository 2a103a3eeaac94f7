"""Instructions that a program can check, two at once: "without commas", "in three bullet points".

The checks are IFEval's (Zhou et al., 2023, arXiv:2311.07911) from if-verifiable, the requests this
project's own, as the package has none: in IFEval's form and under its four numbers, but not IFEval.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from configs.checks import require
from evals.optional_packages import optional_module
from evals.samples import Answer, Load, Metric, Prompt, Task

REQUIREMENT = "if-verifiable==0.1.2"
MAX_NEW_TOKENS = 512
PROMPT_STRICT, PROMPT_LOOSE = Metric("prompt_level_strict_acc"), Metric("prompt_level_loose_acc")
CHECK_STRICT, CHECK_LOOSE = Metric("inst_level_strict_acc"), Metric("inst_level_loose_acc")

Check = tuple[str, Mapping[str, Any]]

REQUESTS = (
    "Write a short letter to a neighbour whose dog barks at night.",
    "Explain to a child why the sky is blue.",
    "Describe how to plant a tomato.",
    "Recommend a way to spend a rainy Sunday at home.",
    "Write an announcement for a village festival.",
    "Summarize what a library is good for.",
    "Give advice to somebody who begins to run.",
    "Write the beginning of a story about a lost key.",
    "Describe a bicycle to somebody who has never seen one.",
    "Write a complaint about a late train.",
    "Explain what a budget is.",
    "Invite a friend to a birthday dinner.",
    "Tell how bread is baked.",
    "Describe the sea in winter.",
    "Write a note that asks the office to save paper.",
    "Explain how to learn a new language.",
    "Write a short speech for a retiring teacher.",
    "Compare cats and dogs as pets.",
    "Describe the work of a nurse.",
    "Explain what recycling is.",
)
PAIRS: tuple[tuple[Check, Check], ...] = (
    (("punctuation:no_comma", {}), ("startend:end_checker", {"end_phrase": "That is all for now"})),
    (
        ("detectable_format:number_bullet_lists", {"num_bullets": 3}),
        ("keywords:forbidden_words", {"forbidden_words": ["very", "really"]}),
    ),
    (("detectable_format:title", {}), ("punctuation:no_comma", {})),
    (
        ("length_constraints:number_words", {"num_words": 60, "relation": "less than"}),
        ("startend:quotation", {}),
    ),
    (
        ("detectable_content:postscript", {"postscript_marker": "P.S."}),
        ("keywords:existence", {"keywords": ["morning", "together"]}),
    ),
    (
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}),
        ("length_constraints:number_words", {"num_words": 40, "relation": "at least"}),
    ),
    (
        ("detectable_content:number_placeholders", {"num_placeholders": 2}),
        ("keywords:frequency", {"keyword": "please", "frequency": 2, "relation": "at least"}),
    ),
    (
        ("length_constraints:number_paragraphs", {"num_paragraphs": 3}),
        ("keywords:existence", {"keywords": ["because"]}),
    ),
    (
        ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2}),
        ("detectable_format:title", {}),
    ),
    (
        ("combination:two_responses", {}),
        ("keywords:forbidden_words", {"forbidden_words": ["I"]}),
    ),
)
"""Checks that can hold together and need neither chance nor a language model."""
STRIDES = (0, 3, 7)
"""Each request is asked with these pairs from its own place on: 60 prompts, six a pair."""


def load(load: Load) -> list[Prompt]:
    require(load.num_fewshot == 0, "instructions have no examples: leave --num-fewshot out")
    prompts = []
    for i, request in enumerate(REQUESTS):
        for stride in STRIDES:
            pair = PAIRS[(i + stride) % len(PAIRS)]
            told = "\n".join([request, *(describe(check) for check in pair)])
            reference = {"checks": [[name, dict(settings)] for name, settings in pair]}
            prompts.append(
                Prompt(
                    key=f"{i}/{stride}",
                    prompt=({"role": "user", "content": told},),
                    reference=reference,
                    max_new_tokens=MAX_NEW_TOKENS,
                )
            )
    return prompts[: load.limit]


def describe(check: Check) -> str:
    """A check in the package's words."""
    name, settings = check
    text = str(_checkers()[name](name).build_description(**settings)).strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def score(prompt: Prompt, answers: Sequence[Answer]) -> dict[Metric, float]:
    """Whether both instructions were followed, and what share of them."""
    common = optional_module("if_verifiable.common", REQUIREMENT, "checking instructions")
    assert not isinstance(prompt.prompt, str)
    checks = prompt.reference["checks"]
    _, found = common.evaluate_instructions(
        response=answers[0].text,
        instruction_id_list=[name for name, _ in checks],
        kwargs_list=[settings for _, settings in checks],
        prompt=str(prompt.prompt[0]["content"]),
        instruction_registry=_checkers(),
    )
    return {
        PROMPT_STRICT: found.binary_strict,
        CHECK_STRICT: found.partial_strict,
        PROMPT_LOOSE: found.binary_loose,
        CHECK_LOOSE: found.partial_loose,
    }


def _checkers() -> Mapping[str, Any]:
    name = "if_verifiable.ifeval.instructions_registry"
    return optional_module(name, REQUIREMENT, "checking instructions").INSTRUCTION_DICT


TASKS = (
    Task(
        name="instructions",
        version=1,
        description=(
            "Requests with two instructions that a program checks, by IFEval's checks; needs a "
            "chat template."
        ),
        origin=f"this project's requests, checked by {REQUIREMENT}",
        license="Apache-2.0",
        output_type="generate_until",
        metrics=(PROMPT_STRICT, CHECK_STRICT, PROMPT_LOOSE, CHECK_LOOSE),
        load=load,
        score=score,
        metadata={
            "num_samples": len(REQUESTS) * len(STRIDES),
            "generation_kwargs": {"until": [], "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False},
        },
    ),
)
