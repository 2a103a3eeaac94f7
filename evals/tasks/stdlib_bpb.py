"""Bits per byte on held-out files, beside what compressors need for the same files.

Each file is compressed, and read by the model, on its own; a figure is total bits over total bytes.
"""

import gzip
import lzma

import numpy as np

from evals.tasks.base import ModelUnderTest, Result

NAME, VERSION = "stdlib_bpb", 1


def run(subject: ModelUnderTest) -> Result:
    """The model's bits per byte; details hold gzip_bpb, xz_bpb and unigram_bpb."""
    files = [(tokens, size) for _, tokens, size in subject.held_out.documents()]
    scores = subject.score([tokens for tokens, _ in files])
    bits = np.array([score.nats.sum(dtype=np.float64) for score in scores]) / np.log(2)
    sizes = np.array([size for _, size in files], np.float64)
    unigram = unigram_bits(subject.token_counts_V)
    texts = [
        subject.tokenizer.decode(tokens[1:].tolist(), skip_special_tokens=False).encode()
        for tokens, _ in files
    ]
    total = sizes.sum()
    return Result(
        task=NAME,
        version=VERSION,
        value=float(bits.sum() / total),
        standard_error=ratio_standard_error(bits, sizes),
        unit="bits per byte",
        count=len(files),
        details={
            "gzip_bpb": 8 * sum(len(gzip.compress(text, 9)) for text in texts) / total,
            "xz_bpb": 8 * sum(len(_xz(text)) for text in texts) / total,
            "unigram_bpb": float(sum(unigram[tokens[1:]].sum() for tokens, _ in files) / total),
            "bytes": int(total),
        },
    )


def _xz(text: bytes) -> bytes:
    return lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)


def unigram_bits(token_counts_V: np.ndarray) -> np.ndarray:
    """-log2 of each token's share of the training tokens, add-one smoothed, [V]."""
    counts_V = token_counts_V + 1.0
    return -np.log2(counts_V / counts_V.sum())


def ratio_standard_error(numerators: np.ndarray, denominators: np.ndarray) -> float:
    """Standard error of sum(numerators) / sum(denominators) over independent files.

    The linearised variance of a ratio estimator (Cochran 1977, section 6.4); 0 for a single file.
    """
    count = len(numerators)
    if count < 2:
        return 0.0
    ratio = numerators.sum() / denominators.sum()
    residuals = numerators - ratio * denominators
    return float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / denominators.sum())
