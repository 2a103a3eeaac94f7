"""Compares runs: their curves in one picture, what their configs differ in, what they came to, and
what scripts.evaluate measured of them, the first run against each other one sample by sample.

    moesaic compare runs/v31_nano runs/v3_nano
    moesaic compare runs/rates/* --to runs/rates

The page is report.html in the folder --to names, by default runs/comparisons/A_B.
"""

import html
from pathlib import Path

from configs.checks import require
from evals.page import difference_table, print_differences
from evals.run_evaluations import paired_differences, read_evaluations, score_rows
from scripts import command
from train.compare import (
    as_text,
    config_differences,
    grid,
    last_numbers,
    read_runs,
    write_comparison,
)


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
    evaluations = read_evaluations(names, arguments.runs)
    scores = score_rows(evaluations)
    sections = [f"<h2>Evaluations</h2>{grid(names, scores)}"] if scores else []
    print(as_text(names, last_numbers(runs)))
    if scores:
        print(f"\n{as_text(names, scores)}")
    for other in evaluations[1:]:
        differences = paired_differences(evaluations[0], other)
        if differences:
            print_differences(names[0], other.name, differences)
            title = html.escape(f"{names[0]} against {other.name}, sample by sample")
            sections.append(f"<h3>{title}</h3>{difference_table(differences)}")
    to = arguments.to or Path("runs/comparisons") / joined
    page = write_comparison(to, " and ".join(names), runs, sections=sections)
    changed = config_differences(runs)
    print(f"\n{as_text(names, changed)}" if changed else "\ntheir settings are the same")
    print(f"page: {page}")


if __name__ == "__main__":
    command.execute(main)
