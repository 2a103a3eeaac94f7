"""Compares runs: their curves in one picture, what their configs differ in, what they came to.

    moesaic compare runs/v31_nano runs/v3_nano
    moesaic compare runs/rates/* --to runs/rates

The page is report.html in the folder --to names, by default runs/comparisons/A_B.
"""

from pathlib import Path

from configs.checks import require
from scripts import command
from train.compare import as_text, config_differences, last_numbers, read_runs, write_comparison


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--to", type=Path, help="folder of the page")
    arguments = parser.parse_args(argv)
    require(
        len(arguments.runs) > 1,
        "one run has nothing to be compared with: name two or more (its own page is report.html in "
        "its folder)",
    )
    runs = read_runs(arguments.runs)
    names = [run.name for run in runs]
    joined = "_".join(names).replace("/", "-")[:100]
    page = write_comparison(
        arguments.to or Path("runs/comparisons") / joined, " and ".join(names), runs
    )
    print(as_text(names, last_numbers(runs)))
    changed = config_differences(runs)
    print(f"\n{as_text(names, changed)}" if changed else "\ntheir settings are the same")
    print(f"page: {page}")


if __name__ == "__main__":
    command.execute(main)
