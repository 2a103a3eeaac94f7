"""Tests run on eight simulated CPU devices; our own layers under JAX's strictest rules."""

import atexit
import contextlib
import functools
import gc
import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

os.environ.setdefault("NPROC", "16")  # threads for the collectives of eight devices on few cores
# Tiny programs run once: most of a test's time would be spent on making them fast. LLVM optimises
# nothing, fusions are emitted by the older and quicker of XLA's two ways (a third of the time for
# the tests of train/), and a program's code is generated on one thread, as the workers have a core
# each.
FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ.setdefault("MOESAIC_KEPT_WEIGHTS_GIB", "0")  # the user's own folder is no test's
jax.config.update("jax_num_cpu_devices", 8)
# Tracing makes objects by the million and keeps most: looking for garbage among them every 700
# (Python's default) takes a tenth of all time. What is imported stays: nobody looks through it.
gc.set_threshold(50_000, 10, 10)
gc.disable()
# Many tests compile the same tiny programs: the workers of a session, which begin after this, share
# what they compiled. Who names a folder, as the Makefile does, keeps it for the next session; a
# program is read where the same one would be compiled, by the same jaxlib with the same flags.
PROGRAMS = "MOESAIC_TEST_PROGRAMS"
MOST_BYTES = 2**30
"""Of kept programs; all tests' are a tenth, and each change of the model brings others."""


KIND = ("vendor_id", "cpu family", "model", "flags", "CPU ", "Features")
"""Lines of /proc/cpuinfo by which XLA chooses instructions."""


def _of_this_cpu(programs: Path) -> Path:
    """A folder of its own, as XLA also reads programs with instructions that this one lacks."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    kind = sorted({line for line in lines if line.startswith(KIND)}) or [platform.processor()]
    return programs / f"{zlib.crc32(repr(kind).encode()):08x}"


def _remove_oldest(folder: Path) -> None:
    """Programs beyond MOST_BYTES, those first whose last use is longest ago."""
    files = [(path.stat(), path) for path in folder.rglob("*") if path.is_file()]
    total = 0
    for stat, path in sorted(files, key=lambda file: -max(file[0].st_atime, file[0].st_mtime)):
        total += stat.st_size
        if total > MOST_BYTES:
            path.unlink(missing_ok=True)


if PROGRAMS not in os.environ:
    os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="moesaic-tests-")
    atexit.register(shutil.rmtree, os.environ[PROGRAMS], ignore_errors=True)
elif "PYTEST_XDIST_WORKER" not in os.environ:
    _remove_oldest(Path(os.environ[PROGRAMS]))
jax.config.update("jax_compilation_cache_dir", str(_of_this_cpu(Path(os.environ[PROGRAMS]))))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
# A fifth of a tiny program's time is spent on the context in which it is written down, where each
# has its own: a hundred share one, which keeps their constants, and then there is another.
with contextlib.suppress(ImportError, AttributeError):  # another jax may keep it elsewhere
    from jax._src.interpreters import mlir

    programs, made = itertools.count(), mlir.make_ir_context
    shared = functools.lru_cache(maxsize=1)(lambda _: made())
    mlir.make_ir_context = lambda: shared(next(programs) // 100)

STRICT = ("tests/kernels/", "tests/model/", "tests/parallel/")
"""Code that calls optax can't be held to it."""


EVERY = "MOESAIC_TEST_EVERY"
SHARE = 3
"""One in so many of the slow cases of large tables runs in CI; another third after each commit."""


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m says
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases of `thinned` tables that are not fast are slow; with -m slow such cases and those of
    `sampled` tables are drawn anew by each commit, unless the environment asks for every one.
    """
    is_sample = config.option.markexpr == "slow" and EVERY not in os.environ
    commit, left_out, kept = _commit() if is_sample else "", [], []
    for item in items:
        thinned, is_drawn = item.get_closest_marker("thinned"), False
        if thinned is not None and zlib.crc32(item.name.encode()) % thinned.args[0]:
            item.add_marker(pytest.mark.slow)
            is_drawn = True
        is_drawn |= item.get_closest_marker("sampled") is not None
        is_out = is_sample and is_drawn and zlib.crc32(f"{commit} {item.nodeid}".encode()) % SHARE
        (left_out if is_out else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_finish() -> None:
    """All modules are there."""
    gc.freeze()
    gc.enable()


def _commit() -> str:
    """What is checked out, the same for all workers of a session; nothing outside of git."""
    git = shutil.which("git")
    if git is None:
        return ""
    made = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return made.stdout.strip()


@pytest.fixture(autouse=True)
def programs_are_kept_by_one_test_at_most() -> Iterator[None]:
    """A verb that runs in a test's own process keeps its programs; the next test does not."""
    yield
    kept_programs = sys.modules.get("infer.kept_programs")
    if kept_programs is not None:
        kept_programs.keep_in(None)


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """No implicit change of dtype or rank in kernels, model and parallel."""
    if not request.node.nodeid.startswith(STRICT):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
