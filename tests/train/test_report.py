"""Pictures and pages of runs, whatever their folders are called."""

import json
import os

import numpy as np
import pytest

from train.report import (
    draw_bars,
    draw_domains,
    draw_loss,
    new_figure,
    no_formula,
    printable,
    to_picture,
    write_report,
)

NAMES = ["a$1_$b", "$\\frac{1}$", "two $", "a\\$b", os.fsdecode(b"caf\xe9"), "run_1"]


def lines(steps: int = 5) -> list[dict]:
    metrics = {"cross_entropy": 2.0, "loss": 2.5, "tokens_per_second": 1e3}
    return [{"step": step, **metrics} for step in range(1, steps + 1)]


@pytest.mark.parametrize("name", NAMES)
def test_a_report_is_drawn_for_any_folder(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    log = "".join(json.dumps(line) + "\n" for line in lines())
    (folder / "metrics.jsonl").write_text(log)
    (folder / "config.json").write_text("{}")
    write_report(folder)
    assert (folder / "loss.png").stat().st_size > 5000
    title = name.replace("\udce9", "\\udce9")
    assert f"<title>Run {title}</title>" in (folder / "report.html").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_letter_by_letter(name):
    """Pixel by pixel as matplotlib draws a text that it is told to hold no formula."""
    pictures = []
    for text, options in ((no_formula(name), {}), (printable(name), {"parse_math": False})):
        figure, axes = new_figure(4, 2)
        axes.text(0.1, 0.5, text, **options)
        pictures.append(to_picture(figure, "text", "").png)
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_takes_any_name(name):
    for picture in (
        draw_loss({name: lines()}),
        draw_bars("bars", "", {name: 1.0, "other": 2.0}, {}, "bits"),
        draw_domains({name: np.zeros((2, 3))}, [name, "other"]),
    ):
        assert len(picture.png) > 3000


def test_other_names_stay_as_they_are():
    assert no_formula("v31_nano run 2") == "v31_nano run 2"
