"""Rotary positions stretched to longer contexts than a model was first trained on.

Frozen and made of plain values, like all configs: see configs/base.py; model/layers.py computes.
"""

import math
from dataclasses import dataclass
from typing import Literal

from configs.checks import require, require_positive


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """RoPE stretched by parts (YaRN, Peng et al. 2023), as its authors' code does it.

    A pair that turns at least beta_fast times over original_length keeps its angle, one that turns
    at most beta_slow times turns `factor` times slower, and the pairs between follow a ramp that is
    linear in the pair's index. The paper's text has it linear in the turns instead; released models
    (DeepSeek's, gpt-oss) were trained with the code, and their weights fit nothing else.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float
    """New context length over the original one."""
    original_length: int
    """Tokens of context the model was trained on."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    """Of the logits' factor (0.1 mscale ln factor + 1)^2; 0 leaves them alone (DeepSeek-V2-Lite:
    0.707)."""
    rotary_scale: float = 1.0
    """Of sines and cosines besides: in latent attention it weighs the part with position."""
    truncate: bool = True
    """Whether the ramp begins and ends at whole pairs (gpt-oss: between them)."""

    def __post_init__(self) -> None:
        require_positive(self, "original_length", "beta_slow")
        require(self.factor >= 1, f"yarn.factor={self.factor} must be at least 1")
        require(
            self.beta_slow < self.beta_fast,
            f"yarn.beta_slow={self.beta_slow} must be below yarn.beta_fast={self.beta_fast}",
        )
        require_positive(self, "rotary_scale")
        require(
            0 < self._root < math.inf,
            f"yarn.mscale={self.mscale} makes 0.1 mscale ln(factor) + 1 = {self._root:.3g} of "
            f"factor={self.factor}, which must be a number greater than 0",
        )

    @property
    def _root(self) -> float:
        return 0.1 * self.mscale * math.log(self.factor) + 1.0

    @property
    def logit_scale(self) -> float:
        return self._root * self._root


@dataclass(frozen=True, kw_only=True)
class Llama3RopeConfig:
    """RoPE stretched by parts, as in Llama 3.1 (2024); logits keep their scale.

    A pair that turns at least high_freq_factor times over original_length keeps its angle, one that
    turns at most low_freq_factor times turns `factor` times slower, and between the two the mix is
    linear in the turns.
    """

    kind: Literal["llama3"] = "llama3"
    factor: float
    """How much slower the slowest pairs turn (Llama 3.1: 8; 3.2: 32)."""
    low_freq_factor: float
    """Turns over original_length (Llama 3: 1)."""
    high_freq_factor: float
    """Turns over original_length (Llama 3: 4)."""
    original_length: int
    """Tokens of context the model was trained on (Llama 3: 8192)."""

    def __post_init__(self) -> None:
        require_positive(self, "original_length", "low_freq_factor")
        require(self.factor >= 1, f"llama3.factor={self.factor} must be at least 1")
        require(
            self.low_freq_factor < self.high_freq_factor,
            f"llama3.low_freq_factor={self.low_freq_factor} must be below "
            f"llama3.high_freq_factor={self.high_freq_factor}",
        )

    @property
    def logit_scale(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class LinearRopeConfig:
    """RoPE by positions divided by `factor` (position interpolation, Chen et al. 2023): every pair
    turns slower alike; logits keep their scale."""

    kind: Literal["linear"] = "linear"
    factor: float
    """New context length over the original one (deepseek-coder: 4)."""

    def __post_init__(self) -> None:
        require(self.factor >= 1, f"linear.factor={self.factor} must be at least 1")

    @property
    def logit_scale(self) -> float:
        return 1.0


RopeScaling = YarnConfig | Llama3RopeConfig | LinearRopeConfig
