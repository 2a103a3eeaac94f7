"""What a process holds at most while it reads a prompt or a checkpoint; to be run as one.

    python -m benchmarks.generation.peaks prompt MODEL LENGTH
    python -m benchmarks.generation.peaks load FOLDER WEIGHTS

MODEL is a function of configs/models.py. Prints JSON, in bytes.
"""

import dataclasses
import json
import math
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.resident_memory import reset_peak, resident
from configs import models
from configs.architecture import ModelConfig
from infer.engine import Engine, EngineOptions, Request
from infer.load import inference_execution
from infer.sources import open_source
from infer.weights import check_format, num_bytes
from model.model_state import init_state
from model.transformer import Transformer, Variables, abstract_variables
from model.unstacked import unstacked_config


def read_prompt(config: ModelConfig, length: int) -> dict[str, float]:
    """Reads a prompt of random tokens through an engine with room for it, with random weights.

    Returns:
      peak: the most that was resident, less what the model and the process held before; state: the
      bytes of keys and values in it; seconds: to the first token, compilation included.
    """
    longest = max(config.context_length, length + 1)
    config = unstacked_config(dataclasses.replace(config, context_length=longest))
    model = Transformer(config, inference_execution())
    variables = random_variables(model)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, length).tolist()
    before, began = reset_peak(), time.perf_counter()
    engine = Engine(model, variables, EngineOptions(max_rows=1, max_length=length + 1))
    engine.add(Request(prompt, 1))
    while engine.has_work():
        engine.step()
    return {
        "peak": resident("VmHWM") - before,
        "state": state_bytes(model, length),
        "weights": num_bytes(variables),
        "seconds": time.perf_counter() - began,
    }


def state_bytes(model: Transformer, length: int) -> int:
    """What the layers keep of one sequence of this length."""
    dtype = model.execution.compute_dtype
    state = jax.eval_shape(lambda: init_state(model.config, 1, length, dtype))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def random_variables(model: Transformer, stddev: float = 0.02) -> Variables:
    """Normal draws for every variable, on the first device."""
    draw = np.random.default_rng(0)

    def drawn(x: Any) -> jax.Array:
        return jax.device_put(stddev * draw.standard_normal(x.shape, np.float32))

    abstract, _ = abstract_variables(model)
    return jax.block_until_ready(jax.tree.map(drawn, abstract))


def load(folder: str, weights: str) -> dict[str, float]:
    """Loads a checkpoint in a format of weights.

    Returns:
      peak: the most that was resident, less what the process held before; result: the bytes of the
      variables; largest: of the largest tensor in the files, as float32.
    """
    jax.block_until_ready(jax.numpy.zeros(8) + 1)  # the runtime's own threads and buffers
    source = open_source(folder)
    assert source.public is not None
    largest = max(math.prod(shape) for shape in source.public.tensors.shapes.values())
    before, began = reset_peak(), time.perf_counter()
    _, variables = source.load(weights=check_format(weights))
    jax.block_until_ready(variables)
    return {
        "peak": resident("VmHWM") - before,
        "result": num_bytes(variables),
        "largest": 4 * largest,
        "seconds": time.perf_counter() - began,
    }


def main(what: str, name: str, value: str) -> None:
    made = read_prompt(getattr(models, name)(), int(value)) if what == "prompt" else None
    print(json.dumps(load(name, value) if made is None else made))


if __name__ == "__main__":
    main(*sys.argv[1:])
