"""Measures generation on this machine, beside llama.cpp and transformers.

    python -m scripts.bench_generation smollm2               # speed, in alternating rounds
    python -m scripts.bench_generation smollm2 --quality     # nats and KL by format of weights
    python -m scripts.bench_generation --memory              # peak memory of long prompts
    python -m scripts.bench_generation --loading             # peak memory of loading into few bits

The peers read the same model: llama.cpp of pip install ".[llama]", transformers of ".[parity]" here
or in another Python (--transformers-python); of one that is missing the reason is printed. --memory
and --loading have random weights and need no SRC. Run it with nothing beside it: what shares the
machine moves the figures.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import machine
from benchmarks.generation.report import PARTS, Request
from configs.checks import require_positive
from scripts import command

SETTINGS = {"rounds": "rounds over all programs", "tokens": "decoding steps of a turn"}
SETTINGS |= {"prefill": "tokens of the prompt whose reading is timed"}


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    values = {name: getattr(arguments, name) for name in SETTINGS}
    request = Request(arguments.source, arguments.transformers_python, **values)
    require_positive(request, *SETTINGS)
    wanted = [part for part in PARTS if getattr(arguments, part, False)] or ["speed"]
    command.keep_compiled()
    found: dict[str, object] = {"machine": machine.description()}
    print(found["machine"])
    for part in wanted:
        found[part] = PARTS[part](request)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument("source", metavar="SRC", nargs="?", default="smollm2")
    for name, text in SETTINGS.items():
        default = getattr(Request, name)
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--transformers-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all that was measured")
    for part in list(PARTS)[1:]:
        parser.add_argument(f"--{part}", action="store_true", help="this part instead of speed")
    return parser


if __name__ == "__main__":
    command.execute(main)
