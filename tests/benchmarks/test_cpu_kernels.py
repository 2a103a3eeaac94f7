"""scripts.bench_cpu: what it compares computes the same, and its table says so."""

import jax
import numpy as np
import pytest

from benchmarks import cpu_kernels
from configs.checks import UserError
from kernels import native
from scripts import bench_cpu

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason="the native library is not built: no C++ compiler"
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "ROWS", 64)
    monkeypatch.setattr(cpu_kernels, "GROUPED", ((2, 16, 24),))
    monkeypatch.setattr(cpu_kernels, "QUANTIZED", ((128, 32, 2),))
    monkeypatch.setattr(cpu_kernels, "CHAIN_BYTES", 4 * 128 * 32 * 3)


def test_the_programs_of_a_comparison_do_the_same_work(monkeypatch):
    seen = []

    def in_turn(programs, rounds, repeats):
        seen.append({name: np.asarray(program()) for name, program in programs.items()})
        return {name: [1.0] for name in programs}

    monkeypatch.setattr(cpu_kernels, "in_turn", in_turn)
    list(cpu_kernels.grouped_comparisons(1))
    assert len(seen) == 3
    for results in seen:  # the dense product has one matrix for all rows, so only its size is ours
        np.testing.assert_allclose(results["native"], results["xla"], rtol=1e-5, atol=1e-4)


def test_a_ratio_is_taken_within_a_round():
    seconds = {"base": [4.0, 2.0, 9.0], "ours": [2.0, 2.0, 3.0]}
    comparison = cpu_kernels.Comparison("product", "base", seconds, 6e9)
    assert comparison.ratio("ours") == (2.0, 1.0, 3.0)
    assert comparison.gflops("base") == 1.5


def test_the_table_names_every_program(capsys):
    bench_cpu.main(["--rounds", "1"])
    out = capsys.readouterr().out
    assert "2 groups, 16 x 24: gradient of w" in out
    assert "int4, int8 activations" in out


def test_a_chain_passes_through_every_matrix():
    w = np.stack([np.full((4, 4), value, np.float32) for value in (1, 2)])
    total = cpu_kernels._chain(lambda x, w: x @ w, jax.numpy.ones((1, 4)), w)()
    assert float(total) == 4 * 4 * 2  # the last matrix's


def test_rounds_must_be_some():
    with pytest.raises(UserError, match="--rounds 0"):
        bench_cpu.main(["--rounds", "0"])
