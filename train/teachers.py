"""Teachers of a student: what they say of each row of a batch.

B rows, L length, D d_model, V vocab, J teacher tokens kept, N teachers, P sources of a mixture.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from checkpoint.provenance import ModelOrigin, weights_fingerprint
from configs.architecture import ModelConfig
from configs.base import RunConfig
from configs.checks import require
from configs.distill import DistillConfig, TeacherShare
from data.mixture_rows import rows_of_sources
from data.token_file import TokenFile
from model.layers import unembed
from model.transformer import Transformer, Variables, hidden_states, output_weights
from train.distillation_loss import mixed_log_probs
from train.matching import Matching, teacher_activations

Batch = dict[str, Any]
View = Callable[[Batch], Batch]
"""Adds what the teachers say of a batch on the devices to it."""


@dataclass(frozen=True)
class Teacher:
    model: Transformer
    variables: Variables
    """In any format of weights (infer/weights.py)."""
    step: int | None
    """Steps it was trained for; None of one that is no run."""
    name: str = "teacher"
    """What it was read from."""

    @functools.cached_property
    def weights(self) -> str:
        """Their fingerprint."""
        return weights_fingerprint(self.variables)

    @property
    def origin(self) -> ModelOrigin:
        return ModelOrigin(name=self.name, weights=self.weights, step=self.step)


LoadTeacher = Callable[[Mesh], Teacher]
"""Loads the teacher onto the student's mesh."""


class TeacherSource(NamedTuple):
    """A teacher that was found and is not loaded yet."""

    config: ModelConfig
    load: LoadTeacher
    tokenizer: Tokenizer


BETWEEN_NAMES = " + "


def joint_origin(origins: Sequence[ModelOrigin]) -> ModelOrigin:
    """Several teachers as the one that a run's provenance names."""
    if len(origins) == 1:
        return origins[0]
    weights = hashlib.sha256(" ".join(origin.weights for origin in origins).encode()).hexdigest()
    return ModelOrigin(name=BETWEEN_NAMES.join(origin.name for origin in origins), weights=weights)


def teacher_shares(
    run: RunConfig, file: TokenFile, num_teachers: int
) -> Callable[[jax.Array], jax.Array] | None:
    """A function from the numbers of rows, int32 [B], to each teacher's share in them, float32
    [B, N]; None for one teacher.

    Args:
      file: the training tokens.
    Raises:
      UserError: distill.teachers are others than there are, name a source that the run's mixture
        has not, or leave a source without a teacher.
    """
    assert run.distill is not None
    shares = run.distill.teachers or (TeacherShare(),) * num_teachers
    require(
        len(shares) == num_teachers,
        f"distill.teachers has {len(shares)} entries for {num_teachers} teachers: name as many "
        "(--teacher once for each)",
    )
    if num_teachers == 1:
        require(not shares[0].sources, "distill.teachers: a single teacher teaches all rows")
        return None
    sources = [part.source for part in run.data.mixture]
    table_PN = _share_table(shares, sources)
    if len(table_PN) == 1:
        return lambda row_B: jnp.broadcast_to(table_PN, (len(row_B), num_teachers))
    first_P = np.array([part.first for part in rows_of_sources(file, run.data.seq_len)])

    def of_rows(row_B: jax.Array) -> jax.Array:
        part_B = jnp.searchsorted(jnp.asarray(first_P), row_B, side="right") - 1
        return jnp.asarray(table_PN)[jnp.maximum(part_B, 0)]

    return of_rows


def _share_table(shares: Sequence[TeacherShare], sources: Sequence[str]) -> np.ndarray:
    """Each teacher's share in the rows of each source, float32 [P, N]; of all alike, [1, N]."""
    named = {source for share in shares for source in share.sources}
    unknown = sorted(named - set(sources))
    require(
        not unknown,
        f"distill.teachers name {', '.join(unknown)}, which data.mixture has not: its sources are "
        f"{', '.join(sources) or 'none'}",
    )
    rows = []
    for source in sources if named else [""]:
        weights = [s.weight if not s.sources or source in s.sources else 0.0 for s in shares]
        require(
            sum(weights) > 0,
            f"distill.teachers leave the source {source} without a teacher: name it with one",
        )
        rows.append(np.array(weights, np.float32) / sum(weights))
    return np.stack(rows)


def with_hidden(
    teachers: Sequence[Teacher],
    shares: Callable[[jax.Array], jax.Array] | None,
    matching: Matching | None,
) -> View:
    """Adds the teachers' hidden states; their logits are made chunk by chunk inside the loss."""
    look = jax.jit(hidden_states, static_argnums=0)
    outputs = tuple(
        jax.jit(output_weights, static_argnums=0)(t.model, t.variables) for t in teachers
    )
    wanted = () if matching is None else tuple((x.kind, x.teacher) for x in matching.layers)

    def view(batch: Batch) -> Batch:
        rows, added, hidden = (batch["tokens"], batch["positions"]), {}, []
        for teacher in teachers:
            if wanted:
                hidden_BLD, layers = teacher_activations(
                    teacher.model, wanted, teacher.variables, *rows
                )
                added["teacher_layers"] = layers
            else:
                hidden_BLD, _ = look(teacher.model, teacher.variables, *rows)
            hidden.append(hidden_BLD)
        if shares is not None:
            shares_BN = shares(batch["row"])
            shape = (*batch["tokens"].shape, shares_BN.shape[1])
            added["teacher_shares"] = jnp.broadcast_to(shares_BN[:, None], shape)
        shared = {**batch.get("shared", {}), "teacher_output": outputs}
        return {**batch, **added, "teacher_hidden": tuple(hidden), "shared": shared}

    return view


def with_top_k(
    teachers: Sequence[Teacher],
    shares: Callable[[jax.Array], jax.Array] | None,
    config: DistillConfig,
    chunks: int,
    *,
    tail: bool = False,
) -> View:
    """Adds the teachers' J best tokens at each place and their softened log-probabilities.

    Args:
      chunks: of a row, whose logits are made one after the other.
      tail: whether the logarithm of what these leave is added, too, as "teacher_tail" [B, L].
    """
    models = tuple(teacher.model for teacher in teachers)
    variables = tuple(teacher.variables for teacher in teachers)

    def view(batch: Batch) -> Batch:
        shares_BN = None if shares is None else shares(batch["row"])
        rows = (batch["tokens"], batch["positions"])
        look = _best_tokens if tail or shares is not None else _best_of_one
        ids, log_probs, *rest = look(models, config, chunks, variables, shares_BN, *rows)
        seen = {"teacher_ids": ids, "teacher_log_probs": log_probs}
        return {**batch, **seen, **({"teacher_tail": rest[0]} if tail else {})}

    return view


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _best_of_one(
    models: tuple[Transformer],
    config: DistillConfig,
    chunks: int,
    variables: tuple[Variables],
    shares_BN: None,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The ids and softened log-probabilities of the J best tokens, [B, L, J] each."""
    top_k = config.top_k
    assert top_k is not None
    hidden_BLD, _ = hidden_states(models[0], variables[0], tokens_BL, positions_BL)
    w_DV = output_weights(models[0], variables[0])

    def best_tokens(hidden):
        logits_BcV = unembed(hidden[0], w_DV)
        best, ids = jax.lax.top_k(logits_BcV / config.temperature, top_k)
        log_normaliser = jax.nn.logsumexp(logits_BcV / config.temperature, axis=-1, keepdims=True)
        return ids, best - log_normaliser

    ids, log_probs = _by_chunks(best_tokens, (hidden_BLD,), chunks)
    return ids, log_probs


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _best_tokens(
    models: tuple[Transformer, ...],
    config: DistillConfig,
    chunks: int,
    variables: tuple[Variables, ...],
    shares_BN: jax.Array | None,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ids and softened log-probabilities of the J best tokens of the mixed distribution,
    [B, L, J] each, and the logarithm of what these leave, [B, L]."""
    top_k = config.top_k
    assert top_k is not None
    pairs = list(zip(models, variables, strict=True))
    hidden = tuple(hidden_states(m, v, tokens_BL, positions_BL)[0] for m, v in pairs)
    outputs = tuple(output_weights(m, v) for m, v in pairs)
    if shares_BN is not None:
        shape = (*tokens_BL.shape, shares_BN.shape[1])
        hidden = (*hidden, jnp.broadcast_to(shares_BN[:, None], shape))

    def best_tokens(parts):
        states, shares = (parts, None) if shares_BN is None else (parts[:-1], parts[-1])
        log_p_BcV = mixed_log_probs(states, outputs, shares, config.temperature)
        best, ids = jax.lax.top_k(log_p_BcV, top_k)
        batch, place = jnp.arange(ids.shape[0])[:, None, None], jnp.arange(ids.shape[1])[:, None]
        rest_BcV = log_p_BcV.at[batch, place, ids].set(-jnp.inf)
        return ids, best, jax.nn.logsumexp(rest_BcV, axis=-1)

    ids, log_probs, tail = _by_chunks(best_tokens, hidden, chunks)
    return ids, log_probs, tail


def _by_chunks(function: Callable[[Any], Any], arrays: Any, chunks: int) -> Any:
    """The function of arrays [B, L, ...], whose results are [B, c, ...], one chunk after the
    other."""

    def cut(x):
        batch, length = x.shape[:2]
        return x.reshape(batch, chunks, length // chunks, *x.shape[2:]).swapaxes(0, 1)

    def joined(x):
        x = x.swapaxes(0, 1)
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])

    return jax.tree.map(joined, jax.lax.map(function, jax.tree.map(cut, arrays)))
