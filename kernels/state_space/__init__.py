"""The state space recurrence of Mamba-2: linear attention whose state forgets."""

from kernels.state_space.api import Implementation, state_space

__all__ = ["Implementation", "state_space"]
