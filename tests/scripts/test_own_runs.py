"""A run of a user's own file, from its first step to the command that goes on with its folder."""

import json
from pathlib import Path

import pytest

from checkpoint import run_directory
from checkpoint.run_directory import EXPERIMENT, read_run
from tests import tiny
from tests.scripts.test_scripts import run, settings

FILE = """
import dataclasses

from configs.runs import v31_nano


def mine():
    return dataclasses.replace(v31_nano(), name="mine", seed=5)
"""


@pytest.mark.slow
def test_a_run_of_ones_own_goes_on_by_its_folder(tmp_path: Path):
    tiny.write_sources(tmp_path)
    file, run_dir = tmp_path / "my_experiments.py", tmp_path / "a run"
    file.write_text(FILE)
    run(tmp_path, "train", f"{file}:mine", *settings(tmp_path), "--run-dir", str(run_dir))
    assert (run_dir / EXPERIMENT).read_text() == FILE
    first = read_run(run_dir)
    assert (first.name, first.seed, first.steps) == ("mine", 5, 12)

    run(tmp_path, "train", str(run_dir), "--steps", "14")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert read_run(run_dir).steps == 14
    assert (run_dir / EXPERIMENT).read_text() == FILE

    _, err = run(tmp_path, "train", str(run_dir), "--run-dir", str(tmp_path / "other"), code=2)
    assert "is a run to go on with, --run-dir" in err
    _, err = run(tmp_path, "train", str(run_dir), "--seed", "4", code=2)
    assert "holds a run with another config (seed was 5, now 4)" in err
    _, err = run(tmp_path, "distill", str(run_dir), code=2)
    assert "--teacher is missing" in err
    file.write_text("raise RuntimeError('mine')\n")
    _, err = run(tmp_path, "train", f"{file}:mine", code=2)
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.splitlines()[-1] == f"error: {file} line 1 raised RuntimeError: mine: mend the file"


def test_a_changed_file_replaces_the_one_before_only_where_no_step_was_done(tmp_path, monkeypatch):
    for step, text in ((None, "a"), (None, "b"), (3, "b"), (3, "c"), (7, "d")):
        monkeypatch.setattr(run_directory, "latest_step", lambda _, step=step: step)
        run_directory._keep_experiment(tmp_path, text)
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {
        "experiment.py": "d",
        "experiment_until_step_3.py": "b",
        "experiment_until_step_7.py": "c",
    }
