"""Runs every GPU kernel, a training step and decoding on this machine's GPU, beside their peers.

    python -m scripts.gpu_report                          all of it, in about 6 minutes
    python -m scripts.gpu_report --parts kernels --cases paged_attention window_attention/sinks
    python -m scripts.gpu_report --parts kernels --sizes  and tries other tiles and blocks
    python -m scripts.gpu_report --write                  and keeps the results in the repository

Parts: kernels (each right against its float32 reference and the same twice, then timed in rounds
beside XLA's, jax's and PyTorch's), training (a step of OLMoE's layers beside transformers' on
torch.compile), decoding (the same shape, in every format of weights), plan (what scripts.plan says
of the training step, beside what was measured). Each has its own share of the minutes and its own
process; a fault in one does not stop the next. What the folder has from before is kept where it is
not measured again. The exit code is 1 where a result was wrong.

Needs jax on a CUDA GPU with flax, optax, orbax-checkpoint, rich and matplotlib; torch and
transformers for the peers. Without a GPU nothing runs: bounds are printed.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import parts, tables, training
from benchmarks.gpu.bounds import print_bounds
from benchmarks.gpu.environment import missing_packages
from benchmarks.gpu.pictures import draw_kernels
from configs.checks import UserError
from kernels import backend
from kernels.compile_checks.cases import NAMES
from parallel.topology import accelerator_of
from planning.measured import compared, plan_figures
from scripts import command
from train.report import write_page

RESULTS = Path("docs/gpu_results")
ALL_PARTS = (*parts.SHARES, "plan")


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    prefixes = tuple(arguments.cases)
    if not any(name.startswith(prefixes) for name in NAMES):
        raise UserError(f"no case begins with {' or '.join(prefixes)}: they are {', '.join(NAMES)}")
    if arguments.minutes < 1:
        raise UserError(f"--minutes {arguments.minutes:g} must be at least 1")
    if missing := missing_packages():
        raise UserError(f"the report needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if set(arguments.parts) != {"plan"} and not parts.has_gpu():
        if arguments.write:
            raise UserError("--write keeps what a GPU did, and there is none that runs the kernels")
        print_bounds([name for name in NAMES if name.startswith(prefixes)])
        return 0
    jax.config.update("jax_platforms", "cpu")  # the GPU is for the parts' own processes
    report = _measure(arguments)
    show(report, arguments.folder)
    if arguments.write:
        print(f"kept in {keep(report, arguments.folder)}")
    wrong = tables.wrong_cases(report.get("kernels", {}))
    if wrong:
        print(f"WRONG, and not timed: {', '.join(wrong)}")
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=6.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=ALL_PARTS, default=list(ALL_PARTS))
    parser.add_argument("--cases", nargs="+", default=[""], help="beginnings of kernels' cases")
    parser.add_argument("--sizes", action="store_true", help="try other tiles and blocks, too")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu_report"))
    parser.add_argument("--write", action="store_true", help=f"keep the results in {RESULTS}")
    return parser


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The folder's report with these parts measured anew."""
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    timed = [name for name in parts.SHARES if name in arguments.parts]
    shares = sum(parts.SHARES[name] for name in timed)
    kinds = ("ours", "peers", "sizes") if arguments.sizes else ("ours", "peers")
    for name in timed:
        seconds = 60 * arguments.minutes * parts.SHARES[name] / shares
        request = parts.Request(folder, seconds, tuple(arguments.cases), kinds)
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        found = parts.run_part(name, request)
        if "failure" in found:
            print(f"{name}: {found['failure']}", flush=True)
        report[name] = merged(report.get(name, {}), found)
        path.write_text(json.dumps(report, indent=1) + "\n")
    if "plan" in arguments.parts and "ours" in report.get("training", {}):
        report["plan"] = _plan(report["training"])
        path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _plan(trained: dict[str, Any]) -> dict[str, Any]:
    """The plan of the step that was trained, or why there is none ("failure")."""
    accelerator = accelerator_of(trained["card"])
    if accelerator is None:
        return {"failure": f"no data sheet of {trained['card']} is known"}
    try:
        return plan_figures(training.olmoe_run(), accelerator)
    except UserError as error:
        return {"failure": str(error)}


def merged(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A part's result over its earlier one: cases that were not run again stay."""
    cases = before.get("cases", {}) | found.get("cases", {})
    return before | found | ({"cases": cases} if cases else {})


def show(report: dict[str, Any], folder: Path) -> None:
    """Prints the tables, and writes report.md and report.html into the folder."""
    sheets = tables.sheets(report)
    if "failure" not in report.get("plan", {"failure": ""}):
        sheets.append(_plan_sheet(report))
    for sheet in sheets:
        table = Table(*sheet.headers, title=sheet.title)
        for row in sheet.rows:
            table.add_row(*row)
        Console(width=170, soft_wrap=True).print(table)
    (folder / "report.md").write_text(as_markdown(report, sheets))
    picture = draw_kernels(report["kernels"]) if "kernels" in report else None
    made_with = {part: _described(found) for part, found in report.items()}
    sections = [tables.as_html(sheet) for sheet in sheets]
    page = write_page(folder, "GPU report", sections, [picture] if picture else [], made_with)
    print(f"page: {page}")


def _plan_sheet(report: dict[str, Any]) -> tables.Sheet:
    ours = report["training"]["ours"]
    seconds = ours["tokens"] / ours["tokens_per_second"]
    headers = ("what", "planned", "measured", "measured / planned")
    return tables.Sheet(
        "The plan of the training step", headers, compared(report["plan"], ours, seconds)
    )


def _described(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("card", "driver", "versions", "date") if key in found}


def as_markdown(report: dict[str, Any], sheets: list[tables.Sheet]) -> str:
    """The tables, and under them which card and versions they come from."""
    lines = [f"- {part}: {json.dumps(_described(found))}" for part, found in report.items()]
    text = "\n".join(map(tables.markdown, sheets))
    return f"# GPU report\n\n{text}\nMade with\n\n" + "\n".join(lines) + "\n"


def keep(report: dict[str, Any], folder: Path) -> Path:
    """Writes the report into the repository, and what `auto` reads of it, kernels/measured.json."""
    card = next(found["card"] for found in report.values() if "card" in found)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{card.replace(' ', '_').lower()}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    shutil.copy(folder / "report.md", path.with_suffix(".md"))
    found = tables.measured(report.get("kernels", {"cases": {}}))
    before = backend.measured()
    if found:
        capability = str(report["kernels"]["capability"])
        after = before | {capability: before.get(capability, {}) | found}
        backend.MEASURED.write_text(json.dumps(after, indent=1) + "\n")
    return path


if __name__ == "__main__":
    command.execute(main)
