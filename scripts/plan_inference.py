"""Plans how to serve a model on a device: formats, kernels, pages, rows and pieces of prompts, each
with the figures it rests on. No weights are needed.

    python -m scripts.plan_inference smollm2
    python -m scripts.plan_inference mixtral_8x7b --device h100 --clients 32 --context 8192
    python -m scripts.plan_inference v31 --device a100 --latency-ms 20 --quality-budget 0.3

MODEL is whatever has a model: a run's name, a run directory, a folder, a GGUF file, or smollm2.
--device here measures this machine's CPU once, in seconds (docs/planner.md).
"""

import argparse
import json

import jax

from configs.accelerators import DATA_SHEETS
from configs.checks import UserError
from infer.weights import FORMATS
from planning.inference import BUDGET
from planning.inference_report import as_tree, print_inference_plan, sentences, title_of
from scripts import command
from scripts.arguments import finite, positive
from scripts.inference_plans import HERE, found_hardware, plan_of
from scripts.model_options import KV_FORMATS


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.device != HERE:
        jax.config.update("jax_platforms", "cpu")
    hardware = found_hardware(arguments.device)
    plan = plan_of(arguments.model, hardware, arguments)
    if arguments.json:
        print(json.dumps(as_tree(plan, arguments.model), indent=2, allow_nan=False))
    else:
        print_inference_plan(plan, arguments.model)
    if plan.chosen is None:
        title, (sentence, *_) = title_of(plan, arguments.model), sentences(plan)
        raise UserError(f"{title}: {sentence[0].lower()}{sentence[1:-1]}")


def _parser() -> argparse.ArgumentParser:
    made = command.parser(__doc__)
    made.add_argument("model", metavar="MODEL", help="a run's name, run, folder, GGUF or smollm2")
    made.add_argument("--device", default=HERE, choices=(HERE, *DATA_SHEETS), help="(here)")
    made.add_argument("--context", type=int, help="tokens of prompt and text (at most 4,096)")
    made.add_argument("--clients", type=int, default=8, help="texts wanted at once (8)")
    made.add_argument("--latency-ms", type=positive, help="between tokens, prompts being read")
    made.add_argument(
        "--quality-budget", type=finite, default=BUDGET, metavar="NATS", help=f"({BUDGET})"
    )
    made.add_argument("--weights", choices=FORMATS, help="settles it")
    made.add_argument("--kv", choices=KV_FORMATS, help="settles it")
    made.add_argument("--max-rows", type=int, help="settles it")
    made.add_argument("--json", action="store_true", help="for programs")
    return made


if __name__ == "__main__":
    command.execute(main)
