"""Bits per byte on held-out files, beside what compressors need for the same files.

Each file is compressed, and read by the model, on its own; a figure is total bits over total bytes.
"""

import gzip
import lzma
from collections.abc import Mapping, Sequence

import numpy as np

from evals.samples import HeldOut, Load, Task, Tokens
from evals.scoring import BITS_PER_BYTE, BYTE_PERPLEXITY
from evals.tasks.base import NotApplicable


def load(settings: Load) -> Sequence[Tokens]:
    """The held-out files.

    Raises:
      NotApplicable: there are none.
    """
    held_out = required_held_out(settings)
    files = [
        Tokens(key=name, tokens=tokens, num_bytes=size)
        for name, tokens, size in held_out.tokens.documents()
    ]
    return files[: settings.limit]


def required_held_out(settings: Load) -> HeldOut:
    """
    Raises:
      NotApplicable: there is no held-out text in the model's own tokens, or it is chats.
    """
    if settings.held_out is None:
        raise NotApplicable("it needs held-out text in the tokens of a model on this machine")
    if settings.held_out.tokens.sidecar.has_loss_mask:
        raise NotApplicable("the run's held-out documents are chats: name a text with --text")
    return settings.held_out


def baselines(settings: Load) -> Mapping[str, float]:
    """gzip_bpb, xz_bpb and unigram_bpb of the same files, and their bytes."""
    held_out, files = required_held_out(settings), load(settings)
    unigram = unigram_bits(held_out.token_counts_V)
    texts = [
        held_out.tokenizer.decode(file.tokens[1:].tolist(), skip_special_tokens=False).encode()
        for file in files
    ]
    total = sum(file.num_bytes for file in files)
    return {
        "gzip_bpb": 8 * sum(len(gzip.compress(text, 9)) for text in texts) / total,
        "xz_bpb": 8 * sum(len(_xz(text)) for text in texts) / total,
        "unigram_bpb": float(sum(unigram[file.tokens[1:]].sum() for file in files) / total),
        "bytes": total,
    }


def _xz(text: bytes) -> bytes:
    return lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)


def unigram_bits(token_counts_V: np.ndarray) -> np.ndarray:
    """-log2 of each token's share of the training tokens, add-one smoothed, [V]."""
    counts_V = token_counts_V + 1.0
    return -np.log2(counts_V / counts_V.sum())


TASKS = (
    Task(
        name="stdlib_bpb",
        version=1,
        description="Bits per byte on held-out files, beside compressors'.",
        origin="held-out text of the run; for other models a share of this Python's library",
        license="as the text's",
        output_type="loglikelihood_rolling",
        metrics=(BITS_PER_BYTE, BYTE_PERPLEXITY),
        load=load,
        needs_held_out=True,
        baselines=baselines,
        metadata={"unit": "bits per byte"},
    ),
)
