"""A sweep from its command to its page; what failed or was stopped goes on by the same command."""

from pathlib import Path

import pytest

from checkpoint.run_directory import EXPERIMENT
from tests import tiny
from tests.scripts.test_scripts import run

FILE = """
import dataclasses
from pathlib import Path

from tests import tiny


def rates():
    base = tiny.run(Path({folder!r}), steps=4)
    made = {{}}
    for rate in {rates}:
        optimizer = dataclasses.replace(base.optimizer, learning_rate=rate)
        made[f"rate_{{rate}}"] = dataclasses.replace(base, optimizer=optimizer)
    return made
"""


@pytest.mark.slow
def test_a_sweep_trains_its_runs_once_and_says_which_failed(tmp_path: Path):
    tiny.write_sources(tmp_path)
    file, folder = tmp_path / "mine.py", tmp_path / "sweep"
    arguments = (f"{file}:rates", "--jobs", "2", "--dir", str(folder))
    file.write_text(FILE.format(folder=str(tmp_path), rates=(0.003, 0.03)))
    blocked = folder / "rate_0.03" / "checkpoints"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    out, _ = run(tmp_path, "sweep", *arguments, code=1)
    assert f"{folder}/rate_0.003: trained" in out
    assert f"failed: {folder}/rate_0.03: " in out
    blocked.unlink()

    out, _ = run(tmp_path, "sweep", *arguments)
    assert "rate_0.003: at work" not in out
    assert f"{folder}/rate_0.03: trained" in out
    assert {"report.html", "curves.png", "sweep.png"} <= {x.name for x in folder.iterdir()}
    assert (folder / "rate_0.03" / EXPERIMENT).read_text() == file.read_text()

    file.write_text(
        FILE.format(folder=str(tmp_path), rates=(0.003,)).replace("steps=4", "steps=4, seed=1")
    )
    _, err = run(tmp_path, "sweep", *arguments, code=2)
    assert "rate_0.003 holds a run with another config (seed was 0, now 1)" in err
