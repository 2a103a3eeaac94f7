"""Training and held-out evaluation of the small models that the experiments compare.

N rows, L tokens of a row, V vocab, E experts, P periods.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ablations.base import Finding, Target
from configs.architecture import ModelConfig
from configs.base import DataConfig, ExecutionConfig, RunConfig
from configs.optimizer import OptimizerConfig
from data.packing import PackedRows, PartRows
from data.pipeline import Batch, Corpus, batches, prepare_corpus
from model.balance import load_metrics
from model.transformer import Transformer, Variables, hidden_and_router, output_weights
from train.distillation_loss import make_chunk_loss
from train.loop import mesh_of, to_devices
from train.losses import collect_router_stats, cross_entropy
from train.progress import ProgressBar
from train.state import TrainState, init_state, make_train_setup
from train.step import make_train_step
from train.teachers import Teacher, View, with_hidden

VOCAB = 4096
ROWS_AT_ONCE = 16


def small_run(
    model: ModelConfig, *, steps: int, seed: int, seq_len: int = 256, batch_size: int = 16
) -> RunConfig:
    """The recipe of the nanos (configs/runs.py) for any small model."""
    return RunConfig(
        name="claim",
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        model=model,
        optimizer=OptimizerConfig(
            kind="muon",
            momentum=0.95,
            learning_rate=1.5e-2,
            schedule="wsd",
            warmup_steps=min(20, steps // 4),
            decay_fraction=0.7,
            final_ratio=0.05,
            beta2=0.99,
        ),
        data=DataConfig(seq_len=seq_len),
        execution=ExecutionConfig(logits_chunks=4),
    )


def standard_library() -> Corpus:
    """The corpus of the quickstart; made when missing."""
    return prepare_corpus(DataConfig(), VOCAB)


def corpus_batches(run: RunConfig) -> Iterator[Batch]:
    """The standard library in the order that the run's seed gives."""
    return batches(
        standard_library().training(),
        seq_len=run.data.seq_len,
        batch_size=run.batch_size,
        seed=run.seed,
    )


@dataclass(frozen=True)
class Trained:
    run: RunConfig
    state: TrainState
    losses: np.ndarray
    """Cross-entropy per token by step, nats."""
    router: list[dict[str, Any]]
    """What train/step.py reports of the routers, by step."""
    seconds: float
    """Of a step: the median, without the first two."""

    @property
    def model(self) -> Transformer:
        return Transformer(self.run.model, self.run.execution)

    @property
    def variables(self) -> Variables:
        return self.state.variables


OnStep = Callable[[int, TrainState], None]
"""Called with the steps done and the state after them."""


def train(
    run: RunConfig,
    data: Iterator[Batch],
    label: str,
    *,
    state: TrainState | None = None,
    variables: Variables | None = None,
    teacher: Teacher | None = None,
    on_step: OnStep = lambda done, state: None,
) -> Trained:
    """Trains in memory, without checkpoints and alarms.

    Args:
      state: to go on from; None draws one from the run's seed. It is used up.
      variables: to begin with instead.
      teacher: what run.distill compares with.
    """
    mesh = mesh_of(run)
    losses, router, seconds = [], [], []
    with jax.set_mesh(mesh), ProgressBar(label, total=run.steps) as bar:
        setup = make_train_setup(run, mesh)
        view: View | None = None
        loss = cross_entropy
        if teacher is not None:
            assert run.distill is not None
            view, loss = with_hidden([teacher], None, None), make_chunk_loss(run.distill)
        step = make_train_step(run, setup, loss)
        if state is None:
            state = init_state(setup, run.seed, variables)
        for done in range(1, run.steps + 1):
            batch = to_devices(next(data), mesh)
            began = time.perf_counter()
            state, metrics = step(state, batch if view is None else view(batch))
            metrics = jax.device_get(metrics)
            seconds.append(time.perf_counter() - began)
            losses.append(float(metrics["cross_entropy"]))
            router.append(metrics["router"])
            rate = run.tokens_per_step / seconds[-1]
            bar.update(done, f"loss {losses[-1]:.3f}  {rate:,.0f} tokens/s")
            on_step(done, state)
    return Trained(run, state, np.array(losses), router, float(np.median(seconds[2:])))


@dataclass(frozen=True)
class HeldOut:
    """A model on rows it has not seen."""

    nats: float
    """Cross-entropy per token."""
    counts: np.ndarray
    """Tokens each expert received, [layers, E]; empty without experts."""
    num_tokens: int

    def load(self) -> dict[str, float]:
        """load_cv, load_cv_floor, mean_k and so on, each the mean over layers."""
        metrics = [load_metrics(jnp.asarray(c), jnp.float32(self.num_tokens)) for c in self.counts]
        return {k: float(np.mean([getattr(f, k) for f in metrics])) for k in metrics[0]._fields}

    @property
    def excess_cv(self) -> float:
        """The load's coefficient of variation beyond what drawing so many tokens would give."""
        load = self.load()
        return max(load["load_cv"] ** 2 - load["load_cv_floor"] ** 2, 0.0) ** 0.5


def held_out_rows(num_tokens: int, seq_len: int) -> dict[str, np.ndarray]:
    """Rows of the standard library's held-out files, [N, L], num_tokens in all."""
    return spread_rows(PackedRows(standard_library().held_out(), seq_len), num_tokens // seq_len)


def spread_rows(rows: PackedRows | PartRows, count: int) -> dict[str, np.ndarray]:
    """So many of the rows, spread evenly over them, [N, L]."""
    chosen = np.linspace(0, len(rows) - 1, count).astype(int)
    columns = [rows[int(i)] for i in chosen]
    return {k: np.stack([c[k] for c in columns]) for k in ("tokens", "targets", "positions")}


def evaluate_held_out(
    model: Transformer, variables: Variables, rows: dict[str, np.ndarray]
) -> HeldOut:
    """Loss and load of the model on these rows, read ROWS_AT_ONCE at a time."""
    nats, counts = 0.0, []
    for begin in range(0, len(rows["tokens"]), ROWS_AT_ONCE):
        piece = {k: x[begin : begin + ROWS_AT_ONCE] for k, x in rows.items()}
        part_nats, part_counts = jax.device_get(_judge(model, variables, piece))
        nats += float(part_nats)
        counts.append(part_counts)
    return HeldOut(nats / rows["targets"].size, np.sum(counts, axis=0), rows["targets"].size)


@functools.partial(jax.jit, static_argnums=0)
def _judge(model, variables, rows):
    hidden_BLD, sown = hidden_and_router(model, variables, rows["tokens"], rows["positions"])
    w_DV = output_weights(model, variables)

    def one_row(row):
        hidden_LD, targets_L = row
        logits_LV = hidden_LD @ w_DV
        target_L = jnp.take_along_axis(logits_LV, targets_L[:, None], axis=1)[:, 0]
        return (jax.nn.logsumexp(logits_LV, axis=1) - target_L).sum()

    nats = jax.lax.map(one_row, (hidden_BLD, rows["targets"])).sum()
    layers = [s.counts_E for s in collect_router_stats(sown, model.config).values()]
    return nats, jnp.concatenate(layers) if layers else jnp.zeros((0, 1), jnp.int32)


def paired(name: str, ours: list[float], base: list[float], target: Target | None) -> Finding:
    """Ours less the base's, seed by seed."""
    differences = tuple(a - b for a, b in zip(ours, base, strict=True))
    return Finding(name=name, values=differences, target=target)


def ratio(name: str, ours: list[float], base: list[float], target: Target | None) -> Finding:
    """Ours over the base's, seed by seed."""
    ratios = tuple(a / b for a, b in zip(ours, base, strict=True))
    return Finding(name=name, values=ratios, target=target)
