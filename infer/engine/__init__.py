"""The engine: many requests generated at once, each as if it were alone."""

from infer.choice import MOST_LOGPROBS
from infer.engine.engine import Engine
from infer.engine.options import EngineOptions, with_pages
from infer.engine.types import (
    Constraint,
    ConstraintFailed,
    Emitted,
    EngineStats,
    Reason,
    Request,
    TokenLogprobs,
)

__all__ = [
    "MOST_LOGPROBS",
    "Constraint",
    "ConstraintFailed",
    "Emitted",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "Reason",
    "Request",
    "TokenLogprobs",
    "with_pages",
]
