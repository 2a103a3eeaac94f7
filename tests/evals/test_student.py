"""The quickstart's student at a tiny size: measured as it trains, exported as README says."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from configs.base import RunConfig
from configs.checks import UserError
from configs.cli import load_run
from configs.monitoring import ValidationConfig
from data.pipeline import prepare_corpus
from infer.logits import full_logits
from infer.sources import open_source
from scripts import convert, evaluate
from tests import tiny
from train.loop import fit
from train.metrics import read_lines
from train.report import draw_validation

EVERY = 4


def small_student(tmp_path: Path) -> RunConfig:
    """The run of configs/runs.py, its shape kept and its sizes made small; without a teacher."""
    small = ["--model.vocab-size", "300", "--model.d-model", "32", "--model.num-layers", "2"]
    small += ["--steps", "6", "--batch-size", "8", "--optimizer.warmup-steps", "2"]
    small += ["--data.seq-len", "32", "--execution.logits-chunks", "2"]
    run = load_run("v31_nano_student", small)
    data = dataclasses.replace(
        run.data,
        source=str(tmp_path / "sources"),
        directory=str(tmp_path / "corpus"),
        holdout_fraction=0.3,
    )
    validation = ValidationConfig(every=EVERY, max_rows=1000)
    return dataclasses.replace(run, data=data, validation=validation, distill=None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[RunConfig, Path]:
    tmp_path = tmp_path_factory.mktemp("student")
    tiny.write_sources(tmp_path)
    run, folder = small_student(tmp_path), tmp_path / "runs" / "student"
    fit(run, folder)
    return run, folder


@pytest.mark.slow
def test_the_loss_is_that_of_the_logits(trained):
    """Of the last line, against logits of each row on one device, to 1e-4 nats."""
    run, folder = trained
    lines = [x for x in read_lines(folder / "metrics.jsonl") if "validation_loss" in x]
    assert [line["step"] for line in lines] == [EVERY, run.steps]
    model, variables = open_source(str(folder)).load()
    held_out, length, nats = prepare_corpus(run.data, 300).held_out(), run.data.seq_len, []
    for start in range(0, len(held_out.tokens) - length, length):
        tokens = np.asarray(held_out.tokens[start : start + length + 1], np.int32)
        ends = np.flatnonzero(tokens[:-1] == 0)  # a document sees nothing of the one before
        for part in np.split(np.arange(length), ends[ends > 0]):
            logits = full_logits(model, variables, tokens[part].tolist()).astype(np.float64)
            shifted = logits - logits.max(1, keepdims=True)
            log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
            nats += (-log_p[np.arange(len(part)), tokens[part + 1]]).tolist()
    assert len(nats) > 1000
    assert lines[-1]["validation_loss"] == pytest.approx(np.mean(nats), abs=1e-4)


@pytest.mark.slow
def test_both_curves_are_drawn(trained):
    """Names and last values are in the picture: without them it is another."""
    lines = [{"step": step, "validation_loss": 8 - step / 50} for step in range(25, 251, 25)]
    both = draw_validation({"teacher": lines, "student": lines[:7]})
    assert "held-out" in both.caption
    assert both.png != draw_validation({"teacher": lines, "pupil": lines[:7]}).png
    assert draw_validation({"teacher": lines, "student": [{"step": 1}]}) is None


@pytest.mark.parametrize(("form", "name"), [("huggingface", "exported"), ("gguf", "student.gguf")])
def test_the_student_goes_to_other_programs(trained, tmp_path, form, name):
    """In Llama's form, with logits and tokens as before; F16 rounds to 1e-3 of the largest."""
    _, folder = trained
    convert.main([str(folder), str(tmp_path / name), "--to", form])
    ours, theirs = open_source(str(folder)), open_source(str(tmp_path / name))
    ids = ours.tokenizer().encode("def function_1(argument, other=2):")
    assert theirs.tokenizer().encode("def function_1(argument, other=2):") == ids
    a, b = (full_logits(*source.load(), ids) for source in (ours, theirs))
    np.testing.assert_allclose(b, a, atol=1e-3 * np.abs(a).max())
    if form == "huggingface":
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]


def test_a_folder_of_runs_names_them(trained):
    _, folder = trained
    for read in (
        lambda: open_source(str(folder.parent)),
        lambda: evaluate.main([str(folder.parent)]),
    ):
        with pytest.raises(UserError, match=f"it holds the runs {folder}: name one of them"):
            read()
