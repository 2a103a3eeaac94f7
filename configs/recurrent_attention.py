"""The kinds of attention whose state has one size, however long the text: delta nets, Mamba-2 and
convolutions.

Frozen and made of plain values, like all configs: see configs/base.py.
"""

from dataclasses import dataclass
from typing import Literal

from configs.attention_traits import AttentionTraits
from configs.checks import require, require_positive

DeltaDecay = Literal["head", "channel"]


@dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig(AttentionTraits):
    """Gated delta net (Yang et al. 2024): linear attention over a state of one size."""

    kind: Literal["gated_delta"] = "gated_delta"
    num_heads: int
    """Heads of values, and of the state, H."""
    num_key_heads: int | None = None
    """Heads of queries and keys; each serves num_heads / num_key_heads heads of values (Qwen3-Next,
    2025). None: as many as num_heads."""
    key_head_dim: int
    value_head_dim: int
    conv_width: int = 4
    """Taps of the causal convolution over queries, keys and values, the token itself included."""
    decay: DeltaDecay = "head"
    """What forgets at a rate of its own: each head (gated delta net), or each channel of its keys
    (Kimi delta attention, 2025)."""
    output_gate: Literal["silu", "sigmoid"] | None = "silu"
    """What the result of each head, normed, is multiplied by: silu or sigmoid of a projection."""
    doubled_beta: bool = False
    """Whether beta, the share of a key's value that is replaced, lies in 0..2 instead of 0..1: what
    the state has may turn its sign (Grazzi et al. 2024; OLMo Hybrid, 2026)."""
    norm_eps: float | None = None
    """Of the norm of each head's result; None is the model's (OLMo Hybrid: 1e-5)."""
    gate_rank: int | None = None
    """Width that the projections of output gate and channels' decays go through; None: the gate has
    one matrix."""

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "key_head_dim", "value_head_dim", "conv_width")
        require(
            self.norm_eps is None or self.norm_eps > 0,
            f"norm_eps={self.norm_eps} must be greater than 0, or None for the model's",
        )
        key_heads = self.num_key_heads
        require(
            key_heads is None or (key_heads > 0 and self.num_heads % key_heads == 0),
            f"num_heads={self.num_heads} must be a multiple of num_key_heads={key_heads}",
        )
        require(
            (self.decay == "head") or self.gate_rank is not None,
            "decay='channel' needs a gate_rank: the channels' rates are a product of two matrices",
        )
        require(
            self.gate_rank is None or self.gate_rank > 0,
            f"gate_rank={self.gate_rank} must be at least 1, or None",
        )
        require(
            self.gate_rank is None or self.decay == "channel" or self.output_gate is not None,
            f"gate_rank={self.gate_rank} has no effect with decay='head' and output_gate=None",
        )

    @property
    def unskippable_reason(self) -> str | None:
        return "a layer with depth sees only the chosen tokens, and a recurrence needs them all"

    @property
    def key_width(self) -> int:
        """Width of all heads' keys together."""
        return (self.num_key_heads or self.num_heads) * self.key_head_dim

    @property
    def conv_channels(self) -> int:
        """Entries of a token's queries, keys and values."""
        return 2 * self.key_width + self.out_width

    @property
    def out_width(self) -> int:
        """Width of all heads' results together."""
        return self.num_heads * self.value_head_dim

    def num_parameters(self, d_model: int) -> int:
        """Weights of queries, keys, values, convolution, decay, correction, gate, norm, output."""
        mixed = (d_model + self.conv_width) * self.conv_channels
        if self.decay == "head":
            decay = (d_model + 2) * self.num_heads
        else:
            channels = self.num_heads * self.key_head_dim
            decay = self._gate_parameters(d_model, channels) + self.num_heads + channels
        gate = 0 if self.output_gate is None else self._gate_parameters(d_model, self.out_width)
        beta, norm, out = d_model * self.num_heads, self.value_head_dim, self.out_width * d_model
        return mixed + decay + gate + beta + norm + out

    def _gate_parameters(self, d_model: int, width: int) -> int:
        rank = self.gate_rank
        return d_model * width if rank is None else rank * (d_model + width)


@dataclass(frozen=True, kw_only=True)
class ShortConvConfig(AttentionTraits):
    """Gated short convolution (LFM2, 2025): y = W_o (c * conv(b * x)), with b, c and x projections
    of the token; the convolution is causal, each channel by itself."""

    kind: Literal["short_conv"] = "short_conv"
    channels: int
    """Width of the projections (LFM2: d_model)."""
    conv_width: int = 3
    """Taps of the convolution, the token itself included."""
    bias: bool = False
    """Whether projections and convolution have biases."""

    def __post_init__(self) -> None:
        require_positive(self, "channels")
        require(
            self.conv_width >= 2,
            f"conv_width={self.conv_width} must be at least 2: with one tap a token sees itself "
            "alone",
        )

    @property
    def unskippable_reason(self) -> str | None:
        return "a layer with depth sees only the chosen tokens, and a convolution needs them all"

    @property
    def num_heads(self) -> int:
        """Every channel is mixed by itself, and none with a score."""
        return 1

    @property
    def out_width(self) -> int:
        """Width of what the last projection reads."""
        return self.channels

    def num_parameters(self, d_model: int) -> int:
        """Weights of the projections and the convolution, and their biases."""
        biases = 4 * self.channels + d_model if self.bias else 0
        return (4 * d_model + self.conv_width) * self.channels + biases


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(AttentionTraits):
    """Mamba-2 (Dao & Gu 2024): linear attention over a state of one size that forgets at a rate of
    each head, and whose keys and queries groups of heads share.

    y = W_o norm((C S + skip * x) * silu(gate)),   S = exp(-rate * step) S + step * B x^T
    """

    kind: Literal["mamba2"] = "mamba2"
    num_heads: int
    """Heads of values, and of the state, H."""
    head_dim: int
    """Width of a head's values, V."""
    state_dim: int
    """Width of keys (B) and queries (C), K."""
    num_groups: int = 1
    """Groups of heads that share keys and queries, G."""
    conv_width: int = 4
    """Taps of the causal convolution over values, keys and queries, the token itself included."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""
    bias: bool = False
    """Whether the projections have biases."""
    norm_by_group: bool = False
    """Whether the result is normed over each group's values (Nemotron-H, 2025) or over all."""
    least_step: float = 0.0
    """Bound of each token's step from below (transformers' time_step_min)."""

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "head_dim", "state_dim", "num_groups", "conv_width")
        require(
            self.num_heads % self.num_groups == 0,
            f"num_heads={self.num_heads} must be a multiple of num_groups={self.num_groups}",
        )
        require(self.least_step >= 0, f"least_step={self.least_step} must not be negative")

    @property
    def unskippable_reason(self) -> str | None:
        return "a layer with depth sees only the chosen tokens, and a recurrence needs them all"

    @property
    def conv_channels(self) -> int:
        """Entries of a token's values, keys and queries."""
        return self.out_width + 2 * self.num_groups * self.state_dim

    @property
    def out_width(self) -> int:
        """Width of all heads' results together."""
        return self.num_heads * self.head_dim

    def num_parameters(self, d_model: int) -> int:
        """Weights of the projections, convolution, steps, rates, skips, norm, and their biases."""
        entering = self.conv_channels + self.out_width + self.num_heads
        conv = (self.conv_width + (1 if self.conv_bias else 0)) * self.conv_channels
        own = 3 * self.num_heads + self.out_width
        biases = entering + d_model if self.bias else 0
        return d_model * (entering + self.out_width) + conv + own + biases
