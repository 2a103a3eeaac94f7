"""Loading streams: a sharded checkpoint of 1.1 GB, made here, read in a process of its own."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.generation.memory import ALLOWED, large_model
from checkpoint.families import MIXTRAL
from checkpoint.public import write_model
from checkpoint.weight_map import expand, flatten
from formats.safetensors.writer import TensorWriter
from kernels import native
from model.transformer import Transformer, abstract_variables

pytestmark = pytest.mark.slow

LARGEST = 4 * math.prod((32_000, 512))
"""Bytes of the largest tensor, the embedding."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder, config = tmp_path_factory.mktemp("large"), large_model()
    shapes = flatten(abstract_variables(Transformer(config))[0])
    entries = expand(MIXTRAL.rows, config, shapes)
    plan = [(entry.name, np.dtype(np.float32), entry.shape) for entry in entries]
    draw = np.random.default_rng(0)
    with TensorWriter(folder, plan, max_shard_bytes=300_000_000) as writer:
        for name, _, shape in plan:
            writer.write(name, draw.standard_normal(shape, np.float32))
    (folder / "config.json").write_text(json.dumps(write_model(MIXTRAL, config)))
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) > 2**30
    return folder


@pytest.mark.parametrize(
    ("dtype", "mesh"),
    [("float32", ()), ("bfloat16", ()), ("float32", ("2", "2", "1")), ("float32", ("1", "2", "2"))],
)
def test_peak_memory_is_the_result_and_a_piece(checkpoint, dtype, mesh):
    used = measured(checkpoint, dtype, *mesh)
    whole = (2 if dtype == "bfloat16" else 4) * large_model().num_parameters
    assert used["result"] >= whole
    assert whole * 0.9 < used["peak"] <= ALLOWED * whole + LARGEST, used


@pytest.mark.skipif(not native.is_available(), reason="no native library to round in place")
@pytest.mark.parametrize(
    ("weights", "bits"), [("fp8", 8.5), ("int8", 8.5), ("int4", 4.5), ("int4_affine", 5)]
)
def test_few_bits_take_their_own_memory_and_one_tensor(checkpoint, weights, bits):
    """Rounded as they are read: floats are there of one tensor at a time."""
    used = measured(checkpoint, "weights", weights)
    assert bits / 32 < used["result"] / (4 * large_model().num_parameters) < 1.2 * bits / 32
    assert used["result"] < used["peak"] <= ALLOWED * used["result"] + LARGEST, used


@pytest.mark.parametrize("form", ["huggingface", "gguf"])
def test_a_conversion_needs_a_few_tensors(checkpoint, form, tmp_path):
    """A tensor as it is read, as it is written, a piece of 64 MiB, and the program's own growth."""
    used = measured(checkpoint, "to", form, str(tmp_path / f"it.{form}"))
    assert used["peak"] < 4 * LARGEST < large_model().num_parameters, used


def measured(checkpoint, *arguments: str) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.checkpoint.peak_memory", str(checkpoint), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
