"""Keys of prefixes: a chain of hashes over whole pages of tokens.

A page's key says all that its contents depend on: the model and its weights, how keys are stored,
the request's preference for experts and salt, every token up to the page's end, and which of its
tokens were read as prompt (the others were read one by one, whose sums are taken in another order).
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from infer.engine.types import Request
from model.transformer import Transformer, Variables


def root_key(identity: bytes, request: Request) -> bytes:
    """Of the prefix without tokens."""
    digest = hashlib.sha256(b"prefix\0" + identity)
    _add(digest, "salt", request.cache_salt.encode("utf-8", "surrogatepass"))
    for name, wanted in sorted((request.preference or {}).items()):
        array = np.ascontiguousarray(wanted, np.float32)
        _add(digest, "preference", f"{name} {array.shape}".encode(), array.tobytes())
    return digest.digest()


def next_key(parent: bytes, tokens: Sequence[int], num_read_as_prompt: int) -> bytes:
    """Of the prefix with one more page of tokens."""
    digest = hashlib.sha256(parent)
    _add(digest, "tokens", np.asarray(tokens, "<i4").tobytes())
    if num_read_as_prompt < len(tokens):
        _add(digest, "text", str(num_read_as_prompt).encode())
    return digest.digest()


def identity_of(model: Transformer, variables: Variables | None, details: Any) -> bytes:
    """What tells a model, its weights and how they run from all others, 32 bytes.

    Args:
      variables: hashed whole; None where no other weights can be met.
      details: of the engine, in what its `repr` says.
    """
    digest = hashlib.sha256(f"{model!r}\0{details!r}".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.ascontiguousarray(leaf)
        _add(digest, jax.tree_util.keystr(path), f"{array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.digest()


def _add(digest: Any, tag: str, *parts: bytes) -> None:
    """Every part with its tag and length, so that no two lists of parts look alike."""
    for part in (tag.encode(), *parts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
