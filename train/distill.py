"""Distillation: a student learns from a frozen teacher's predictions on the same rows.

The teacher runs beside the student, or, with a cache, once per row of data: its best tokens and
their log-probabilities are kept on disk and read when the row comes again.

B rows, L length, V vocab, J teacher tokens kept.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from checkpoint.provenance import ModelOrigin, confirm_teacher, weights_fingerprint
from configs.architecture import ModelConfig
from configs.base import DistillConfig, RunConfig
from configs.checks import UserError, require
from data.packed_chats import PackedChats
from data.packing import PackedRows, packed_rows
from data.pipeline import prepare_corpus
from data.tokenizers.tokenizer import fingerprint, vocabulary_difference
from formats.small_files import read_json
from model.layers import unembed
from model.transformer import Transformer, Variables, hidden_states, output_weights
from parallel.distributed import first_then_others, is_started
from train.loop import BatchTransform, FitResult, fit, to_devices
from train.losses import ChunkLoss, full_distillation, top_k_distillation


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


LoadTeacher = Callable[[Mesh], Teacher]
"""Loads the teacher onto the student's mesh."""


def distill(
    run: RunConfig,
    run_dir: Path,
    teacher_config: ModelConfig,
    load: LoadTeacher,
    teacher_tokenizer: Tokenizer,
    **options: Any,
) -> FitResult:
    """Trains the student as train.loop.fit does, towards run.distill's objective.

    Args:
      options: `fit`'s: variables, initial, hooks, experiment.
    Raises:
      UserError: a run that is no distillation, whose vocabulary is not the teacher's, or whose
      teacher has a memory; a run that goes on with another teacher.
    """
    config = run.distill
    if config is None:
        raise UserError(
            f"{run.name} has no distill settings: choose a student, or train it by scripts.train"
        )
    require(
        not config.cache or not is_started(),
        "distill.cache=True keeps the teacher's answers in one process's files, and this run has "
        "several processes: leave it out, the teacher then runs beside the student",
    )
    check_vocabulary(run, teacher_config, teacher_tokenizer)
    if teacher_config.memory_length is not None:
        raise UserError(
            f"the teacher has memory_length={teacher_config.memory_length}, and distillation "
            "shows it a row without the ones before it: choose a teacher without memory"
        )

    chunks = run.execution.logits_chunks

    def make_transform(mesh: Mesh) -> BatchTransform:
        teacher = load(mesh)
        origin = ModelOrigin(name=teacher.name, weights=teacher.weights, step=teacher.step)
        first_then_others(lambda: confirm_teacher(run_dir, origin), lambda: None)
        if config.top_k is None:
            return _with_hidden(teacher)
        if not config.cache:
            return _with_top_k(teacher, config, chunks)
        corpus = prepare_corpus(run.data, run.model.vocab_size)
        rows = packed_rows(corpus.training(), run.data.seq_len)
        cache = TopKCache(run_dir / "teacher_cache", rows, config, teacher)
        return _with_cache(_with_top_k(teacher, config, chunks), cache, mesh)

    return fit(
        run,
        run_dir,
        chunk_loss=make_chunk_loss(config),
        make_transform=make_transform,
        objective="distillation",
        **options,
    )


def check_vocabulary(student: RunConfig, teacher: ModelConfig, tokenizer: Tokenizer) -> None:
    """
    Raises:
      UserError: the two would number tokens differently, so their logits could not be compared.
    """
    if student.model.vocab_size != teacher.vocab_size:
        raise UserError(
            f"the student's vocabulary has {student.model.vocab_size} entries, the teacher's "
            f"{teacher.vocab_size}: distillation compares logits token by token, give the student "
            "the teacher's vocabulary (--model.vocab_size) and corpus"
        )
    corpus = prepare_corpus(student.data, student.model.vocab_size)
    difference = vocabulary_difference(corpus.tokenizer(), tokenizer)
    if difference is not None:
        raise UserError(
            f"the tokenizers in {student.data.directory} and of the teacher differ ({difference}): "
            "distillation needs one vocabulary, give the student the teacher's corpus "
            "(--data.directory), or make one with the teacher as --data.tokenizer"
        )


def make_chunk_loss(config: DistillConfig) -> ChunkLoss:
    """The objective on a chunk of logits."""
    loss = full_distillation if config.top_k is None else top_k_distillation
    return functools.partial(loss, temperature=config.temperature, kl_weight=config.kl_weight)


def _with_hidden(teacher: Teacher) -> BatchTransform:
    """Adds the teacher's hidden states; its logits are made chunk by chunk inside the loss."""

    model, variables = teacher.model, teacher.variables
    look = jax.jit(hidden_states, static_argnums=0)
    w_DV = jax.jit(output_weights, static_argnums=0)(model, variables)

    def transform(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        hidden_BLD, _ = look(model, variables, batch["tokens"], batch["positions"])
        return {**batch, "teacher_hidden": hidden_BLD, "shared": w_DV}

    return transform


def _with_top_k(teacher: Teacher, config: DistillConfig, chunks: int) -> BatchTransform:
    """Adds the teacher's J best tokens at each place and their softened log-probabilities.

    Args:
      chunks: of a row, whose logits are made one after the other.
    """
    look = functools.partial(_best_tokens, teacher.model, config, chunks, teacher.variables)

    def transform(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        ids, log_probs = look(batch["tokens"], batch["positions"])
        return {**batch, "teacher_ids": ids, "teacher_log_probs": log_probs}

    return transform


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _best_tokens(
    model: Transformer,
    config: DistillConfig,
    chunks: int,
    variables: Variables,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The ids and softened log-probabilities of the J best tokens, [B, L, J] each."""
    top_k = config.top_k
    assert top_k is not None
    hidden_BLD, _ = hidden_states(model, variables, tokens_BL, positions_BL)
    w_DV = output_weights(model, variables)
    batch, length, width = hidden_BLD.shape
    pieces = hidden_BLD.reshape(batch, chunks, length // chunks, width).swapaxes(0, 1)

    def best_tokens(hidden_BcD):
        logits_BcV = unembed(hidden_BcD, w_DV)
        best, ids = jax.lax.top_k(logits_BcV / config.temperature, top_k)
        log_normaliser = jax.nn.logsumexp(logits_BcV / config.temperature, axis=-1, keepdims=True)
        return ids, best - log_normaliser

    ids, log_probs = (
        x.swapaxes(0, 1).reshape(batch, length, -1) for x in jax.lax.map(best_tokens, pieces)
    )
    return ids, log_probs


def _with_cache(look: BatchTransform, cache: "TopKCache", mesh: Mesh) -> BatchTransform:
    """Reads the teacher's view of known rows; asks the teacher for the others and keeps the answer.

    What is used always went through the cache's number format, so a resumed run sees the same
    values.
    """

    def transform(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        rows = np.asarray(batch["row"])
        if not cache.has(rows):
            seen = look(batch)
            cache.write(
                rows, np.asarray(seen["teacher_ids"]), np.asarray(seen["teacher_log_probs"])
            )
        ids, log_probs = cache.read(rows)
        return {**batch, **to_devices({"teacher_ids": ids, "teacher_log_probs": log_probs}, mesh)}

    return transform


class TopKCache:
    """Memory-mapped [rows, L, J] token ids (uint16 or uint32) and log-probabilities (float16).

    The files have their full size at once but, being sparse, take disk space only for rows written.
    """

    def __init__(
        self,
        directory: Path,
        rows: PackedRows | PackedChats,
        config: DistillConfig,
        teacher: Teacher,
    ) -> None:
        """Opens or makes the cache of the teacher's view of these rows.

        Raises:
          UserError: the folder holds the view of another teacher, or with other settings.
        """
        assert config.top_k is not None
        shape = (len(rows), rows.seq_len, config.top_k)
        settings = {
            "teacher": teacher.weights,
            "training_tokens": fingerprint(rows.file.path),
            "rows": len(rows),
            "seq_len": rows.seq_len,
            "top_k": config.top_k,
            "temperature": config.temperature,
        }
        directory.mkdir(parents=True, exist_ok=True)
        described = directory / "cache.json"
        mend = "delete that folder, it will be made again"
        if described.exists() and read_json(described, mend) != settings:
            raise UserError(
                f"{directory} holds what another teacher said, or with other settings: {mend}"
            )
        id_dtype = np.uint16 if teacher.model.config.vocab_size <= 2**16 else np.uint32
        self._ids = _open(directory / "ids.bin", id_dtype, shape)
        self._log_probs = _open(directory / "log_probs.bin", np.float16, shape)
        self._is_known = _open(directory / "known.bin", np.uint8, (len(rows),))
        described.write_text(json.dumps(settings))

    def has(self, rows_B: np.ndarray) -> bool:
        return bool(self._is_known[rows_B].all())

    def read(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 and log-probabilities float32, [B, L, J]."""
        return self._ids[rows_B].astype(np.int32), self._log_probs[rows_B].astype(np.float32)

    def write(self, rows_B: np.ndarray, ids_BLJ: np.ndarray, log_probs_BLJ: np.ndarray) -> None:
        """Keeps the rows; they count as known only once both files have them."""
        self._ids[rows_B] = ids_BLJ
        self._log_probs[rows_B] = np.maximum(log_probs_BLJ, np.finfo(np.float16).min)
        self._is_known[rows_B] = 1


def _open(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    mode = "r+" if path.exists() else "w+"
    return np.memmap(path, dtype, mode=mode, shape=shape)
