"""Measures the server under load, beside static batching and llama.cpp's server.

    python -m scripts.bench_serving smollm2                      # 8 clients that wait for answers
    python -m scripts.bench_serving smollm2 --rate 2             # 2 requests a second, at random
    python -m scripts.bench_serving smollm2 --prefix             # 8K prompts that begin alike
    python -m scripts.bench_serving smollm2 --drafts             # code written again
    python -m scripts.bench_serving smollm2 --start              # cold starts, and warm ones

SRC is what `moesaic serve` takes. Servers are processes of their own and take turns in alternating
rounds; a peer that is missing is left out with its reason. Run it with nothing beside it: what
shares the machine moves the figures.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

from benchmarks import machine
from benchmarks.serving import measured
from benchmarks.serving.report import PARTS
from benchmarks.serving.request import SETTINGS, Request
from infer.weights import FORMATS
from scripts import command


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    request = Request(**{field.name: getattr(arguments, field.name) for field in fields(Request)})
    command.keep_compiled()
    wanted = [part for part in PARTS if getattr(arguments, part, False)] or ["load"]
    found: dict[str, object] = {"machine": machine.description(), "settings": vars(request)}
    print(found["machine"])
    for part in wanted:
        found[part], turns = PARTS[part](request)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        if arguments.picture is not None:
            measured.draw(turns, arguments.picture.with_stem(f"{arguments.picture.stem}_{part}"))


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument("source", metavar="SRC", nargs="?", default="smollm2")
    parser.add_argument("--weights", choices=FORMATS, default=Request.weights)
    for name, (kind, text) in SETTINGS.items():
        default = getattr(Request, name)
        shown = f"{text} ({default})" if default is not None else text
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=shown)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all that was measured")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw it, by part")
    for part in list(PARTS)[1:]:
        parser.add_argument(f"--{part}", action="store_true", help="this part instead of the load")
    return parser


if __name__ == "__main__":
    command.execute(main)
