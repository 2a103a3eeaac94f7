"""The parts of scripts/bench_generation.py: each measures, prints, and returns what it measured."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import ceilings
from benchmarks.generation import memory, quality, speed
from infer.sources import open_source


@dataclass(frozen=True)
class Request:
    """What to measure."""

    source: str = "smollm2"
    transformers_python: str = sys.executable
    """The interpreter that has torch and transformers."""
    rounds: int = 7
    tokens: int = 64
    """Decoding steps of a turn."""
    prefill: int = 512
    """Tokens of the prompt whose reading is timed."""


def speed_part(request: Request) -> dict[str, Any]:
    settings = speed.Settings(
        rounds=request.rounds,
        tokens=request.tokens,
        prefill=request.prefill,
        python=request.transformers_python,
    )
    measured = speed.measure(open_source(request.source), settings)
    speed.print_speeds(*measured, settings)
    read = ceilings.read_bandwidth()
    speed.print_reading(measured[0], read)
    return speed.as_json(*measured, settings) | {"read_gb_per_second": read}


def quality_part(request: Request) -> dict[str, Any]:
    settings = quality.Settings()
    measured = quality.measure(open_source(request.source), settings)
    quality.print_quality(*measured, settings)
    return quality.as_json(*measured, settings)


def memory_part(request: Request) -> dict[str, Any]:
    del request  # a model of random weights
    measured = memory.measure_prompts()
    memory.print_prompts(measured)
    return {"shape": memory.MODEL, "prompts": measured}


def loading_part(request: Request) -> dict[str, Any]:
    del request  # a checkpoint of random weights
    measured = memory.measure_loading()
    memory.print_loading(measured)
    return {"formats": measured}


PARTS: dict[str, Callable[[Request], dict[str, Any]]] = {
    "speed": speed_part,
    "quality": quality_part,
    "memory": memory_part,
    "loading": loading_part,
}
