"""What every program has to do: prompts to read and tokens to generate.

Only the standard library: peers import this file from other environments.
"""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass

ROWS = (1, 8)
"""Sequences decoded at once."""
SKIPPED = 2
"""Steps of decoding that are not timed: caches fill, threads wake."""


@dataclass(frozen=True)
class Work:
    """The same for all programs; token ids are random."""

    prompts: list[list[int]]
    """One for each of the sequences that are decoded together."""
    long_prompt: list[int]
    """Read alone."""
    tokens: int
    """Decoding steps that are timed."""

    @property
    def decoded_length(self) -> int:
        """Tokens of a sequence at the end of decoding."""
        return len(self.prompts[0]) + 1 + SKIPPED + self.tokens

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def make_work(vocab_size: int, *, prompt: int, tokens: int, long_prompt: int) -> Work:
    """Prompts of so many tokens each, `tokens` steps to time, one long prompt."""
    draw = random.Random(0)

    def some(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    return Work([some(prompt) for _ in range(max(ROWS))], some(long_prompt), tokens)


def read_work(text: str) -> Work:
    """The inverse of `Work.to_json`."""
    return Work(**json.loads(text))


def measures(
    decode: Callable[[int], float], prefill: Callable[[], float]
) -> dict[str, Callable[[], float]]:
    """Measures by the names that all programs answer to; `decode` takes the number of sequences."""
    named: dict[str, Callable[[], float]] = {
        decode_name(rows): lambda rows=rows: decode(rows) for rows in ROWS
    }
    return named | {PREFILL: prefill}


def decode_name(rows: int) -> str:
    return f"decode {rows}"


PREFILL = "prefill"
MEASURES = (*map(decode_name, ROWS), PREFILL)
