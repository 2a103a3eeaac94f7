"""A learning rate found on a narrow model, and the wide one it is meant for (mu-P).

    moesaic sweep docs/examples/width_transfer.py:one_rate      # the rate is every matrix's
    moesaic sweep docs/examples/width_transfer.py:base_width    # it is the narrow model's

Each sweep trains v31_nano's form, dense, at three widths and five rates; its report draws the last
loss over the rate, a line for each width.
"""

import dataclasses

from configs.architecture import LayerSpec
from configs.attention import AttentionConfig
from configs.base import MeshConfig, RunConfig
from configs.feed_forward import DenseConfig
from configs.optimizer import OptimizerConfig
from configs.runs import v31_nano

NARROW = 64
WIDTHS = (NARROW, 128, 256)
RATES = (0.008, 0.016, 0.032, 0.064, 0.128)
STEPS = 60


def one_rate() -> dict[str, RunConfig]:
    """The same rate for every matrix."""
    return {name_of(w, rate): run(w, rate, None) for w in WIDTHS for rate in RATES}


def base_width() -> dict[str, RunConfig]:
    """The rate of the narrow model, scaled matrix by matrix to the width."""
    return {name_of(w, rate): run(w, rate, NARROW) for w in WIDTHS for rate in RATES}


def name_of(width: int, rate: float) -> str:
    return f"width_{width}_rate_{rate}"


def run(width: int, rate: float, base: int | None) -> RunConfig:
    """Heads of one size, more of them with the width; all else as it was."""
    nano = v31_nano()
    attention = AttentionConfig(num_heads=width // 32, num_kv_heads=width // 64, head_dim=32)
    layer = LayerSpec(attention=attention, ffn=DenseConfig(d_ff=3 * width))
    model = dataclasses.replace(nano.model, d_model=width, pattern=(layer,))
    optimizer = OptimizerConfig(learning_rate=rate, warmup_steps=20, base_width=base)
    changes = {"steps": STEPS, "model": model, "optimizer": optimizer, "mesh": MeshConfig()}
    return dataclasses.replace(nano, **changes)
