"""Command line and report lines that scripts.prune and scripts.quantize share."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from checkpoint.export_dtype import ExportDtype
from compress.calibration import Rows, read_rows
from compress.importance import Progress
from compress.pruning import PruningReport
from compress.quantization import QuantizationReport
from configs.checks import UserError
from formats.gguf.writer import Quantization
from infer.convert import Conversion, Form, form_of
from infer.sources import Source
from parallel.distributed import is_first
from train.progress import ProgressBar


def add_target(parser: argparse.ArgumentParser) -> None:
    """SRC, DST and what form DST has."""
    parser.add_argument("source", metavar="SRC", help="run, folder, GGUF file, or smollm2")
    parser.add_argument("target", metavar="DST", type=Path, help="folder, or file ending in .gguf")
    parser.add_argument("--to", choices=get_args(Form), help="form of DST (by its ending)")
    parser.add_argument("--family", help="model_type to export as (default: one that fits)")
    parser.add_argument("--report", type=Path, help="JSON file for what is printed, and more")


def add_text(parser: argparse.ArgumentParser) -> None:
    """The text that is calibrated and measured on."""
    parser.add_argument("--text", help="folder, file or stdlib (a run's own; code and prose)")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--held-out-tokens", type=int, default=16_384)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (512)")


def rows_of(source: Source, arguments: argparse.Namespace) -> tuple[Rows, Rows]:
    """Rows to calibrate on and rows to measure on."""
    return read_rows(
        source,
        arguments.text,
        calibration=arguments.calibration_tokens,
        held_out=arguments.held_out_tokens,
        length=arguments.length,
    )


def conversion_to(
    arguments: argparse.Namespace,
    dtype: ExportDtype | None = None,
    quantization: Quantization = "F16",
) -> Conversion:
    """What DST is written as.

    Args:
      dtype: of a Hugging Face folder.
      quantization: of what a GGUF's matrices are that come in floats.
    """
    form = form_of(arguments.target, arguments.to)
    return Conversion(
        to=form,
        family=arguments.family,
        dtype=dtype if form == "huggingface" else None,
        quantization=quantization if form == "gguf" else None,
    )


def parsed_budget(text: str) -> dict[str, Any]:
    """A budget as people write it: 0.02nats, 60MB, 1.2GB.

    Raises:
      UserError: no budget.
    """
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
    number = text.strip().lower()
    try:
        if number.endswith("nats"):
            return {"budget_nats": float(number.removesuffix("nats"))}
        if number[-2:] in units:
            return {"budget_bytes": round(float(number[:-2]) * units[number[-2:]])}
    except ValueError:
        pass
    raise UserError(f"--budget {text!r} must be nats or bytes: 0.02nats, 60MB, 1.2GB")


def quantization_lines(report: QuantizationReport, target: Path) -> list[str]:
    """What the weights became and what that costs, for people."""
    kinds = [
        f"{what} {bits:.3g} bits x {report.counts[what]:,}" for what, bits in report.bits.items()
    ]
    return [
        f"weights: {report.weight_bytes:,} bytes with scales, {report.ratio:.3f} of float32's, "
        f"{report.bits_per_weight:.2f} bits a weight",
        f"of these: {'; '.join(kinds)}",
        f"on disk: {bytes_of(target):,} bytes",
        str(report.quality),
    ]


def bytes_of(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(x.stat().st_size for x in path.rglob("*") if x.is_file())


@contextlib.contextmanager
def layer_progress(title: str, source: Source) -> Iterator[Progress]:
    """A bar of layers, shown by the first process once there is one."""
    total = source.config.num_layers
    with contextlib.ExitStack() as shown:
        bar: ProgressBar | None = None

        def update(done: int, whole: int) -> None:
            nonlocal bar
            if not is_first():
                return
            if bar is None:
                bar = ProgressBar(f"{title} {source.name}", total=whole or total, unit="layers")
                shown.enter_context(bar)
            bar.update(done)

        yield update


def pruning_lines(report: PruningReport) -> list[str]:
    """What went and what it costs, for people."""
    before, after = report.before, report.after
    lines = [
        _counts("parameters", before.num_parameters, after.num_parameters),
        _counts("active parameters", before.num_active_parameters, after.num_active_parameters),
    ]
    if report.layers:
        lines.append(f"layers gone: {', '.join(map(str, report.layers))}")
    if before.d_model != after.d_model:
        lines.append(f"d_model {before.d_model} -> {after.d_model}")
    kinds: dict[str, None] = {}
    for old, new in zip(_last(before), _last(after), strict=False):
        heads = (old.attention.num_heads, new.attention.num_heads)
        widths = (old.ffn.d_ff, new.ffn.d_ff)
        experts = tuple(getattr(spec.ffn, "num_experts", 0) for spec in (old, new))
        for what, (was, now) in (("heads", heads), ("d_ff", widths), ("experts", experts)):
            if was != now:
                kinds[f"{what} {was} -> {now or 'none'}"] = None
    return [*lines, *(["a layer: " + ", ".join(kinds)] if kinds else []), str(report.quality)]


def _last(config: Any) -> list[Any]:
    """Kinds of layers, from the last: layers that went may be of the prefix."""
    return [*reversed((*config.prefix, *config.pattern))]


def _counts(what: str, before: int, after: int) -> str:
    return f"{what}: {before:,} -> {after:,} ({after / before:.1%})"
