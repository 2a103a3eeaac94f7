"""Distillation: a student learns from frozen teachers' predictions on the same rows.

The teachers run beside the student; or, with a cache, once per row of data: their best tokens and
these tokens' log-probabilities are kept on disk and read when the row comes again. A share of the
rows may be written by the student itself (train/on_policy.py).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from checkpoint.provenance import ModelOrigin, confirm_teacher
from configs.architecture import ModelConfig
from configs.base import RunConfig
from configs.checks import UserError, require
from data.packing import packed_rows
from data.pipeline import prepare_corpus
from data.preferences import PreferencePairs
from data.tokenizers.tokenizer import vocabulary_difference
from parallel.distributed import first_then_others, is_started
from train.byte_distillation import aligned_view, make_byte_loss
from train.distillation_loss import make_chunk_loss
from train.loop import BatchTransform, FitResult, fit
from train.matching import Matching, make_matching
from train.offline_cache import OfflineCache
from train.on_policy import MakeWriter, with_written_rows
from train.state import TrainState
from train.teacher_cache import TopKCache, with_cache
from train.teachers import (
    Batch,
    LoadTeacher,
    Teacher,
    TeacherSource,
    View,
    joint_origin,
    teacher_shares,
    with_hidden,
    with_top_k,
)

__all__ = ["LoadTeacher", "Teacher", "TopKCache", "distill", "make_chunk_loss"]


def distill(
    run: RunConfig,
    run_dir: Path,
    teacher_config: ModelConfig,
    load: LoadTeacher,
    teacher_tokenizer: Tokenizer,
    *others: TeacherSource,
    make_writer: MakeWriter | None = None,
    **options: Any,
) -> FitResult:
    """Trains the student as train.loop.fit does, towards run.distill's objective.

    Args:
      others: further teachers.
      make_writer: what writes the student's own rows (on_policy).
      options: `fit`'s: variables, initial, hooks, experiment.
    Raises:
      UserError: a run that is no distillation, whose vocabulary is not the teachers', or whose
      teacher has a memory; a run that goes on with another teacher.
    """
    sources = (TeacherSource(teacher_config, load, teacher_tokenizer), *others)
    config = _checked(run, sources)
    matching = make_matching(config, run.model, teacher_config)

    def make_view(mesh: Mesh) -> View:
        teachers = [source.load(mesh) for source in sources]
        _confirm(run_dir, joint_origin([teacher.origin for teacher in teachers]))
        if config.vocabulary == "bytes":
            ours = prepare_corpus(run.data, run.model.vocab_size).tokenizer()
            return aligned_view(run, teachers[0], (ours, teacher_tokenizer), mesh)
        return teachers_view(run, teachers, matching, mesh, run_dir / "teacher_cache")

    return _fit(run, run_dir, make_view, matching, make_writer, options)


def distill_by_view(
    run: RunConfig,
    run_dir: Path,
    origin: ModelOrigin,
    make_view: Callable[[Mesh], View],
    make_writer: MakeWriter | None = None,
    **options: Any,
) -> FitResult:
    """As `distill`, by a teacher of which no more is known than what it says (a server's).

    Raises:
      UserError: a run that is no distillation; a run that goes on with another teacher.
    """
    _checked(run, ())

    def confirmed_view(mesh: Mesh) -> View:
        _confirm(run_dir, origin)
        return make_view(mesh)

    return _fit(run, run_dir, confirmed_view, None, make_writer, options)


def distill_from_cache(run: RunConfig, run_dir: Path, **options: Any) -> FitResult:
    """As `distill`, with what teachers have said ahead: the cache that run.distill names.

    Raises:
      UserError: a cache that is not there, not whole, or not of this run's data.
    """
    config = run.distill
    assert config is not None
    assert config.cache_directory is not None
    require(
        not is_started(),
        "distill.cache_directory is read by one process, and this run has several: leave it out, "
        "the teacher then runs beside the student",
    )
    corpus = prepare_corpus(run.data, run.model.vocab_size)
    cache = OfflineCache(Path(config.cache_directory), run, corpus)
    return distill_by_view(run, run_dir, cache.teacher, cache.view, **options)


def _fit(
    run: RunConfig,
    run_dir: Path,
    make_view: Callable[[Mesh], View],
    matching: Matching | None,
    make_writer: MakeWriter | None,
    options: dict[str, Any],
) -> FitResult:
    config = run.distill
    assert config is not None
    is_constant = all(term.is_constant for term in config.terms)
    is_aligned = config.vocabulary == "bytes"

    def make_transform(mesh: Mesh) -> BatchTransform:
        view = make_view(mesh)
        write = with_written_rows(run, mesh, make_writer) if config.on_policy.share else None

        def transform(batch: Batch, state: TrainState, done: int) -> Batch:
            if write is not None:
                batch = write(batch, state, done)
            batch = view(batch)
            if is_constant:
                return batch
            weights = np.array(config.weights_at(done, run.steps), np.float32)
            return {**batch, "shared": {**batch.get("shared", {}), "weights": weights}}

        return transform

    return fit(
        run,
        run_dir,
        chunk_loss=make_byte_loss(config) if is_aligned else make_chunk_loss(config),
        make_transform=make_transform,
        matching=matching,
        objective="distillation",
        **options,
    )


def teachers_view(
    run: RunConfig,
    teachers: Sequence[Teacher],
    matching: Matching | None,
    mesh: Mesh,
    cache_directory: Path,
) -> View:
    """What run.distill asks the teachers for.

    Args:
      cache_directory: of the run's own cache, where it keeps one.
    """
    config = run.distill
    assert config is not None
    file = prepare_corpus(run.data, run.model.vocab_size).training()
    shares = teacher_shares(run, file, len(teachers))
    if config.top_k is None:
        return with_hidden(teachers, shares, matching)
    view = with_top_k(teachers, shares, config, run.execution.logits_chunks)
    if not config.cache:
        return view
    require(
        len(teachers) == 1,
        "distill.cache keeps one teacher's answers: make a cache of several ahead "
        "(scripts.distill --make-cache), or leave it out",
    )
    rows = packed_rows(file, run.data.seq_len)
    assert not isinstance(rows, PreferencePairs), "the config refuses preferences here"
    return with_cache(view, TopKCache(cache_directory, rows, config, teachers[0]), mesh)


def _confirm(run_dir: Path, origin: ModelOrigin) -> None:
    first_then_others(lambda: confirm_teacher(run_dir, origin), lambda: None)


def _checked(run: RunConfig, sources: Sequence[TeacherSource]) -> Any:
    """run.distill, once it can be done with these teachers."""
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
    require(
        not config.on_policy.share or not is_started(),
        "distill.on_policy writes rows in one process, and this run has several: leave it out",
    )
    require(
        not config.matching or len(sources) == 1,
        "distill.losses that compare layers need a single teacher whose layers can be seen: name "
        "one, or leave them out",
    )
    is_aligned = config.vocabulary == "bytes"
    require(
        not is_aligned or (len(sources) == 1 and not is_started()),
        "distill.vocabulary='bytes' needs a single teacher that is loaded, and one process",
    )
    for source in sources:
        if not is_aligned:
            check_vocabulary(run, source.config, source.tokenizer)
        if source.config.memory_length is not None:
            raise UserError(
                f"the teacher has memory_length={source.config.memory_length}, and distillation "
                "shows it a row without the ones before it: choose a teacher without memory"
            )
    return config


def check_vocabulary(student: RunConfig, teacher: ModelConfig, tokenizer: Tokenizer) -> None:
    """
    Raises:
      UserError: the two would number tokens differently, so their logits could not be compared.
    """
    check_vocabulary_size(student, teacher)
    corpus = prepare_corpus(student.data, student.model.vocab_size)
    difference = vocabulary_difference(corpus.tokenizer(), tokenizer)
    if difference is not None:
        raise UserError(
            f"the tokenizers in {student.data.directory} and of the teacher differ ({difference}): "
            "distillation needs one vocabulary, give the student the teacher's corpus "
            "(--data.directory), make one with the teacher as --data.tokenizer, or set "
            "distill.vocabulary='bytes'"
        )


def check_vocabulary_size(student: RunConfig, teacher: ModelConfig) -> None:
    """
    Raises:
      UserError: the two have not as many tokens.
    """
    if student.model.vocab_size != teacher.vocab_size:
        raise UserError(
            f"the student's vocabulary has {student.model.vocab_size} entries, the teacher's "
            f"{teacher.vocab_size}: distillation compares logits token by token, give the student "
            f"the teacher's vocabulary (--model.vocab-size {teacher.vocab_size} "
            "--data.tokenizer TEACHER, with a --data.directory of its own), or set "
            "distill.vocabulary='bytes'"
        )
