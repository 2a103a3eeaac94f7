"""The work of our own kernels against counts by hand; in a program as XLA writes it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from planning.hlo import parse
from planning.work import executed, flops, is_narrow, traffic, unknown_calls
from tests.parallel.test_topology import needs_plugin
from tests.planning.runs import moe_step_flops

ROOT = Path(__file__).resolve().parents[2]
TRITON = 'custom_call_target="__gpu$xla.gpu.triton", api_version=API_VERSION_TYPED_FFI'


def config(name: str) -> str:
    return f'backend_config={{grid_x = 8 : i32, ir = "ML\\EFR(}}", name = "{name}", num_warps = 4}}'


TEXT = f"""HloModule m

ENTRY %main (table: s32[6], x: bf16[64,32], w: bf16[4,32,16]) -> bf16[2] {{
  %table = s32[6]{{0}} parameter(0)
  %x = bf16[64,32]{{1,0}} parameter(1)
  %w = bf16[4,32,16]{{2,1,0}} parameter(2)
  %y = bf16[64,16]{{1,0}} custom-call(%table, %x, %w), {TRITON}, {config("grouped_matmul")}
  %dx = bf16[64,32]{{1,0}} custom-call(%table, %y, %w), {TRITON}, {config("grouped_matmul_dx")}
  %dw = bf16[4,32,16]{{2,1,0}} custom-call(%x, %y), {TRITON}, {config("grouped_matmul_dw")}
  ROOT %out = bf16[2]{{0}} custom-call(%dx, %dw), {TRITON}, {config("another_kernel")}
}}
"""
"""64 rows of x, 4 experts' matrices from 32 to 16."""


@pytest.fixture(scope="module")
def kernels():
    return {x.instruction.name: x for x in executed(parse(TEXT), lambda _: 1.0)}


@pytest.mark.parametrize("name", ["y", "dx", "dw"])
def test_flops_are_those_of_the_rows_that_experts_get(kernels, name):
    """12 rows for each of 4 experts; of the 64 rows of x the others are not computed."""
    assert flops(kernels[name], 12.0) == 2 * (4 * 12) * 32 * 16
    assert is_narrow(kernels[name])


def test_traffic_is_each_operand_and_the_result_once(kernels):
    x, y, w, table = 2 * 64 * 32, 2 * 64 * 16, 2 * 4 * 32 * 16, 4 * 6
    found = {name: traffic(kernels[name], 40.0) for name in ("y", "dx", "dw")}
    assert found == {"y": table + x + w + y, "dx": table + y + w + x, "dw": x + y + w}


def test_matrices_that_no_row_needs_are_not_read(kernels):
    """One row per expert on average: e^-1 of them get none."""
    whole, few = (traffic(kernels["y"], rows) for rows in (1000.0, 1.0))
    assert whole - few == pytest.approx(0.36788 * 2 * 4 * 32 * 16, rel=1e-4)


def test_only_kernels_whose_work_is_not_known_are_named(kernels):
    assert unknown_calls(kernels.values()) == {"another_kernel": 1.0}


PROGRAM = """
import dataclasses, json
import jax
jax.config.update("jax_platforms", "cpu")
from parallel.topology import H100, compile_only_mesh
from planning.plan import make_plan
from tests.planning.runs import READABLE, moe_run

found = {}
for kernel in ("xla", "auto"):
    base = moe_run(expert=2)
    execution = dataclasses.replace(READABLE, compute_dtype="bfloat16", grouped_matmul=kernel)
    run = dataclasses.replace(base, execution=execution)
    plan = make_plan(run, "train", compile_only_mesh(H100, expert=2), H100)
    traffic = sum(p.bytes_moved for p in plan.parts if p.name == "routed experts")
    found[kernel] = (plan.flops, traffic, plan.unknown)
print(json.dumps(found))
"""


@pytest.mark.slow
@needs_plugin
def test_a_plan_for_a_gpu_has_the_kernels_that_the_run_would_take():
    """ "auto" is Triton there. The FLOPs are as with loops, whose tiles are twice the rows that an
    expert gets on two devices (test_plan.py), and all of them are counted.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert found["xla"][0] == pytest.approx(moe_step_flops(2, 2.0), rel=0.01)
    assert found["auto"][0] == pytest.approx(moe_step_flops(2), rel=0.01)
    assert found["auto"][2] == {}
    assert found["auto"][1] < found["xla"][1]
