"""Runs beside each other: their names, numbers, settings and pictures."""

import dataclasses
import json
from pathlib import Path

import pytest

from configs import runs
from configs.checks import UserError
from configs.serialization import to_json
from scripts import compare, sweep
from train import sweep as sweep_pictures
from train.compare import (
    as_text,
    config_differences,
    distinct_names,
    draw_curves,
    last_numbers,
    read_runs,
)
from train.sweep import draw_sweep

PNG = b"\x89PNG"


def write_run(folder: Path, rate: float = 0.01, *, load=True, validated=True, **changes) -> Path:
    """A folder as training leaves it, with 40 steps whose loss is known."""
    folder.mkdir(parents=True)
    base = runs.v31_nano()
    optimizer = dataclasses.replace(base.optimizer, learning_rate=rate)
    settings = {"name": folder.name, "optimizer": optimizer, "steps": 40} | changes
    run = dataclasses.replace(base, **settings)
    (folder / "config.json").write_text(to_json(run))
    lines = []
    for step in range(1, 41):
        loss = 2.0 + rate + 3.0 / step
        line = {"step": step, "loss": loss, "cross_entropy": loss}
        line["tokens_per_second"] = 1000.0 * (1 + step % 2)
        if load:
            line["load_cv"] = [0.5, 0.7]
        if validated and step % 20 == 0:
            line |= {"validation_loss": loss + 0.5, "validation_bits_per_byte": 1.25}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_runs_are_told_apart_by_as_much_of_their_path_as_it_takes(tmp_path):
    names = distinct_names([Path("a/x"), Path("b/x"), Path("b/y")])
    assert names == ["a/x", "b/x", "b/y"]
    assert distinct_names([Path("a/x"), Path("b/y")]) == ["x", "y"]
    with pytest.raises(UserError, match="name a run twice"):
        distinct_names([Path("a/x"), Path("a/../a/x")])


def test_the_settings_that_differ_and_the_last_numbers(tmp_path):
    folders = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", 0.02, seed=3, validated=False),
        write_run(tmp_path / "c", distill=runs.v31_nano_student().distill),
    ]
    compared = read_runs(folders)
    changed = config_differences(compared)
    assert changed["optimizer.learning-rate"] == ["0.01", "0.02", "0.01"]
    assert changed["seed"] == ["0", "3", "0"]
    assert changed["distill"] == ["None", "None", "-"]
    assert changed["distill.temperature"] == ["-", "-", "1.0"]
    assert not {name for name in changed if not name.startswith(("seed", "optim", "distill"))}
    numbers = last_numbers(compared)
    loss = 2.0 + 0.01 + (3.0 / 39 + 3.0 / 40) / 2  # the last twentieth of 40 steps
    assert numbers["loss, mean of the last twentieth"][0] == f"{loss:.4f}"
    assert numbers["validation loss"] == [f"{2.51 + 3 / 40:.4f}", "-", f"{2.51 + 3 / 40:.4f}"]
    assert numbers["tokens per second, median"] == ["1,500"] * 3
    lines = as_text(["a", "b", "c"], numbers).splitlines()
    assert len(set(map(len, lines))) == 1
    assert lines[1].split() == ["steps", "40", "40", "40"]


def test_the_page_is_whole(tmp_path, capsys):
    write_run(tmp_path / "a$1<b>")
    write_run(tmp_path / "dense", load=False, validated=False)
    to = tmp_path / "page"
    compare.main([str(tmp_path / "a$1<b>"), str(tmp_path / "dense"), "--to", str(to)])
    out = capsys.readouterr().out
    assert "their settings are the same" in out
    assert (to / "curves.png").read_bytes().startswith(PNG)
    page = (to / "report.html").read_text()
    assert "a$1&lt;b&gt;" in page
    assert "<b>" not in page
    assert "data:image/png;base64," in page
    with pytest.raises(UserError, match="one run has nothing to be compared with"):
        compare.main([str(tmp_path / "dense")])


def test_a_run_that_has_not_trained_and_too_many_are_refused(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"has no step in its metrics.jsonl: train it first"):
        read_runs([folder])
    with pytest.raises(UserError, match="25 runs are too many for one picture, at most 24"):
        read_runs([tmp_path / str(i) for i in range(25)])


def test_curves_of_many_runs_are_drawn(tmp_path):
    compared = read_runs([write_run(tmp_path / f"r{i}", 0.01 * (i + 1)) for i in range(9)])
    picture = draw_curves(compared)
    assert picture.png.startswith(PNG)
    (drawn,) = draw_sweep(compared)
    assert "the least is r0's" in drawn.caption
    assert "optimizer.learning-rate" in drawn.caption
    write_run(tmp_path / "other", 0.5, seed=4)
    (drawn,) = draw_sweep(read_runs([tmp_path / "r1", tmp_path / "other"]))
    assert drawn.caption == "The last loss of each run."
    assert draw_sweep(compared[:1]) == []


def test_a_sweep_over_a_number_and_something_else_has_a_line_for_each(tmp_path, monkeypatch):
    folders = [
        write_run(tmp_path / f"s{seed}_{i}", 0.01 * (i + 1), seed=seed)
        for i in range(3)
        for seed in (7, 8)
    ]
    labels: list[list[str]] = []
    monkeypatch.setattr(sweep_pictures, "label_ends", lambda axes, ends: labels.append(list(ends)))
    (drawn,) = draw_sweep(read_runs(folders))
    assert "over optimizer.learning-rate" in drawn.caption
    assert labels == [["seed 7", "seed 8"]]


def test_a_run_with_steps_to_go_is_left_out_of_the_picture_and_named(tmp_path):
    folders = [write_run(tmp_path / f"r{i}", 0.01 * (i + 1)) for i in range(3)]
    folders.append(write_run(tmp_path / "stopped", 0.001, steps=50))
    (drawn,) = draw_sweep(read_runs(folders))
    assert "the least is r0's. Not drawn, as they have steps to go: stopped." in drawn.caption
    assert draw_sweep(read_runs(folders[2:])) == []


def test_what_a_sweep_may_return():
    a, b = runs.v31_nano(), runs.v3_nano()
    assert sweep.runs_of({"x": a, 3: b}) == {"x": a, "3": b}
    assert sweep.runs_of([a, b]) == {"v31_nano": a, "v3_nano": b}
    for made, sentence in (
        ([a, a], "several runs are named v31_nano"),
        ([], r"returned \[\], expected a dict or a list of RunConfigs"),
        (a, "returned RunConfig"),
        ({"x": 3}, r"returned \{'x': 3\}, expected"),
        ({"../x": a}, "is no name of a folder"),
        ([runs.v31_nano_student()], "learns from a teacher, and a sweep has none"),
    ):
        with pytest.raises(UserError, match=sentence):
            sweep.runs_of(made)
