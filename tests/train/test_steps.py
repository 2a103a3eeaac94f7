"""How many steps a run has behind it, and what is said when fewer are asked for."""

import dataclasses
import re

import pytest

from configs.checks import UserError
from scripts.train import finish
from tests import tiny
from train.loop import fit


@pytest.mark.slow
def test_a_run_is_never_said_to_have_trained_what_it_did_not(tmp_path, capsys):
    tiny.write_sources(tmp_path)
    run, folder = tiny.run(tmp_path, steps=4), tmp_path / "run"
    first = fit(run, folder)
    assert (first.steps, first.new_steps) == (4, 4)
    assert "12 files, " in capsys.readouterr().out  # the corpus is told of
    again = fit(run, folder)
    assert (again.steps, again.new_steps) == (4, 0)
    assert finish(run, folder, again) == 0
    out = capsys.readouterr().out
    assert "all 4 steps were done before" in out
    assert "trained" not in out
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    assert before
    sentence = "has 4 steps behind it, steps=3 asks for fewer"
    with pytest.raises(UserError, match=re.escape(sentence)):
        fit(dataclasses.replace(run, steps=3), folder)
    assert {path: path.read_bytes() for path in folder.glob("*.json*")} == before
    more = fit(dataclasses.replace(run, steps=5), folder)
    assert (more.steps, more.new_steps) == (5, 1)
