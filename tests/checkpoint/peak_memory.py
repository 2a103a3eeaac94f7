"""Loads FOLDER in a process of its own and prints, in bytes, what that took: JSON.

    python -m tests.checkpoint.peak_memory FOLDER DTYPE [DATA EXPERT TENSOR]

With mesh sizes, onto that many CPU devices.
"""

import json
import re
import sys
from pathlib import Path

import jax

from infer.sources import open_source
from parallel.mesh import make_mesh


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (most since the last reset), bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(folder: str, dtype: str, *sizes: str) -> None:
    mesh = None
    if sizes:
        data, expert, tensor = map(int, sizes)
        jax.config.update("jax_num_cpu_devices", data * expert * tensor)
        mesh = make_mesh(data, expert, tensor)
    jax.block_until_ready(jax.numpy.zeros(8) + 1)  # the runtime's own threads and buffers
    source = open_source(folder)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    _, variables = source.load(mesh=mesh, dtype=dtype)  # type: ignore[arg-type]
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
    main(*sys.argv[1:])
