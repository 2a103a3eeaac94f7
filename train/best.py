"""The weights of the lowest validation loss, kept beside the newest checkpoints (checkpoint.best).

They lie in RUN/best, without the optimiser's state; best.json says the step and the loss.
"""

import json
import math
from pathlib import Path
from typing import Any

from checkpoint.orbax_store import CheckpointStore, latest_step
from checkpoint.run_directory import BEST
from formats.atomic_folder import replace_text
from formats.small_files import read_json_object
from parallel.distributed import is_first
from train.state import TrainState


class BestCheckpoint:
    """A context manager, which waits for the last save."""

    def __init__(self, run_dir: Path, metadata: dict[str, Any], *, is_kept: bool) -> None:
        """
        Args:
          metadata: as of the run's other checkpoints.
          is_kept: whether anything is to be done.
        """
        self._path = run_dir / f"{BEST}.json"
        self._store, self._loss = None, math.inf
        if not is_kept:
            return
        if self._path.exists() and latest_step(run_dir / BEST) is not None:
            self._loss = float(read_json_object(self._path)["validation_loss"])
        self._store = CheckpointStore(run_dir / BEST, keep=1, metadata=metadata)

    def __enter__(self) -> "BestCheckpoint":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._store is not None:
            self._store.__exit__(*error)

    def offer(self, step: int, loss: Any, state: TrainState, data_iterator: Any) -> None:
        """Keeps the state if its loss is the lowest so far; waits for it, and for the save.

        Args:
          loss: float32 scalar on the devices.
        """
        if self._store is None:
            return
        value = float(loss)
        if not value < self._loss:
            return
        self._loss = value
        parts = {name: x for name, x in state.to_dict().items() if name != "opt_state"}
        self._store.save(step, parts, data_iterator)
        self._store.wait()
        if is_first():
            replace_text(self._path, json.dumps({"step": step, "validation_loss": value}) + "\n")
