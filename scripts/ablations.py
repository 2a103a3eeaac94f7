"""The articles' figures as A/B experiments: same data, same steps, equal active FLOPs stated.

    python -m scripts.ablations balance --seeds 3
    python -m scripts.ablations all

Each prints the article's figure, the bound of theory and what was measured with its spread, adds
itself to runs/ablations/ablations.md, and draws runs/ablations/NAME.png. What does not reproduce is
reported as such. `--log docs/ablations.md` keeps a result among those of the project, which names
the articles.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from benchmarks.ablations import (
    balance,
    context_router,
    delta_net,
    dynamic_depth,
    dynamic_experts,
    growth,
    incremental,
    long_context,
    offloading,
    recurrence,
    serving,
    smaller,
    sparse_attention,
)
from benchmarks.ablations.base import Report, append_report, print_report
from configs.checks import UserError
from scripts import command

ABLATIONS: dict[str, Callable[[int], Report]] = {
    "recurrence": recurrence.run,
    "sparse_attention": sparse_attention.run,
    "dynamic_depth": dynamic_depth.run,
    "balance": balance.run,
    "dynamic_experts": dynamic_experts.run,
    "context_router": context_router.run,
    "growth": growth.run,
    "long_context": long_context.run,
    "delta_net": delta_net.run,
    "smaller": smaller.run,
    "incremental": incremental.run,
    "offloading": offloading.run,
    "serving": serving.run,
}


PICTURES = Path("runs/ablations")
LOG = PICTURES / "ablations.md"


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("name", choices=[*ABLATIONS, "all"])
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each arm")
    parser.add_argument("--log", type=Path, default=LOG, help=f"Markdown to add to ({LOG})")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds} must be at least 1")
    for folder in (PICTURES, arguments.log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as compiled:
        # The seeds of an arm are one program: compile it once.
        jax.config.update("jax_compilation_cache_dir", compiled)
        missed = _run(ABLATIONS if arguments.name == "all" else [arguments.name], arguments)
    print(f"{len(missed)} targets missed" + "".join(f"\n- {figure}" for figure in missed))


def _run(names: Iterable[str], arguments: argparse.Namespace) -> list[str]:
    """Each experiment, printed, logged and drawn; returns the figures that missed their target."""
    missed = []
    for name in names:
        began = time.monotonic()
        report = ABLATIONS[name](arguments.seeds)
        print_report(report)
        line = f"python -m scripts.ablations {name} --seeds {arguments.seeds}"
        append_report(report, arguments.log, line, time.monotonic() - began)
        (PICTURES / f"{name}.png").write_bytes(report.picture.png)
        print(f"drawn: {PICTURES / name}.png; added to {arguments.log}", flush=True)
        missed += [f"{name}: {figure}" for figure in report.missed]
    return missed


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
