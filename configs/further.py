"""Settings of teaching a trained model further: what it is to keep."""

from dataclasses import dataclass

from configs.checks import require, require_positive


@dataclass(frozen=True, kw_only=True)
class FurtherConfig:
    """How a run that begins with a trained model (run.init) keeps what that one can do."""

    consolidation: float = 0.0
    """lambda of elastic weight consolidation (Kirkpatrick et al. 2017): lambda / 2 times the sum of
    F (w - w0)^2 is added to the loss, with F the Fisher information of a token of the old data, so
    1 weighs the new data like as many tokens of the old. 0: none."""
    fisher_rows: int = 128
    """Rows of the old data that F is measured on."""
    frozen_experts: int = 0
    """The first so many experts of every MoE layer stay as they are, and so does all that is no
    expert, the routers' columns of the others excepted: a grown model (scripts.grow) learns a new
    domain with its new experts alone. 0: all is trained."""

    def __post_init__(self) -> None:
        require(
            self.consolidation >= 0,
            f"further.consolidation={self.consolidation} must not be negative",
        )
        require_positive(self, "fisher_rows")
        require(
            self.fisher_rows == 128 or self.consolidation > 0,
            f"further.fisher_rows={self.fisher_rows} has no effect without further.consolidation: "
            "leave it out",
        )
        require(
            self.frozen_experts >= 0,
            f"further.frozen_experts={self.frozen_experts} must not be negative",
        )
        require(
            not (self.frozen_experts and self.consolidation),
            "further.frozen_experts leave nothing old to be consolidated: leave "
            "further.consolidation out",
        )
