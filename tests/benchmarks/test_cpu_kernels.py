"""scripts.bench_cpu: what it compares computes the same, and its table says so."""

import importlib.util

import jax
import numpy as np
import pytest

from benchmarks import cpu_kernels
from benchmarks.ggml import Ggml
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


class Peer:
    """Stands in for llama.cpp."""

    def __init__(self, threads):
        assert threads > 0

    def products(self, x_RK, weights_NK, kind):
        assert kind in ("q8_0", "q4_0")
        return lambda: x_RK @ weights_NK[-1].T


@pytest.mark.slow
def test_a_token_takes_what_its_matrices_take(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "Ggml", Peer)
    monkeypatch.setattr(cpu_kernels, "PEER_RESTS", 0.0)
    monkeypatch.setattr(cpu_kernels, "WARM", 0.0)
    one, other = cpu_kernels.Matrix(64, 16, 3, 1), cpu_kernels.Matrix(32, 32, 1, 2)
    monkeypatch.setattr(cpu_kernels, "SMOLLM2", {"one": one, "other": other})
    *each, token = list(cpu_kernels.decoding_comparisons(1))[:3]
    for program, (total,) in token.seconds.items():
        (a,), (b,) = (comparison.seconds[program] for comparison in each)
        assert total == pytest.approx(3 * a + b / 2)  # of `other`, two copies were timed
    assert token.operations == 2 * (3 * 64 * 16 + 32 * 32)


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason='llama.cpp is not there: pip install ".[llama]" builds it in ten minutes',
)
@pytest.mark.parametrize(("kind", "bits"), [("q8_0", 8), ("q4_0", 4)])
@pytest.mark.parametrize("rows", [1, 8])
def test_llama_cpp_multiplies_what_it_is_given(kind, bits, rows):
    random = np.random.RandomState(0)
    x_RK = random.standard_normal((rows, 64)).astype(np.float32)
    weights_NK = [random.standard_normal((16, 64)).astype(np.float32) for _ in range(2)]
    y_RN = Ggml(threads=2).products(x_RK, weights_NK, kind)()
    # Weights of up to 3 have errors of half a step, x is rounded to 8 bits; the signs of 64 of
    # them vary, so that their sum stays below 8 times one.
    error = 8 * (3 / 2**bits + 3 / 2**8) * 2
    np.testing.assert_allclose(y_RN, x_RK @ weights_NK[-1].T, atol=error)


def test_a_chain_passes_through_every_matrix():
    w = np.stack([np.full((4, 4), value, np.float32) for value in (1, 2)])
    last = cpu_kernels._chain(lambda x, w: x @ w, jax.numpy.ones((1, 4)), w)()
    assert float(last) == 4 * 2  # the last matrix's


def test_rounds_must_be_some():
    with pytest.raises(UserError, match="--rounds 0"):
        bench_cpu.main(["--rounds", "0"])
