"""Loads or converts FOLDER in a process of its own and prints, in bytes, what that took: JSON.

    python -m tests.checkpoint.peak_memory FOLDER DTYPE [DATA EXPERT TENSOR]
    python -m tests.checkpoint.peak_memory FOLDER weights FORMAT
    python -m tests.checkpoint.peak_memory FOLDER to FORM TARGET

With mesh sizes, onto that many CPU devices.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.resident_memory import reset_peak, resident
from infer.convert import Conversion, convert
from infer.sources import Source, open_source
from parallel.mesh import make_mesh


def started(folder: str) -> tuple[Source, int]:
    """The source, and what is resident before anything is read."""
    jax.block_until_ready(jax.numpy.zeros(8) + 1)  # the runtime's own threads and buffers
    source = open_source(folder)
    return source, reset_peak()


def convert_to(folder: str, form: Any, target: str) -> None:
    source, before = started(folder)
    convert(source, Path(target), Conversion(to=form))
    print(json.dumps({"peak": resident("VmHWM") - before}))


def load(folder: str, dtype: Any, *sizes: str, weights: Any = "float32") -> None:
    mesh = None
    if sizes:
        data, expert, tensor = map(int, sizes)
        jax.config.update("jax_num_cpu_devices", data * expert * tensor)
        mesh = make_mesh(data, expert, tensor)
    source, before = started(folder)
    _, variables = source.load(mesh=mesh, dtype=dtype, weights=weights)
    jax.block_until_ready(variables)
    arrays = jax.tree.leaves(variables)
    result = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    used = {
        "result": result,
        "peak": resident("VmHWM") - before,
        "after": resident("VmRSS") - before,
    }
    print(json.dumps(used))


if __name__ == "__main__":
    _, folder, what, *rest = sys.argv
    if what == "to":
        convert_to(folder, *rest)
    elif what == "weights":
        load(folder, None, weights=rest[0])
    else:
        load(folder, what, *rest)
