"""Whether a converted model computes what it did: logits on the same tokens, from both sides.

The other side is another library where one is installed (transformers for folders and GGUF files),
in a process of its own, or logits that were recorded; our own reading of source and target are
compared in any case, which finds what the conversion broke, but not what our reading has wrong.

L length, V vocab.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.checks import UserError
from infer.logits import full_logits
from infer.sources import Source

TOLERANCE = 1e-4
"""Of the largest logit: float32 sums in another order differ by a tenth of it."""

LENGTH = 48
RECORDED = "logits.npz"
"""Beside a checkpoint: tokens int32 [L] and logits float32 [L, V] that another program computed."""

_PEER = Path(__file__).parent / "peers" / "transformers_logits.py"


@dataclass(frozen=True)
class Comparison:
    """One side against the other."""

    what: str
    difference: float
    """Largest, of logits."""
    tolerance: float
    is_independent: bool
    """Whether the other side is not our own reading."""

    @property
    def is_good(self) -> bool:
        return self.difference <= self.tolerance


def verify(source: Source, target: Source, *, loss: float = 0.0) -> Iterator[Comparison]:
    """Each comparison that this machine can make, as it is made.

    Args:
      loss: what the target's format may change, as a share of the largest logit (quantised forms).
    Raises:
      UserError: another library is there and can't read the checkpoint, or recorded logits are
        damaged.
    """
    recorded = read_recorded(source)
    length = min(LENGTH, source.config.context_length)
    drawn = np.random.default_rng(0).integers(0, source.config.vocab_size, length)
    tokens = drawn.tolist() if recorded is None else recorded[0].tolist()
    ours = {side.name: full_logits(*side.load(), tokens) for side in (source, target)}
    before, after = ours[source.name], ours[target.name]
    yield _compare(f"{target.name} and {source.name}, both read by us", before, after, False, loss)
    if recorded is not None:
        yield _compare(f"{source.name} and its recorded logits", recorded[1], before, True)
    for side in (source, target):
        if side.kind in ("huggingface", "gguf") and has_transformers(side):
            theirs = transformers_logits(side.path, tokens)
            yield _compare(f"{side.name} and transformers on it", theirs, ours[side.name], True)


def _compare(
    what: str, expected: np.ndarray, found: np.ndarray, is_independent: bool, loss: float = 0.0
) -> Comparison:
    if expected.shape != found.shape:
        raise UserError(f"{what}: logits {list(expected.shape)} beside {list(found.shape)}")
    scale = float(np.abs(expected).max())
    difference = float(np.abs(expected - found).max())
    return Comparison(what, difference, scale * max(TOLERANCE, loss), is_independent)


def read_recorded(source: Source) -> tuple[np.ndarray, np.ndarray] | None:
    """(tokens, logits) that lie beside the source; None without.

    Raises:
      UserError: they are damaged, or of another model.
    """
    folder = source.path if source.path.is_dir() else source.path.parent
    path = folder / RECORDED
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            tokens, logits = file["tokens"], file["logits"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} holds no arrays `tokens` and `logits` ({error})") from error
    if tokens.ndim != 1 or logits.shape != (len(tokens), source.config.vocab_size):
        raise UserError(
            f"{path} has tokens {list(tokens.shape)} and logits {list(logits.shape)}, expected [L] "
            f"and [L, {source.config.vocab_size}]"
        )
    return tokens, logits


def has_transformers(side: Source) -> bool:
    """Whether the library that reads the other side is installed."""
    needed = ("torch", "transformers", *(("gguf",) if side.kind == "gguf" else ()))
    return all(importlib.util.find_spec(name) is not None for name in needed)


def transformers_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """Float32 [L, V] by transformers on CPU, in a process of its own (it looks for a package named
    `kernels`, and finds ours where it runs).

    Raises:
      UserError: it can't read the checkpoint.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.npy"
        command = [sys.executable, str(_PEER), str(path.absolute()), json.dumps(tokens), str(out)]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"transformers can't read {path}: {last}")
        return np.load(out)
