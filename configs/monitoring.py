"""Settings of what a run tells about itself as it goes: its metrics and its validation loss."""

from dataclasses import dataclass

from configs.checks import require, require_positive

VALIDATION_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """How the metrics of the steps come to the log."""

    fetch_every: int | None = None
    """Steps whose metrics are fetched from the devices at once; each has its line in the log
    whatever this is. None: 1 on the CPU, 10 on accelerators, which so never wait for the host."""

    def __post_init__(self) -> None:
        require(
            self.fetch_every is None or self.fetch_every > 0,
            f"metrics.fetch_every={self.fetch_every} must be at least 1, or None for the device's "
            "usual",
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
