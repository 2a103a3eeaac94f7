"""How weights are updated: optimiser and learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal

from configs.checks import require, require_positive


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon for the hidden matrices with AdamW for the rest; one schedule for both."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float
    """Peak learning rate. Muon's updates are scaled to AdamW's RMS (0.2), so it serves both."""
    schedule: Literal["cosine", "wsd", "infinite"] = "cosine"
    """After the warm-up: cosine decay; or stable then linear decay (warm-up-stable-decay); or a
    cosine down to a constant rate, at which training can go on with new data any time, and a linear
    decay for a release (Ibrahim et al. 2024)."""
    warmup_steps: int
    decay_fraction: float | None = None
    """wsd and infinite: last share of the steps in which the rate falls; infinite may have none."""
    cooldown_fraction: float | None = None
    """infinite only: share of the steps from the warm-up to the constant rate."""
    constant_ratio: float | None = None
    """infinite only: the constant rate over the peak."""
    final_ratio: float = 0.1
    """Learning rate at the last step over the peak."""
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float | None = None
    """Muon only: its momentum."""
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms are left alone."""
    clip_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down; None: never."""
    base_width: int | None = None
    """d_model of the model that learning_rate was found with (mu-P, Yang et al. 2022): AdamW's
    updates of what reads d_model, embeddings apart, are scaled by base_width / d_model, so that a
    wide model learns as a narrow one does. None: one rate for all."""
    average: float | None = None
    """Decay of the moving average of the weights, as 0.999: what validation measures, and what the
    run is read as. None: none is kept."""
    skip_above: float | None = None
    """A step whose loss or gradient norm is more than this many times its running mean, or is not
    finite, changes nothing, and the log says so ("skipped"). None: every step counts."""

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "eps")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm={self.clip_norm} must be greater than 0, or None to leave gradients as "
            "they are",
        )
        require(
            self.skip_above is None or self.skip_above > 1,
            f"optimizer.skip_above={self.skip_above} must be above 1, the running mean itself, or "
            "None to skip no step",
        )
        require(
            self.base_width is None or (self.base_width > 0 and self.kind == "adamw"),
            f"optimizer.base_width={self.base_width} must be a d_model, with kind='adamw': Muon's "
            "updates are scaled by the matrix itself",
        )
        require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must not be negative")
        require(
            (self.decay_fraction is not None) == (self.schedule == "wsd")
            or self.schedule == "infinite",
            f"optimizer.decay_fraction={self.decay_fraction} goes with schedule='wsd' and only "
            "with it, "
            f"got schedule={self.schedule!r}",
        )
        for name in ("cooldown_fraction", "constant_ratio"):
            value = getattr(self, name)
            require(
                (value is not None) == (self.schedule == "infinite"),
                f"optimizer.{name}={value} goes with schedule='infinite' and only with it, got "
                f"schedule={self.schedule!r}",
            )
            require(value is None or 0 < value < 1, f"optimizer.{name}={value} must lie in (0, 1)")
        require(
            self.decay_fraction is None or 0 < self.decay_fraction <= 1,
            f"optimizer.decay_fraction={self.decay_fraction} must lie in (0, 1]",
        )
        require(
            (self.momentum is not None) == (self.kind == "muon"),
            f"optimizer.momentum={self.momentum} goes with kind='muon' and only with it, got "
            f"kind={self.kind!r}",
        )
        for name in ("final_ratio", "beta1", "beta2", "momentum", "average"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, f"optimizer.{name}={value} must lie in [0, 1)")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative")
