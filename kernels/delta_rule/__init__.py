"""The gated delta rule: linear attention whose state forgets and corrects."""

from kernels.delta_rule.api import Implementation, delta_rule

__all__ = ["Implementation", "delta_rule"]
