"""scripts.gpu_report: bounds by hand, each op checked and timed as on a GPU, in Pallas' interpreter
with tiny cases, processes that fail or hang, and the tables.
"""

import dataclasses
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.compile_checks import work
from benchmarks.gpu import checks, parts, peers, report, tables, times
from benchmarks.gpu import operands as drawn
from benchmarks.gpu.programs import OURS, Program, compile_loop, kind_of, poison
from benchmarks.gpu.roofline import CASES, bound, case_of, work_of
from configs.accelerators import A100, H100, H200, accelerator_of
from configs.checks import UserError
from kernels import backend
from kernels.backend import H100 as H100_TARGET
from kernels.backend import INTERPRET
from kernels.cached_attention import cases as cached_cases
from kernels.cached_attention.cases import CompiledCase as CachedCase
from kernels.grouped_matmul.cases import CompiledCase as GroupedCase
from kernels.paged_attention.cases import CompiledCase as PagedCase
from kernels.paged_attention.cases import CompiledLatentCase as LatentCase
from kernels.window_attention.cases import CompiledCase as WindowCase
from scripts import gpu_report


@pytest.fixture(autouse=True, scope="module")
def compiled_anew():
    """Nothing that was compiled in an earlier session is taken: XLA can't write down a program for
    a CPU that it has itself read from a file."""
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


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
CACHED = CachedCase(
    num_tokens=9, num_rows=3, length=32, page_size=16, num_heads=4, num_kv_heads=2, head_dim=16
)
WINDOW = WindowCase(
    head_dim=16, num_heads=4, num_kv_heads=2, length=48, window_size=20, num_sink_tokens=2
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
    case = dataclasses.replace(WINDOW, length=5, window_size=2, num_sink_tokens=1)
    assert work.visible_pairs(case) == 1 + 2 + 3 + 3 + 3  # itself, the one before, the first
    queries, keys = 2 * 5 * 4 * 16, 2 * 5 * 2 * 16
    forward = (2 * 12 * 4 * 32, 2 * queries + 2 * keys + 4 * 5 * 4 + 4 * 4 * 5)
    assert work_of(case) == forward
    gradient = work_of(dataclasses.replace(case, kernel="gradient_q"))
    assert gradient.flops - forward[0] == 2 * 12 * 4 * 48
    assert work.visible_pairs(dataclasses.replace(case, window_size=None, num_sink_tokens=0)) == 15


def test_paged_work_by_hand(monkeypatch):
    monkeypatch.setattr(work, "lengths", lambda case: np.array([20, 32]))
    heads, page_tables = 2 * 4, 4 * 2 * 3
    assert work_of(PAGED) == (
        2 * 52 * 4 * 32,
        52 * 2 * 2 * 16 * 2 + heads * 2 * 32 + page_tables,
    )
    windowed = dataclasses.replace(PAGED, pages="int8", window_size=8, num_sink_tokens=1)
    assert work_of(windowed).least_bytes == 18 * 2 * 2 * 20 + heads * 2 * 32 + page_tables
    assert work_of(LATENT) == (
        2 * 52 * 4 * (48 + 32),
        52 * 48 * 2 + heads * 2 * (48 + 32) + page_tables,
    )


def test_cached_work_by_hand(monkeypatch):
    """A ring's row 0 is asked by a chunk of three tokens, row 1 by its last."""
    held = np.array([[0, 4, 5, 3, 2, 6], [0, 1, -1, -1, -1, -1]])
    monkeypatch.setattr(work, "held_positions", lambda case: held)
    ring = dataclasses.replace(
        CACHED,
        num_tokens=4,
        num_rows=2,
        length=6,
        page_size=None,
        window_size=2,
        num_sink_tokens=1,
    )
    rows, positions = work.asking_tokens(ring)
    assert (rows.tolist(), positions.tolist()) == ([0, 0, 0, 1], [4, 5, 6, 1])
    places = 4 * (2 * 6 + 2 * 4)
    seen, slots, queries = 3 + 3 + 3 + 2, 5 + 2, 4 * 4
    assert work_of(ring) == (
        2 * seen * 4 * 32,
        slots * 2 * 2 * 16 * 2 + queries * 32 * 2 + places,
    )
    latent = dataclasses.replace(ring, num_kv_heads=1, value_width=8, is_int8=True)
    assert work_of(latent) == (
        2 * seen * 4 * 24,
        slots * (16 + 4) + queries * 24 * 2 + places,
    )


def test_a_ring_holds_the_sinks_and_the_newest_positions():
    case = dataclasses.replace(CACHED, length=12, window_size=8, num_sink_tokens=2, page_size=None)
    for held in work.held_positions(case):
        last = held.max()
        assert sorted(held) == [0, 1, *range(last - 9, last + 1)]
        assert [held[2 + (p - 2) % 10] for p in (last, last - 9)] == [last, last - 9]


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
    monkeypatch.setattr(report, "measure", None)
    assert gpu_report.main(["--cases", "paged_latent", "grouped_matmul/fp8_rows_decode"]) == 0
    said = capsys.readouterr().out
    assert "nothing was run, and no speed is claimed" in said
    (row,) = [line for line in said.splitlines() if "paged_latent_attention/few_heads" in line]
    assert "us, memory" in row
    assert "188 / 190" in row  # registers, as benchmarks/compile_checks/compiled.json has them
    (row,) = [line for line in said.splitlines() if "fp8_rows_decode" in line]
    assert "│ -" in row


def test_what_cannot_be_is_said(monkeypatch):
    with pytest.raises(UserError, match="no case begins with paged/"):
        gpu_report.main(["--cases", "paged/"])
    for minutes in ("0", "nan", "inf"):
        with pytest.raises(UserError, match=f"--minutes {minutes} must be at least 1"):
            gpu_report.main(["--minutes", minutes])
    monkeypatch.setattr(parts, "has_gpu", lambda: False)
    with pytest.raises(UserError, match="--write keeps what a GPU did"):
        gpu_report.main(["--write"])
    monkeypatch.setattr(gpu_report, "missing_packages", lambda: ["flax", "optax"])
    with pytest.raises(UserError, match="needs flax, optax: pip install flax optax"):
        gpu_report.main([])


# --- Cases, as on a GPU --------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Checks, then times, a tiny case under the name op/tiny; returns both."""

    def run(op, case):
        monkeypatch.setitem(CASES[op], "tiny", case)
        monkeypatch.setattr(checks, "calls_of", lambda name: 2)
        monkeypatch.setattr(times, "calls_of", lambda name: 2)
        monkeypatch.setattr(times.torch_peers, "available", lambda: None)
        name = f"{op}/tiny"
        lines = list(checks.check_case(name, INTERPRET, tmp_path, ("ours", "peers")))
        chosen = {line["program"]: line["index"] for line in lines if "failure" not in line}
        return lines, times.time_case(name, INTERPRET, tmp_path, chosen, rounds=2)

    return run


@pytest.mark.parametrize(
    ("op", "case", "others"),
    [
        ("grouped_matmul", GROUPED, {"one dense product", "lax.ragged_dot"}),
        pytest.param(
            "grouped_matmul",
            dataclasses.replace(GROUPED, format="int4", gated=True, gathered=True),
            set(),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "grouped_matmul",
            dataclasses.replace(GROUPED, contraction="gradient_w"),
            {"one dense product"},
            marks=pytest.mark.slow,
        ),
        ("window_attention", WINDOW, {"jax.nn, xla, no sinks"}),
        pytest.param(
            "window_attention",
            dataclasses.replace(WINDOW, num_sink_tokens=0, kernel="gradient_kv"),
            {"jax.nn, xla"},
            marks=pytest.mark.slow,
        ),
        ("paged_attention", dataclasses.replace(PAGED, pages="int8"), {"xla, pages gathered"}),
        ("cached_attention", CACHED, {"xla, tiles of tokens"}),
        pytest.param(
            "cached_attention",
            dataclasses.replace(
                CACHED, num_kv_heads=1, head_dim=48, value_width=32, is_int8=True, page_size=None
            ),
            {"xla, tiles of tokens"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "paged_latent_attention", LATENT, {"xla, pages gathered"}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.thinned(2)
def test_a_case_is_checked_and_timed(tiny, op, case, others):
    lines, timed = tiny(op, case)
    (ours,) = [line for line in lines if line["program"] == OURS]
    assert checks.is_right(ours)
    assert ours["is_repeated"]
    assert set(timed["seconds"]) == {OURS} | others, timed["failures"]
    assert all(len(seconds) == 2 for seconds in timed["seconds"].values())
    assert timed["least_bytes"] == work_of(case).least_bytes


def test_a_wrong_result_is_told(tiny, monkeypatch):
    right = drawn.expected
    monkeypatch.setattr(drawn, "expected", lambda *a: right(*a)[::-1])
    lines, _ = tiny("paged_attention", PAGED)
    assert not checks.is_right(lines[0])


def test_a_loop_starts_from_nan_and_gives_the_last_result():
    x = jnp.arange(6.0).reshape(2, 3)
    looped = compile_loop(Program(lambda x: {"y": 2 * x}, (x,)), 3)
    (start,) = poison([x])
    assert np.isnan(start).all()
    (found,) = looped.compiled([x], [start])
    np.testing.assert_array_equal(found, 2 * x)  # each call begins with x, not with a result


@pytest.mark.parametrize(
    ("label", "kind"),
    [(OURS, "ours"), (f"{OURS} 128x64", "sizes"), ("lax.ragged_dot", "peers")],
)
def test_kinds_of_programs(label, kind):
    assert kind_of(label) == kind


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (GROUPED, "lax.ragged_dot"),
        (dataclasses.replace(GROUPED, gated=True, gathered=True), "lax.ragged_dot"),
        (dataclasses.replace(WINDOW, num_sink_tokens=0), "jax.nn, xla"),
        (dataclasses.replace(WINDOW, num_sink_tokens=0, kernel="gradient_q"), "jax.nn, xla"),
    ],
    ids=["grouped", "swiglu", "window", "window_gradient"],
)
def test_a_peer_computes_what_the_case_does(case, name):
    operands = drawn.draw(case)
    function, theirs = peers.peers(case, operands, capability=0)[name]
    found = jax.jit(function)(*theirs)
    assert drawn.error(found, drawn.expected(case, operands)) < checks.LARGEST_ERROR


# --- Processes -----------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
for name in sys.argv[1].split(","):
    print(json.dumps({"begins": name}), flush=True)
    if name == "dies": os._exit(139)
    if name == "hangs": time.sleep(60)
    print(json.dumps({"case": name, "program": "ours", "error": 0.0}), flush=True)
"""


def test_a_worker_that_dies_or_hangs_loses_its_case_alone(monkeypatch):
    monkeypatch.setattr(checks, "CASE_SECONDS", 1.0)
    names = ["a", "dies", "b", "hangs", "c"]
    command = [sys.executable, "-c", WORKER]
    lines = list(checks.check_all(names, 1, command, time.monotonic() + 30))
    by_case = {line["case"]: line for line in lines}
    assert [name for name in names if "error" in by_case[name]] == ["a", "b", "c"]
    assert "exit code 139" in by_case["dies"]["failure"]
    assert "stopped" in by_case["hangs"]["failure"]


def test_what_no_time_was_left_for_is_told():
    lines = list(checks.check_all(["a", "b"], 2, [sys.executable, "-c", WORKER], time.monotonic()))
    assert [line["failure"] for line in lines] == ["no time was left"] * 2


def test_a_part_that_fails_leaves_what_it_had(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonesuch")
    found = parts.run_part("card", parts.Request(tmp_path, 30.0))
    assert "exit code 1" in found["failure"]


@pytest.mark.slow
def test_what_a_stopped_part_started_ends_with_it(tmp_path):
    child = f"import time; time.sleep(4); open({str(tmp_path / 'mark')!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert parts.run_group([sys.executable, "-c", parent], 1.0, {}) == "stopped after 1 s"
    time.sleep(4)
    assert not (tmp_path / "mark").exists()


def test_what_an_inner_process_had_when_it_was_stopped_is_taken(tmp_path, monkeypatch):
    request = parts.Request(tmp_path, 30.0)

    def stopped(command, **options):
        (tmp_path / "decoding_ours.json").write_text('{"ours": [1]}')
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(parts.subprocess, "run", stopped)
    found = parts._in_a_process("decoding_ours", request, seconds=2.0)
    assert found["ours"] == [1]
    assert found["failure"] == "decoding_ours: stopped after 2 s"


def test_a_process_that_is_stopped_says_where_it_was(tmp_path):
    code = "import sys, time; from benchmarks.gpu import parts; parts.PARTS['x'] = lambda *_: time"
    code += f".sleep(2); parts.main(['x', {str(tmp_path)!r}, '1', '', ''])"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=parts.ROOT)
    assert "in <lambda>" in parts._last_seen(tmp_path, "x")
    assert parts._last_seen(tmp_path, "another") == ""


def test_every_case_has_as_many_tokens_as_it_says():
    for name, case in cached_cases.COMPILED.items():
        rows_T, positions_T = work.asking_tokens(case)
        assert len(rows_T) == len(positions_T) == case.num_tokens, name
        assert set(rows_T) == set(range(case.num_rows))


# --- Results -------------------------------------------------------------------------------------


def entry(seconds, error=1e-3, flops=2e12, moved=1e9):
    check = {"error": error, "norm_error": error, "is_repeated": True}
    return {
        "checks": {OURS: check},
        "failures": {},
        "flops": flops,
        "least_bytes": moved,
        "seconds": seconds,
    }


REPORT = {
    "kernels": {
        "card": "NVIDIA H200",
        "capability": 90,
        "ceilings": {"bytes_per_second": 4e12, "flops_per_second": 8e14},
        "cases": {
            "window_attention/causal": entry({OURS: [5e-3, 4e-3, 6e-3], "cudnn": [4e-3]}),
            "window_attention/mosaic_causal": entry({OURS: [4e-3]}),
            "grouped_matmul/int8_decode": entry({OURS: [1e-3]}),
            "grouped_matmul/mosaic_int8_decode": entry({OURS: [2e-3]}),
            "grouped_matmul/bf16_down": entry({}, error=0.5),
        },
    },
    "training": {
        "card": "NVIDIA H200",
        "ours": {
            "layers": 4,
            "tokens": 1000,
            "tokens_per_second": 2000.0,
            "flops": 1e12,
            "peak_bytes": 5e10,
        },
        "peer": {"float32": {"tokens_per_second": 1000.0, "peak_bytes": 6e10}},
        "small": {"here": [4.0, 3.0], "cpu": [4.0, 2.0]},
    },
    "decoding": {
        "ours": [
            {
                "weights": "int8",
                "batch": 32,
                "tokens_per_second": 900.0,
                "seconds_per_step": [0.03, 0.04, 0.05],
                "gigabytes_per_second": 1234.0,
                "layers": 16,
                "context": 1024,
            }
        ],
        "engine": [
            {
                "weights": "int8",
                "batch": 32,
                "tokens_per_second": 600.0,
                "seconds_per_step": [0.04, 0.05, 0.06],
            }
        ],
        "peer": {"decoding": [{"batch": 32, "tokens_per_second": 300.0, "how": "CUDA graph"}]},
    },
}


def test_the_tables_say_what_was_measured():
    kernels, trained, decoded = tables.sheets(REPORT)
    rows = {row[0]: row for row in kernels.rows}
    assert rows["window_attention/causal"][2:] == ("5,000", "400", "200", "0.50", "cudnn", "0.80")
    assert rows["grouped_matmul/bf16_down"][1] == "WRONG: 5.0e-01"
    assert trained.rows[1][-1] == "2.00"
    assert trained.rows[2][0] == "a small model's losses: within 5.0e-01 of a CPU's"
    assert decoded.rows[0][-1] == "3.00"
    assert decoded.rows[1] == (
        "int8, by the engine",
        "32",
        "600",
        "50.00",
        "",
        *decoded.rows[1][5:],
    )
    assert decoded.rows[1][-1] == "2.00"
    assert "| cudnn |" in tables.markdown(kernels)
    assert "<td>cudnn</td>" in tables.as_html(kernels)
    assert tables.wrong_cases(REPORT["kernels"]) == ["grouped_matmul/bf16_down"]


def test_parts_that_failed_have_no_tables(tmp_path, capsys):
    failed = {part: {"failure": "stopped after 60 s"} for part in parts.SHARES}
    report.show(failed, tmp_path)
    assert tables.sheets(failed) == []
    assert "page:" in capsys.readouterr().out


def test_auto_takes_what_was_measured_to_be_faster(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backend, "MEASURED", tmp_path / "measured.json")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    backend.measured.cache_clear()
    report.show(REPORT, tmp_path)
    kept = report.keep(REPORT, tmp_path)
    backend.measured.cache_clear()
    assert json.loads(kept.read_text()) == REPORT
    assert kept.with_suffix(".md").read_text().startswith("# GPU report")
    assert "page:" in capsys.readouterr().out
    assert backend.prefers_mosaic("window_attention", H100_TARGET)  # 4 ms, not 5
    assert not backend.prefers_mosaic("grouped_matmul/int8", H100_TARGET)  # 2 ms, not 1
    assert not backend.prefers_mosaic("grouped_matmul/int4", H100_TARGET)  # was not measured
    assert not backend.prefers_mosaic("window_attention", INTERPRET)
    backend.measured.cache_clear()


def test_cases_that_were_not_run_again_stay():
    before = {"cases": {"a": 1, "b": 2}, "date": "then"}
    assert report.merged(before, {"cases": {"b": 3}, "date": "now"}) == {
        "cases": {"a": 1, "b": 3},
        "date": "now",
    }
