"""scripts.bench_kernels: bounds by hand, the printout without a GPU, and each op measured as on a
GPU, in Pallas' interpreter with tiny cases.
"""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.gpu import measure as measuring
from benchmarks.gpu import operands as drawn
from benchmarks.gpu import peers
from benchmarks.gpu.measure import Timing, measure
from benchmarks.gpu.roofline import CASES, bound, case_of, work_of
from configs.checks import UserError
from kernels.backend import INTERPRET, Target
from kernels.compile_checks import work
from kernels.grouped_matmul.cases import CompiledCase as GroupedCase
from kernels.paged_attention.cases import CompiledCase as PagedCase
from kernels.paged_attention.cases import CompiledLatentCase as LatentCase
from kernels.window_attention.cases import CompiledCase as WindowCase
from parallel.topology import A100, H100, H200, accelerator_of
from scripts import bench_kernels

GROUPED = GroupedCase(rows=40, d_in=128, d_out=24, num_groups=3)
PAGED = PagedCase(batch=2, max_pages=2, page_size=16, num_heads=4, num_kv_heads=2, head_dim=16)
LATENT = LatentCase(
    batch=2,
    max_pages=2,
    page_size=16,
    num_heads=4,
    latent_rank=32,
    rope_head_dim=16,
    nope_head_dim=16,
)
WINDOW = WindowCase(
    head_dim=16, num_heads=4, num_kv_heads=2, length=48, window_size=20, num_sinks=2
)


# --- Bounds --------------------------------------------------------------------------------------


def test_grouped_work_by_hand():
    case = case_of("grouped_matmul/int8_swiglu_decode")  # 512 rows, 64 x 2048 x (2 x 1408)
    weights = 64 * 2048 * 2816 * (1 + 4 / 128)
    assert work_of(case) == (
        2 * 512 * 2048 * 2816,
        512 * 2048 * 2 + weights + 512 * 1408 * 2,
    )
    gradient = case_of("grouped_matmul/mixtral_gradient_w")
    assert work_of(gradient).least_bytes == 2 * (16_384 * (4096 + 14_336) + 8 * 4096 * 14_336)


def test_window_work_by_hand():
    case = dataclasses.replace(WINDOW, length=5, window_size=2, num_sinks=1)
    assert work.visible_pairs(case) == 1 + 2 + 3 + 3 + 3  # itself, the one before, the first
    queries, keys = 2 * 5 * 4 * 16, 2 * 5 * 2 * 16
    forward = (2 * 12 * 4 * 32, 2 * queries + 2 * keys + 4 * 5 * 4 + 4 * 4 * 5)
    assert work_of(case) == forward
    gradient = work_of(dataclasses.replace(case, kernel="gradient_q"))
    assert gradient.flops - forward[0] == 2 * 12 * 4 * 48
    assert work.visible_pairs(dataclasses.replace(case, window_size=None, num_sinks=0)) == 15


def test_paged_work_by_hand(monkeypatch):
    monkeypatch.setattr(work, "lengths", lambda case: np.array([20, 32]))
    heads, tables = 2 * 4, 4 * 2 * 3
    assert work_of(PAGED) == (
        2 * 52 * 4 * 32,
        52 * 2 * 2 * 16 * 2 + heads * 2 * 32 + tables,
    )
    windowed = dataclasses.replace(PAGED, pages="int8", window_size=8, num_sinks=1)
    assert work_of(windowed).least_bytes == 18 * 2 * 2 * 20 + heads * 2 * 32 + tables
    assert work_of(LATENT) == (
        2 * 52 * 4 * (48 + 32),
        52 * 48 * 2 + heads * 2 * (48 + 32) + tables,
    )


def test_a_bound_is_the_slower_of_two():
    decode, prefill = (case_of(f"grouped_matmul/bf16_{name}") for name in ("decode", "prefill"))
    found = bound(decode, H100)
    assert found is not None
    assert found.limit == "memory"
    assert found.seconds == work_of(decode).least_bytes / 3.35e12
    found = bound(prefill, A100)
    assert found is not None
    assert found.limit == "compute"
    assert found.seconds == work_of(prefill).flops / 312e12


def test_each_format_has_its_own_peak():
    fp8, exact = (
        case_of(f"grouped_matmul/{name}") for name in ("fp8_rows_prefill", "float32_prefill")
    )
    assert bound(fp8, A100) is None
    half, whole = bound(fp8, H100), bound(exact, H100)
    assert half is not None
    assert whole is not None
    assert half.compute == work_of(fp8).flops / 1978.9e12
    assert whole.compute == work_of(exact).flops / 66.9e12


def test_data_sheets_are_found_by_the_kind_of_device():
    assert accelerator_of("NVIDIA H100 80GB HBM3") is H100
    assert accelerator_of("NVIDIA H200") is H200
    assert accelerator_of("NVIDIA A100-SXM4-80GB") is A100
    assert accelerator_of("NVIDIA H100 PCIe") is None
    assert accelerator_of("cpu") is None


# --- Without a GPU -------------------------------------------------------------------------------


def test_without_a_gpu_bounds_are_printed_and_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(bench_kernels, "measure", None)
    assert bench_kernels.main([]) == 0
    said = capsys.readouterr().out
    assert "nothing was run, and no speed is claimed" in said
    (row,) = [line for line in said.splitlines() if "paged_latent_attention/few_heads" in line]
    assert "us, memory" in row
    assert "188 / 190" in row  # registers, as kernels/compiled.json has them
    (row,) = [line for line in said.splitlines() if "fp8_rows_decode" in line]
    assert "│ -" in row


def test_what_cannot_be_is_said():
    with pytest.raises(UserError, match="no case begins with 'paged/'"):
        bench_kernels.main(["paged/"])
    with pytest.raises(UserError, match="--rounds 0 must be at least 1"):
        bench_kernels.main(["--rounds", "0"])
    with pytest.raises(UserError, match="--write keeps what a GPU did"):
        bench_kernels.main(["--write"])


# --- As on a GPU ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(measuring, "TURN_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("op", "case", "others"),
    [
        ("grouped_matmul", GROUPED, {"one dense product", "lax.ragged_dot"}),
        (
            "grouped_matmul",
            dataclasses.replace(GROUPED, format="int4", gated=True, gathered=True),
            {"one dense product", "lax.ragged_dot"},
        ),
        (
            "grouped_matmul",
            dataclasses.replace(GROUPED, contraction="gradient_w"),
            {"one dense product"},
        ),
        ("window_attention", WINDOW, {"jax.nn, xla, no sinks"}),
        (
            "window_attention",
            dataclasses.replace(WINDOW, num_sinks=0, kernel="gradient_kv"),
            {"jax.nn, xla"},
        ),
        ("paged_attention", PAGED, {"xla, pages gathered"}),
        ("paged_attention", dataclasses.replace(PAGED, pages="int8"), {"xla, pages gathered"}),
        ("paged_latent_attention", LATENT, {"xla, pages gathered"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_case_is_checked_and_timed(monkeypatch, op, case, others):
    monkeypatch.setitem(CASES[op], "tiny", case)
    timing = measure(f"{op}/tiny", INTERPRET, H100, rounds=2)
    assert timing.is_right
    assert set(timing.seconds) == {"ours"} | others
    assert all(len(seconds) == 2 for seconds in timing.seconds.values())
    assert timing.bound == bound(case, H100)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (GROUPED, "lax.ragged_dot"),
        (dataclasses.replace(GROUPED, gated=True, gathered=True), "lax.ragged_dot"),
        (dataclasses.replace(WINDOW, num_sinks=0), "jax.nn, xla"),
        (dataclasses.replace(WINDOW, num_sinks=0, kernel="gradient_q"), "jax.nn, xla"),
    ],
    ids=["grouped", "swiglu", "window", "window_gradient"],
)
def test_a_peer_computes_what_the_case_does(case, name):
    operands = drawn.draw(case)
    found = peers.peers(case, operands, capability=0)[name]()
    assert drawn.error(found, drawn.expected(case, operands)) < measuring.LARGEST_ERROR


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setitem(CASES["paged_attention"], "tiny", PAGED)
    right = drawn.expected
    monkeypatch.setattr(drawn, "expected", lambda *a: right(*a)[::-1])
    timing = measure("paged_attention/tiny", INTERPRET, None, rounds=2)
    assert not timing.is_right
    assert timing.seconds == {}
    assert timing.bound is None


def test_the_command_prints_keeps_and_fails_on_what_is_wrong(monkeypatch, tmp_path, capsys):
    seconds = {"ours": [1e-3, 2e-3, 1e-3], "xla": [2e-3, 2e-3, 3e-3]}
    name = "grouped_matmul/bf16_prefill"
    case = case_of(name)
    timing = Timing(name, 1e-3, seconds, {"cudnn": "X: no"}, work_of(case), bound(case, H100))
    wrong = dataclasses.replace(timing, name="grouped_matmul/bf16_down", error=0.5, seconds={})
    timings = {timing.name: timing, wrong.name: wrong}
    monkeypatch.setattr(bench_kernels, "current_target", lambda: Target("cuda", 90))
    monkeypatch.setattr(bench_kernels, "measure", lambda name, *rest: timings[name])
    monkeypatch.setattr(bench_kernels, "RESULTS", tmp_path)
    assert bench_kernels.main([timing.name, "--write"]) == 0
    said = capsys.readouterr().out
    assert "378.0" in said  # TFLOP/s: 378 GFLOP in a millisecond
    assert "0.38" in said  # of 989
    assert "2.00" in said  # the median of 2, 1 and 3
    assert "cudnn did not run: X: no" in said
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text())["cases"][timing.name]["seconds"] == seconds
    monkeypatch.setattr(bench_kernels, "NAMES", [wrong.name])
    assert bench_kernels.main([]) == 1
    assert "WRONG, and not timed: grouped_matmul/bf16_down" in capsys.readouterr().out
