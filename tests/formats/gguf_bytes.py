"""GGUF files put together byte by byte, so that a test can say what no writer would write."""

import struct

import numpy as np

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
"""Value types."""


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """Dims in ggml's order, the fastest first."""
    head = text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    return head + struct.pack("<IQ", kind, offset)


def gguf(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    counts: tuple[int, int] | None = None,
) -> bytes:
    num_tensors, num_pairs = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, num_tensors, num_pairs)
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def small(seed: int = 0) -> bytes:
    """A valid file: two vectors and a matrix of float32, and metadata of every shape."""
    values = np.random.default_rng(seed).standard_normal(8 + 32 + 8).astype("<f4")
    tokens = struct.pack("<IQ", STRING, 2) + text("a") + text("b")
    pairs = (
        pair("general.architecture", STRING, text("llama")),
        pair("llama.block_count", U32, struct.pack("<I", 2)),
        pair("llama.rope.freq_base", F32, struct.pack("<f", 1e4)),
        pair("tokenizer.ggml.add_bos_token", BOOL, b"\x01"),
        pair("tokenizer.ggml.tokens", ARRAY, tokens),
        pair("tokenizer.ggml.scores", ARRAY, struct.pack("<IQff", F32, 2, 0, 1)),
    )
    tensors = (
        tensor("first", (8,), 0, 0),
        tensor("matrix", (8, 4), 0, 32),
        tensor("last", (8,), 0, 160),
    )
    return gguf(pairs, tensors, values.tobytes())
