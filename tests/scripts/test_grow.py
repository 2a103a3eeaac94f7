"""Growth as a verb: overrides, what it goes on with, and the rows it reads."""

import dataclasses
import json
import shutil
import signal

import numpy as np
import pytest

from checkpoint.provenance import ModelOrigin
from checkpoint.run_directory import read_run
from configs.checks import UserError
from data.pipeline import batches, prepare_corpus
from scripts import command, grow
from tests import tiny
from tests.train.test_loop import stop_after
from tests.train.test_provenance import make_old
from train.loop import fit

OVERRIDES = ("--steps", "2", "--optimizer.learning-rate", "0.001", "--optimizer.warmup-steps", "1")


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A run of four steps, stopped after three."""
    tmp_path = tmp_path_factory.mktemp("grow")
    tiny.write_sources(tmp_path)
    layer = tiny.model().pattern[0]
    run = tiny.run(tmp_path, steps=4, model=tiny.model(pattern=(layer,), num_layers=1))
    fit(run, tmp_path / "parent", make_transform=stop_after(3, signal.SIGTERM))
    return run, tmp_path / "parent"


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    monkeypatch.setattr(command, "use_host_devices", lambda count: None)  # they are there


def grown(parent, run_dir, *arguments: str) -> int:
    return grow.main([str(parent), "--run-dir", str(run_dir), *OVERRIDES, *arguments])


@pytest.mark.slow
def test_a_grown_run_takes_overrides_and_goes_on_with_its_own_origin_alone(
    parent, tmp_path, capsys
):
    run, parent_dir = parent
    run_dir, other = tmp_path / "grown", tmp_path / "other parent"
    assert grown(parent_dir, run_dir) == 0
    found = read_run(run_dir)
    assert found.name == "tiny_grown"
    changes = {"learning_rate": 0.001, "warmup_steps": 1}
    assert found.optimizer == dataclasses.replace(run.optimizer, **changes)
    assert "reading on after its 24 rows" in capsys.readouterr().out
    known = json.loads((run_dir / "provenance.json").read_text())["initial"]
    assert known["rows_read"] == 3 * run.batch_size
    with pytest.raises(UserError, match=r"--drop 0\.0 .*, now .*--drop 0\.5"):
        grown(parent_dir, run_dir, "--drop", "0.5")
    with pytest.raises(UserError, match=r"--optimizer grown, now .*--optimizer fresh"):
        grown(parent_dir, run_dir, "--optimizer", "fresh")
    shutil.copytree(parent_dir, tmp_path / "moved")
    assert grown(tmp_path / "moved", run_dir) == 0
    shutil.copytree(parent_dir, other)
    fit(run, other)
    with pytest.raises(UserError, match=r"was .*parent at step 3 .*, now .*other parent at step 4"):
        grown(other, run_dir)


def test_what_growth_decides_is_no_override(parent, tmp_path):
    for name, value in (("--model.d-model", "64"), ("--init.source", "smollm2")):
        with pytest.raises(UserError, match="can't be overridden"):
            grown(parent[1], tmp_path / "other", name, value)
    with pytest.raises(UserError, match=r"--optimizer\.learning-rat"):
        grown(parent[1], tmp_path / "other", "--optimizer.learning-rat", "1")
    with pytest.raises(UserError, match=r"--operater: did you mean --operator\?"):
        grown(parent[1], tmp_path / "other", "--operater", "copy")
    assert not (tmp_path / "other").exists()


def spy(seen: list[int], stop: int):
    """Notes the rows of each step; signals in one of them."""

    def make_transform(mesh):
        interrupt = stop_after(stop, signal.SIGTERM)(mesh)

        def extend(batch, *_):
            seen.extend(np.asarray(batch["row"]).tolist())
            return interrupt(batch)

        return extend

    return make_transform


def test_a_run_reads_on_after_its_parents_rows_and_so_when_it_goes_on(parent, tmp_path):
    run, _ = parent
    file = prepare_corpus(run.data, 300).training()
    stream = batches(file, seq_len=32, batch_size=8, seed=run.seed)
    whole = np.concatenate([next(stream)["row"] for _ in range(7)]).tolist()
    origin = ModelOrigin(name="parent", weights="0" * 64, step=3, rows_read=24)
    seen: list[int] = []
    fit(run, tmp_path / "heir", make_transform=spy(seen, stop=3), initial=origin)
    assert len(seen) == 24
    fit(run, tmp_path / "heir", make_transform=spy(seen, stop=0))
    assert seen == whole[24:]
    assert not set(seen) & set(whole[:24])


def test_a_grown_run_of_earlier_versions_goes_on_where_it_was(parent, tmp_path):
    """They read their parent's rows again, and must not jump now."""
    run, _ = parent
    shutil.copytree(parent[1], tmp_path / "old")
    make_old(tmp_path / "old")
    origin = ModelOrigin(name="parent", weights="0" * 64, step=3, rows_read=24)
    seen: list[int] = []
    fit(run, tmp_path / "old", make_transform=spy(seen, stop=0), initial=origin)
    stream = batches(prepare_corpus(run.data, 300).training(), seq_len=32, batch_size=8, seed=0)
    assert seen == [next(stream)["row"].tolist() for _ in range(4)][3]
