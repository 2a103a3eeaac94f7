"""Pruning from source to target: measurement, what goes, what that costs, the smaller model."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.calibration import Rows
from compress.experts import dense_model, merged_model
from compress.importance import Progress, Sums, influence, measure
from compress.layered import LayeredModel, layered
from compress.prune import ExpertScore, PrunedLayer, prune, without_layers
from compress.quality import Quality, compare
from compress.sizes import Axis, Budget, default_axes, shrunk_config, sized
from compress.working_folder import load_arrays, save_arrays, working_folder
from configs.architecture import ModelConfig
from configs.checks import require
from configs.feed_forward import MoEConfig
from infer.convert import Conversion, convert, export_family_of, source_fingerprint
from infer.sources import Progress as Elements
from infer.sources import Source


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What is to go; layers first, then units by the budget, or experts by their share."""

    budget: Budget | None = None
    axes: tuple[Axis, ...] | None = None
    """None: see `compress.sizes.default_axes`."""
    experts: float | None = None
    """Share of each layer's experts that stays."""
    by: ExpertScore = "reap"
    merge: bool = False
    """Whether experts that go are merged into those that stay."""
    dense: int | None = None
    """Groups of experts that each layer of them becomes, beside each other, as a dense layer."""
    layers: int | None = None
    """Layers that stay."""

    def __post_init__(self) -> None:
        wanted = [self.budget, self.experts, self.dense, self.layers]
        require(
            any(x is not None for x in wanted),
            "nothing is to go: name --keep, --parameters, --active-parameters, --experts, --dense "
            "or --layers",
        )
        require(
            self.axes is None or self.budget is not None,
            "axes go with a budget: --keep, --parameters or --active-parameters",
        )
        others = [x for x in (self.budget, self.dense) if x is not None]
        require(
            self.experts is None or not others,
            "--experts is a share by itself: leave out the budget and --dense, or name --axes "
            "experts with a budget",
        )
        require(
            self.experts is None or 0 < self.experts <= 1,
            f"experts={self.experts} must lie in (0, 1]",
        )
        require(
            self.dense is None or self.budget is None,
            "--dense changes the layers that a budget would prune: make the model dense first, "
            "then prune it",
        )
        goes = self.experts is not None or "experts" in (self.axes or ())
        require(not self.merge or goes, "--merge goes with --experts or --axes experts")
        require(
            self.by == "reap" or goes or (self.budget is not None and self.axes is None),
            f"--by {self.by} goes with --experts or --axes experts",
        )

    def sized(self, config: ModelConfig) -> tuple[ModelConfig, tuple[Axis, ...]]:
        """The config with the units that stay, layers and dense layers not counted, and the axes.

        Raises:
          UserError: no such size.
        """
        if self.experts is not None:
            return shrunk_config(config, {"experts": self.experts}), ("experts",)
        if self.budget is None:
            return dataclasses.replace(config, multi_token=None), ()
        axes = self.axes or default_axes(config, self.budget)
        return sized(config, self.budget, axes), axes


@dataclass(frozen=True)
class PruningReport:
    """What went, and what it costs."""

    before: ModelConfig
    after: ModelConfig
    axes: tuple[Axis, ...]
    layers: tuple[int, ...]
    """Numbers of the layers that went."""
    lost: tuple[PrunedLayer, ...]
    influences: tuple[float, ...]
    """Of each layer before."""
    quality: Quality

    def record(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "parameters": [self.before.num_parameters, self.after.num_parameters],
            "active_parameters": [
                self.before.num_active_parameters, self.after.num_active_parameters,
            ],
            "axes": list(self.axes),
            "layers_gone": list(self.layers),
            "lost": [dataclasses.asdict(x) for x in self.lost],
            "influence": list(self.influences),
            "quality": dataclasses.asdict(self.quality) | {"lost": self.quality.lost},
        }  # fmt: skip


def prune_source(
    source: Source,
    target: Path,
    pruning: Pruning,
    rows: tuple[Rows, Rows],
    conversion: Conversion,
    *,
    reading: Elements = lambda done, total: None,
    measuring: Progress = lambda done, total: None,
    notes: Callable[[str], None] = lambda _: None,
) -> PruningReport:
    """Writes the pruned model, whole or not at all; measurements of an interrupted pass are kept.

    Args:
      rows: to calibrate on, and to measure on.
      notes: is told what of the source is left out.
    Raises:
      UserError: what can't be pruned so, or a target that can't hold the result.
    """
    check(source, target, pruning, conversion)
    fingerprint = fingerprint_of(source, repr(pruning), rows)
    with working_folder(target, fingerprint) as folder:
        original = layered(*source.load(progress=reading))
        sums = measured(original, rows[0], folder, measuring)
        smaller, report = pruned(original, sums, pruning)
        quality = compare(original, smaller, rows[1].steps())
        config, variables = smaller.assembled()
        held = source.with_variables(config, variables, fingerprint)
        convert(held, target, conversion, notes=notes)
    return dataclasses.replace(report, after=config, quality=quality)


def check(source: Source, target: Path, pruning: Pruning, conversion: Conversion) -> None:
    """
    Raises:
      UserError: see `prune_source`; nothing is read for it.
    """
    config = source.config
    has_experts = any(isinstance(spec.ffn, MoEConfig) for spec in config.layer_kinds)
    require(
        has_experts or not (pruning.experts or pruning.dense or pruning.merge),
        "this model has no experts: --experts, --merge and --dense are for those that have",
    )
    if pruning.layers is not None:
        kinds = (*config.prefix, *config.pattern)
        require(
            1 <= pruning.layers <= config.num_layers,
            f"layers={pruning.layers} must lie between 1 and the model's {config.num_layers}",
        )
        if len(set(kinds)) > 1:  # which go is not known yet, nor what the target must hold
            return
        config = dataclasses.replace(config, num_layers=pruning.layers, exit_spacing=None)
    if pruning.dense is None:
        smaller, _ = pruning.sized(config)
        export_family_of(source.with_variables(smaller, {}, ""), target, conversion)


def measured(
    model: LayeredModel, rows: Rows, folder: Path, progress: Progress = lambda done, total: None
) -> list[Sums]:
    """`compress.importance.measure`, going on with what a folder has."""
    known: list[Sums] = []
    while (sums := load_arrays(folder, f"layer_{len(known)}")) is not None:
        known.append(sums)
    return measure(
        model,
        rows.steps(),
        known=known,
        keep=lambda i, sums: save_arrays(folder, f"layer_{i}", sums),
        progress=progress,
    )


def pruned(
    original: LayeredModel, sums: Sequence[Sums], pruning: Pruning
) -> tuple[LayeredModel, PruningReport]:
    """The smaller model, and the report but for its quality."""
    model, own, gone = original, list(sums), []
    influences = tuple(influence(s) for s in sums[:-1])
    if pruning.layers is not None:
        model, own, gone = without_layers(model, own, pruning.layers)
    target, axes = pruning.sized(model.assembled_config())
    lost: list[PrunedLayer] = []
    if pruning.merge:
        model = merged_model(model, target, own, pruning.by)
    if axes:
        model, lost = prune(model, target, own, by=pruning.by)
    if pruning.dense is not None:
        model = dense_model(model, own, pruning.dense)
    nothing = Quality(0, 0.0, 0.0, 0.0, 0.0)
    before, after = original.assembled_config(), model.assembled_config()
    report = PruningReport(before, after, axes, tuple(gone), tuple(lost), influences, nothing)
    return model, report


def fingerprint_of(source: Source, what: str, rows: tuple[Rows, Rows]) -> str:
    """Of all that a pass depends on."""
    digest = hashlib.sha256(f"{source_fingerprint(source)} {what}".encode())
    for part in rows:
        digest.update(part.tokens_NL.tobytes())
    return digest.hexdigest()
