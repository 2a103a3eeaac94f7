"""Comparison of a converted model with what it was: next tokens on the same text, from both sides.

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
from infer.convert import has_tokenizer
from infer.logits import full_logits
from infer.sources import Source

TOLERANCE = 1e-4
"""Of the largest logit: float32 sums in another order differ by a tenth of it."""

TEXT = """\
The river rises in the hills above the town, passes under three old bridges and reaches the sea \
after 214 miles. In 1852 a flood took two of them; the third, built of stone, still stands. \
"We had never seen the like," wrote a clerk, "and hope not to again." Its name in the local speech \
means "slow water", and for most of the year that is what it is.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values) if values else 0.0
"""
"""Text to compare models with a tokenizer on: prose and code."""
LENGTH = 128
"""Tokens of it at most."""
RANDOM_LENGTH = 48
"""Tokens for models without a tokenizer: random ones."""
RECORDED = "logits.npz"
"""Beside a checkpoint: tokens int32 [L] and logits float32 [L, V] that another program computed."""

_PEER = Path(__file__).parent / "peers" / "transformers_logits.py"


@dataclass(frozen=True)
class Comparison:
    """One side against the other."""

    what: str
    divergence: float
    """Kullback-Leibler divergence of the found next tokens from the expected, nats: the mean over
    the text. 0 is equal."""
    agreement: float
    """Share of places where both hold the same next token most likely."""
    difference: float
    """Largest, of logits."""
    tolerance: float
    """Largest allowed `difference`, or where the form rounds, `divergence`."""
    is_rounded: bool
    """Whether the found side is in a form that rounds."""
    is_independent: bool
    """Whether the other side is not our own reading."""

    @property
    def is_good(self) -> bool:
        return (self.divergence if self.is_rounded else self.difference) <= self.tolerance


@dataclass(frozen=True)
class Unreadable:
    """A GGUF that another library has no reading of."""

    what: str
    reason: str


@dataclass(frozen=True)
class Probe:
    """Tokens to compare on."""

    tokens: list[int]
    what: str


def verify(
    source: Source, target: Source, probe: Probe, *, divergence: float | None = None
) -> Iterator[Comparison | Unreadable]:
    """Each comparison that this machine can make, as it is made.

    Args:
      probe: of `choose_probe`.
      divergence: what the target's form may change, in nats; None where it rounds nothing.
    Raises:
      UserError: another library is there and can't read a Hugging Face checkpoint, or recorded
        logits are damaged.
    """
    recorded = read_recorded(source)
    ours = {side.name: full_logits(*side.load(), probe.tokens) for side in (source, target)}
    before, after = ours[source.name], ours[target.name]
    what = f"{target.name} and {source.name}, both read by us"
    yield compare(what, before, after, is_independent=False, divergence=divergence)
    if recorded is not None:
        what = f"{source.name} and its recorded logits"
        yield compare(what, recorded[1], before, is_independent=True)
    for side in (source, target):
        if side.kind not in ("huggingface", "gguf") or not has_transformers(side):
            continue
        what = f"{side.name} and transformers on it"
        try:
            theirs = transformers_logits(side.path, probe.tokens)
        except UserError as error:
            if side.kind != "gguf":  # it reads GGUF of some architectures only
                raise
            yield Unreadable(what, str(error))
            continue
        yield compare(what, theirs, ours[side.name], is_independent=True)


def choose_probe(source: Source) -> Probe:
    """The tokens of recorded logits where there are any, those of `TEXT` where the source has a
    tokenizer, random ones elsewhere.

    Raises:
      UserError: recorded logits are damaged.
    """
    config, recorded = source.config, read_recorded(source)
    if recorded is not None:
        return Probe(recorded[0].tolist(), f"the {len(recorded[0])} tokens of {RECORDED}")
    reason = "no tokenizer"
    if has_tokenizer(source):
        try:
            tokens = source.tokenizer().encode(TEXT)[: min(LENGTH, config.context_length)]
            if tokens and max(tokens) < config.vocab_size:
                return Probe(tokens, f"{len(tokens)} tokens of a text")
            reason = "the tokenizer has more tokens than the model"
        except UserError as error:
            reason = str(error)
    length = min(RANDOM_LENGTH, config.context_length)
    random = np.random.default_rng(0).integers(0, config.vocab_size, length)
    return Probe(random.tolist(), f"{length} random tokens ({reason})")


def compare(
    what: str,
    expected_LV: np.ndarray,
    found_LV: np.ndarray,
    *,
    is_independent: bool,
    divergence: float | None = None,
) -> Comparison:
    """
    Args:
      divergence: allowed, where the found side is in a form that rounds.
    Raises:
      UserError: logits of other shapes.
    """
    if expected_LV.shape != found_LV.shape:
        raise UserError(f"{what}: logits {list(expected_LV.shape)} beside {list(found_LV.shape)}")
    pairs = zip(expected_LV, found_LV, strict=True)
    divergences_L = [_divergence(expected_V, found_V) for expected_V, found_V in pairs]
    exact = TOLERANCE * float(np.abs(expected_LV).max())
    return Comparison(
        what=what,
        divergence=float(np.mean(divergences_L)),
        agreement=float((expected_LV.argmax(-1) == found_LV.argmax(-1)).mean()),
        difference=float(np.abs(expected_LV - found_LV).max()),
        tolerance=exact if divergence is None else divergence,
        is_rounded=divergence is not None,
        is_independent=is_independent,
    )


def _divergence(expected_V: np.ndarray, found_V: np.ndarray) -> float:
    """KL(expected || found) of one place in nats, in float64; rounding makes it no less than 0."""
    expected_logp_V, found_logp_V = (_log_softmax(x_V) for x_V in (expected_V, found_V))
    terms_V = np.exp(expected_logp_V) * (expected_logp_V - found_logp_V)
    return max(float(terms_V.sum()), 0.0)


def _log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted_V = logits_V.astype(np.float64) - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())


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
