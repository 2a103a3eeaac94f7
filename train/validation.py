"""Validation loss: how well the model predicts held-out text, the same rows each time.

It looks at the run's variables and changes nothing: neither the rows that training reads nor any
random number. Each row is read from its own beginning, as in training, so that the first of its
tokens are predicted from little; scripts.evaluate gives every token a context.

S batches, B rows of a batch, L length.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.base import RunConfig
from configs.tuning import PreferenceConfig
from data.held_out import held_out_batches, token_bytes
from data.pipeline import Corpus
from data.preferences import held_out_pairs
from model.depth import with_threshold_selection
from model.model_state import init_memory
from model.transformer import Transformer, Variables, hidden_states, output_weights
from parallel.mesh import BATCH_AXES
from train.losses import chunked_loss, cross_entropy, with_source_sums
from train.preference import log_probs, num_pairs, preference_loss
from train.state import TrainState


class Validation:
    """The held-out rows of a run, on its devices, and the program that measures on them."""

    def __init__(self, run: RunConfig, corpus: Corpus, mesh: Mesh) -> None:
        """
        Args:
          mesh: in use whenever the loss is measured.
        """
        self.every, self.steps = run.validation.every, run.steps
        if self.every is None:
            return
        file, rows = corpus.held_out(), run.validation.max_rows
        shape = (run.data.seq_len, rows, run.batch_size // run.accumulation)
        split_by = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        if run.preference is not None:
            batches = held_out_pairs(file, *shape, multiple_of=split_by)
        else:
            streams = run.model.memory_length is not None
            self._num_sources = len(run.data.mixture)
            batches = held_out_batches(
                file,
                *shape,
                multiple_of=split_by,
                streams=streams,
                sources=self._num_sources > 0,
            )
        targets = batches["targets"][batches["targets"] >= 0]
        bytes_V = token_bytes(corpus.tokenizer(), run.model.vocab_size)
        self._num_tokens = targets.size
        self._num_bytes = 0 if bytes_V is None else int(bytes_V[targets].sum())
        split = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
        self._batches = {
            name: jax.make_array_from_callback(x_SBL.shape, split, x_SBL.__getitem__)
            for name, x_SBL in batches.items()
        }
        execution = dataclasses.replace(run.execution, remat="none")
        model = Transformer(with_threshold_selection(run.model), execution)
        everywhere = NamedSharding(mesh, PartitionSpec())
        program = partial(_preferences, run.preference) if run.preference else _nats
        static = (0,) if run.preference else (0, 3)
        jitted = jax.jit(program, static_argnums=static, out_shardings=everywhere)
        self._measure: Callable[..., Any] = partial(jitted, model)
        self._is_preference = run.preference is not None

    def is_due(self, step: int) -> bool:
        """Whether the loss is measured after this step."""
        return self.every is not None and (step % self.every == 0 or step == self.steps)

    def measure(self, state: TrainState) -> dict[str, Any]:
        """ "validation_loss", nats per token, and where it is known what bytes the tokens stand for
        "validation_bits_per_byte"; of preferences "validation_loss" per pair and
        "validation_accuracy". Float32 scalars on the devices.
        """
        variables = state.measured_variables
        if self._is_preference:
            return self._measure(variables, state.reference_variables, self._batches)
        return self.measure_variables(variables)

    def measure_variables(self, variables: Variables) -> dict[str, Any]:
        """As `measure`, of next tokens."""
        nats = self._measure(variables, self._batches, self._num_sources)
        sources = {}
        if self._num_sources:
            nats, sources["validation_source"] = nats
        measured = sources | {"validation_loss": nats / self._num_tokens}
        if self._num_bytes:
            measured["validation_bits_per_byte"] = nats / (math.log(2) * self._num_bytes)
        return measured


def _preferences(
    config: PreferenceConfig,
    model: Transformer,
    variables: Variables,
    reference: Variables,
    batches: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """Loss and accuracy of the held-out pairs."""

    def add(carry: Any, batch: dict[str, jax.Array]) -> tuple[Any, None]:
        own, before = (log_probs(model, x, batch) for x in (variables, reference))
        loss, sums = preference_loss(own, before, config)
        empty = batch["targets"].shape[0] / 2 - (batch["targets"] >= 0).any(axis=1).sum() / 2
        loss -= empty * jnp.log(2.0)  # of padding, whose margin is 0
        return jax.tree.map(jnp.add, carry, (loss, sums["accuracy"])), None

    zeros = (jnp.float32(0), jnp.float32(0))
    (loss, accuracy), _ = jax.lax.scan(add, zeros, batches)
    count = num_pairs(batches["targets"].reshape(-1, batches["targets"].shape[-1]))
    return {"validation_loss": loss / count, "validation_accuracy": accuracy / count}


def _nats(
    model: Transformer, variables: Variables, batches: dict[str, jax.Array], num_sources: int
) -> Any:
    """-log p summed over the targets of all batches, float32; a memory starts empty. Of a mixture
    also its sources' sums: see train.losses.source_sums.
    """
    chunk_loss = with_source_sums(cross_entropy, num_sources) if num_sources else cross_entropy
    w_DV, chunks = output_weights(model, variables), model.execution.logits_chunks

    def add(carry: tuple[jax.Array, Any], batch: dict[str, jax.Array]) -> tuple[Any, Any]:
        nats, memory = carry
        hidden_BLD, memory = hidden_states(
            model, variables, batch["tokens"], batch["positions"], memory
        )
        targets = {name: x for name, x in batch.items() if name in ("targets", "source")}
        more, sums = chunked_loss(chunk_loss, hidden_BLD, w_DV, targets, None, chunks)
        return (nats + more, memory), sums.get("source")

    rows = batches["tokens"].shape[1]
    memory = init_memory(model.config, rows, model.execution.compute_dtype)
    (nats, _), sums = cast(Any, jax.lax.scan(add, (jnp.float32(0), memory), batches))
    return (nats, sums.sum(axis=0)) if num_sources else nats
