"""Settings of how a trained model is trained further: adapters, and learning from preferences."""

from dataclasses import dataclass
from typing import Literal, get_args

from configs.checks import require, require_positive

AdapterTarget = Literal["attention", "dense", "experts"]
ADAPTER_TARGETS: tuple[AdapterTarget, ...] = get_args(AdapterTarget)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021): beside each chosen matrix W, which stays as it is, a
    product of two small ones is trained: x W + (alpha / rank) x A B.
    """

    rank: int = 8
    """Columns of A and rows of B."""
    alpha: float = 16.0
    """The product's factor is alpha / rank."""
    targets: tuple[AdapterTarget, ...] = ()
    """Matrices that get one: of attention, of dense feed-forward layers and shared experts, of the
    routed experts (each expert its own). Empty: all of them that the model has."""

    def __post_init__(self) -> None:
        require_positive(self, "rank", "alpha")
        unknown = [name for name in self.targets if name not in ADAPTER_TARGETS]
        require(
            not unknown and len(set(self.targets)) == len(self.targets),
            f"lora.targets={self.targets} must be some of {ADAPTER_TARGETS}, each once",
        )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7) on pairs of answers."""

    beta: float = 0.1
    """How strongly the model is held to the one it began with."""

    def __post_init__(self) -> None:
        require_positive(self, "beta")
