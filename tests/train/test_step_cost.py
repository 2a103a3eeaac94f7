"""What a step is said to have taken of its devices."""

import dataclasses
import types

import numpy as np
import pytest

from configs import models
from configs.accelerators import H100
from configs.base import InitConfig
from configs.optimizer import OptimizerConfig
from configs.tuning import LoRAConfig
from model.flops import forward_flops_per_token
from tests import tiny
from train.step_cost import StepCost, flops_per_step, peak_resident


def devices(kind: str, count: int, peak: int | None = None) -> np.ndarray:
    """Devices as jax describes them."""
    stats = None if peak is None else {"peak_bytes_in_use": peak}
    made = np.empty(count, object)
    for i in range(count):
        made[i] = types.SimpleNamespace(
            device_kind=kind, process_index=0, memory_stats=lambda: stats
        )
    return made


def test_the_share_of_the_peak_is_that_of_the_data_sheet(tmp_path):
    """Eight H100s that train at half of their bfloat16 peak."""
    run = tiny.run(tmp_path)
    run = dataclasses.replace(
        run, execution=dataclasses.replace(run.execution, compute_dtype="bfloat16")
    )
    tokens = run.batch_size * run.data.seq_len
    flops = 3 * tokens * forward_flops_per_token(run.model, run.data.seq_len)
    seconds = flops / (8 * H100.flops_16 / 2)
    line = StepCost(run, devices(H100.description, 8, peak=5 << 30)).line(seconds, 0.25)
    assert line == {
        "mfu": pytest.approx(0.5),
        "model_tflops": pytest.approx(8 * H100.flops_16 / 2e12),
        "data_wait": 0.25,
        "peak_memory": 5 << 30,
    }


def test_a_device_without_a_data_sheet_has_no_share_of_a_peak(tmp_path):
    line = StepCost(tiny.run(tmp_path), devices("cpu", 1)).line(1.0, 0.0)
    assert "mfu" not in line
    assert line["model_tflops"] > 0
    assert 50e6 < line["peak_memory"] <= peak_resident() < 500e9  # of this process, in bytes


def test_adapters_save_the_gradient_of_the_weights(tmp_path):
    whole = tiny.run(tmp_path, init=InitConfig(source="smollm2"), model=models.v31_nano_student())
    optimizer = OptimizerConfig(learning_rate=1e-3, kind="adamw", warmup_steps=1)
    whole = dataclasses.replace(whole, optimizer=optimizer)
    adapted = dataclasses.replace(whole, lora=LoRAConfig())
    assert flops_per_step(adapted) == pytest.approx(flops_per_step(whole) * 2 / 3)
