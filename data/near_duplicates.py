"""Near-duplicates of training documents among the held-out ones, by MinHash (Broder 1997).

A document is the set of its words in runs of five (shingles). The share that two sets have in
common (Jaccard) is the chance that the same shingle has the smallest hash in both, so it is
estimated from the smallest values of many hashes. Those are cut into bands, and documents that
agree in a whole band are compared (Leskovec et al., Mining of Massive Datasets, chapter 3).
"""

import hashlib
import re
from collections.abc import Iterable

import numpy as np

RUN = 5
"""Words of a shingle."""
NUM_HASHES, BANDS = 128, 32
"""Bands of four: documents of similarity s agree in one with 1 - (1 - s^4)^32; 99.98% at 0.7."""
PRIME = (1 << 61) - 1

_WORD = re.compile(r"\w+")


def signature(text: str) -> np.ndarray:
    """The smallest value of each hash over the text's shingles, uint64 [NUM_HASHES]."""
    words = _WORD.findall(text.lower())
    runs = {" ".join(words[i : i + RUN]) for i in range(max(len(words) - RUN + 1, 1))}
    digests = [hashlib.blake2b(run.encode(), digest_size=4).digest() for run in runs]
    keys = np.array([int.from_bytes(digest, "big") for digest in digests], np.uint64)
    # A multiplication of 31 by 32 bits stays below 2^63.
    return ((keys[:, None] * _FACTORS[None] + _ADDENDS[None]) % np.uint64(PRIME)).min(axis=0)


_RANDOM = np.random.default_rng(5)
_FACTORS = _RANDOM.integers(1, 1 << 31, NUM_HASHES, dtype=np.uint64)
_ADDENDS = _RANDOM.integers(0, 1 << 61, NUM_HASHES, dtype=np.uint64)


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """The estimated share of shingles that two documents have in common."""
    return float((first == second).mean())


class HeldOutIndex:
    """The held-out documents, asked by training documents which of them they are like."""

    def __init__(self, texts: Iterable[str], max_similarity: float) -> None:
        self.max_similarity = max_similarity
        self.signatures = [signature(text) for text in texts]
        self.found: dict[int, float] = {}
        """The largest similarity of each held-out document that is above the limit."""
        self._by_band: dict[tuple[int, bytes], list[int]] = {}
        for i, own in enumerate(self.signatures):
            for key in _bands(own):
                self._by_band.setdefault(key, []).append(i)

    def compare(self, text: str) -> None:
        """Notes the held-out documents that are like this training document."""
        own = signature(text)
        near = {i for key in _bands(own) for i in self._by_band.get(key, ())}
        for i in near:
            share = similarity(own, self.signatures[i])
            if share > self.max_similarity:
                self.found[i] = max(share, self.found.get(i, 0.0))


def _bands(own: np.ndarray) -> list[tuple[int, bytes]]:
    return [(i, band.tobytes()) for i, band in enumerate(own.reshape(BANDS, -1))]
