"""What each format of weights costs in quality: nats per token, and distance from float32.

Measured on two texts of this repository, prose and code, in windows. llama.cpp's formats are read
from the files that it writes and multiplied in float32: only the rounding of weights is compared.

L length, V vocab.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.generation import llama_peer
from benchmarks.generation.programs import ROOT, llama_file, llama_name, our_name
from configs.checks import require
from infer.logits import full_logits
from infer.score import score_documents
from infer.sources import Source, open_source
from infer.verify import compare
from infer.weights import FORMATS, num_bytes
from model.transformer import Transformer, Variables

TEXTS = {
    "prose": ("docs/checkpoints.md", "docs/sharding.md", "docs/planner.md"),
    "code": ("kernels/quantize/packing.py", "kernels/matmul/api.py", "infer/sampling.py"),
}
"""Files whose first tokens are read, one file after the other."""


@dataclass(frozen=True)
class Settings:
    """How much is read."""

    tokens: int = 4096
    """Of each text."""
    window: int = 512
    """Tokens that are read at once."""


@dataclass(frozen=True)
class Quality:
    """One format on one text."""

    format: str
    text: str
    tokens: int
    weight_bytes: int | None
    """In memory; None where the file's format is read into floats."""
    nats: float
    """-log p(token), the mean over the text; windows move by half of themselves."""
    divergence: float
    """Kullback-Leibler divergence of the next tokens from float32's, nats, the mean over windows
    that lie side by side."""
    agreement: float
    """Share of places where float32's most likely token is the most likely."""


@dataclass(frozen=True)
class Rounded:
    """A model in one format."""

    name: str
    model: Transformer
    variables: Variables
    weight_bytes: int | None


def measure(source: Source, settings: Settings) -> tuple[list[Quality], dict[str, str]]:
    """Each format on each text, float32 first, and why others are left out.

    Raises:
      UserError: the source has no tokenizer, or the texts are too short.
    """
    texts = read_texts(source, settings.tokens)
    left_out: dict[str, str] = {}
    formats = [*our_formats(source), *_llama_formats(source, left_out)]
    made = [q for name, tokens in texts.items() for q in qualities(formats, name, tokens, settings)]
    return made, left_out


def read_texts(source: Source, count: int) -> dict[str, np.ndarray]:
    """The first tokens of each text, int32 [count].

    Raises:
      UserError: the source has no tokenizer, or a text has fewer.
    """
    tokenizer, made = source.tokenizer(), {}
    for name, files in TEXTS.items():
        ids = tokenizer.encode("\n".join((ROOT / file).read_text() for file in files))
        require(len(ids) >= count, f"the {name} has {len(ids)} tokens, not {count}: ask for fewer")
        made[name] = np.array(ids[:count], np.int32)
    return made


def our_formats(source: Source) -> Iterator[Rounded]:
    for weights in FORMATS:
        model, variables = source.load(weights=weights)
        yield Rounded(our_name(weights), model, variables, num_bytes(variables))


def _llama_formats(source: Source, left_out: dict[str, str]) -> Iterator[Rounded]:
    """llama.cpp's own formats of fewer bits, rounded by itself and read by us."""
    with tempfile.TemporaryDirectory() as folder:
        path, reason = llama_file(source, Path(folder))
        if path is None:
            left_out["llama.cpp"] = reason
            return
        for kind in llama_peer.KINDS:
            if kind == "F32":
                continue
            target = Path(folder) / f"{kind}.gguf"
            llama_peer.quantize(path, target, kind, machine.cores())
            model, variables = open_source(str(target)).load()
            yield Rounded(llama_name(kind), model, variables, None)


def qualities(
    formats: list[Rounded], text: str, tokens: np.ndarray, settings: Settings
) -> list[Quality]:
    """Of each format on one text; the first is the one that others are compared with."""
    ids, size = tokens.tolist(), settings.window
    windows = [ids[begin : begin + size] for begin in range(0, len(ids), size)]
    shares = np.array([len(window) for window in windows]) / len(ids)
    compared: dict[str, list[tuple[float, float]]] = {f.name: [] for f in formats}
    for window in windows:
        first = formats[0]
        expected_LV = full_logits(first.model, first.variables, window)
        for f in formats:
            found_LV = full_logits(f.model, f.variables, window)
            c = compare(f.name, expected_LV, found_LV, is_independent=False)
            compared[f.name].append((c.divergence, c.agreement))
    made = []
    for f in formats:
        (scores,) = score_documents(f.model, f.variables, [tokens], length=size, batch_size=1)
        divergence, agreement = shares @ np.array(compared[f.name])
        made.append(
            Quality(
                f.name,
                text,
                len(tokens),
                f.weight_bytes,
                float(scores.nats.mean()),
                float(divergence),
                float(agreement),
            )
        )
    return made


def print_quality(made: list[Quality], left_out: dict[str, str], settings: Settings) -> None:
    table = Table("format", "text", "weights MB", "nats/token", "KL to float32", "same top token")
    table.title = f"{settings.tokens} tokens of each text, windows of {settings.window}"
    for q in made:
        size = "" if q.weight_bytes is None else f"{q.weight_bytes / 1e6:.0f}"
        figures = (f"{q.nats:.4f}", f"{q.divergence:.2e}", f"{q.agreement:.1%}")
        table.add_row(q.format, q.text, size, *figures)
    Console().print(table)
    for name, reason in left_out.items():
        print(f"without {name}: {reason}")


def as_json(made: list[Quality], left_out: dict[str, str], settings: Settings) -> dict[str, Any]:
    """Everything that was measured."""
    formats = [vars(q) for q in made]
    return {"settings": vars(settings), "texts": TEXTS, "formats": formats, "left_out": left_out}
