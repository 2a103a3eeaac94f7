"""What to measure, and what the parts share."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving import load
from benchmarks.serving.load import Traffic
from benchmarks.serving.measured import Measured
from configs.checks import require
from infer.sources import Source

TEXT_BYTES = 400_000
"""Of the text that prompts are pieces of."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure."""

    source: str = "smollm2"
    weights: str = "int8"
    rounds: int = 3
    requests: int = 64
    """Of a turn."""
    clients: int = 8
    rate: float | None = None
    """Requests a second, at random times; None: `clients` that wait for their answers."""
    rows: int = 8
    """Texts that a server generates at once."""
    length: int = 2048
    """Tokens of prompt and answer at most; the model's context where that is shorter."""
    prompt_mean: float = load.PROMPT_MEAN
    answer_mean: float = load.ANSWER_MEAN
    shared: int = 8192
    """Tokens of the prompts whose beginning is shared, with --prefix."""
    step_seconds: float | None = None
    """That our server's steps may take: less between two texts, and later first ones."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "requests", "clients", "rows", "prompt_mean", "answer_mean"):
            value = getattr(self, name)
            require(value > 0, f"--{name.replace('_', '-')} {value} must be greater than 0")
        for name in ("rate", "step_seconds"):
            value = getattr(self, name)
            sentence = f"--{name.replace('_', '-')} {value} must be greater than 0"
            require(value is None or value > 0, sentence)
        for name in ("length", "shared"):
            value = getattr(self, name)
            require(value >= 32, f"--{name} {value} must be at least 32 tokens")

    @property
    def traffic(self) -> Traffic:
        return Traffic(self.rate, None if self.rate is not None else self.clients)


SETTINGS = {
    "rounds": (int, "rounds over all servers"),
    "requests": (int, "of a turn"),
    "clients": (int, "that wait for their answers"),
    "rate": (float, "requests a second at random times, instead of clients"),
    "rows": (int, "texts generated at once"),
    "length": (int, "tokens of prompt and answer at most"),
    "prompt_mean": (float, "tokens of a prompt"),
    "answer_mean": (float, "tokens of an answer"),
    "shared": (int, "tokens of prompts that begin alike"),
    "step_seconds": (float, "that a step of our server may take; none is as `serve` without it"),
    "seed": (int, "of lengths, texts and times"),
}
"""Kind and purpose of each setting that is a number."""

Findings = tuple[dict[str, Any], Mapping[str, Sequence[Measured]]]
"""What is kept as JSON, and the turns to draw."""


def ours(request: Request) -> tuple[str, ...]:
    seconds = request.step_seconds
    return (
        *("--weights", request.weights),
        *(() if seconds is None else ("--step-seconds", str(seconds))),
    )


def some_text() -> str:
    """Source of this Python's standard library."""
    text = ""
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) > TEXT_BYTES:
            break
    return text


def sized(source: Source, wanted: int) -> int:
    """Tokens of a long prompt: as many as asked for, or as the context has room for."""
    return min(wanted, source.config.context_length - 32)
