"""A large model made small, stage by stage: prune, distil, quantise, measure, answer.

    python -m scripts.large_to_small                         # make large-to-small
    python -m scripts.large_to_small --short                 # the same road in a few steps
    python -m scripts.large_to_small models/big --keep 0.7 --steps 1000

Each stage is skipped when it is done: interrupted, the same command goes on. The folder's
report.html has one picture: quality against bytes and against tokens per second.
"""

import os
import subprocess
import sys
from pathlib import Path

from compress.calibration import read_rows
from compress.chain import Chain, answer, write_chain_page
from infer.sources import open_source
from infer.weights import WeightFormat
from scripts import command
from scripts.arguments import finite

SIZES = {"calibration": 32_768, "held_out": 16_384, "length": 512}
SHORT_SIZES = {"calibration": 2048, "held_out": 2048, "length": 256}
SHORT = ("--steps", "4", "--optimizer.warmup-steps", "1")


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("source", metavar="SRC", nargs="?", default="smollm2")
    parser.add_argument("--keep", type=finite, default=0.7, help="share of the layers (0.7)")
    parser.add_argument("--parameters", help="in the place of --keep: how many, as 35M")
    parser.add_argument("--steps", type=int, default=600, help="of distillation (600)")
    parser.add_argument("--short", action="store_true", help="few steps: a check, not a result")
    parser.add_argument("--text", help="folder, file or stdlib (code and prose)")
    parser.add_argument("--prompt", default="def mean(values):\n")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/large_to_small"))
    options = parser.parse_args(argv)
    name, folder = options.source, options.run_dir
    pruned, student = folder / "pruned", folder / "student"
    sizes = SHORT_SIZES if options.short else SIZES
    text = [f"--{k.replace('_', '-')}-tokens={sizes[k]}" for k in ("calibration", "held_out")]
    text += [f"--length={sizes['length']}", *(["--text", options.text] if options.text else [])]
    chain = Chain(folder, read_rows(open_source(name), options.text, **sizes)[1])
    chain.measured("source", name)
    if not pruned.exists():
        wanted = ["--parameters", options.parameters] if options.parameters else []
        verb("prune", name, pruned, *(wanted or ["--keep", options.keep]), *text)
    chain.measured("pruned", pruned)
    if "distilled" not in chain.stages:
        learn = ["--teacher", name, "--init.source", pruned, "--data.directory", folder / "corpus"]
        learn += ["--data.source", options.text] if options.text else []
        learn += ["--data.seq-len", min(256, open_source(name).config.context_length)]
        learn += SHORT if options.short else ("--steps", options.steps)
        verb("distill", "pruned_recovery", "--run-dir", student, *learn)
    chain.measured("distilled", student)
    methods: dict[WeightFormat, str] = {"int8": "rtn", "int4": "gptq"}
    for weights, method in methods.items():
        target = folder / f"{weights}.gguf"
        if not target.exists():
            verb("quantize", student, target, "--weights", weights, "--method", method, *text)
        chain.measured(weights, target, weights)
    said = answer(folder / "int8.gguf", options.prompt)
    page = write_chain_page(chain, vars(options) | {"run_dir": str(folder)}, [said])
    print(f"{page}: written\n{said}")
    return 0


def verb(name: str, *arguments: object) -> None:
    """Runs a verb in a process of its own, whose memory goes with it; ends with its code where it
    is not 0.
    """
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join([root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    made = [sys.executable, "-m", f"scripts.{name}", *map(str, arguments)]
    code = subprocess.run(made, env=os.environ | {"PYTHONPATH": paths}).returncode
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
