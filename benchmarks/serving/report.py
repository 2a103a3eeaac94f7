"""The parts of scripts/bench_serving.py: each measures, prints, and returns what it measured."""

from collections.abc import Callable

from benchmarks.serving.batching import load_part
from benchmarks.serving.comparisons import drafts_part, prefix_part, start_part
from benchmarks.serving.request import Findings, Request

PARTS: dict[str, Callable[[Request], Findings]] = {
    "load": load_part,
    "prefix": prefix_part,
    "drafts": drafts_part,
    "start": start_part,
}
"""By option; the first one without."""
