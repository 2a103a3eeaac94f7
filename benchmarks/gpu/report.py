"""The GPU report as a whole: its parts run one after the other, its files, and what is kept of it.

A report is what report.json holds: by part, the result of parts.py. What a folder has from before
stays where it is not measured again.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu import parts, tables
from benchmarks.gpu.pictures import draw_kernels
from configs.checks import require
from formats.atomic_folder import replace_text
from formats.small_files import read_json_object
from kernels import backend
from train.report import write_page

RESULTS = Path("docs/gpu_results")
MADE_WITH = ("card", "driver", "versions", "date")

Report = dict[str, Any]


def read(folder: Path) -> Report:
    """The folder's report; empty where it has none."""
    path = folder / "report.json"
    mend = "remove it, or choose another --folder"
    report = read_json_object(path, mend) if path.exists() else {}
    for name, found in report.items():
        require(isinstance(found, dict), f"{path} has {name}={str(found)[:60]}, no part: {mend}")
    return report


def write(report: Report, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "report.json", json.dumps(report, indent=1) + "\n")


def measure(
    folder: Path,
    seconds: float,
    chosen: Sequence[str],
    prefixes: Sequence[str],
    kinds: Sequence[str],
) -> Report:
    """The folder's report with these parts measured anew, each within its share of the seconds.

    Args:
      chosen: of parts.SHARES.
      prefixes, kinds: the kernels' cases and programs; see parts.Request.
    """
    report = read(folder)
    timed = [name for name in parts.SHARES if name in chosen]
    whole = sum(parts.SHARES[name] for name in timed)
    for name in timed:
        share = seconds * parts.SHARES[name] / whole
        print(f"{name}: at most {share:.0f} s", flush=True)
        request = parts.Request(folder, share, tuple(prefixes), tuple(kinds))
        found = parts.run_part(name, request)
        if "failure" in found:
            print(f"{name}: {found['failure']}", flush=True)
        report[name] = merged(report.get(name, {}), found)
        write(report, folder)
    return report


def merged(before: Report, found: Report) -> Report:
    """A part's result over its earlier one: cases that were not run again stay."""
    cases = before.get("cases", {}) | found.get("cases", {})
    return before | found | ({"cases": cases} if cases else {})


def show(report: Report, folder: Path, more: Sequence[tables.Sheet] = ()) -> None:
    """Prints the tables, and writes report.md and report.html into the folder."""
    sheets = [*tables.sheets(report), *more]
    for sheet in sheets:
        table = Table(*sheet.headers, title=sheet.title)
        for row in sheet.rows:
            table.add_row(*row)
        Console(width=170, soft_wrap=True).print(table)
    (folder / "report.md").write_text(_markdown(report, sheets))
    has_cases = bool(report.get("kernels", {}).get("cases"))
    picture = draw_kernels(report["kernels"]) if has_cases else None
    made_with = {part: _made_with(found) for part, found in report.items()}
    sections = [tables.as_html(sheet) for sheet in sheets]
    page = write_page(folder, "GPU report", sections, [picture] if picture else [], made_with)
    print(f"page: {page}")


def keep(report: Report, folder: Path) -> Path:
    """Writes the report into the repository, and what `auto` reads of it, kernels/measured.json."""
    card = next(found["card"] for found in report.values() if "card" in found)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{card.replace(' ', '_').lower()}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    shutil.copy(folder / "report.md", path.with_suffix(".md"))
    before = backend.measured()
    if found := tables.measured({"cases": {}} | report.get("kernels", {})):
        capability = str(report["kernels"]["capability"])
        after = before | {capability: before.get(capability, {}) | found}
        backend.MEASURED.write_text(json.dumps(after, indent=1) + "\n")
    return path


def _made_with(found: Report) -> Report:
    return {key: found[key] for key in MADE_WITH if key in found}


def _markdown(report: Report, sheets: Sequence[tables.Sheet]) -> str:
    """The tables, and under them which card and versions they come from."""
    lines = [f"- {part}: {json.dumps(_made_with(found))}" for part, found in report.items()]
    text = "\n".join(map(tables.markdown, sheets))
    return f"# GPU report\n\n{text}\nMade with\n\n" + "\n".join(lines) + "\n"
