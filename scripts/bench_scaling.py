"""Scaling of a training step's cost with layers, experts and sequence length, and of compile time
with depth.

    python -m scripts.bench_scaling

Each series changes one thing of a small model and compares the measured cost per token with the one
predicted, with its fit; all of them take ten minutes.
"""

from benchmarks.scaling import SERIES, print_compile_times, print_series
from scripts import command


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds over the members of a series")
    parser.add_argument("--only", choices=[*SERIES, "compile"], help="one series instead of all")
    arguments = parser.parse_args(argv)
    for name in SERIES:
        if arguments.only in (None, name):
            print_series(name, arguments.rounds)
    if arguments.only in (None, "compile"):
        print_compile_times()


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
