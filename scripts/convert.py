"""Converts a model: Hugging Face form, GGUF, or our own folder, in any direction; a run's adapters
alone into PEFT's.

    python -m scripts.convert models/mixtral models/mixtral_ours --to orbax --verify
    python -m scripts.convert runs/smollm2_code exported --to huggingface --dtype bfloat16
    python -m scripts.convert runs/deepseek_v3_nano exported --to huggingface --dtype float8
    python -m scripts.convert runs/fine_tune_lora adapter --to peft
    python -m scripts.convert smollm2 smollm2.gguf --quantization Q8_0

A DST that ends in .gguf is such a file, any other a folder of our own form where --to names none.
Nothing appears under its name before it is whole. Interrupted, the same command goes on with the
whole files of a Hugging Face export and the tensors of a GGUF; --to orbax begins again.
"""

from pathlib import Path
from typing import get_args

from checkpoint.export_dtype import ExportDtype
from configs.checks import require
from formats.gguf.writer import Quantization
from infer.convert import Conversion, Form, convert, form_of, rounding
from infer.sources import Source, open_source
from infer.verify import Comparison, Unreadable, choose_probe, verify
from scripts import command
from scripts.arguments import positive
from scripts.reading import reading

DIVERGENCE = {
    "F16": 1e-4,
    "float16": 1e-4,
    "bfloat16": 1e-2,
    "BF16": 1e-2,
    "Q8_0": 2e-2,
    "float8": 0.1,
    "mxfp4": 0.5,
}
"""Allowed KL divergence of next tokens by the form rounded to, in nats. SmolLM2-135M moves by 5e-6
in F16, 8e-5 in bfloat16 and 2e-3 in Q8_0; a tiny mixture of experts by up to 3e-3 in bfloat16,
where one token of the text goes to another expert."""


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("source", metavar="SRC", help="run, folder, GGUF file, or smollm2")
    parser.add_argument("target", metavar="DST", type=Path, help="folder, or file ending in .gguf")
    parser.add_argument("--to", choices=get_args(Form), help="form of DST (by its ending)")
    parser.add_argument("--family", help="model_type to export as (default: one that fits)")
    parser.add_argument("--dtype", choices=get_args(ExportDtype), help="default: the source's")
    parser.add_argument("--quantization", choices=get_args(Quantization), help="of a GGUF (F16)")
    parser.add_argument("--max-shard-gb", type=positive, default=5.0)
    parser.add_argument("--verify", action="store_true", help="compare next tokens of both sides")
    arguments = parser.parse_args(argv)
    require(
        not (arguments.verify and arguments.to == "peft"),
        "--verify compares whole models: leave it out with --to peft",
    )
    source = open_source(arguments.source)
    conversion = Conversion(
        to=form_of(arguments.target, arguments.to),
        family=arguments.family,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
    )
    title = f"writing {arguments.target}"
    notes: list[str] = []
    with reading(source) as read, reading(source, title) as written:
        convert(
            source, arguments.target, conversion, reading=read, writing=written, notes=notes.append
        )
    print("\n".join([f"{arguments.target}: written", *notes]))
    if not arguments.verify:
        return 0
    kind = rounding(source, conversion)
    return check(source, arguments.target, None if kind is None else DIVERGENCE[kind])


def check(source: Source, target: Path, divergence: float | None) -> int:
    """Compares, shows, and says what could not be compared; 1 where next tokens differ."""
    probe = choose_probe(source)
    print(f"next tokens on {probe.what}:")
    made = []
    for found in verify(source, open_source(str(target)), probe, divergence=divergence):
        if isinstance(found, Unreadable):
            print(f"  not compared: {found.what} ({found.reason})", flush=True)
            continue
        made.append(found)
        print(f"  {_line(found)}", flush=True)
    if not any(found.is_independent for found in made):
        print(
            "not verified independently: transformers (pip install -c constraints.txt "
            f"'.[parity]') reads neither side here, and no recorded logits ({source.name}/"
            "logits.npz) are there; only our own reading was compared"
        )
    return 0 if all(found.is_good for found in made) else 1


def _line(found: Comparison) -> str:
    verdict = "good" if found.is_good else "DIFFERS"
    divergence = f"KL {found.divergence:.1e} nats"
    allowed = f" (up to {found.tolerance:.1e})"
    if found.is_rounded:
        divergence += allowed
    line = f"{verdict}: {found.what}: {divergence}, same top token {found.agreement:.1%}"
    if found.is_rounded:
        return line
    return f"{line}, logits within {found.difference:.1e}{allowed}"


if __name__ == "__main__":
    command.execute(main)
