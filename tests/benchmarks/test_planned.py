"""What planning gives over defaults: turns alternate, figures are those of the engines."""

import json

import pytest

from benchmarks import planned
from benchmarks.planned import Compared, Shape, compare, geometric_mean
from configs.checks import UserError
from infer.hardware import from_sheet
from infer.sources import open_source
from scripts import bench_planned
from tests.checkpoint.tiny_folder import write_llama


def test_the_mean_is_of_the_shapes_medians():
    shape = Shape(1, 2, 3)
    found = [
        Compared(shape, "", default=[10.0, 20.0, 10.0], planned=[20.0, 20.0, 80.0]),
        Compared(shape, "", default=[8.0], planned=[4.0]),
    ]
    assert [one.ratio for one in found] == [2.0, 0.5]
    assert geometric_mean(found) == pytest.approx(1.0)


def test_engines_take_turns_on_the_same_requests():
    class Fake:
        def __init__(self, name):
            self.name, self.seen, self.left = name, [], 0

        def add(self, request):
            log.append((self.name, tuple(request.prompt)))
            self.left += request.max_new_tokens

        def has_work(self):
            return self.left > 0

        def step(self):
            self.left -= 1
            return [type("Emitted", (), {"tokens": [0]})]

    log: list = []
    arms: list = [Fake("default"), Fake("planned")]
    rates = planned.alternate(arms, Shape(1, 4, 3), 100, rounds=2)
    assert [len(own) for own in rates] == [2, 2]
    assert [name for name, _ in log] == ["default", "planned"] * 3
    assert log[0][1] == log[1][1] != log[2][1]


@pytest.mark.slow
def test_a_real_model_is_measured_and_kept(tmp_path, monkeypatch, capsys):
    write_llama(tmp_path / "llama")
    monkeypatch.setattr(bench_planned, "SHAPES", (Shape(1, 8, 4), Shape(2, 8, 4), Shape(9, 99, 9)))
    monkeypatch.setattr(bench_planned, "found_hardware", lambda device: from_sheet("cpu"))
    out = tmp_path / "found.json"
    bench_planned.main([str(tmp_path / "llama"), "--rounds", "1", "--json", str(out)])
    found = json.loads(out.read_text())
    assert [one["shape"]["clients"] for one in found["shapes"]] == [1, 2]  # one has no context
    assert found["mean"] > 0
    assert "geometric mean" in capsys.readouterr().out


def test_what_is_planned_is_told(tmp_path):
    write_llama(tmp_path)
    source = open_source(str(tmp_path))
    one = bench_planned.planned_for(source, from_sheet("cpu"), Shape(3, 8, 4))
    assert (one.options.max_rows, one.options.max_length) == (3, 12)
    assert str(one).startswith(f"{one.weights}, kv {one.options.kv_dtype}, 3 row(s)")


def test_impossible_rounds(tmp_path):
    with pytest.raises(UserError, match="--rounds 0 must be at least 1"):
        bench_planned.main(["smollm2", "--rounds", "0"])
    assert compare(None, None, shapes=()) == []  # type: ignore[arg-type]
