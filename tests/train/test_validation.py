"""Validation loss: right, the same on every mesh, and nothing that training would notice."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from configs.base import MeshConfig
from configs.checks import UserError
from configs.monitoring import ValidationConfig
from data.pipeline import prepare_corpus
from infer.run_weights import load_model
from infer.score import score_documents
from tests import tiny
from tests.train.test_loop import losses, stop_after
from train.loop import fit, mesh_of
from train.metrics import read_lines
from train.report import write_report
from train.state import init_state, make_train_setup
from train.validation import Validation

EVERY = 4


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two runs, of which one is measured."""
    tmp_path = tmp_path_factory.mktemp("validation")
    tiny.write_sources(tmp_path)
    plain = tiny.run(tmp_path, steps=8, mesh=MeshConfig(expert=4))  # as test_loop's
    run = dataclasses.replace(plain, validation=ValidationConfig(every=EVERY, max_rows=10))
    fit(plain, tmp_path / "plain")
    fit(run, tmp_path / "run")
    return run, tmp_path


def test_it_is_measured_on_time_and_logged(measured):
    run, tmp_path = measured
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [x["step"] for x in lines if "validation_loss" in x] == [EVERY, run.steps]
    last = lines[-1]
    assert np.log(300) - 3 < last["validation_loss"] < lines[EVERY - 1]["validation_loss"]
    corpus = prepare_corpus(run.data, run.model.vocab_size).held_out().sidecar
    per_byte = last["validation_loss"] / np.log(2) * corpus.num_tokens / corpus.num_bytes
    assert last["validation_bits_per_byte"] == pytest.approx(per_byte, rel=0.1)  # of all rows


def test_training_does_not_notice(measured):
    _, tmp_path = measured
    lines = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("plain", "run")]
    for plain, line in zip(*lines, strict=True):
        timed = {"seconds", "tokens_per_second", "model_tflops", "data_wait", "peak_memory"}
        own = {name for name in line if name.startswith("validation")}
        assert {k: x for k, x in line.items() if k not in timed | own} == {
            k: x for k, x in plain.items() if k not in timed
        }


def test_a_resumed_run_measures_the_same(measured):
    run, tmp_path = measured
    fit(run, tmp_path / "stopped", make_transform=stop_after(3, signal.SIGTERM))
    fit(run, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "run")
    logs = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("stopped", "run")]
    found = [[x.get("validation_loss") for x in log] for log in logs]
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_mesh_does_not_matter(measured):
    """To 1e-6 of the loss: sums over devices are made in another order."""
    run, _ = measured
    corpus, found = prepare_corpus(run.data, run.model.vocab_size), []
    for mesh_config in (MeshConfig(), MeshConfig(data=2, expert=2, tensor=2)):
        changed = dataclasses.replace(run, mesh=mesh_config)
        mesh = mesh_of(changed)
        with jax.set_mesh(mesh):
            state = init_state(make_train_setup(changed, mesh), run.seed)
            found.append(Validation(changed, corpus, mesh).measure(state))
    for name in found[0]:
        np.testing.assert_allclose(*(float(x[name]) for x in found), rtol=1e-6)


@pytest.mark.slow
def test_a_memory_reads_on_from_row_to_row(tmp_path):
    """The first stream is one document's beginning: as scoring reads it segment by segment."""
    tiny.write_sources(tmp_path, files=12)
    run = tiny.memory_run(tmp_path, validation=ValidationConfig(every=3, max_rows=8))
    fit(run, tmp_path / "run")
    model, variables = load_model(run, tmp_path / "run")
    corpus = prepare_corpus(run.data, run.model.vocab_size)
    (_, tokens, _), *_ = corpus.held_out().documents()
    read = 8 * run.data.seq_len + 1
    assert len(tokens) >= read
    (scores,) = score_documents(
        model, variables, [tokens[:read]], length=run.data.seq_len, batch_size=1
    )
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["validation_loss"] == pytest.approx(scores.nats.mean(), rel=1e-5)


def test_the_report_shows_it(measured):
    _, tmp_path = measured
    pages = {}
    for name in ("plain", "run"):
        write_report(tmp_path / name)
        pages[name] = (tmp_path / name / "report.html").read_text()
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert f"<td>{last['validation_loss']:.4f}</td>" in pages["run"]
    assert "circles are the loss on held-out text" in pages["run"]
    assert "validation" not in pages["plain"].split("<details>")[0]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["validation"]["every"] == 4


def test_settings_without_effect_are_refused():
    with pytest.raises(UserError, match=r"max_rows=8 has no effect without validation\.every"):
        ValidationConfig(every=None, max_rows=8)
    with pytest.raises(UserError, match=r"validation\.every=0 must be at least 1"):
        ValidationConfig(every=0)
    with pytest.raises(UserError, match="max_rows=0 must be greater than 0"):
        ValidationConfig(max_rows=0)
