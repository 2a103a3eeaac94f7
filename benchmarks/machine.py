"""The machine that a measurement was made on, without which a timing says nothing."""

import os
import platform
from pathlib import Path

from kernels import native


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def description() -> str:
    """Processor, cores, and the instruction set of the native kernels."""
    kernels = native.isa() if native.is_available() else "not built"
    return f"{processor()}, {cores()} cores, native kernels: {kernels}"
