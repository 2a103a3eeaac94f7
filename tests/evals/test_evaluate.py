"""Evaluation of a run whose text is no Python: what applies is shown and written, one by one."""

import json

import pytest

from configs.checks import UserError
from evals import run as evals_run
from evals.run import evaluate
from evals.tasks.base import Result, Skipped
from scripts import evaluate as verb
from tests import tiny
from train.loop import fit

TASKS = "line_completion,stdlib_bpb"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("evaluate")
    for path in tiny.write_sources(tmp_path).iterdir():
        path.write_text(path.read_text().replace("def ", "a story of "))
    fit(tiny.run(tmp_path, steps=3), tmp_path / "run")
    return tmp_path / "run"


def no_progress(_name):
    return lambda done, total: None


def test_a_task_that_does_not_apply_is_skipped_with_its_reason(run_dir, capsys):
    verb.main([str(run_dir), "--tasks", TASKS])
    out = capsys.readouterr().out
    assert "line_completion skipped: it needs held-out Python functions" in out
    assert "stdlib_bpb" in out
    assert "gzip_bpb" in out
    (written,) = json.loads((run_dir / "evals.json").read_text())
    assert written["task"] == "stdlib_bpb"
    assert 0 < written["value"] < 16


def test_nothing_that_applies_is_an_error(run_dir):
    with pytest.raises(UserError, match="none of the tasks line_completion applies to"):
        list(evaluate(run_dir, ["line_completion"], no_progress))


def test_a_result_is_written_when_it_is_there(run_dir, monkeypatch):
    """The task after it may fail, or be interrupted."""

    def interrupted(_subject):
        (written,) = json.loads((run_dir / "evals.json").read_text())
        assert written["task"] == "stdlib_bpb"
        raise KeyboardInterrupt

    (run_dir / "evals.json").unlink(missing_ok=True)
    monkeypatch.setitem(evals_run.TASKS, "line_completion", interrupted)
    found = evaluate(run_dir, ["stdlib_bpb", "line_completion"], no_progress)
    assert isinstance(next(found), Result)
    with pytest.raises(KeyboardInterrupt):
        next(found)
    assert len(json.loads((run_dir / "evals.json").read_text())) == 1


def test_reasons_name_the_tokenizer_where_it_is_that(run_dir, monkeypatch):
    monkeypatch.setattr(evals_run.line_completion, "begins_line", lambda tokenizer: [])
    skipped, _ = evaluate(run_dir, TASKS.split(","), no_progress)
    assert isinstance(skipped, Skipped)
    assert "needs a byte-level tokenizer" in skipped.reason
