"""Programs for a case: ours, ours with other sizes, and its peers, each as a loop on the device.

A call from Python takes longer than a small kernel. So what is timed is one program that runs a
case's function again and again; each time depends on the one before, and results land in memory
that held NaN at first.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import serialize_executable

from benchmarks.compile_checks.cases import program
from benchmarks.compile_checks.devices import Device
from benchmarks.gpu import operands as drawn
from benchmarks.gpu.peers import peers
from benchmarks.gpu.roofline import Bound, Case
from kernels.cached_attention.cases import CompiledCase as CachedCase
from kernels.cached_attention.pallas_triton import Sizes
from kernels.grouped_matmul.cases import CompiledCase as GroupedCase
from kernels.grouped_matmul.tiles import Tiles
from kernels.window_attention import pallas_mosaic as window_mosaic
from kernels.window_attention.cases import CompiledCase as WindowCase
from kernels.window_attention.pallas_triton import Blocks, Kernels

TURN_SECONDS = 0.02
"""About what the calls of one turn take together."""
MOST_CALLS = 200
OURS = "ours"


class Program(NamedTuple):
    """A function and its operands, trees of arrays."""

    function: Callable[..., Any]
    operands: tuple[Any, ...]


class Looped(NamedTuple):
    """A compiled program that runs `calls` times; it takes leaves of operands and of a result."""

    compiled: Any
    calls: int


def programs(name: str, case: Case, device: Device) -> tuple[dict[str, Program], drawn.Operands]:
    """All programs of a case by name, ours first, and the operands that ours take."""
    operands = drawn.draw(case)
    found = {OURS: Program(program(name, device).function, operands)}
    for peer, (function, theirs) in peers(case, operands, device.target.capability).items():
        found[peer] = Program(function, theirs)
    for label, sizes in candidates(case):
        found[f"{OURS} {label}"] = Program(program(name, device, sizes).function, operands)
    return found, operands


def kind_of(label: str) -> str:
    """ "ours", "sizes" (ours, with other sizes than it would choose) or "peers"."""
    first, *rest = label.split(" ")
    return "peers" if first != OURS else "sizes" if rest else "ours"


def num_calls(bound: Bound | None) -> int:
    """Calls of a turn, for a program that reaches about half of its bound."""
    if bound is None:
        return 1
    return max(1, min(MOST_CALLS, round(TURN_SECONDS / (2 * bound.seconds))))


def compile_loop(chosen: Program, calls: int) -> Looped:
    """Compiles a program for `calls` runs; it gives the last result's leaves."""
    leaves, tree = jax.tree.flatten(chosen.operands)

    def run(leaves, results):
        def once(_, results):
            tied, _ = lax.optimization_barrier((leaves, results))
            return jax.tree.leaves(chosen.function(*jax.tree.unflatten(tree, tied)))

        return lax.fori_loop(0, calls, once, results)

    jitted = jax.jit(run, donate_argnums=1)
    return Looped(jitted.lower(leaves, abstract_results(chosen)).compile(), calls)


def abstract_results(chosen: Program) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the leaves of a program's result."""
    return jax.tree.leaves(jax.eval_shape(chosen.function, *chosen.operands))


def poison(results: list[Any]) -> list[jax.Array]:
    """Arrays like these that hold NaN, or of integers their least value."""

    def filled(x: Any) -> jax.Array:
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.full(x.shape, jnp.nan if is_float else jnp.iinfo(x.dtype).min, x.dtype)

    return [filled(x) for x in results]


def save(looped: Looped) -> bytes:
    """A compiled program's bytes, for another process on such a device."""
    return serialize_executable.serialize(looped.compiled)[0]


# --- Other sizes ---------------------------------------------------------------------------------


def candidates(case: Case) -> Iterator[tuple[str, Any]]:
    """Other sizes to try for a case's kernel, by a label."""
    if isinstance(case, GroupedCase):
        for tiles in _tiles(case):
            yield label_of(tiles), tiles
    elif isinstance(case, CachedCase) and case.dtype == "bfloat16":
        in_group = case.num_heads // case.num_kv_heads
        is_few = in_group <= 16 and case.num_tokens <= case.num_rows
        for sizes in CACHED_FEW if is_few else CACHED_MANY:
            yield "x".join(map(str, sizes)), Sizes(*sizes)
    elif isinstance(case, WindowCase) and case.dtype == "bfloat16":
        if case.compiler == "mosaic":
            for blocks in MOSAIC_BLOCKS:
                yield "x".join(map(str, blocks)), window_mosaic.Blocks(*blocks)
            return
        for blocks in ATTENTION_BLOCKS[case.kernel]:
            yield "x".join(map(str, blocks)), Kernels(*[Blocks(*blocks)] * 3)


def label_of(tiles: Tiles) -> str:
    return "x".join(map(str, dataclasses.astuple(tiles)))


def _tiles(case: GroupedCase) -> Iterator[Tiles]:
    mean = case.rows // case.num_groups
    if case.format == "float32" or case.fp8_rows:
        return
    if case.compiler == "mosaic":
        sizes = MOSAIC_TILES if mean <= 16 and not case.gated else ()
    elif case.contraction == "gradient_w":
        sizes = GRADIENT_TILES
    elif mean <= 16:
        sizes = FEW_ROWS
    elif mean <= 128:
        sizes = SOME_ROWS
    elif case.gated:
        sizes = GATED_TILES
    else:
        sizes = MANY_ROWS
    for rows, columns, depth, warps, stages in sizes:
        yield Tiles(rows=rows, columns=columns, depth=depth, num_warps=warps, num_stages=stages)


# rows, columns, depth, warps, stages
MANY_ROWS = (
    (128, 128, 64, 4, 3),
    (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 4),
    (128, 128, 32, 4, 4),
    (128, 128, 32, 8, 5),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (256, 128, 32, 8, 4),
    (64, 256, 64, 4, 4),
    (64, 256, 64, 8, 4),
)
GATED_TILES = (
    (128, 64, 64, 4, 3),
    (128, 64, 64, 8, 4),
    (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (64, 128, 64, 8, 4),
    (128, 128, 64, 8, 4),
    (128, 128, 32, 8, 4),
    (256, 64, 64, 8, 3),
)
GRADIENT_TILES = (
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 32, 4, 4),
    (128, 128, 32, 8, 4),
    (128, 256, 32, 8, 4),
    (128, 256, 64, 8, 3),
    (256, 128, 32, 8, 4),
    (256, 128, 64, 8, 3),
)
MOSAIC_TILES = ((16, 128, 128, 12, 6), (16, 128, 128, 12, 10), (16, 128, 128, 12, 16))
FEW_ROWS = (
    (16, 64, 64, 4, 5),
    (16, 64, 128, 4, 3),
    (16, 64, 128, 4, 5),
    (16, 64, 256, 4, 3),
    (16, 128, 64, 4, 5),
    (16, 128, 128, 4, 3),
    (16, 128, 128, 8, 4),
    (16, 32, 128, 4, 5),
    (16, 32, 256, 4, 4),
)
SOME_ROWS = (
    (32, 64, 128, 4, 4),
    (32, 128, 64, 4, 4),
    (32, 128, 128, 4, 3),
    (64, 64, 64, 4, 5),
    (64, 64, 128, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 128, 128, 8, 3),
    (128, 64, 64, 4, 4),
)
# queries, keys, warps, stages
ATTENTION_BLOCKS = {
    "forward": (
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
    ),
    "gradient_q": (
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (128, 32, 4, 3),
    ),
    "gradient_kv": (
        (64, 128, 8, 2),
        (64, 128, 8, 3),
        (128, 128, 8, 2),
        (64, 64, 4, 2),
        (64, 64, 8, 3),
        (32, 128, 4, 2),
        (128, 64, 8, 2),
    ),
}
# queries, slots, warps, stages
CACHED_FEW = (
    (16, 32, 4, 2),
    (16, 32, 4, 3),
    (16, 64, 4, 2),
    (16, 64, 4, 3),
    (16, 128, 4, 2),
    (16, 64, 8, 2),
)
CACHED_MANY = (
    (32, 32, 4, 2),
    (32, 64, 4, 2),
    (64, 32, 4, 2),
    (64, 32, 8, 2),
    (64, 64, 8, 2),
    (64, 64, 8, 3),
    (64, 128, 8, 2),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
)
# queries of a warpgroup, keys, slots, whether results share the queries' place, turns
MOSAIC_BLOCKS = (
    (64, 128, 2, False, False),
    (64, 128, 2, False, True),
    (64, 128, 3, True, False),
    (64, 128, 3, True, True),
    (64, 64, 4, True, True),
)
