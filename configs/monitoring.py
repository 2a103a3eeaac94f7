"""Settings of what a run tells about itself as it goes: its metrics and its validation loss."""

from dataclasses import dataclass
from typing import Literal, get_args

from configs.checks import require, require_positive

VALIDATION_ROWS = 64

Logger = Literal["tensorboard", "wandb"]


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """How the metrics of the steps come to the log."""

    fetch_every: int | None = None
    """Steps whose metrics are fetched from the devices at once; each has its line in the log
    whatever this is. None: 1 on the CPU, 10 on accelerators, which so never wait for the host."""
    loggers: tuple[Logger, ...] = ()
    """Where the log goes beside metrics.jsonl, by packages that are installed (train/loggers.py);
    wandb keeps it in the run's folder, offline."""

    def __post_init__(self) -> None:
        require(
            self.fetch_every is None or self.fetch_every > 0,
            f"metrics.fetch_every={self.fetch_every} must be at least 1, or None for the device's "
            "usual",
        )
        unknown = [name for name in self.loggers if name not in get_args(Logger)]
        require(
            not unknown and len(set(self.loggers)) == len(self.loggers),
            f"metrics.loggers={self.loggers} must be some of {get_args(Logger)}, each once",
        )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Loss on held-out text, the same rows each time."""

    every: int | None = 100
    """Steps between two measurements; the last step is always measured. None: never."""
    max_rows: int = VALIDATION_ROWS
    """Rows of data.seq_len tokens, spread evenly over the held-out text; all where it has fewer."""

    def __post_init__(self) -> None:
        require(
            self.every is None or self.every > 0,
            f"validation.every={self.every} must be at least 1, or None for no validation",
        )
        require_positive(self, "max_rows")
        require(
            self.every is not None or self.max_rows == VALIDATION_ROWS,
            f"validation.max_rows={self.max_rows} has no effect without validation.every: set it, "
            "or leave max_rows out",
        )


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Texts that the model writes as it is trained (samples.jsonl)."""

    every: int | None = None
    """Steps between samples; None: none are written."""
    prompts: tuple[str, ...] = ()
    """Beginnings of texts; of a run on chats or preferences, messages to answer."""
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0: the likeliest token each time."""

    def __post_init__(self) -> None:
        require(
            self.every is None or self.every > 0,
            f"samples.every={self.every} must be at least 1, or None for no samples",
        )
        require(
            (self.every is not None) == bool(self.prompts),
            f"samples.prompts={self.prompts} go with samples.every and only with it, got "
            f"{self.every}: give both",
        )
        require_positive(self, "max_new_tokens")
        require(
            self.temperature >= 0,
            f"samples.temperature={self.temperature} must not be negative",
        )
