"""Compiled programs that are kept in a folder, and taken up again without being traced.

JAX's own cache knows a program by its text: a model is traced and lowered for it at each start,
which takes longer than reading what was compiled. Here a program is also known by all that its text
is made from: the code, the model's settings, the shapes of what it is given, the device.

NAME.key        of what a program is made from: which program it is
NAME.program    of a program's text: what was compiled, with the trees of what it takes and gives

Files are written under another name first. What is damaged is made anew.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from infer.kept_files import UNFINISHED, code_hash, make_room
from kernels import native

CODE = ("configs", "formats", "infer", "kernels", "model", "parallel")
"""Packages that programs are traced from."""

MOST_BYTES = 512 << 20
"""Of the folder: what was used longest ago gives way. A program of SmolLM2 takes 2 MB."""

_folder: Path | None = None


def keep_in(folder: Path | None) -> None:
    """Keeps what is compiled from now on in this folder, which is there; None: keeps nothing."""
    global _folder
    _folder = folder


class KeptPrograms:
    """Runs jitted functions, each compiled once for the shapes that it is given.

    Args:
      given: arrays that all of them take first, such as a model's variables.
    """

    def __init__(self, *given: Any) -> None:
        self._given = given
        is_kept = _folder is not None and _is_on_default_device(given)
        self._shapes = repr(_shapes(given)) if is_kept else None
        self._found: dict[Any, Callable[..., Any] | None] = {}

    @property
    def is_active(self) -> bool:
        """Whether programs are kept of arrays that lie on one device."""
        return self._shapes is not None

    def run(
        self,
        function: Any,
        *arguments: Any,
        before: tuple[Any, ...] = (),
        after: tuple[Any, ...] = (),
    ) -> Any:
        """What the function gives.

        Args:
          arguments: arrays, behind those that all take.
          before, after: the function's static arguments, around the arrays.
        """
        found = None
        if self._shapes is not None and _folder is not None:
            key = (function, before, after, _shapes(arguments))
            if key not in self._found:
                self._found[key] = self._find(_folder, function, arguments, before, after)
            found = self._found[key]
        if found is not None:
            return found(*self._given, *arguments)
        return function(*before, *self._given, *arguments, *after)

    def _find(
        self,
        folder: Path,
        function: Any,
        arguments: tuple[Any, ...],
        before: tuple[Any, ...],
        after: tuple[Any, ...],
    ) -> Callable[..., Any] | None:
        """The compiled program; None where arrays lie elsewhere than on the default device."""
        arrays = (*self._given, *arguments)
        if not _is_on_default_device(arrays):
            return None
        called = f"{function.__module__}.{function.__qualname__}"
        settings = repr((before, after, _shapes(arguments)))
        name = _digest(_machine(), code_hash(CODE), called, settings, str(self._shapes))
        return _kept(folder, name, lambda: function.lower(*before, *arrays, *after))


def _kept(folder: Path, name: str, lower: Callable[[], Any]) -> Callable[..., Any]:
    """The program of that name, read or made."""
    link = folder / f"{name}.key"
    found = _read(folder, _text_of(link))
    if found is not None:
        with contextlib.suppress(OSError):
            os.utime(link)
        return found
    lowered = lower()
    program = _digest(_machine(), lowered.as_text())
    found = _read(folder, program)
    if found is None:
        with _from_no_file():
            found = lowered.compile()
        content = _as_bytes(found)
        if content is None:
            return found
        _write(folder / f"{program}.program", content)
    _write(link, program.encode())
    return found


def _shapes(tree: Any) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, *((np.shape(x), getattr(x, "dtype", type(x))) for x in leaves)


def _is_on_default_device(arrays: Any) -> bool:
    """Whether all lies where a program is compiled for that names no device."""
    shardings = {x.sharding for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array)}
    return shardings <= {SingleDeviceSharding(jax.devices()[0])}


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} {part}".encode())
    return digest.hexdigest()


@functools.cache
def _machine() -> str:
    """All that shapes what is compiled of a text: versions, settings, the device."""
    device = jax.devices()[0]
    settings = {
        name: value
        for name, value in jax.config.values.items()
        if not any(word in name for word in ("cache", "dir", "log", "debug"))
    }
    isa = native.isa() if device.platform == "cpu" and native.is_available() else ""
    known = (
        *(jax.__version__, jaxlib.version.__version__, device.client.platform_version),
        *(device.device_kind, platform.machine(), _processor(), isa, len(jax.devices())),
        *(os.environ.get("XLA_FLAGS", ""), sorted(settings.items(), key=str)),
    )
    return _digest(*map(repr, known))


def _processor() -> str:
    """The processor and what it can do: a program for one may end another's process."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(named)}))


@contextlib.contextmanager
def _from_no_file() -> Iterator[None]:
    """XLA can't write down a program for a CPU that it has itself read from a file; other devices'
    programs it can, and JAX's cache has them for a process that can't keep them here."""
    if jax.default_backend() != "cpu":
        yield
        return
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def _as_bytes(compiled: Any) -> bytes | None:
    """None where XLA can't write it down: this process had it from a file before."""
    try:
        body = pickle.dumps(serialize_executable.serialize(compiled))
    except (jax.errors.JaxRuntimeError, pickle.PicklingError, ValueError):
        return None
    return hashlib.sha256(body).digest() + body


def _text_of(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _read(folder: Path, name: str) -> Callable[..., Any] | None:
    """The program of that name; None where it is not there, or damaged."""
    path = folder / f"{name}.program"
    try:
        stored = path.read_bytes()
        if hashlib.sha256(stored[32:]).digest() != stored[:32]:
            return None
        loaded = serialize_executable.deserialize_and_load(
            *pickle.loads(stored[32:]), execution_devices=jax.devices()[:1]
        )
        os.utime(path)
    except Exception:  # an older one, another machine's: whatever it is, it is compiled anew
        return None
    return loaded


def _write(path: Path, content: bytes) -> None:
    """A disk that refuses costs the next start its time, and this one nothing."""
    part = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        if make_room(path.parent, len(content), MOST_BYTES):
            part.write_bytes(content)
            part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
