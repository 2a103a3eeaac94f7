"""Device time of a profiled program, by kernel."""

from collections import defaultdict
from pathlib import Path

import jax


def kernel_times(folder: Path) -> list[tuple[str, int, float]]:
    """Kernels of a profile: name, how often it ran, microseconds in all; the longest first."""
    count: dict[str, int] = defaultdict(int)
    microseconds: dict[str, float] = defaultdict(float)
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            streams = [line for line in plane.lines if line.name.startswith("Stream")]
            for event in (event for line in streams for event in line.events):
                count[event.name] += 1
                microseconds[event.name] += event.duration_ns / 1e3
    longest = sorted(microseconds, key=lambda name: -microseconds[name])
    return [(name, count[name], microseconds[name]) for name in longest]
