"""The native CPU kernels against XLA's own products, in turn.

R rows, E groups, D and F widths, K inputs, N outputs.
"""

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ggml import Ggml
from kernels.backend import Target
from kernels.grouped_matmul import Activations, cpu, xla
from kernels.matmul import matmul
from kernels.quantize import WeightFormat, to_format

ROWS = 4096
GROUPED = ((8, 512, 1024), (64, 256, 512), (128, 512, 1024))
"""Groups, D, F."""
QUANTIZED = (
    *((4096, 4096, rows) for rows in (1, 8, 512)),
    *((1024, 1024, rows) for rows in (1, 8, 512)),
    *((576, 3072, rows) for rows in (1, 8, 512)),  # SmolLM2-135M's gate and up
)
"""Inputs, outputs, rows."""
WEIGHTS: dict[WeightFormat, tuple[Activations, ...]] = {
    "bfloat16": ("float", "auto"),
    "fp8": ("float", "auto"),
    "int8": ("float", "int8", "auto"),
    "int4": ("float", "int8", "auto"),
}
"""Formats, and what the product makes of x."""
CHAIN_BYTES = 128e6
"""Float weights that one call passes through: more than caches hold, as in decoding."""
PEER_KINDS: dict[WeightFormat, str] = {"int8": "q8_0", "int4": "q4_0"}
"""llama.cpp's names for the same bytes."""
PEER_RESTS = 0.3
"""Seconds after which the threads of llama.cpp's pool, which spin for some 0.1, leave the cores."""
WARM = 0.03
"""Seconds until calls of a millisecond take equally long, for us and for llama.cpp."""


@dataclass(frozen=True)
class Matrix:
    """One kind of a model's matrices."""

    inputs: int
    outputs: int
    of_a_token: int
    """How many of them a token passes."""
    copies: int
    """Of those that the comparison takes in turn: more than a core's own caches hold."""


SMOLLM2 = {
    "q, o": Matrix(576, 576, 60, 30),
    "k, v": Matrix(576, 192, 60, 60),
    "gate, up": Matrix(576, 1536, 60, 30),
    "down": Matrix(1536, 576, 30, 30),
    "output layer": Matrix(576, 49_152, 1, 2),
}
"""Of SmolLM2-135M, which has 30 layers."""

Program = Callable[[], jax.Array | np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """One product in several programs."""

    name: str
    base: str
    """The program that the others are compared with."""
    seconds: dict[str, list[float]]
    """By program, one figure per round."""
    operations: float
    """Multiplications and additions of the useful work."""

    def ratio(self, program: str) -> tuple[float, float, float]:
        """How many times as fast as the base: median, least and greatest over the rounds."""
        pairs = zip(self.seconds[self.base], self.seconds[program], strict=True)
        values = [base / ours for base, ours in pairs]
        return statistics.median(values), min(values), max(values)

    def gflops(self, program: str) -> float:
        return self.operations / statistics.median(self.seconds[program]) / 1e9


def in_turn(
    programs: dict[str, Program], rounds: int, repeats: int, rest: float = 0.0, warm: float = 0.0
) -> dict[str, list[float]]:
    """Seconds per call of each, by round; each turn begins with a call that is not timed.

    Args:
      rest: seconds before each turn, for the threads of the one before to go to sleep.
      warm: seconds of calls that are not timed, for its own to wake and the caches to fill.
    """
    seconds = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            time.sleep(rest)
            began = time.perf_counter()
            jax.block_until_ready(program())
            while time.perf_counter() - began < warm:
                jax.block_until_ready(program())
            began = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready(program())
            seconds[name].append((time.perf_counter() - began) / repeats)
    return seconds


def grouped_comparisons(rounds: int) -> Iterator[Comparison]:
    """The three contractions of grouped_matmul against one dense product of equal useful work."""
    for num_groups, d_in, d_out in GROUPED:
        random = np.random.RandomState(0)
        shares_E = random.dirichlet(np.full(num_groups, 8.0))
        sizes_E = jnp.array(random.multinomial(ROWS, shares_E), jnp.int32)
        x_RD, dy_RF, w_EDF = (
            jnp.array(random.standard_normal(shape), jnp.float32)
            for shape in ((ROWS, d_in), (ROWS, d_out), (num_groups, d_in, d_out))
        )
        for name, programs in _contractions(x_RD, dy_RF, w_EDF, sizes_E).items():
            seconds = in_turn(programs, rounds, repeats=2)
            label = f"{num_groups} groups, {d_in} x {d_out}: {name}"
            yield Comparison(label, "dense", seconds, 2.0 * ROWS * d_in * d_out)


def _contractions(x_RD, dy_RF, w_EDF, sizes_E) -> dict[str, dict[str, Program]]:
    def forward(implementation, transpose):
        return functools.partial(implementation.rows_times_matrix, transpose=transpose)

    parts = {
        "forward": (lambda x, w: x @ w, (x_RD, w_EDF[0]), (x_RD, w_EDF, sizes_E)),
        "gradient of x": (lambda dy, w: dy @ w.T, (dy_RF, w_EDF[0]), (dy_RF, w_EDF, sizes_E)),
        "gradient of w": (lambda x, dy: x.T @ dy, (x_RD, dy_RF), (x_RD, dy_RF, sizes_E)),
    }
    programs = {}
    for name, (dense, dense_operands, operands) in parts.items():
        ours, plain = (
            implementation.rows_times_rows
            if name == "gradient of w"
            else forward(implementation, name == "gradient of x")
            for implementation in (cpu, xla)
        )
        programs[name] = {
            "dense": functools.partial(jax.jit(dense), *dense_operands),
            "native": functools.partial(jax.jit(ours), *operands),
            "xla": functools.partial(jax.jit(plain), *operands),
        }
    return programs


def quantized_comparisons(rounds: int) -> Iterator[Comparison]:
    """Products of few and of many rows with weights in every format, packed as they are for a CPU,
    against XLA's in float32.
    """
    for num_inputs, num_outputs, num_rows in QUANTIZED:
        random = np.random.RandomState(0)
        count = max(1, round(CHAIN_BYTES / (4 * num_inputs * num_outputs)))
        shape = (count, num_inputs, num_outputs)
        w_LKN = jnp.array(random.standard_normal(shape), jnp.float32)
        x_RK = jnp.array(random.standard_normal((num_rows, num_inputs)), jnp.float32)
        programs = {"float32": _chain(lambda x, w: x @ w, x_RK, w_LKN)}
        for format, kinds in WEIGHTS.items():
            weights = to_format(w_LKN, format, Target("cpu"))
            for activations in kinds:
                product = functools.partial(matmul, activations=activations, implementation="cpu")
                programs[f"{format}, {activations} activations"] = _chain(product, x_RK, weights)
        seconds = in_turn(programs, rounds, repeats=2)
        label = f"{num_rows} x {num_inputs} x {num_outputs}"
        yield Comparison(label, "float32", seconds, 2.0 * num_rows * w_LKN.size)


def decoding_comparisons(rounds: int) -> Iterator[Comparison]:
    """The matrices of SmolLM2-135M in blocks of 32 with scales of 16 bits, against llama.cpp's.

    At the end of each kind what all of them take for a token.
    """
    peer = Ggml(threads=os.cpu_count() or 1)
    for num_rows, format in itertools.product((1, 8, 512), PEER_KINDS):
        label = f"{num_rows} rows, {format}"
        token: dict[str, list[float]] = {}
        operations = 0.0
        for name, matrix in SMOLLM2.items():
            programs = _decoding_programs(peer, matrix, num_rows, format)
            seconds = in_turn(programs, rounds, repeats=10, rest=PEER_RESTS, warm=WARM)
            work = 2.0 * num_rows * matrix.inputs * matrix.outputs
            shape = f"{name} {matrix.inputs} x {matrix.outputs}"
            yield Comparison(f"{shape}, {label}", "llama.cpp", seconds, work * matrix.copies)
            share = matrix.of_a_token / matrix.copies
            for program, values in seconds.items():
                sums = token.get(program, [0.0] * rounds)
                token[program] = [a + share * b for a, b in zip(sums, values, strict=True)]
            operations += work * matrix.of_a_token
        yield Comparison(f"all matrices of a token, {label}", "llama.cpp", token, operations)


def _decoding_programs(
    peer: Ggml, matrix: Matrix, num_rows: int, format: WeightFormat
) -> dict[str, Program]:
    random = np.random.RandomState(0)
    shape = (matrix.copies, matrix.inputs, matrix.outputs)
    w_LKN = random.standard_normal(shape).astype(np.float32)
    x_RK = random.standard_normal((num_rows, matrix.inputs)).astype(np.float32)
    weights = to_format(jnp.array(w_LKN), format, Target("cpu"))
    kind = PEER_KINDS[format]
    programs: dict[str, Program] = {
        "llama.cpp": peer.products(x_RK, list(w_LKN.swapaxes(1, 2)), kind)
    }
    for activations in ("float", "int8", "auto"):
        product = functools.partial(matmul, activations=activations, implementation="cpu")
        chain = _chain(product, jnp.array(x_RK), weights)
        programs[f"{activations} activations"] = chain
    return programs


def _chain(product: Callable, x_RK: jax.Array, weights) -> Program:
    """x meets each matrix of a stack, one after the other; unrolled, so that none is copied."""
    layers = [
        jax.tree.map(lambda a: jnp.array(a[i]), weights)  # noqa: B023
        for i in range(jax.tree.leaves(weights)[0].shape[0])
    ]

    def run(x_RK, layers):
        last = jnp.float32(0)
        for layer in layers:
            # The next product waits for this one: it needs an entry of it.
            last = product(x_RK + 0 * last, layer)[-1, -1]
        return last

    return functools.partial(jax.jit(run), x_RK, layers)
