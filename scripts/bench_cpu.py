"""Compares the native CPU kernels with XLA's products on this machine, in alternating rounds.

    python -m scripts.bench_cpu                # both parts
    python -m scripts.bench_cpu grouped        # ragged groups against one dense product
    python -m scripts.bench_cpu quantized      # int8 and int4 weights against float32

Ratios are medians over the rounds, with the least and the greatest; above 1 is faster than the
base. Run it with nothing beside it: what shares the machine moves the figures.
"""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from benchmarks.cpu_kernels import Comparison, grouped_comparisons, quantized_comparisons
from configs.checks import UserError
from kernels import native
from scripts import command

PARTS = {"grouped": grouped_comparisons, "quantized": quantized_comparisons}


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
    for name in [arguments.part] if arguments.part else PARTS:
        print_comparisons(PARTS[name](arguments.rounds))


def print_comparisons(comparisons: Iterator[Comparison]) -> None:
    table = Table("product", "program", "GFLOP/s", "times as fast", "least", "most")
    for comparison in comparisons:
        print(f"measured: {comparison.name}", flush=True)
        for program in comparison.seconds:
            middle, least, most = comparison.ratio(program)
            figures = (f"{comparison.gflops(program):.0f}", f"{middle:.2f}")
            table.add_row(comparison.name, program, *figures, f"{least:.2f}", f"{most:.2f}")
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
