"""A run's own cache of its teacher's best tokens, filled as the rows come.

Caches that are made ahead, for several students, are in train/offline_cache.py.

B rows, L length, J teacher tokens kept.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from configs.checks import UserError
from configs.distill import DistillConfig
from data.packed_chats import PackedChats
from data.packing import PackedRows
from data.tokenizers.tokenizer import fingerprint
from formats.small_files import read_json
from train.loop import to_devices
from train.teachers import Batch, Teacher, View


def with_cache(look: View, cache: "TopKCache", mesh: Mesh) -> View:
    """Reads the teacher's view of known rows; asks the teacher for the others and keeps the answer.

    What is used always went through the cache's number format, so a resumed run sees the same
    values.
    """

    def view(batch: Batch) -> Batch:
        rows = np.asarray(batch["row"])
        if not cache.has(rows):
            seen = look(batch)
            cache.write(
                rows, np.asarray(seen["teacher_ids"]), np.asarray(seen["teacher_log_probs"])
            )
        ids, log_probs = cache.read(rows)
        return {**batch, **to_devices({"teacher_ids": ids, "teacher_log_probs": log_probs}, mesh)}

    return view


class TopKCache:
    """Memory-mapped [rows, L, J] token ids (uint16 or uint32) and log-probabilities (float16).

    The files have their full size at once but, being sparse, take disk space only for rows written.
    """

    def __init__(
        self,
        directory: Path,
        rows: PackedRows | PackedChats,
        config: DistillConfig,
        teacher: Teacher,
    ) -> None:
        """Opens or makes the cache of the teacher's view of these rows.

        Raises:
          UserError: the folder holds the view of another teacher, or with other settings.
        """
        assert config.top_k is not None
        shape = (len(rows), rows.seq_len, config.top_k)
        settings = {
            "teacher": teacher.weights,
            "training_tokens": fingerprint(rows.file.path),
            "rows": len(rows),
            "seq_len": rows.seq_len,
            "top_k": config.top_k,
            "temperature": config.temperature,
        }
        directory.mkdir(parents=True, exist_ok=True)
        described = directory / "cache.json"
        mend = "delete that folder, it will be made again"
        if described.exists() and read_json(described, mend) != settings:
            raise UserError(
                f"{directory} holds what another teacher said, or with other settings: {mend}"
            )
        id_dtype = np.uint16 if teacher.model.config.vocab_size <= 2**16 else np.uint32
        self._ids = _open(directory / "ids.bin", id_dtype, shape)
        self._log_probs = _open(directory / "log_probs.bin", np.float16, shape)
        self._is_known = _open(directory / "known.bin", np.uint8, (len(rows),))
        described.write_text(json.dumps(settings))

    def has(self, rows_B: np.ndarray) -> bool:
        return bool(self._is_known[rows_B].all())

    def read(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 and log-probabilities float32, [B, L, J]."""
        return self._ids[rows_B].astype(np.int32), self._log_probs[rows_B].astype(np.float32)

    def write(self, rows_B: np.ndarray, ids_BLJ: np.ndarray, log_probs_BLJ: np.ndarray) -> None:
        """Keeps the rows; they count as known only once both files have them."""
        self._ids[rows_B] = ids_BLJ
        self._log_probs[rows_B] = np.maximum(log_probs_BLJ, np.finfo(np.float16).min)
        self._is_known[rows_B] = 1


def _open(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    mode = "r+" if path.exists() else "w+"
    return np.memmap(path, dtype, mode=mode, shape=shape)
