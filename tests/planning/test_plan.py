"""Plans of small runs on host devices against hand counts and against what a run really holds."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.accelerators import H100
from kernels.grouped_matmul.xla import tile_rows
from model.flops import training_flops_per_token
from parallel.mesh import make_mesh
from planning.collectives import grouped
from planning.loops import balanced_load
from planning.plan import make_plan
from tests.planning.runs import LENGTH, PERIODS, READABLE, ROWS, moe_run, moe_step_flops
from train.loop import to_devices
from train.state import init_state, make_train_setup

ROOT = Path(__file__).resolve().parents[2]
MESHES = [{}, {"expert": 2}, {"data": 2, "expert": 2}]


@functools.cache
def planned(run, step="train"):
    """As for H100s, compiled for host devices."""
    return make_plan(run, step, make_mesh(**dataclasses.asdict(run.mesh)), H100)


@pytest.mark.parametrize(
    ("mesh", "computed"),
    [
        (MESHES[0], 1),
        pytest.param(MESHES[1], 2, marks=pytest.mark.slow),
        pytest.param(MESHES[2], 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_flops_of_a_training_step_are_those_counted_by_hand(mesh, computed):
    """Two expert shards gather twice the rows that they need, so tiles are twice an expert's rows:
    64 rows in a tile of 128 on two devices, 32 in one of 64 on four.
    """
    run = moe_run(**mesh)
    expected = moe_step_flops(run.mesh.num_devices, computed)
    assert planned(run).flops == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_recomputing_layers_costs_their_forward_pass_again():
    kept, again = planned(moe_run()), planned(moe_run(remat="full"))
    head = 6 * ROWS * LENGTH * 32 * 300
    layers = moe_step_flops(1) - head
    # The last product of a period is not needed again: the dense layer's way down.
    down = 2 * ROWS * LENGTH * PERIODS * 32 * 48
    assert again.flops - kept.flops == pytest.approx(layers / 3 - down, rel=0.01)
    assert again.memory.kept < kept.memory.kept


@pytest.mark.parametrize(
    "mesh",
    [MESHES[0], *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[1:])],
    ids=str,
)
def test_arguments_are_what_a_real_run_holds(mesh):
    """To the byte: state and batch on each device."""
    run = moe_run(**mesh)
    devices = make_mesh(**dataclasses.asdict(run.mesh))
    state = init_state(make_train_setup(run, devices), seed=0)
    rows = np.zeros((run.batch_size, run.data.seq_len), np.int32)
    batch = to_devices(dict.fromkeys(("tokens", "targets", "positions"), rows), devices)
    held = dict.fromkeys(devices.devices.flat, 0)
    for x in jax.tree.leaves((state, batch)):
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {sum(planned(run).memory.arguments.values())}


@pytest.mark.slow
def test_collectives_of_the_experts_are_those_of_the_transport():
    """Forward and backward of each of the six MoE layers, with bytes counted by hand."""
    run = moe_run(expert=4)
    found = grouped(planned(run).collectives)
    width, tokens = 32, ROWS * LENGTH // 4
    gathers = found["all-gather", ("expert",)]
    # Forward x, and backward the gradient of the sum scattered forward: tokens x 32 float32 each.
    large = [c for c in gathers if c.payload == tokens * width * 4]
    assert sum(c.times for c in large) == 2 * PERIODS
    scatters = found["reduce-scatter", ("expert",)]
    assert {c.payload for c in scatters if c.payload > 10_000} == {4 * tokens * width * 4}
    assert sum(c.times for c in scatters if c.payload > 10_000) == 2 * PERIODS


@pytest.mark.slow
def test_all_to_all_is_followed_through_the_conditional():
    execution = dataclasses.replace(READABLE, transport="all_to_all", capacity_factor=2.0)
    run = dataclasses.replace(moe_run(expert=4), execution=execution)
    found = grouped(planned(run).collectives)["all-to-all", ("expert",)]
    rows = 4 * (ROWS * LENGTH // 4 * 2 * 2 // 4)  # four buffers of twice the balanced load
    large = [c for c in found if c.payload == rows * 32 * 4]
    assert sum(c.times for c in large) == 4 * PERIODS  # there and back, forward and backward


def test_trips_are_the_tiles_of_balanced_experts():
    """Against the groups' own sizes when every expert gets the same rows."""
    run = moe_run(expert=2)
    tokens, local = ROWS * LENGTH, 4
    sizes = np.full(local, tokens * 2 / 2 / local)
    tile = tile_rows(4 * tokens * 2, local)
    assert balanced_load(run, 4 * tokens).trips == pytest.approx((4 * sizes / tile).mean())


def test_an_expert_with_few_rows_runs_a_tile_if_it_gets_any():
    """Against drawn choices: 4 tokens choose 2 of 8 experts, 1 row each on average."""
    chosen = np.random.RandomState(0).randint(0, 8, (10_000, 8))
    visited = np.mean([len(set(row)) for row in chosen]) / 8
    assert balanced_load(moe_run(), 4).trips == pytest.approx(visited, rel=0.05)


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_inference_plans_hold_weights_and_cache(step):
    run = moe_run(data=2)
    plan = planned(run, step)
    # Keys and values of two heads of 8, and a position: a window of 14 slots and the whole row.
    slots = 12 + 2 + LENGTH
    per_row = PERIODS * slots * (2 * 2 * 8 * 4 + 4)
    assert plan.memory.arguments["cache"] == ROWS // 2 * per_row
    assert "optimiser" not in plan.memory.arguments
    weights = plan.memory.arguments["parameters"]
    assert weights == run.model.num_parameters * 4 / 2  # every weight has a d_model to split


@pytest.mark.slow
def test_bounds_follow_from_the_parts():
    plan = planned(moe_run(expert=2))
    for part in plan.parts:
        assert part.kernel_seconds >= max(part.compute_seconds, part.memory_seconds) * (1 - 1e-9)
        assert part.kernel_seconds <= part.compute_seconds + part.memory_seconds
    assert plan.hidden_seconds <= plan.exposed_seconds
    tokens, length = ROWS * LENGTH, LENGTH
    useful = tokens * training_flops_per_token(plan.run.model, length) / 2
    assert plan.mfu(1e-3) == pytest.approx(useful / (1e-3 * 989.4e12))


@pytest.mark.slow
def test_parts_of_the_model_have_names():
    plan = planned(moe_run(expert=2))
    names = {part.name for part in plan.parts}
    assert {"attention", "routed experts", "shared experts", "dense layers"} <= names
    unnamed = sum(part.flops for part in plan.parts if part.name == "unnamed")
    assert unnamed < 0.02 * plan.flops


MEASURE = """
import dataclasses, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from parallel.mesh import make_mesh
from planning.program import compile_step
from tests.planning.runs import wide_run
from train.loop import to_devices
from train.state import init_state, make_train_setup

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(name))

run = wide_run()
mesh = make_mesh(**dataclasses.asdict(run.mesh))
program = compile_step(run, "train", mesh)
state = init_state(make_train_setup(run, mesh), seed=0)
rows = np.zeros((run.batch_size, run.data.seq_len), np.int32)
batch = to_devices({name: rows for name in ("tokens", "targets", "positions")}, mesh)
jax.block_until_ready((state, batch))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
jax.block_until_ready(program.compiled(state, batch))
print(status("VmHWM") - before, program.compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_temporaries_are_what_a_real_step_takes():
    """The peak of a process of two devices during a step, above what it held before."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=ROOT, check=True, capture_output=True, text=True
    )
    grown, temporaries = map(int, done.stdout.split())
    assert grown == pytest.approx(2 * temporaries, rel=0.1)
