"""The limits that compiled kernels are held to, the results in the repository, and the L2 model."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compile_checks import attention_traffic, facts, gate, run, traffic, work
from benchmarks.compile_checks.cases import NAMES, program, runs_on
from benchmarks.compile_checks.devices import DEVICES, lowered
from benchmarks.compile_checks.facts import Facts
from kernels.backend import Target
from kernels.grouped_matmul import pallas_triton as grouped
from kernels.grouped_matmul import tiles as tiling
from kernels.grouped_matmul.cases import COMPILED, CompiledCase
from kernels.grouped_matmul.tiles import Tiles, place, tile_table
from kernels.paged_attention.cases import CompiledLatentCase
from kernels.window_attention import cases as window_cases
from kernels.window_attention.pallas_triton import choose_kernels
from scripts import check_kernels

A100, H100 = DEVICES["sm_80"], DEVICES["sm_90a"]
CASE = "grouped_matmul/int8_prefill"
SOUND = Facts(
    registers=128,
    spilled_bytes=0,
    stack_bytes=0,
    shared_bytes=100_000,
    threads=256,
    instructions=2000,
    matrix_products={"wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16": 8},
    asynchronous_loads=24,
    plain_loads=8,
    traffic=1.0,
)


@pytest.mark.parametrize("key", run.KEYS)
def test_every_case_has_sound_committed_results(key):
    committed = run.read_committed()["cases"]
    assert key in committed, f"{key} was never compiled: make kernels ARGS='{key} --write'"
    assert gate.faults(*run.split(key), run.committed_facts(committed[key])) == []


def test_no_committed_result_is_of_a_case_that_is_gone():
    assert set(run.read_committed()["cases"]) <= set(run.KEYS)


def test_a_few_bytes_may_spill_where_the_case_says_so():
    name = "window_attention/long_gradient_kv"
    facts = dataclasses.replace(SOUND, traffic=None, spilled_bytes=40, local_accesses=10)
    assert gate.faults(name, H100, facts) == []
    (fault,) = gate.faults(name, H100, dataclasses.replace(facts, spilled_bytes=400))
    assert "spills: 400 bytes" in fault


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"spilled_bytes": 16}, "spills: 16 bytes"),
        ({"local_accesses": 2}, "2 accesses to local memory"),
        ({"shared_bytes": 232_449}, "over 232448"),
        ({"registers": 255, "threads": 512}, "none can start"),
        ({"matrix_products": {}}, "instructions missing"),
        (
            {"matrix_products": {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": 8}},
            "not wgmma",
        ),
        (
            {"matrix_products": {"wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32": 8}},
            "tf32.*not wgmma.*bf16",
        ),
        ({"asynchronous_loads": 0}, "no asynchronous load"),
        ({"plain_loads": 129}, "129 plain loads"),
        ({"widened_weights": ["%convert.3"]}, "widened in memory by %convert.3"),
        ({"traffic": 1.2}, "1.20 times"),
    ],
)
def test_each_limit_is_held(changes, sentence):
    assert gate.faults(CASE, H100, SOUND) == []
    (fault,) = gate.faults(CASE, H100, dataclasses.replace(SOUND, **changes))
    assert re.search(sentence, fault)


def test_an_a100_has_no_wgmma():
    (fault,) = gate.faults(CASE, A100, SOUND)
    assert "not mma.sync" in fault


def test_what_got_worse_is_named():
    committed = dataclasses.asdict(SOUND)
    assert gate.regressions(dataclasses.replace(SOUND, registers=135), committed) == []
    worse = dataclasses.replace(SOUND, registers=160, plain_loads=9)
    assert gate.regressions(worse, committed) == [
        "registers: 160, was 128",
        "plain_loads: 9, was 8",
    ]
    other = dataclasses.replace(SOUND, matrix_products={})
    assert "instructions changed" in gate.regressions(other, committed)[0]


def test_a_hash_follows_what_is_traced(monkeypatch):
    """The A100 has other tiles for it; so has the H100 after a change of the kernel's."""
    name = "grouped_matmul/bf16_swiglu_prefill"
    before = gate.program_hash(name, H100)
    assert gate.program_hash(name, H100) == before != gate.program_hash(name, A100)
    monkeypatch.setattr(tiling, "SWEEP_BYTES", 1)
    assert gate.program_hash(name, H100) != before


def test_floats_as_large_as_the_weights_are_found_in_hlo():
    hlo = "%a.1 = s8[4,8]{1,0} parameter(0)\n%b = bf16[4,8]{1,0} convert(%a.1)\n%c = f32[8] x()"
    assert facts._widened(hlo, 32) == ["%b"]
    assert facts._widened(hlo, 0) == []


def test_what_mosaic_wrote_is_found(tmp_path):
    """A Mosaic kernel's PTX is in a file of its own, its launch in the log of Mosaic's passes."""
    (tmp_path / "module_0001.ptx").write_text("")
    (tmp_path / "mosaic_x_0.ptx").write_text(".entry mosaic_x_mosaic_gpu_kernel(")
    log = "gpu.launch in (%c384) dynamic_shared_memory_size %c217152_i32 {\n"
    (tmp_path / "mosaic_x_0.mlir-passes.log").write_text(f"func\n{log}{log.replace('2171', '9')}")
    path, entry = facts._find(tmp_path, "mosaic_x")
    assert (path.name, entry) == ("mosaic_x_0.ptx", "mosaic_x_mosaic_gpu_kernel")
    assert facts._dynamic_shared_bytes(tmp_path, entry) == 217_152
    (tmp_path / "mosaic_x_0.mlir-passes.log").write_text("another form of launch")
    with pytest.raises(RuntimeError, match="no launch of mosaic_x_mosaic_gpu_kernel"):
        facts._dynamic_shared_bytes(tmp_path, entry)


def test_the_command_reports_what_a_process_said(monkeypatch, capsys):
    results = [("grouped_matmul/int8_prefill/sm_90a", SOUND), ("x/sm_80", "exit code -6: aborted")]
    monkeypatch.setattr(run, "compile_all", lambda keys: results)
    monkeypatch.setattr(run, "chosen", lambda: [key for key, _ in results])
    monkeypatch.setattr(run, "read_committed", lambda: {"tools": {}, "cases": {}})
    monkeypatch.setattr(run, "tool_versions", lambda: {"ptxas": "1"})
    assert check_kernels.main([]) == 1
    said = capsys.readouterr().out
    assert "int8_prefill/sm_90a: 128 registers, 100000 bytes shared" in said
    assert "FAILS: exit code -6: aborted" in said
    assert "1 of 2 cases are sound" in said


def test_results_are_kept_beside_those_of_other_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "COMMITTED", tmp_path / "compiled.json")
    monkeypatch.setattr(run, "tool_versions", lambda: {"ptxas": "1"})
    monkeypatch.setattr(
        run, "program_hash", lambda name, device: f"{name} {device.accelerator.architecture}"
    )
    run.write({run.KEYS[0]: SOUND})
    run.write({run.KEYS[1]: SOUND})
    kept = json.loads(run.COMMITTED.read_text())["cases"]
    assert set(kept) == set(run.KEYS[:2])
    assert run.committed_facts(kept[run.KEYS[0]]) == SOUND
    assert set(run.KEYS[2:]) <= set(run.chosen())  # the others have never been compiled
    monkeypatch.setattr(run, "tool_versions", lambda: {"ptxas": "2"})
    assert len(run.chosen()) == run.SAMPLE


# --- Traffic -------------------------------------------------------------------------------------


def test_the_model_takes_the_grids_order(monkeypatch):
    monkeypatch.setattr(tiling, "SWEEP_BYTES", 2 * 16 * 64)
    sizes, columns = [40, 0, 3, 16], 3
    tiles = Tiles(rows=16, columns=16, depth=16)
    table = tile_table(jnp.asarray(sizes, jnp.int32), sum(sizes), tiles, 64)
    groups, _ = traffic._tiles(np.asarray(sizes), 16)
    order = list(traffic._order(groups, columns, 2))
    at = jax.vmap(lambda i: place(i, table, columns))(jnp.arange(len(order), dtype=jnp.int32))
    rows = [int(table.first_row_P[tile]) for tile, _ in order]
    np.testing.assert_array_equal(at.first_row, rows)
    np.testing.assert_array_equal(at.column, [column for _, column in order])


def test_mixtral_reads_each_matrix_once_and_other_orders_do_not(monkeypatch):
    """8 experts of 4096 x 14336 and 8192 rows: the order decides."""
    case = CompiledCase(rows=8192, d_in=4096, d_out=14_336, num_groups=8)
    tiles = traffic.tiles_of(case, H100.target)
    assert traffic.ratio(case, tiles, H100) < 1.01

    def tile_by_tile(groups, columns, longest):
        return ((tile, column) for tile in range(len(groups)) for column in range(columns))

    def column_by_column(groups, columns, longest):
        return ((tile, column) for column in range(columns) for tile in range(len(groups)))

    for wrong in (tile_by_tile, column_by_column):
        monkeypatch.setattr(traffic, "_order", wrong)
        assert traffic.ratio(case, tiles, H100) > 1.5


def test_wide_tiles_read_mixtrals_down_projection_less_often():
    case = COMPILED["mixtral_down"]
    tiles = traffic.tiles_of(case, H100.target)
    assert traffic.ratio(case, tiles, H100) < case.most_traffic
    assert traffic.ratio(case, dataclasses.replace(tiles, columns=128), H100) > 1.3


def test_strips_keep_what_a_gradient_of_matrices_reads(monkeypatch):
    """Mixtral's with 2048 rows to an expert: row by row, dy passes through L2 for every wave."""
    case = COMPILED["mixtral_gradient_w"]
    tiles = traffic.tiles_of(case, H100.target)
    assert traffic.ratio(case, tiles, H100) < 1.1
    monkeypatch.setattr(traffic, "columns_of_strip", lambda *shape: 1000)
    assert traffic.ratio(case, tiles, H100) > 2


def test_the_model_takes_the_strips_of_the_kernel():
    down, across, strip = 3, 7, 3
    blocks = jnp.arange(down * across, dtype=jnp.int32)
    for width in (strip, 100):
        at = jax.vmap(lambda i, w=width: grouped._place_in_strips(i, down, across, w))(blocks)
        order = list(zip(*(x.tolist() for x in at), strict=True))
        assert order == list(traffic._strips(down, across, width))


def test_a_cache_that_holds_everything_moves_the_least():
    endless = dataclasses.replace(
        H100, accelerator=dataclasses.replace(H100.accelerator, l2_bytes=2**40)
    )
    for name in ("bf16_prefill", "bf16_gradient_x", "mixtral_down", "mixtral_gradient_w"):
        case = COMPILED[name]
        tiles = traffic.tiles_of(case, H100.target)
        np.testing.assert_allclose(traffic.ratio(case, tiles, endless), 1.0)
    for case in window_cases.COMPILED.values():  # positions are read as keys' and as queries'
        assert 1.0 <= attention_traffic.window_ratio(case, endless) < 1.01


def test_the_model_sees_the_blocks_that_a_window_kernel_reads():
    """128 queries and 64 keys to a block; window and sinks as the kernel's loops count them."""
    case = dataclasses.replace(
        window_cases.COMPILED["causal"], length=512, window_size=100, num_sink_tokens=4
    )
    blocks = choose_kernels(128, 2, A100.target).forward
    assert [attention_traffic._blocks_of_keys(case, first, blocks) for first in (0, 128, 384)] == [
        [0, 1],
        [0, 1, 2, 3],
        [0, 4, 5, 6, 7],
    ]


def test_few_long_sequences_cost_little_more_than_their_pages():
    """By hand: 2 x 4096 positions of 16 heads, in 16 parts that leave 16 x 514 floats each."""
    case = CompiledLatentCase(batch=2, num_heads=16, max_pages=64)
    positions = work.lengths(case)
    pages = sum(-(-int(n) // 32) * 32 for n in positions) * 576 * 2
    small = 2 * (16 * 576 * 2 + 4 * 65)
    sums, result = 2 * 16 * 16 * 514 * 4, 2 * 16 * 512 * 2
    least = sum(positions) * 576 * 2 + small + result
    ratio = attention_traffic.paged_ratio(case, H100)
    np.testing.assert_allclose(ratio, (pages + small + 2 * sums + result) / least)


# --- Lowering ------------------------------------------------------------------------------------

ONE_OF_EACH = {program(name, H100).kernel: name for name in reversed(NAMES)}
"""A case of every kernel."""


@pytest.mark.parametrize("kernel", sorted(k for k in ONE_OF_EACH if k.startswith("mosaic")))
def test_kernels_are_written_in_what_mosaic_has(kernel):
    """To the binary of Mosaic's dialects in XLA's program: layouts and copies fit each other."""
    case = program(ONE_OF_EACH[kernel], H100)
    assert "mosaic_gpu" in lowered(case.function, case.operands, H100).as_text()


@pytest.mark.parametrize("target", [A100.target, Target("rocm")], ids=["cuda", "rocm"])
@pytest.mark.parametrize("kernel", sorted(ONE_OF_EACH))
@pytest.mark.thinned(2)
def test_kernels_are_written_in_what_triton_has(kernel, target):
    """As far as a CPU goes: Triton's own language; for ROCm no compiler is checked beyond it."""
    device = dataclasses.replace(H100, target=target)
    name = ONE_OF_EACH[kernel]
    if not runs_on(name, device):
        pytest.skip("fp8 products and Mosaic's kernels need Hopper")
    case = program(name, device)
    text = lowered(case.function, case.operands, device).as_text()
    assert f'name = "{kernel}"' in text
