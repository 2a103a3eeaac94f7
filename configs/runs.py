"""Whole experiments: each public function returns a RunConfig; its docstring says how to run it."""

from configs import models
from configs.base import MeshConfig, OptimizerConfig, RunConfig


def v31_nano() -> RunConfig:
    """x"""
    return RunConfig(
        name="v31_nano",
        steps=500,
        batch_size=16,
        model=models.v31_nano(),
        mesh=MeshConfig(expert=2),
        optimizer=OptimizerConfig(
            kind="muon",
            momentum=0.95,
            learning_rate=5e-3,
            warmup_steps=20,
            schedule="wsd",
            decay_fraction=0.4,
            final_ratio=0.05,
        ),
    )
