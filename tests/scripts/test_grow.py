"""Growth as a verb: overrides, what it goes on with, and the rows it reads."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from checkpoint.provenance import ModelOrigin
from checkpoint.run_directory import read_run
from configs.checks import UserError
from scripts import command, grow
from tests import tiny
from train.loop import fit


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("grow")
    tiny.write_sources(tmp_path)
    run = tiny.run(tmp_path, steps=3)
    fit(run, tmp_path / "parent")
    return run, tmp_path / "parent"


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    monkeypatch.setattr(command, "use_host_devices", lambda count: None)  # they are there


def grown(parent, run_dir, *arguments: str) -> int:
    own = ["--run-dir", str(run_dir), "--operator", "copy"]
    return grow.main([str(parent), *own, "--optimizer.warmup-steps", "1", *arguments])


def test_overrides_are_taken_and_what_growth_decides_is_not(parent, tmp_path):
    run, parent_dir = parent
    arguments = ["--steps", "2", "--optimizer.learning-rate", "0.001", "--batch-size", "4"]
    assert grown(parent_dir, tmp_path / "grown", *arguments) == 0
    found = read_run(tmp_path / "grown")
    assert found.optimizer == dataclasses.replace(
        run.optimizer, learning_rate=0.001, warmup_steps=1
    )
    assert (found.batch_size, found.name) == (4, "tiny_grown")
    for name, value in (("--model.d-model", "64"), ("--init.source", "smollm2")):
        with pytest.raises(UserError, match="can't be overridden, as growth decides it"):
            grown(parent_dir, tmp_path / "other", "--steps", "2", name, value)
    with pytest.raises(UserError, match=r"--optimizer\.learning-rat"):
        grown(parent_dir, tmp_path / "other", "--steps", "2", "--optimizer.learning-rat", "1")
    assert not (tmp_path / "other").exists()


def test_a_grown_run_goes_on_with_its_parent_and_options_alone(parent, tmp_path, capsys):
    run, parent_dir = parent
    run_dir = tmp_path / "grown"
    assert grown(parent_dir, run_dir, "--steps", "2") == 0
    assert "reading on after its 24 rows" in capsys.readouterr().out
    known = json.loads((run_dir / "provenance.json").read_text())["initial"]
    assert known["rows_read"] == 3 * run.batch_size
    with pytest.raises(UserError, match=r"--drop 0\.0 .*, now .*--drop 0\.5"):
        grown(parent_dir, run_dir, "--steps", "3", "--drop", "0.5")
    with pytest.raises(UserError, match=r"--optimizer grown, now .*--optimizer fresh"):
        grown(parent_dir, run_dir, "--steps", "3", "--optimizer", "fresh")
    other = tmp_path / "other parent"
    shutil.copytree(parent_dir, other)
    fit(dataclasses.replace(run, steps=4), other)
    with pytest.raises(UserError, match=r"was .*parent at step 3 .*, now .*other parent at step 4"):
        grown(other, run_dir, "--steps", "3")
    shutil.copytree(parent_dir, tmp_path / "moved")
    assert grown(tmp_path / "moved", run_dir, "--steps", "3") == 0


def rows_of(run, run_dir, **options) -> list[int]:
    """Rows of the data that training reads, in its order."""
    seen = []

    def make_extend(_mesh):
        def extend(batch):
            seen.extend(np.asarray(batch["row"]).tolist())
            return batch

        return extend

    fit(run, run_dir, make_extend=make_extend, **options)
    return seen


def test_a_run_reads_on_after_its_parents_rows_and_so_when_it_goes_on(parent, tmp_path):
    run, _ = parent
    whole = rows_of(dataclasses.replace(run, steps=7), tmp_path / "whole")
    origin = ModelOrigin(name="parent", weights="0" * 64, step=3, rows_read=24)
    first = rows_of(dataclasses.replace(run, steps=3), tmp_path / "heir", initial=origin)
    then = rows_of(dataclasses.replace(run, steps=4), tmp_path / "heir")
    assert first + then == whole[24:]
    assert not set(first + then) & set(whole[:24])
