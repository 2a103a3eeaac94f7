"""Compares the native CPU kernels with XLA's products on this machine, in alternating rounds.

    python -m scripts.bench_cpu                # the first two parts
    python -m scripts.bench_cpu grouped        # ragged groups against one dense product
    python -m scripts.bench_cpu quantized      # int8 and int4 weights against float32
    python -m scripts.bench_cpu decoding       # SmolLM2's matrices against llama.cpp's kernels

The last needs llama.cpp: pip install ".[llama]" builds it, in about ten minutes on two cores.

Ratios are medians over the rounds, with the least and the greatest; above 1 is faster than the
base. Run it with nothing beside it: what shares the machine moves the figures.
"""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from benchmarks.cpu_kernels import (
    Comparison,
    decoding_comparisons,
    grouped_comparisons,
    quantized_comparisons,
)
from configs.checks import UserError
from kernels import native
from scripts import command

PARTS = {
    "grouped": grouped_comparisons,
    "quantized": quantized_comparisons,
    "decoding": decoding_comparisons,
}


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="only this part")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds} must be at least 1")
    if not native.is_available():
        raise UserError("the native CPU kernels are not built, so there is nothing to compare")
    print(f"instruction set: {native.isa()}")
    for name in [arguments.part] if arguments.part else ("grouped", "quantized"):
        print_comparisons(PARTS[name](arguments.rounds))


def print_comparisons(comparisons: Iterator[Comparison]) -> None:
    """One table for each: they come minutes apart."""
    for comparison in comparisons:
        table = Table("program", "GFLOP/s", "times as fast", "least", "most")
        table.title = comparison.name
        for program in comparison.seconds:
            middle, least, most = comparison.ratio(program)
            figures = (f"{comparison.gflops(program):.0f}", f"{middle:.2f}")
            table.add_row(program, *figures, f"{least:.2f}", f"{most:.2f}")
        Console().print(table)


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
