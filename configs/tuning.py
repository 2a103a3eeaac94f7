"""Settings of ways to train: adapters, preferences, weights rounded in the last steps."""

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


@dataclass(frozen=True, kw_only=True)
class QuantizationAwareConfig:
    """Weights rounded in the last steps, gradients straight through to the float masters
    (train/quantization_aware.py); the result is rounded by scripts.quantize."""

    weights: Literal["none", "int8", "int4", "fp8"] = "none"
    """none: nothing is rounded."""
    last_fraction: float = 0.1
    """Share of the steps, the last ones, that train with rounded weights."""
    block_size: int = 32
    """Inputs that share a scale (a GGUF's: 32); weights whose inputs it does not divide stay in
    floats."""

    def __post_init__(self) -> None:
        require_positive(self, "block_size")
        require(
            0 < self.last_fraction <= 1,
            f"quantization_aware.last_fraction={self.last_fraction} must lie in (0, 1]",
        )
        require(
            self.block_size % 2 == 0,
            f"quantization_aware.block_size={self.block_size} must be even",
        )
        require(
            self.weights != "none" or (self.last_fraction, self.block_size) == (0.1, 32),
            f"quantization_aware.last_fraction={self.last_fraction} and block_size="
            f"{self.block_size} have no effect with weights='none': name a format",
        )
