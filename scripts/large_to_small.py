"""A large model made small, stage by stage: prune, distil, quantise, measure, answer.

    python -m scripts.large_to_small --parameters 35M --arms # make large-to-small
    python -m scripts.large_to_small --short                 # the same road in a few steps
    python -m scripts.large_to_small models/big --keep 0.7 --steps 1000

What the teacher says is kept once, its best tokens at each place, for all who learn from it.

--arms trains beside the student, on as many tokens, what it is compared with: its shape from drawn
weights and the pruned model, each alone and with the teacher; the pruned one on texts that it
writes itself; and experts, of which a token meets as many parameters. At the end all stages are
asked --tasks, on a page of their own.

Each stage is skipped when it is done: interrupted, the same command goes on. The folder's
report.html has one picture: quality against bytes and against tokens per second.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compress.calibration import read_rows
from compress.chain import Chain, answer, write_chain_page
from compress.sizes import shrunk_config
from configs.checks import require
from configs.feed_forward import DenseConfig
from infer.sources import open_source
from infer.weights import WeightFormat
from scripts import command
from scripts.arguments import finite

SIZES = {"calibration": 32_768, "held_out": 16_384, "length": 512}
SHORT_SIZES = {"calibration": 2048, "held_out": 2048, "length": 256}
SHORT = ("--steps", "4", "--optimizer.warmup-steps", "1")
TASKS = "bpb_code,bpb_prose,udhr:eng,line_completion,multiemo_en"
METHODS: dict[WeightFormat, str] = {"int8": "rtn", "int4": "gptq"}
ROAD = ("source", "pruned", "distilled", *METHODS)
TOP_K = 64
"""Of the teacher's tokens at each place; the others are one bin."""
EXPERTS = 8
RECIPE = ("--batch-size", "4", "--optimizer.learning-rate", "1e-3")
"""Of few tokens many small steps make most."""
DRAWN = ("--init.weights", "drawn")
OWN_SHARE = 0.25
"""Of the rows, half of each written by the student itself."""


@dataclass(frozen=True)
class Arm:
    """A model trained on as many tokens as the student."""

    teacher: Literal["none", "cached", "own texts"]
    begin: Literal["pruned", "narrow"] = "pruned"
    settings: tuple[str, ...] = ()


STUDENT = Arm("cached")
ARMS = {
    "drawn, alone": Arm("none", settings=DRAWN),
    "drawn, teacher": Arm("cached", settings=DRAWN),
    "pruned, alone": Arm("none"),
    "pruned, own texts": Arm("own texts"),
    "experts, teacher": Arm(
        "cached",
        "narrow",
        ("--init.upcycle.num-experts", str(EXPERTS), "--init.upcycle.top-k", "2"),
    ),
}
"""The stage "distilled" is the pruned one with its teacher. Two experts of the last are as wide as
one layer of the student."""


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    source, folder = options.source, options.run_dir
    pruned, student = folder / "pruned", folder / "student"
    sizes = SHORT_SIZES if options.short else SIZES
    text = [f"--{k.replace('_', '-')}-tokens={sizes[k]}" for k in ("calibration", "held_out")]
    text += [f"--length={sizes['length']}", *(["--text", options.text] if options.text else [])]
    chain = Chain(folder, read_rows(open_source(source), options.text, **sizes)[1])
    chain.measured("source", source)
    if not pruned.exists():
        wanted = ["--parameters", options.parameters] if options.parameters else []
        verb("prune", source, pruned, *(wanted or ["--keep", options.keep]), *text)
    chain.measured("pruned", pruned)
    _learn(chain, "distilled", student, options, STUDENT)
    for name in options.arms:
        arm, place = ARMS[name], folder / name.replace(", ", "_").replace(" ", "_")
        if arm.begin == "narrow" and not (folder / "narrow").exists():
            half = _half_as_wide(str(pruned))
            verb("prune", pruned, folder / "narrow", "--axes", "ffn", "--parameters", half, *text)
        _learn(chain, name, place, options, arm)
    for weights, method in METHODS.items():
        target = folder / f"{weights}.gguf"
        if not target.exists():
            verb("quantize", student, target, "--weights", weights, "--method", method, *text)
        chain.measured(weights, target, weights)
    said = answer(folder / "int8.gguf", options.prompt)
    pages = []
    if options.tasks != "none":
        paths = [stage.path for stage in chain.stages.values()]
        asked = ("--tasks", options.tasks, "--limit", options.limit)
        verb("evaluate_all", *paths, *asked, "--output", folder / "evaluation")
        pages.append("evaluation/report.html")
    settings = vars(options) | {"run_dir": str(folder)}
    page = write_chain_page(chain, ROAD, settings, [said], pages)
    print(f"{page}: written\n{said}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument("source", metavar="SRC", nargs="?", default="smollm2")
    parser.add_argument("--keep", type=finite, default=0.7, help="share of the layers (0.7)")
    parser.add_argument("--parameters", help="in the place of --keep: how many, as 35M")
    parser.add_argument("--steps", type=int, default=120, help="of distillation (120)")
    parser.add_argument(
        "--arms",
        type=_arms,
        nargs="?",
        const=tuple(ARMS),
        default=(),
        metavar="NAME;NAME",
        help=f"train what it is compared with, too; all, or of {'; '.join(ARMS)}",
    )
    parser.add_argument("--tasks", default=TASKS, help=f"of the evaluation, or none ({TASKS})")
    parser.add_argument("--limit", type=int, default=30, help="samples of each task (30)")
    parser.add_argument("--short", action="store_true", help="few steps: a check, not a result")
    parser.add_argument("--text", help="folder, file or stdlib (code and prose)")
    parser.add_argument("--prompt", default="def mean(values):\n")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/large_to_small"))
    return parser


def _arms(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(";"))
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        sentence = f"there is no arm {'; '.join(unknown)!r}: take of {'; '.join(ARMS)}"
        raise argparse.ArgumentTypeError(sentence)
    return names


def _half_as_wide(name: str) -> int:
    """Parameters of a dense model whose layers are half as wide.

    Raises:
      UserError: a model that has experts already.
    """
    config = open_source(name).config
    require(
        all(isinstance(spec.ffn, DenseConfig) for spec in config.layer_kinds),
        f"{name} is not dense, and experts are made of dense layers: leave 'experts, teacher' out "
        "of --arms",
    )
    return shrunk_config(config, {"ffn": 0.5}).num_parameters


def _learn(chain: Chain, stage: str, place: Path, options: argparse.Namespace, arm: Arm) -> None:
    """A model trained and measured, if it is not there."""
    if stage not in chain.stages:
        training = _training(options, options.run_dir / arm.begin)
        if arm.teacher == "none":
            verb("train", "pruned_alone", "--run-dir", place, *training, *arm.settings)
        else:
            taught = [*training, *_teacher(options, arm), *arm.settings]
            verb("distill", "pruned_recovery", "--run-dir", place, *taught)
    chain.measured(stage, place)


def _teacher(options: argparse.Namespace, arm: Arm) -> list[object]:
    """What says who teaches; what it says of the data is kept by then."""
    best, named = ["--distill.top-k", TOP_K], ["--teacher", options.source]
    if arm.teacher == "own texts":
        half = _row_length(options.source) // 2
        own = ["--distill.on-policy.share", OWN_SHARE, "--distill.on-policy.prompt-length", half]
        return [*best, *named, *own]
    cache = options.run_dir / "teacher"
    # The rows and their order are the same for all.
    read = _training(options, options.run_dir / "pruned")
    verb("distill", "pruned_recovery", *read, *best, *named, "--make-cache", cache)
    return [*best, "--distill.cache-directory", cache]


def _row_length(source: str) -> int:
    return min(256, open_source(source).config.context_length // 2)


def _training(options: argparse.Namespace, begin: Path) -> list[object]:
    """What all who learn have in common."""
    given = ["--init.source", begin, "--data.seq-len", _row_length(options.source)]
    given += ["--data.directory", options.run_dir / "corpus", "--data.tokenizer", options.source]
    given += ["--data.source", options.text] if options.text else []
    return [*given, *RECIPE, *(SHORT if options.short else ("--steps", options.steps))]


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
