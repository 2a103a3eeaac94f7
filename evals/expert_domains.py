"""Names for experts: which domains of held-out text choose which experts, and asking for them.

The domain of a document follows from its name. For each MoE layer the choices of every expert are
counted per domain, and expert e belongs to domain d where

    NPMI(e, d) = log(p(e, d) / (p(e) p(d))) / -log p(e, d)

(Bouma 2009; 1: only there, 0: as everywhere, -1: never there) exceeds a threshold. Every domain
counts alike, whatever the amount of its text. A preference for a domain is beta times the standard
deviation of a token's scores, added to the choice of its experts; gates don't see it.

D domains, P periods, E experts.
"""

import dataclasses
import functools
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoint.run_corpus import open_run_corpus
from checkpoint.run_directory import read_run
from configs.architecture import ModelConfig
from configs.base import RunConfig
from configs.checks import UserError, require
from data.packing import TokenFile, document_positions
from formats.atomic_folder import replace_text
from formats.small_files import read_record
from infer.run_weights import RunWeights, load_with_identity, newer_weights
from model.moe_layers import MoELayer, moe_layers
from model.transformer import Preference, Transformer, Variables, hidden_and_router

FILE = "expert_domains.json"
THRESHOLD = 0.02
"""Least NPMI of a domain's experts: weak labels, but far above the noise of ten thousand tokens."""
DEFAULT_BETA = 0.5
TOKENS_AT_ONCE = 4096

Domains = Mapping[str, Sequence[str]]
"""Domain -> beginnings of document names: "xml" means "xml", "xml.dom" and "xml/a.txt"."""

STDLIB_DOMAINS: Domains = {
    "markup": ("xml", "html"),
    "internet": ("email", "http", "urllib", "wsgiref", "xmlrpc", "smtplib", "nturl2path"),
    "encodings": ("encodings", "codecs"),
    "concurrency": ("asyncio", "multiprocessing", "concurrent", "threading", "queue"),
    "text": ("re", "json", "string", "textwrap", "csv", "configparser", "tokenize", "struct"),
    "packaging": ("importlib", "distutils", "ensurepip", "pkgutil", "modulefinder", "zipimport"),
    "interface": ("idlelib", "tkinter", "turtle", "turtledemo", "curses", "cmd"),
}
"""For the built-in corpus, the standard library: by package."""


@dataclass(frozen=True, kw_only=True)
class LayerLabels:
    """Labels of one layer's experts."""

    layer: str
    period: int
    experts: dict[str, list[int]]
    """By domain."""
    npmi: list[list[float]]
    """[D, E]."""


@dataclass(frozen=True, kw_only=True)
class ExpertLabels:
    """What expert_domains.json holds."""

    domains: list[str]
    threshold: float
    layers: list[LayerLabels]
    weights: RunWeights | None = None
    """Those that were labelled; None in older files."""


def read_domains(path: Path) -> Domains:
    """Domains from a JSON file: {"domain": ["beginning of a name", ...], ...}.

    Raises:
      UserError: not such a file.
    """
    advice = 'write it like {"domain": ["beginning of a name", ...], ...}'
    try:
        return read_record(dict[str, list[str]], path, advice)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {advice}") from error


def sort_documents(names: Sequence[str], domains: Domains) -> dict[str, list[int]]:
    """The documents (by place) of each domain; some may belong to none.

    Raises:
      UserError: fewer than two domains, one without documents, or a document in two.
    """
    require(len(domains) >= 2, f"{len(domains)} domains tell no experts apart: give at least two")
    found: dict[str, list[int]] = {domain: [] for domain in domains}
    for i, name in enumerate(names):
        mine = [d for d, starts in domains.items() if any(_begins(name, s) for s in starts)]
        require(
            len(mine) < 2,
            f"domains {' and '.join(mine)} overlap: both have the document {name}",
        )
        for domain in mine:
            found[domain].append(i)
    empty = [domain for domain, places in found.items() if not places]
    require(
        not empty,
        f"no held-out document belongs to the domains {', '.join(empty)}: leave them out or change "
        f"their names' beginnings with --domains (documents are {', '.join(names[:3])}, ...)",
    )
    return found


def _begins(name: str, start: str) -> bool:
    return name == start or name.startswith((f"{start}.", f"{start}/"))


def npmi(counts_DE: np.ndarray) -> np.ndarray:
    """NPMI of each expert with each domain, [D, E], every domain weighted alike; -1 where an expert
    is never chosen."""
    shares_DE = counts_DE / np.maximum(counts_DE.sum(axis=1, keepdims=True), 1)
    joint_DE = shares_DE / len(counts_DE)
    independent_DE = joint_DE.sum(axis=0) * joint_DE.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        values_DE = np.log(joint_DE / independent_DE) / -np.log(joint_DE)
    return np.where(joint_DE > 0, values_DE, -1.0)


def label_experts(
    run_dir: Path, domains: Domains, threshold: float = THRESHOLD
) -> dict[str, np.ndarray]:
    """Counts, labels and writes run_dir/expert_domains.json; the NPMI [D, E] of each layer.

    Raises:
      UserError: a run without experts, checkpoint or corpus, or domains as in sort_documents.
    """
    require(-1 <= threshold <= 1, f"threshold={threshold} must lie in [-1, 1], where NPMI does")
    run = read_run(run_dir)
    layers = _layers(run.model)
    require(bool(layers), f"{run_dir} has no MoE layer: there are no experts to label")
    held_out = open_run_corpus(run, run_dir).held_out
    places = sort_documents(held_out.sidecar.names, domains)
    model, variables, weights = load_with_identity(run, run_dir)
    counts = [
        _count(model, variables, held_out, places[domain], run.data.seq_len) for domain in domains
    ]
    labelled, matrices = [], {}
    for name, layer in layers.items():
        for period in range(layer.count):
            npmi_DE = npmi(np.stack([c[name][period] for c in counts]))
            experts = {
                domain: np.flatnonzero(row_E > threshold).tolist()
                for domain, row_E in zip(domains, npmi_DE, strict=True)
            }
            matrices[f"{name} of period {period}"] = npmi_DE
            labelled.append(
                LayerLabels(layer=name, period=period, experts=experts, npmi=npmi_DE.tolist())
            )
    labels = ExpertLabels(
        domains=list(domains), threshold=threshold, layers=labelled, weights=weights
    )
    replace_text(run_dir / FILE, json.dumps(dataclasses.asdict(labels)) + "\n")
    return matrices


def _layers(config: ModelConfig) -> dict[str, MoELayer]:
    """Those that choose when the model is used."""
    return {name: x for name, x in moe_layers(config).items() if x.periods is not None}


def _count(
    model: Transformer, variables: Variables, file: TokenFile, places: list[int], length: int
) -> dict[str, np.ndarray]:
    """Choices of each expert over these documents, [P, E] by layer."""
    documents = list(file.documents())
    stream = np.concatenate([documents[i][1] for i in places])
    look = jax.jit(functools.partial(_choices, model))
    total: dict[str, np.ndarray] = {}
    end = file.sidecar.end_of_text_id
    for tokens_BL, positions_BL in _batches(stream, length, end):
        for name, counts_PE in look(variables, tokens_BL, positions_BL).items():
            total[name] = total.get(name, 0) + np.asarray(counts_PE, np.int64)
    return total


def _choices(model: Transformer, variables: Variables, tokens_BL, positions_BL):
    _, sown = hidden_and_router(model, variables, tokens_BL, positions_BL)
    layers = _layers(model.config)
    return {name: x.of(sown["router"])["stats"].counts_E for name, x in layers.items()}


def _batches(
    stream: np.ndarray, length: int, end_of_text_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows cut from the stream, the last one padded with position -1."""
    rows = max(TOKENS_AT_ONCE // length, 1)
    for begin in range(0, len(stream), rows * length):
        part = stream[begin : begin + rows * length]
        tokens_BL = np.pad(part, (0, rows * length - len(part))).reshape(rows, length)
        positions_BL = np.stack([document_positions(row, end_of_text_id) for row in tokens_BL])
        is_padding_BL = np.arange(rows * length).reshape(rows, length) >= len(part)
        yield tokens_BL, np.where(is_padding_BL, -1, positions_BL).astype(np.int32)


def read_preference(run_dir: Path, wanted: str) -> Preference:
    """The preference that "DOMAIN" or "DOMAIN:BETA" asks for, one for all rows.

    Raises:
      UserError: the experts have no labels yet, an unknown domain, a beta that is no number, or
        labels of another model.
    """
    labels = read_labels(run_dir)
    domain, _, text = wanted.partition(":")
    require(
        domain in labels.domains,
        f"unknown domain {domain!r}: {run_dir / FILE} knows {', '.join(labels.domains)}",
    )
    try:
        beta = float(text) if text else DEFAULT_BETA
    except ValueError as error:
        raise UserError(f"beta={text!r} of --expert-preference is no number") from error
    require(math.isfinite(beta), f"beta={text!r} of --expert-preference must be a finite number")
    return _preference(read_run(run_dir), labels, domain, beta, run_dir)


def read_labels(run_dir: Path) -> ExpertLabels:
    """
    Raises:
      UserError: the experts have no labels yet, or the file is damaged.
    """
    path = run_dir / FILE
    require(path.exists(), f"{run_dir} has no labelled experts: {_again(run_dir)} labels them")
    return read_record(ExpertLabels, path, f"{_again(run_dir)} makes it again")


def _again(run_dir: Path) -> str:
    return f"python -m scripts.label_experts {shlex.quote(str(run_dir))}"


def _preference(
    run: RunConfig, labels: ExpertLabels, domain: str, beta: float, run_dir: Path
) -> Preference:
    by_layer = {(x.layer, x.period): x for x in labels.layers}
    preference = {}
    for name, layer in _layers(run.model).items():
        num_experts = layer.config.num_experts
        wanted_PBE = np.zeros((layer.count, 1, num_experts), np.float32)
        for period in range(layer.count):
            label = by_layer.get((name, period))
            if label is None or not _fits(label, labels.domains, num_experts):
                raise UserError(
                    f"{run_dir / FILE} labels the experts of another model: {_again(run_dir)} "
                    "makes it again"
                )
            wanted_PBE[period, 0, label.experts[domain]] = beta
        preference[name] = jnp.asarray(wanted_PBE)
    _check_weights(labels, run, run_dir)
    return preference


def _fits(label: LayerLabels, domains: list[str], num_experts: int) -> bool:
    return (
        set(label.experts) == set(domains)
        and all(0 <= e < num_experts for experts in label.experts.values() for e in experts)
        and {len(row_E) for row_E in label.npmi} == {num_experts}
    )


def _check_weights(labels: ExpertLabels, run: RunConfig, run_dir: Path) -> None:
    """
    Raises:
      UserError: the run's newest weights are not those that were labelled.
    """
    path, again = run_dir / FILE, _again(run_dir)
    if labels.weights is None:
        print(
            f"note: {path} was made before labels kept which weights they are of: where the run "
            f"was trained on since, {again} makes it again",
            file=sys.stderr,
            flush=True,
        )
        return
    newest = newer_weights(labels.weights, run, run_dir)
    require(
        newest is None,
        f"{path} labels the experts of {labels.weights}, and the newest are {newest}: {again} "
        "makes it again",
    )
