"""Converts a model: Hugging Face form, GGUF, or our own folder, in any direction.

    python -m scripts.convert models/mixtral models/mixtral_ours --to orbax --verify
    python -m scripts.convert runs/v31_nano exported --to huggingface --dtype bfloat16
    python -m scripts.convert runs/deepseek exported --to huggingface --dtype float8
    python -m scripts.convert smollm2 smollm2.gguf --to gguf --quantization Q8_0

Nothing appears under the name DST before it is whole. Interrupted, the same command goes on with
the whole files of a Hugging Face export and the tensors of a GGUF; --to orbax begins again.
"""

from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from checkpoint.storage import ExportDtype
from infer.convert import Conversion, Form, convert
from infer.sources import Source, open_source
from infer.verify import verify
from scripts import command
from scripts.arguments import positive
from scripts.reading import reading

LOSS = {
    "F16": 2e-3,
    "Q8_0": 5e-2,
    "bfloat16": 5e-2,
    "float16": 2e-3,
    "float8": 0.2,
    "mxfp4": 0.4,
}
"""What a format may move logits by, as a share of the largest: its rounding, through the layers."""


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("source", metavar="SRC", help="run, folder, GGUF file, or smollm2")
    parser.add_argument("target", metavar="DST", type=Path)
    parser.add_argument("--to", choices=get_args(Form), default="orbax")
    parser.add_argument("--family", help="model_type to export as (default: one that fits)")
    parser.add_argument("--dtype", choices=get_args(ExportDtype), help="default: the source's")
    parser.add_argument("--quantization", choices=("F16", "Q8_0"), help="of a GGUF (F16)")
    parser.add_argument("--max-shard-gb", type=positive, default=5.0)
    parser.add_argument("--verify", action="store_true", help="compare logits of both sides")
    arguments = parser.parse_args(argv)
    source = open_source(arguments.source)
    conversion = Conversion(
        to=arguments.to,
        family=arguments.family,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
    )
    title = f"writing {arguments.target}"
    with reading(source) as read, reading(source, title) as written:
        convert(source, arguments.target, conversion, reading=read, writing=written)
    print(f"{arguments.target}: written")
    kind = (arguments.quantization or "F16") if arguments.to == "gguf" else arguments.dtype
    return check(source, arguments.target, LOSS.get(kind, 0.0)) if arguments.verify else 0


def check(source: Source, target: Path, loss: float) -> int:
    """Compares, shows, and says what could not be compared; 1 where logits differ."""
    table = Table("what", "largest difference", "allowed", "")
    made = []
    for one in verify(source, open_source(str(target)), loss=loss):
        made.append(one)
        verdict = "good" if one.is_good else "DIFFERS"
        table.add_row(one.what, f"{one.difference:.2e}", f"{one.tolerance:.2e}", verdict)
    Console().print(table)
    if not any(one.is_independent for one in made):
        print(
            "not verified independently: neither transformers (pip install '.[parity]') nor "
            f"recorded logits ({source.name}/logits.npz) are there; only our own reading was "
            "compared"
        )
    return 0 if all(one.is_good for one in made) else 1


if __name__ == "__main__":
    command.execute(main)
