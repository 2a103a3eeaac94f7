"""Peak memory: of reading long prompts, and of loading a checkpoint into a few bits.

Each figure is of a process of its own (peaks.py), beyond what it held before; what compiling takes
is part of it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.generation.peaks import random_variables
from benchmarks.generation.programs import ROOT
from checkpoint import huggingface
from checkpoint.public import export_family
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.feed_forward import MoEConfig, RouterConfig
from model.transformer import Transformer

LENGTHS = (4096, 8192, 16_384)
MODEL = "smollm2_135m"
"""Whose shape reads the prompts."""
SHARD_BYTES = 300_000_000
ALLOWED = 1.3
"""Peak memory of loading over the loaded bytes, beside the largest tensor."""


def peak(what: str, *arguments: str) -> dict[str, float]:
    """What peaks.py says of these arguments.

    Raises:
      RuntimeError: it died.
    """
    command = [sys.executable, "-m", "benchmarks.generation.peaks", what, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, float]]:
    """Peaks of reading prompts of these lengths, each in a process of its own."""
    return [{"length": length} | peak("prompt", MODEL, str(length)) for length in lengths]


def print_prompts(made: list[dict[str, float]]) -> None:
    """A row for each length, with the memory of a token more than the row before: where memory is
    linear in length, it is the same in all."""
    table = Table("prompt", "peak MB", "of which state MB", "KB of a token more", "s")
    table.title = f"reading prompts with the shape of {MODEL}: peak beside the weights"
    before: dict[str, float] | None = None
    for row in made:
        more = "" if before is None else f"{slope(before, row) / 1e3:.1f}"
        sizes = (f"{row['peak'] / 1e6:.0f}", f"{row['state'] / 1e6:.0f}")
        table.add_row(f"{row['length']:,}", *sizes, more, f"{row['seconds']:.0f}")
        before = row
    Console().print(table)


def slope(shorter: dict[str, float], longer: dict[str, float]) -> float:
    """Bytes of peak memory for each token by which the prompts differ."""
    return (longer["peak"] - shorter["peak"]) / (longer["length"] - shorter["length"])


def large_model() -> ModelConfig:
    """275M parameters, 1.1 GB in float32; the largest tensor is the embedding, 65 MB."""
    attention = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=64)
    ffn = MoEConfig(num_experts=8, d_ff=1536, router=RouterConfig(top_k=2, z_loss_weight=0.0))
    return ModelConfig(
        vocab_size=32_000,
        d_model=512,
        num_layers=12,
        pattern=(LayerSpec(attention=attention, ffn=ffn),),
        context_length=1024,
        norm_eps=1e-5,
    )


def write_checkpoint(folder: Path, config: ModelConfig, shard_bytes: int = SHARD_BYTES) -> None:
    """A checkpoint of random weights in Hugging Face form, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    family = export_family(config)
    variables = random_variables(Transformer(config))
    huggingface.export(
        folder, family, config, variables, dtype="float32", extra={}, max_shard_bytes=shard_bytes
    )


def measure_loading(weights: tuple[str, ...] = ("int8", "int4")) -> list[dict[str, Any]]:
    """Peaks of loading `large_model` in these formats."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        write_checkpoint(folder, large_model())
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return [{"weights": w, "file_bytes": size} | peak("load", str(folder), w) for w in weights]


def print_loading(made: list[dict[str, Any]]) -> None:
    columns = ("weights", "files MB", "peak MB", "loaded MB", "largest tensor MB", "allowed MB")
    table = Table(*columns, "s", title="loading a checkpoint in Hugging Face form")
    for row in made:
        allowed = ALLOWED * row["result"] + row["largest"]
        sizes = (row["file_bytes"], row["peak"], row["result"], row["largest"], allowed)
        cells = (f"{np.round(size / 1e6):.0f}" for size in sizes)
        table.add_row(row["weights"], *cells, f"{row['seconds']:.0f}")
    Console().print(table)
