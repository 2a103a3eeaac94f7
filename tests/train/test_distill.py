"""Distillation end to end: live, top-k and cached teachers; vocabularies that don't match."""

import dataclasses
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from checkpoint.orbax_store import latest_step
from checkpoint.provenance import read_provenance
from configs.base import DistillConfig
from configs.checks import UserError
from data.pipeline import prepare_corpus
from infer.run_weights import load_model
from scripts.distill import teacher_of
from tests import tiny
from tests.checkpoint.tiny_folder import byte_level, write_llama, write_tokenizer
from tests.train.test_loop import losses
from train.distill import Teacher, check_vocabulary, distill
from train.loop import fit
from train.metrics import read_lines


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("distill")
    tiny.write_sources(tmp_path)
    run = tiny.run(tmp_path, steps=20, name="teacher")
    fit(run, tmp_path / "teacher")
    return run, tmp_path


def tokenizer_of(run):
    return prepare_corpus(run.data, run.model.vocab_size).tokenizer()


def loader(run, run_dir: Path):
    def load(mesh):
        model, params = load_model(run, run_dir, mesh)
        step = latest_step(run_dir / "checkpoints") or 0
        return Teacher(model, params, step, str(run_dir))

    return load


def student(teacher, **distillation):
    _, tmp_path = teacher
    small = tiny.model(pattern=tiny.model().pattern[:1], num_layers=1)
    return tiny.run(
        tmp_path, name="student", model=small, distill=DistillConfig(**distillation), seed=3
    )


def train(teacher, name: str, **distillation) -> list[float]:
    run, tmp_path = teacher
    result = distill(
        student(teacher, **distillation),
        tmp_path / name,
        run.model,
        loader(run, tmp_path / "teacher"),
        tokenizer_of(run),
    )
    assert result.interrupted is None
    return losses(tmp_path / name)


def test_a_student_moves_towards_its_teacher(teacher):
    train(teacher, "full", kl_weight=1.0, temperature=2.0)
    lines = read_lines(teacher[1] / "full" / "metrics.jsonl")
    assert lines[-1]["kl"] < 0.9 * lines[0]["kl"]
    assert lines[0]["loss"] == pytest.approx(lines[0]["kl"], rel=1e-5)


@pytest.mark.slow
def test_nearly_all_bins_are_nearly_the_whole_vocabulary(teacher):
    full = train(teacher, "whole", kl_weight=1.0)
    bins = train(teacher, "bins", kl_weight=1.0, top_k=299)
    np.testing.assert_allclose(bins, full, rtol=1e-3)


@pytest.mark.slow
def test_the_cache_changes_rounding_only_and_is_filled_once(teacher):
    live = train(teacher, "live", top_k=16)
    cached = train(teacher, "cached", top_k=16, cache=True)
    np.testing.assert_allclose(cached, live, rtol=2e-3)  # float16 log-probabilities
    known = np.fromfile(teacher[1] / "cached" / "teacher_cache" / "known.bin", np.uint8)
    assert known.sum() == min(6 * 8, len(known))  # 6 steps of 8 rows


@pytest.mark.slow
def test_a_cached_run_resumes_bit_for_bit(teacher):
    run, tmp_path = teacher
    whole = train(teacher, "cached whole", top_k=8, cache=True)
    shutil.copytree(tmp_path / "teacher", tmp_path / "same teacher")

    def stopping_loader(mesh):
        loaded = loader(run, tmp_path / "same teacher")(mesh)
        signal.raise_signal(signal.SIGINT)
        return loaded

    config = student(teacher, top_k=8, cache=True)
    halves, tokenizer = tmp_path / "cached halves", tokenizer_of(run)
    first = distill(config, halves, run.model, stopping_loader, tokenizer)
    assert first.interrupted == signal.SIGINT
    distill(config, halves, run.model, loader(run, tmp_path / "same teacher"), tokenizer)
    assert losses(tmp_path / "cached halves") == whole


@pytest.fixture(scope="module")
def retrained(teacher):
    """The loader of a teacher of the same model, seed and steps, trained at another rate."""
    run, tmp_path = teacher
    optimizer = dataclasses.replace(run.optimizer, learning_rate=1e-3)
    run = dataclasses.replace(run, optimizer=optimizer)
    fit(run, tmp_path / "retrained")
    return loader(run, tmp_path / "retrained")


@pytest.mark.slow
def test_the_cache_of_a_teacher_that_was_trained_again_is_refused(teacher, retrained):
    run, tmp_path = teacher
    folder, config = tmp_path / "first teacher", student(teacher, top_k=8, cache=True)
    distill(config, folder, run.model, loader(run, tmp_path / "teacher"), tokenizer_of(run))
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="what another teacher said"):
        distill(config, folder, run.model, retrained, tokenizer_of(run))


@pytest.mark.slow
def test_a_student_goes_on_with_its_teacher_alone(teacher, retrained):
    """The same weights under another name are the same teacher."""
    run, tmp_path = teacher
    config, folder, tokenizer = student(teacher), tmp_path / "half", tokenizer_of(run)
    half = dataclasses.replace(config, steps=3)
    distill(half, folder, run.model, loader(run, tmp_path / "teacher"), tokenizer)
    with pytest.raises(
        UserError, match=r"another teacher \(.*teacher at step 20 .*, now .*retrain"
    ):
        distill(config, folder, run.model, retrained, tokenizer)
    with pytest.raises(
        UserError, match=r"objective was distillation \(scripts.distill\), now next_"
    ):
        fit(config, folder)
    shutil.copytree(tmp_path / "teacher", tmp_path / "moved teacher")
    moved = loader(run, tmp_path / "moved teacher")
    assert distill(config, folder, run.model, moved, tokenizer).steps == config.steps
    fit(half, tmp_path / "plain")
    with pytest.raises(UserError, match=r"objective was next_token .*, now distillation"):
        distill(config, tmp_path / "plain", run.model, moved, tokenizer)


def test_vocabularies_must_match(teacher, tmp_path):
    run, _ = teacher
    config = student(teacher)
    larger = dataclasses.replace(run.model, vocab_size=400)
    tokenizer = tokenizer_of(run)
    with pytest.raises(UserError, match=r"has 300 entries, the teacher's 400"):
        check_vocabulary(config, larger, tokenizer)
    check_vocabulary(config, run.model, tokenizer)
    tiny.write_sources(tmp_path, files=9, word="other")
    elsewhere = dataclasses.replace(run, data=tiny.run(tmp_path).data)
    other = tokenizer_of(elsewhere)
    with pytest.raises(UserError, match=r"the tokenizers in .* differ \(\d+ of 300 ids"):
        check_vocabulary(config, elsewhere.model, other)


def test_a_run_without_a_teacher_is_refused(teacher):
    run, tmp_path = teacher
    load, tokenizer = loader(run, tmp_path / "teacher"), tokenizer_of(run)
    with pytest.raises(UserError, match="has no distill settings"):
        distill(run, tmp_path / "none", run.model, load, tokenizer)


@pytest.mark.parametrize("distillation", [{}, {"top_k": 16}], ids=["full", "top_k"])
@pytest.mark.slow
def test_a_public_checkpoint_teaches_in_any_format(distillation, tmp_path):
    """On its own tokens. What int8 changes of it is little, and the cache and log can tell."""
    write_llama(tmp_path / "model", hidden_size=256)
    write_tokenizer(tmp_path / "model", byte_level())
    tiny.write_sources(tmp_path)
    run = student((None, tmp_path), kl_weight=1.0, **distillation)
    data = dataclasses.replace(
        run.data, tokenizer=str(tmp_path / "model"), directory=str(tmp_path / "own")
    )
    run, first, origins = dataclasses.replace(run, data=data), {}, set()
    for weights in ("float32", "int8"):
        folder = tmp_path / weights
        distill(run, folder, *teacher_of(tmp_path / "model", weights))
        lines = read_lines(folder / "metrics.jsonl")
        assert lines[-1]["kl"] < lines[0]["kl"]
        first[weights] = lines[0]["kl"]
        known = read_provenance(folder)
        assert known is not None
        assert known.teacher is not None
        assert known.teacher.step is None
        origins.add(known.teacher.weights)
    assert first["int8"] == pytest.approx(first["float32"], rel=0.02)
    assert first["int8"] != first["float32"]
    assert len(origins) == 2
