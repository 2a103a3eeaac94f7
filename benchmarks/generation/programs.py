"""The programs that generate from one model, and the files that peers read it from."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from benchmarks import machine
from benchmarks.generation.llama_peer import KINDS
from benchmarks.generation.work import Work
from benchmarks.generation.worker import Program
from configs.checks import UserError
from infer.convert import Conversion, convert
from infer.sources import Source
from infer.weights import WeightFormat

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS: tuple[WeightFormat, ...] = ("float32", "bfloat16", "int8", "int4", "int4_affine")
LLAMA, TRANSFORMERS = "llama.cpp", "transformers"
PEER = Path(__file__).with_name("transformers_peer.py")


@dataclass(frozen=True)
class Programs:
    """Those that can be run here, and why others can't."""

    found: list[Program]
    left_out: dict[str, str]
    """By name, the reason."""


def our_name(weights: str) -> str:
    return f"moesaic {weights}"


def llama_name(kind: str) -> str:
    return f"{LLAMA} {kind}"


TRANSFORMERS_NAME = f"{TRANSFORMERS} float32"


def programs(source: Source, work: Work, folder: Path, python: str) -> Programs:
    """Ours in each format, llama.cpp in each of its own, transformers.

    Args:
      folder: for the peers' files, which must stay there while they are measured.
      python: the interpreter that has torch and transformers.
    """
    threads, found, left_out = str(machine.cores()), [], {}
    for weights in WEIGHTS:
        command = (sys.executable, "-m", "benchmarks.generation.ours")
        command += (str(source.path.absolute()), weights, work.to_json())
        found.append(Program(our_name(weights), command, ROOT, our_environment(), is_peer=False))
    path, reason = llama_file(source, folder)
    if path is None:
        left_out[LLAMA] = reason
    else:
        command = (sys.executable, "-m", "benchmarks.generation.llama_peer", str(path))
        for kind in KINDS:
            arguments = (*command, kind, threads, work.to_json())
            found.append(Program(llama_name(kind), arguments, ROOT, os.environ))
    path, reason = _transformers_folder(source, folder, python)
    if path is None:
        left_out[TRANSFORMERS] = reason
    else:
        command = (python, str(PEER), str(path), threads, work.to_json())
        elsewhere = Path(tempfile.mkdtemp(dir=folder))
        found.append(Program(TRANSFORMERS_NAME, command, elsewhere, peer_environment(python)))
    return Programs(found, left_out)


def llama_file(source: Source, folder: Path) -> tuple[Path | None, str]:
    """The model as a GGUF of floats; or None, and why llama.cpp can't be a peer."""
    reason = missing(sys.executable, os.environ, "llama_cpp")
    if reason:
        return None, f'{reason}: pip install ".[llama]" builds it'
    path = folder / "F16.gguf"
    reason = converted(source, path, Conversion(to="gguf", quantization="F16"))
    return (None, reason) if reason else (path, "")


def _transformers_folder(source: Source, folder: Path, python: str) -> tuple[Path | None, str]:
    reason = missing(python, peer_environment(python), "torch", "transformers")
    if reason:
        return None, f'{reason}: pip install ".[parity]", or name a Python that has them'
    path = folder / "huggingface"
    reason = converted(source, path, Conversion(to="huggingface", dtype="float32"))
    return (None, reason) if reason else (path, "")


def our_environment() -> Mapping[str, str]:
    """This process's, with its folder of compiled programs where it has one."""
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    return os.environ | ({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {})


def peer_environment(python: str) -> Mapping[str, str]:
    """Of another interpreter: packages that PYTHONPATH adds to this one are not its own."""
    if python == sys.executable:
        return os.environ
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def missing(python: str, environment: Mapping[str, str], *packages: str) -> str:
    """Why an interpreter can't import them; "" where it can."""
    command = [python, "-c", f"import {', '.join(packages)}"]
    with tempfile.TemporaryDirectory() as elsewhere:  # the repository's names hide others
        try:
            done = subprocess.run(
                command, cwd=elsewhere, env=dict(environment), capture_output=True, text=True
            )
        except OSError as error:
            return f"{python} can't be run ({error.strerror})"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def converted(source: Source, path: Path, conversion: Conversion) -> str:
    """Writes it; why it can't be said in that form, "" where it can."""
    try:
        convert(source, path, conversion)
    except UserError as error:
        return str(error)
    return ""
