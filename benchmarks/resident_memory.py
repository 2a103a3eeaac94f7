"""Memory that a process holds, as Linux counts it."""

import re
from pathlib import Path
from typing import Literal


def resident(field: Literal["VmRSS", "VmHWM"]) -> int:
    """VmRSS (now) or VmHWM (most since the last reset), bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> int:
    """Lets VmHWM begin anew; what is resident now, bytes."""
    now = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return now
