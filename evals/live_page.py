"""The page of `moesaic watch`: a run's curves and numbers, read from its folder every few seconds.

One page of HTML with its script, and /state.json, which it asks for. Both come from the standard
library's HTTP server.
"""

import functools
import html
import json
import math
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from checkpoint.run_directory import read_run
from configs.checks import UserError
from configs.serialization import finite_json
from train.metrics import Line, read_lines

MOST_POINTS = 600
"""Of a curve: more can't be seen."""
SECONDS_BETWEEN_LOOKS = 3
SAMPLES_SHOWN = 6

CURVES = (
    ("loss", ("loss", "validation_loss")),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
    ("tokens per second", ("tokens_per_second",)),
    ("seconds of a step, and of its wait for data", ("seconds", "data_wait")),
    ("share of the devices' peak", ("mfu",)),
    ("peak memory, bytes", ("peak_memory",)),
    ("load's coefficient of variation", ("load_cv",)),
    ("loss by source", ("source_losses",)),
    ("accuracy and margin", ("accuracy", "margin")),
)
"""Title of each picture and the columns of the log in it; those that a run lacks are left out."""


def run_state(run_dir: Path) -> dict[str, Any]:
    """What the page shows, of now: progress, last numbers, curves, samples.

    Raises:
      UserError: the folder is no run's, or its log is damaged.
    """
    run = read_run(run_dir)
    try:
        lines = read_lines(run_dir / "metrics.jsonl")
    except UserError:
        if (run_dir / "metrics.jsonl").exists():
            raise
        lines = []
    last = lines[-1] if lines else {}
    step = int(last.get("step", 0))
    speed = [line["seconds"] for line in lines[-50:] if "seconds" in line]
    seconds_left = (run.steps - step) * sum(speed) / len(speed) if speed else None
    shown = thinned(lines)
    curves = [
        {"title": title, "lines": found}
        for title, names in CURVES
        if (found := {k: v for name in names for k, v in curve(shown, name).items()})
    ]
    numbers = {name: x for name, x in last.items() if isinstance(x, int | float)}
    return {
        "name": run.name,
        "step": step,
        "steps": run.steps,
        "seconds_left": seconds_left,
        "numbers": numbers,
        "curves": curves,
        "samples": _samples(run_dir),
    }


def thinned(lines: Sequence[Line]) -> list[Line]:
    """At most MOST_POINTS, the last among them; those with a validation loss stay."""
    every = max(math.ceil(len(lines) / MOST_POINTS), 1)
    last = len(lines) - 1
    return [x for i, x in enumerate(lines) if (last - i) % every == 0 or "validation_loss" in x]


def curve(lines: Sequence[Line], name: str) -> dict[str, list[list[float]]]:
    """Points [step, value] of a column by name: of layers mean and largest, of sources each."""
    found: dict[str, list[list[float]]] = {}
    for line in lines:
        value = line.get(name)
        if isinstance(value, list) and value:
            values = {f"{name}, mean": sum(value) / len(value), f"{name}, largest": max(value)}
        elif isinstance(value, dict):
            values = value
        else:
            values = {name: value} if isinstance(value, int | float) else {}
        for key, x in values.items():
            if math.isfinite(x):
                found.setdefault(key, []).append([line["step"], x])
    return found


def _samples(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "samples.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-SAMPLES_SHOWN:]
    found = []
    for line in reversed(lines):
        try:
            found.append(json.loads(line))
        except ValueError:  # it is being written
            continue
    return found


def page(run_dir: Path) -> str:
    """The page, which asks for state.json."""
    return PAGE.replace("TITLE", html.escape(str(run_dir))).replace(
        "SECONDS", str(SECONDS_BETWEEN_LOOKS)
    )


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, run_dir: Path, *arguments: Any) -> None:
        self.run_dir = run_dir
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self._send(200, "text/html", page(self.run_dir))
        elif path == "/state.json":
            try:
                self._send(200, "application/json", finite_json(run_state(self.run_dir)))
            except UserError as error:
                self._send(200, "application/json", json.dumps({"error": str(error)}))
        else:
            self._send(404, "text/plain", "there are / and /state.json")

    def _send(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the terminal belongs to whoever watches."""


def make_server(run_dir: Path, host: str, port: int) -> ThreadingHTTPServer:
    """Listens, and answers once it is told to serve.

    Raises:
      OSError: the address is taken, or not this machine's.
    """
    return ThreadingHTTPServer((host, port), functools.partial(_Handler, run_dir))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title><style>
body { font: 15px system-ui, sans-serif; margin: 1.5em auto; max-width: 72em; padding: 0 1em }
h1 { font-size: 1.3em } h2 { font-size: 1em; margin: 0 } progress { width: 100% }
#curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(22em, 1fr)); gap: 1.2em }
svg { width: 100%; background: #f6f6f4 } table { border-collapse: collapse }
td { padding: 0 1em 0 0 } td + td { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; background: #f6f6f4; padding: .6em } .key { margin-right: 1em }
</style></head><body><h1>TITLE</h1><p id="told">reading ...</p><progress id="bar"></progress>
<div id="curves"></div><h2>last step</h2><table id="numbers"></table><div id="samples"></div>
<script>
const colours = ["#1f6fb4", "#d1603d", "#3a9a5b", "#8a5fb0", "#a08a2e", "#666"];
const shown = x => Math.abs(x) >= 1e4 || (x && Math.abs(x) < 1e-3) ? x.toExponential(3)
  : +x.toFixed(4);
const made = (kind, text) => { const e = document.createElement(kind);
  if (text !== undefined) e.textContent = text; return e };
function picture(curve) {
  const box = made("div"), names = Object.keys(curve.lines), w = 400, h = 200;
  const points = names.flatMap(n => curve.lines[n]);
  const xs = points.map(p => p[0]), ys = points.map(p => p[1]);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const at = p => `${8 + (w - 16) * (p[0] - x0) / (x1 - x0 || 1)},` +
    `${h - 8 - (h - 16) * (p[1] - y0) / (y1 - y0 || 1)}`;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
  names.forEach((n, i) => {
    const line = document.createElementNS(svg.namespaceURI, "polyline");
    line.setAttribute("points", curve.lines[n].map(at).join(" "));
    line.setAttribute("fill", "none");
    line.setAttribute("stroke", colours[i % colours.length]);
    line.setAttribute("stroke-width", "1.5");
    svg.append(line) });
  box.append(made("h2", `${curve.title}: ${shown(y0)} to ${shown(y1)}`), svg);
  names.forEach((n, i) => { const key = made("span",
    `${n} ${shown(curve.lines[n].at(-1)[1])}`);
    key.className = "key"; key.style.color = colours[i % colours.length]; box.append(key) });
  return box }
async function look() {
  try {
    const state = await (await fetch("state.json")).json();
    const told = document.getElementById("told");
    if (state.error) { told.textContent = state.error; return }
    const left = state.seconds_left == null ? "" :
      `, about ${(state.seconds_left / 60).toFixed(1)} minutes left`;
    told.textContent = `step ${state.step} of ${state.steps}${left}`;
    Object.assign(document.getElementById("bar"), { max: state.steps, value: state.step });
    document.getElementById("curves").replaceChildren(...state.curves.map(picture));
    document.getElementById("numbers").replaceChildren(...Object.entries(state.numbers).map(
      ([name, x]) => { const row = made("tr"); row.append(made("td", name),
        made("td", x === null ? "not finite" : shown(x))); return row }));
    document.getElementById("samples").replaceChildren(...state.samples.flatMap(
      s => [made("h2", `step ${s.step}: ${s.prompt}`), made("pre", s.text)]));
  } catch (error) { document.getElementById("told").textContent = `no answer: ${error}` }
}
look(); setInterval(look, 1000 * SECONDS);
</script></body></html>
"""
