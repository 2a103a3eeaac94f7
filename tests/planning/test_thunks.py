"""Collectives of a plan against the thunks: what XLA's runtime for GPUs would launch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.test_topology import needs_plugin

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = r"""
import collections, dataclasses, json, re, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
from configs.accelerators import H100
from parallel.topology import compile_only_mesh
from planning import program
from planning.hlo import parse
from planning.work import executed
from tests.planning.runs import READABLE, moe_run

step, remat, transport, dump = sys.argv[1:]
sizes = {"data": 2, "expert": 4}
factor = 2.0 if transport == "all_to_all" else None
execution = dataclasses.replace(READABLE, remat=remat, transport=transport, capacity_factor=factor)
run = dataclasses.replace(moe_run(**sizes), execution=execution)
program.GPU_OPTIONS["xla_dump_to"] = dump
compiled = program.compile_step(run, step, compile_only_mesh(H100, **sizes)).compiled
instructions = executed(parse(compiled.as_text()), lambda _: 1.0)
read = collections.Counter(x.collective for x in instructions if x.collective)
(path,) = Path(dump).glob("*jit_*.thunk_sequence.txt")
kinds = "AllGather|AllReduce|ReduceScatter|AllToAll|RaggedAllToAll|Collective[A-Z]\w+"
launched = re.findall(rf"^ *\d+: k({kinds})\b", path.read_text(), re.MULTILINE)
names = [re.sub("(?<!^)(?=[A-Z])", "-", kind).lower() for kind in launched]
print(json.dumps([read, collections.Counter(names)]))
"""
"""Prints how many collectives of each kind were read from the HLO, and how many are thunks."""


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize(
    ("step", "remat", "transport"),
    [("train", "full", "all_to_all"), ("train", "none", "gather"), ("decode", "none", "gather")],
)
def test_every_collective_is_a_thunk_and_every_thunk_was_read(step, remat, transport, tmp_path):
    """By kind, each counted once wherever it stands: in loops, and in branches not taken."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, step, remat, transport, str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    read, launched = json.loads(done.stdout)
    assert read == launched
    assert sum(read.values()) > 2
