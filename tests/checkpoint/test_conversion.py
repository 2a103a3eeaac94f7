"""A conversion reads each tensor when it is written, once, and goes on where it was stopped."""

import collections
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from checkpoint.assemble import Tensors, part_of, pieces
from checkpoint.weight_map import expand, flatten
from configs.checks import UserError
from formats.gguf import writer as gguf_writer
from formats.gguf.reader import GGUFFile
from formats.gguf.writer import write_gguf
from formats.safetensors.reader import open_tensors
from infer.adapters import model_entries
from infer.convert import Conversion, convert
from infer.sources import Source, open_source
from tests.checkpoint.cases import CASES, write_case

THROUGH_GGUF = ("gpt_oss", "deepseek_v3", "llama")
"""Where tensors are stacked, split and joined on the way there and back."""
CHECKED = "tid2eid"
"""Of the experts of each token, looked through before anything else is read."""
SPLIT = ("gate_up_proj", "kv_b_proj")


class Counted:
    """Tensors that count the elements read of each, and may fail at one."""

    def __init__(self, tensors: Tensors, fails_at: str | None = None) -> None:
        self._tensors, self._fails_at = tensors, fails_at
        self.shapes = tensors.shapes
        self.file = tensors.file
        self.elements: collections.Counter[str] = collections.Counter()

    def read(self, name: str) -> np.ndarray:
        return self.read_rows(name, 0, self.shapes[name][0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if name == self._fails_at:
            raise UserError("stopped")
        self.elements[name] += (stop - start) * math.prod(self.shapes[name][1:])
        return self._tensors.read_rows(name, start, stop)


def counted(source: Source, fails_at: str | None = None) -> Counted:
    """Counts what the source's checkpoint is read of from now on."""
    assert source.public is not None
    tensors = Counted(source.public.tensors, fails_at)
    object.__setattr__(source.public, "tensors", tensors)
    return tensors


def parameters_of(source: Source) -> collections.Counter[str]:
    """By tensor how many parameters lie interleaved in it (Qwen3-Next's): it is read for each."""
    assert source.public is not None
    entries = model_entries(source.config, source.public.family.rows)
    return collections.Counter(e.name for e in entries if e.public_rows is not None)


def some_slow(*fast: str) -> list[Any]:
    return [c if c in fast else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize("case", some_slow("gpt_oss", "qwen3_moe_mixed"))
@pytest.mark.sampled
def test_what_stays_in_the_files_is_what_loading_gives(case: str, tmp_path: Path):
    write_case(case, tmp_path)
    source = open_source(str(tmp_path))
    _, loaded = source.load(dtype="bfloat16", for_decoding=True)
    config, left = source.load_or_leave(dtype="bfloat16")
    expected = flatten(loaded)
    assert source.public is not None
    for entry in expand(source.public.rows, config, expected):
        found = part_of(flatten(left)[entry.leaf], entry.place)
        np.testing.assert_array_equal(found, part_of(expected[entry.leaf], entry.place))
        assert found.dtype == expected[entry.leaf].dtype


@pytest.mark.parametrize("case", some_slow("olmoe", *THROUGH_GGUF))
@pytest.mark.sampled
def test_there_and_back_each_tensor_is_read_once(case: str, tmp_path: Path):
    write_case(case, tmp_path / "first")
    is_rounded = case in THROUGH_GGUF
    there = Conversion(to="gguf") if is_rounded else Conversion(to="huggingface", dtype="float32")
    between = tmp_path / ("between.gguf" if is_rounded else "between")
    back = Conversion(to="huggingface", dtype="float32")
    way = [(tmp_path / "first", between, there), (between, tmp_path / "last", back)]
    for path, target, conversion in way:
        source = open_source(str(path))
        tensors, held = counted(source), parameters_of(source)
        convert(source, target, conversion)
        for name, elements in tensors.elements.items():
            is_twice = is_rounded and any(part in name for part in SPLIT)
            is_twice |= name.endswith(CHECKED)
            times = 2 if is_twice else max(held[name], 1)
            assert elements == times * math.prod(tensors.shapes[name]), name
        assert len(tensors.elements) == len(tensors.shapes)
    first, last = (open_source(str(tmp_path / name)) for name in ("first", "last"))
    assert last.config == first.config
    before, after = open_tensors(first.path), open_tensors(last.path)
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        wanted, found = before.read(name), after.read(name)
        if is_rounded and not np.array_equal(found, wanted):
            wanted = wanted.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(found, wanted, err_msg=name)


def tensors_of(counts: collections.Counter[str]) -> list[gguf_writer.Tensor]:
    def reader(name: str, shape: tuple[int, ...]) -> gguf_writer.Tensor:
        def read() -> np.ndarray:
            counts[name] += 1
            if counts["stop at " + name] > 0:
                raise UserError("stopped")
            return np.random.default_rng(len(name)).standard_normal(shape, np.float32)

        return name, shape, read

    return [reader("x" * i + ".weight", (3 + i, 64) if i % 2 else (7 * i,)) for i in range(1, 9)]


def test_a_stopped_gguf_goes_on_and_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gguf_writer, "MARKED_BYTES", 700)
    metadata = {"general.architecture": "llama", "llama.block_count": 2}
    counts: collections.Counter[str] = collections.Counter()
    write_gguf(tmp_path / "whole.gguf", metadata, tensors_of(counts), "Q8_0")
    assert set(counts.values()) == {1}
    path = tmp_path / "it.gguf"
    counts = collections.Counter({"stop at xxxxxx.weight": 1})
    with pytest.raises(UserError, match="stopped"):
        write_gguf(path, metadata, tensors_of(counts), "Q8_0")
    kept = int((tmp_path / "it.gguf.done").read_text())
    assert 1 < kept < 5
    again: collections.Counter[str] = collections.Counter()
    told: list[int] = []
    write_gguf(path, metadata, tensors_of(again), "Q8_0", told.append)
    assert len(again) == 8 - kept
    assert sum(told) == sum(math.prod(shape) for _, shape, _ in tensors_of(counts))
    assert path.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert GGUFFile(path).kind("xxx.weight") == GGMLQuantizationType.Q8_0
    assert {p.name for p in tmp_path.iterdir()} == {"whole.gguf", "it.gguf"}


@pytest.mark.parametrize("change", ["metadata", "shorter", "no number"])
def test_another_file_is_not_gone_on_with(change: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gguf_writer, "MARKED_BYTES", 0)
    path, metadata = tmp_path / "it.gguf", {"general.architecture": "llama"}
    counts: collections.Counter[str] = collections.Counter({"stop at xxxxxxxx.weight": 1})
    with pytest.raises(UserError, match="stopped"):
        write_gguf(path, metadata, tensors_of(counts), "F16")
    if change == "metadata":
        metadata["general.name"] = "another"
    elif change == "shorter":
        path.write_bytes(path.read_bytes()[:-400])
    else:
        (tmp_path / "it.gguf.done").write_text("")
    again: collections.Counter[str] = collections.Counter()
    write_gguf(path, metadata, tensors_of(again), "F16")
    assert len(again) == 8
    write_gguf(tmp_path / "fresh.gguf", metadata, tensors_of(again), "F16")
    assert path.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def test_a_stopped_conversion_to_gguf_keeps_its_place(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gguf_writer, "MARKED_BYTES", 0)
    write_case("llama", tmp_path / "first")
    target = tmp_path / "it.gguf"
    stopped = open_source(str(tmp_path / "first"))
    counted(stopped, fails_at="model.norm.weight")
    with pytest.raises(UserError, match="stopped"):
        convert(stopped, target, Conversion(to="gguf"))
    assert {p.name for p in tmp_path.iterdir()} == {"first", "it.gguf.partial"}
    source = open_source(str(tmp_path / "first"))
    tensors = counted(source)
    convert(source, target, Conversion(to="gguf"))
    assert {p.name for p in tmp_path.iterdir()} == {"first", "it.gguf"}
    assert 0 < len(tensors.elements) < len(tensors.shapes)
    convert(open_source(str(tmp_path / "first")), tmp_path / "fresh.gguf", Conversion(to="gguf"))
    assert target.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def test_pieces_cover_the_rows_asked_for():
    rows = [row for part in pieces((1000, 100_000), 3, 777) for row in range(*part)]
    assert rows == list(range(3, 777))
