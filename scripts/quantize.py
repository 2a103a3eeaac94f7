"""Rounds a model's weights to few bits, into a file that keeps them so.

    python -m scripts.quantize smollm2 small.gguf --weights int4 --method gptq
    python -m scripts.quantize pruned small --weights int8 --to huggingface
    python -m scripts.quantize runs/v31_nano small --budget 0.02nats

DST is a file that ends in .gguf (Q8_0, Q4_0, Q4_1), a Hugging Face folder (compressed-tensors), or
a model folder (int8, int4, fp8 as they are). Interrupted, the same command goes on.
"""

import json
from pathlib import Path
from typing import get_args

from compress.quantization import Quantization, Weights, quantize_source
from compress.rounding import parsed_methods
from configs.checks import require
from infer.sources import open_source
from scripts import command
from scripts.compression import (
    add_target,
    add_text,
    conversion_to,
    layer_progress,
    parsed_budget,
    quantization_lines,
    rows_of,
)
from scripts.reading import reading


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    add_target(parser)
    parser.add_argument("--weights", choices=get_args(Weights), help="with --budget mixed")
    parser.add_argument(
        "--method", default="rtn", help="rtn, gptq, awq, smoothquant, rotate, or several: awq,gptq"
    )
    parser.add_argument("--budget", help="of mixed weights: 0.02nats, or bytes as 60MB")
    parser.add_argument("--vocabulary", choices=get_args(Weights), help="embedding, output layer")
    parser.add_argument("--block", type=int, help="inputs that share a scale")
    add_text(parser)
    arguments = parser.parse_args(argv)
    if arguments.weights is None:
        require(
            arguments.budget is not None,
            f"name --weights ({', '.join(get_args(Weights))}), or a --budget, which chooses",
        )
        arguments.weights = "mixed"
    quantization = Quantization(
        weights=arguments.weights,
        methods=parsed_methods(arguments.method),
        vocabulary=arguments.vocabulary,
        block=arguments.block,
        **({} if arguments.budget is None else parsed_budget(arguments.budget)),
    )
    source, target = open_source(arguments.source), Path(arguments.target)
    rows, notes = rows_of(source, arguments), []
    kind = "BF16" if arguments.weights == "bfloat16" else "F16"
    with reading(source) as read, layer_progress("rounding", source) as rounding:
        report = quantize_source(
            source, target, quantization, rows, conversion_to(arguments, "bfloat16", kind),
            reading=read, rounding=rounding, notes=notes.append,
        )  # fmt: skip
    print("\n".join([f"{target}: written", *quantization_lines(report, target), *notes]))
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(report.record(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
