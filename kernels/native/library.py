"""The compiled library: found, checked against its sources, and made known to XLA."""

import ctypes
import functools
import hashlib
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MODULE = "moesaic_native"
SOURCES = Path(__file__).parent / "src"
TARGETS = (
    "moesaic_rows_times_matrix",
    "moesaic_rows_times_rows",
    "moesaic_thin_matmul",
    "moesaic_bfloat16_matmul",
    "moesaic_half_rows_times_matrix",
    "moesaic_half_rows_times_rows",
    "moesaic_quantize",
    "moesaic_quantized_matmul",
    "moesaic_attention_forward",
    "moesaic_attention_backward",
    "moesaic_cached_attention",
    "moesaic_sines",
)
REBUILD = "run `make .venv`, or `pip install .`, with a C++ compiler (g++ or clang++) present"

FLOATS = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
"""Dtypes that some kernels take."""

logger = logging.getLogger(__name__)


def is_available() -> bool:
    """Whether the library is there and was built from the sources beside this file.

    Where it isn't, one line says why and what to do, once.
    """
    return _library() is not None


def is_used_for(x: jax.Array, dtypes: Sequence[jnp.dtype] = FLOATS[:1]) -> bool:
    """Whether a program for the CPU would use kernels on x that take these dtypes.

    Where the CPU is not what this process computes on, nobody is told that they are missing.
    """
    return jax.default_backend() == "cpu" and x.dtype in dtypes and is_available()


def call(
    target: str,
    result: jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct],
    *operands: jax.Array,
    **attributes: int | bool | np.float32 | np.ndarray,
) -> Any:
    """What one of TARGETS makes of CPU arrays, shaped as `result`; only where is_available()."""
    if not is_available():
        raise NotImplementedError(f"the native CPU kernels are not built: {REBUILD}")
    invoke = jax.ffi.ffi_call(target, result, vmap_method="sequential")
    return invoke(*operands, **attributes)


def isa() -> str:
    """The instruction set in use: "avx512", "avx2", or "baseline", what any processor has."""
    return _loaded().moesaic_isa().decode()


def use_isa(name: str) -> bool:
    """Chooses an instruction set for the whole process, for tests; False: it is not here."""
    return _loaded().moesaic_use_isa(name.encode())


def source_hash(sources: Path = SOURCES) -> str:
    """Of every source file, in the order of their names, as setup.py makes it."""
    files = sorted(sources.iterdir())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def load(path: Path, sources: Path = SOURCES) -> ctypes.CDLL:
    """The library at this path.

    Raises:
      ImportError: it can't be loaded, or was built from other sources.
    """
    try:
        library = ctypes.CDLL(str(path))
        library.moesaic_source_hash.restype = library.moesaic_isa.restype = ctypes.c_char_p
        library.moesaic_use_isa.restype = ctypes.c_bool
        built_from = library.moesaic_source_hash().decode()
    except (OSError, AttributeError) as error:
        raise ImportError(f"{path} can't be loaded ({error}): {REBUILD}") from error
    if built_from != source_hash(sources):
        raise ImportError(f"{path} was built from other sources than {sources}: {REBUILD}")
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec(MODULE)
    try:
        if spec is None or spec.origin is None:
            raise ImportError(f"the native CPU kernels are not built: {REBUILD}")
        library = load(Path(spec.origin))
    except ImportError as error:
        logger.warning("%s. Plain XLA does their work, slower.", error)
        return None
    for target in TARGETS:
        capsule = jax.ffi.pycapsule(getattr(library, target))
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    return library


def _loaded() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise NotImplementedError(f"the native CPU kernels are not built: {REBUILD}")
    return library
