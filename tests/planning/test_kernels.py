"""The work of our own kernels against counts by hand; in a program as XLA writes it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import models
from planning.hlo import parse
from planning.kernels import Assumed, mean_keys
from planning.work import executed, flops, is_narrow, traffic, unknown_calls
from tests.parallel.test_topology import needs_plugin
from tests.planning.runs import LENGTH, PERIODS, ROWS, moe_step_flops

ROOT = Path(__file__).resolve().parents[2]
TRITON = 'custom_call_target="__gpu$xla.gpu.triton", api_version=API_VERSION_TYPED_FFI'


def config(name: str) -> str:
    """As XLA writes it, with bytes of Triton's program in it."""
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


def rows(count: float) -> Assumed:
    """For each expert."""
    return Assumed(count, lambda *_: 0.0)


@pytest.fixture(scope="module")
def kernels():
    return {x.instruction.name: x for x in executed(parse(TEXT), lambda _: 1.0)}


@pytest.mark.parametrize("name", ["y", "dx", "dw"])
def test_flops_of_experts_are_those_of_the_rows_that_they_get(kernels, name):
    """12 rows for each of 4 experts; of the 64 rows of x the others are not computed."""
    assert flops(kernels[name], rows(12.0)) == 2 * (4 * 12) * 32 * 16
    assert is_narrow(kernels[name])


def test_a_kernel_of_mosaic_counts_as_triton_s_of_the_same_op():
    """Its name stands in the operation's; its own program follows."""
    call = 'custom_call_target="mosaic_gpu_v2", api_version=API_VERSION_TYPED_FFI, '
    call += 'metadata={op_name="jit(step)/moe/mosaic_grouped_matmul/mpmd_map"}'
    call += ', backend_config={kernel_hash = "5", module = "ML"}'
    triton = f"custom-call(%table, %x, %w), {TRITON}, {config('grouped_matmul')}"
    assert triton in TEXT
    text = TEXT.replace(triton, f"custom-call(%table, %x, %w), {call}")
    found = {x.instruction.name: x for x in executed(parse(text), lambda _: 1.0)}
    assert flops(found["y"], rows(12.0)) == 2 * (4 * 12) * 32 * 16
    assert unknown_calls(found.values()) == {"another_kernel": 1.0}


def test_traffic_is_each_operand_and_the_result_once(kernels):
    x, y, w, table = 2 * 64 * 32, 2 * 64 * 16, 2 * 4 * 32 * 16, 4 * 6
    found = {name: traffic(kernels[name], rows(40.0)) for name in ("y", "dx", "dw")}
    assert found == {"y": table + x + w + y, "dx": table + y + w + x, "dw": x + y + w}


def test_matrices_that_no_row_needs_are_not_read(kernels):
    """One row per expert on average: e^-1 of them get none."""
    whole, few = (traffic(kernels["y"], rows(n)) for n in (1000.0, 1.0))
    assert whole - few == pytest.approx(0.36788 * 2 * 4 * 32 * 16, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("window_attention", 48 + 32),  # scores q k of width 48; their weights times v of width 32
        ("window_attention_dq", 48 + 32 + 48),  # both again, backwards, and dq
        ("window_attention_dkv", 48 + 32 + 32 + 48),  # and dv and dk
    ],
)
def test_flops_of_attention_are_those_of_the_keys_that_queries_see(name, products):
    """Three rows of 64, 4 heads with 2 of keys and values; two FLOPs a channel."""
    text = f"""HloModule m

ENTRY %main (at: s32[3,64], q: bf16[3,64,4,48], k: bf16[3,64,2,48], v: bf16[3,64,2,32]) -> f32[3] {{
  %at = s32[3,64]{{1,0}} parameter(0)
  %q = bf16[3,64,4,48]{{3,2,1,0}} parameter(1)
  %k = bf16[3,64,2,48]{{3,2,1,0}} parameter(2)
  %v = bf16[3,64,2,32]{{3,2,1,0}} parameter(3)
  ROOT %out = f32[3]{{0}} custom-call(%at, %q, %k, %v), {TRITON}, {config(name)}
}}
"""
    (kernel,) = executed(parse(text), lambda _: 1.0)
    assumed = Assumed(0.0, lambda _, length: (length + 1) / 2)
    assert flops(kernel, assumed) == 3 * 4 * (64 * 65 / 2) * 2 * products
    assert is_narrow(kernel)


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("periods/layer_0/layer_0.branches/attention/shard_map/window_attention", 1024),
        ("periods/layer_5/layer_5.branches/attention/shard_map/window_attention", None),
        ("periods/layer_5/layer_5.branches/moe/context/shard_map/window_attention", 256),
    ],
)
def test_keys_are_those_of_the_attention_at_that_place(name, window):
    """V3.1: five local layers with four sinks, one that sees all, and the router's own window."""
    seen = sum(min(i, window or i) for i in range(1, 2001)) / 2000
    sinks = sum(min(4, max(i - 1024, 0)) for i in range(1, 2001)) / 2000 if window == 1024 else 0
    assert mean_keys(models.v31(), f"jit(step)/{name}", 2000) == pytest.approx(seen + sinks)


def test_only_kernels_whose_work_is_not_known_are_named(kernels):
    assert unknown_calls(kernels.values()) == {"another_kernel": 1.0}


PROGRAM = """
import dataclasses, json
import jax
jax.config.update("jax_platforms", "cpu")
from configs.accelerators import H100
from parallel.topology import compile_only_mesh
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
    """ "auto" is Triton there. Loops run tiles of twice an expert's rows (test_plan.py); kernels
    have its rows, and make gate and up again in the backward pass.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert found["xla"][0] == pytest.approx(moe_step_flops(2, 2.0), rel=0.01)
    again = ROWS * LENGTH / 2 * PERIODS * 2 * (2 * 32 * 2 * 16)  # two experts per token
    assert found["auto"][0] == pytest.approx(moe_step_flops(2) + again, rel=0.01)
    assert found["auto"][2] == {}
    assert found["auto"][1] < found["xla"][1]
