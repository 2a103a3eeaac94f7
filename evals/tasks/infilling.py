"""Fill-in-the-middle: one line of a held-out function, given what stands before and after it.

For models that were trained to: their tokenizers have tokens that say where prefix, suffix and
middle begin (Bavarian et al., 2022, arXiv:2207.14255; here prefix, suffix, middle, PSM). The lines
are those that line_completion draws, split at characters as in training, and exact match is decided
by teacher forcing in the same way: the line, and then the end of the text.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from data.corpora import name_hash
from data.tokenizers.infilling import ENDS, find_marks
from data.tokenizers.tokenizer import end_of_text_id
from evals.samples import HeldOut, Load, Tokens
from evals.tasks.base import NotApplicable
from evals.tasks.line_completion import LINE_COMPLETION, MAX_EXAMPLES, function_lines
from evals.tasks.stdlib_bpb import required_held_out


def load(settings: Load) -> Sequence[Tokens]:
    """The lines, each behind its prefix and suffix.

    Raises:
      NotApplicable: the tokenizer has no such tokens, or there are no functions to draw from.
    """
    held_out = required_held_out(settings)
    marks = find_marks(held_out.tokenizer)
    if marks is None:
        raise NotApplicable(
            "it needs a model that was trained to fill in the middle, and this tokenizer has no "
            "tokens for that (such as <fim_prefix>)"
        )
    found = draw(held_out, marks)
    if not found:
        raise NotApplicable("it needs held-out Python functions, and this run's corpus has none")
    return found[: settings.limit]


def draw(held_out: HeldOut, marks: tuple[int, int, int]) -> list[Tokens]:
    """A line of each function, in an order that depends on their places alone."""
    tokenizer = held_out.tokenizer
    ends = [i for name in ENDS if (i := tokenizer.token_to_id(name)) is not None]
    end = end_of_text_id(tokenizer)
    found = []
    for module, tokens, _ in held_out.tokens.documents():
        text = tokenizer.decode(tokens[1:].tolist(), skip_special_tokens=False)
        for function, number, begin, after in function_lines(text):
            middle = tokenizer.encode(text[begin:after]).ids
            room = held_out.length - len(middle) - 4  # the first token and the marks
            prefix, suffix = _around(tokenizer, text[:begin], text[after:], room)
            if room > 0 and middle:
                ids = [int(tokens[0]), marks[0], *prefix, marks[1], *suffix, marks[2], *middle, end]
                found.append(
                    Tokens(
                        key=f"{module}:{function}:{number}",
                        tokens=np.array(ids, np.int32),
                        num_bytes=0,
                        num_answer=len(middle) + 1,
                        last_ids=tuple(sorted({*ends, end})),
                    )
                )
    return sorted(found, key=lambda sample: name_hash(sample.key))[:MAX_EXAMPLES]


def _around(
    tokenizer: Tokenizer, before: str, after: str, room: int
) -> tuple[list[int], list[int]]:
    """The last tokens before a place and the first after it, so many together at most; one side has
    what the other leaves, and half at least."""
    prefix, suffix = tokenizer.encode(before).ids, tokenizer.encode(after).ids
    num_suffix = min(len(suffix), max(room // 2, room - len(prefix)))
    num_prefix = max(min(len(prefix), room - num_suffix), 0)
    return prefix[len(prefix) - num_prefix :], suffix[: max(num_suffix, 0)]


TASKS = (
    dataclasses.replace(
        LINE_COMPLETION,
        name="line_infilling",
        description="Lines of held-out Python functions, given what is before and after them.",
        load=load,
    ),
)
