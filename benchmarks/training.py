"""Training steps on fixed random tokens: the thing that is measured."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from checkpoint.orbax_store import abstract_like
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.base import ExecutionConfig, RunConfig
from configs.feed_forward import MoEConfig, RouterConfig
from configs.optimizer import OptimizerConfig
from train.compiled import compile_ahead
from train.loop import mesh_of, to_devices
from train.state import TrainState, init_state, make_train_setup
from train.step import make_train_step

ComputeDtype = Literal["float32", "bfloat16"]


def mixtral_run(compute_dtype: ComputeDtype = "float32") -> RunConfig:
    """The shape of benchmarks/mixtral_torch.py, with its optimiser and no extra losses."""
    attention = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=32, rope_base=1e6)
    router = RouterConfig(top_k=2, load_balance_weight=0.0, z_loss_weight=0.0)
    ffn = MoEConfig(num_experts=8, d_ff=512, router=router)
    model = ModelConfig(
        vocab_size=4096,
        d_model=256,
        num_layers=4,
        pattern=(LayerSpec(attention=attention, ffn=ffn),),
        context_length=256,
    )
    optimizer = OptimizerConfig(learning_rate=3e-4, warmup_steps=0, weight_decay=0.01, beta2=0.999)
    return RunConfig(
        name="mixtral_bench",
        steps=1_000_000,
        batch_size=8,
        model=model,
        optimizer=optimizer,
        execution=ExecutionConfig(compute_dtype=compute_dtype, logits_chunks=4),
    )


def random_batch(run: RunConfig) -> dict[str, np.ndarray]:
    random = np.random.RandomState(0)
    length = run.data.seq_len
    tokens = random.randint(0, run.model.vocab_size, (run.batch_size, length + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (run.batch_size, length))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions}


def lowered_step(run: RunConfig) -> str:
    """The compiled step's text, whose instructions name the code they came from."""
    mesh = mesh_of(run)
    with jax.set_mesh(mesh):
        setup = make_train_setup(run, mesh)
        step: Any = make_train_step(run, setup)
        batch = to_devices(random_batch(run), mesh)
        return step.lower(setup.abstract_state, batch).compile().as_text()


def make_step(run: RunConfig) -> Callable[[], None]:
    """A function that trains one step and waits for its metrics, as the training loop does; the
    first time, it compiles and makes the state, in the loop's order."""
    mesh, state = mesh_of(run), None
    with jax.set_mesh(mesh):
        setup = make_train_setup(run, mesh)
        train_step = make_train_step(run, setup)
        batch = to_devices(random_batch(run), mesh)

    def begin() -> TrainState:
        compile_ahead(train_step, abstract_like(setup.abstract_state, setup.shardings), batch)
        return init_state(setup, run.seed)

    def step() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(begin() if state is None else state, batch)
            jax.device_get(metrics)

    return step
