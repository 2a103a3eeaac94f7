"""What a step takes of the devices: its share of their peak (MFU), memory, the wait for data."""

import resource
import sys
from typing import Any

import jax
import numpy as np

from configs.accelerators import UNKNOWN, data_sheet_of
from configs.base import RunConfig
from model.flops import training_flops_per_token


class StepCost:
    """Costs of the steps of one run, for their lines of the log."""

    def __init__(self, run: RunConfig, devices: np.ndarray) -> None:
        """
        Args:
          devices: of the run's mesh.
        """
        self._flops = flops_per_step(run)
        sheet = data_sheet_of(devices.flat[0].device_kind)
        self._peak = None
        if sheet != UNKNOWN:
            rates = {"bfloat16": sheet.flops_16, "float32": sheet.flops_32}
            self._peak = devices.size * rates[run.execution.compute_dtype]
        self._own = [x for x in devices.flat if x.process_index == jax.process_index()]

    def line(self, seconds: float, waited: float) -> dict[str, float]:
        """A step's "model_tflops" per second, of all devices together, "mfu" where the devices'
        data sheet is known, "data_wait" in seconds, and "peak_memory", the largest so far of any
        device of this process in bytes; on the CPU, the process's.

        Args:
          seconds: the step's wall time.
          waited: for its batch.
        """
        rate = self._flops / max(seconds, 1e-9)
        made = {"model_tflops": rate / 1e12, "data_wait": waited, "peak_memory": self._memory()}
        return made | ({} if self._peak is None else {"mfu": rate / self._peak})

    def _memory(self) -> float:
        stats: list[dict[str, Any] | None] = [device.memory_stats() for device in self._own]
        peaks = [x["peak_bytes_in_use"] for x in stats if x and "peak_bytes_in_use" in x]
        return float(max(peaks, default=peak_resident()))


def flops_per_step(run: RunConfig) -> float:
    """Model FLOPs of an optimiser step (model/flops.py). Beside adapters the weights have no
    gradient, which saves a third; preferences take a second forward pass, of the reference. A
    teacher's work is left out.
    """
    passes = (2 if run.lora is not None else 3) + (1 if run.preference is not None else 0)
    forward = training_flops_per_token(run.model, run.data.seq_len) / 3
    return passes * forward * run.tokens_per_step


def peak_resident() -> int:
    """The most memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
