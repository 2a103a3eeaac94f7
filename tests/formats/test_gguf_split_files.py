"""Models split into several GGUF files, as the public package writes them."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from configs.checks import UserError
from formats.gguf.reader import GGUFFile
from formats.gguf.split_files import read_model_header

TENSORS = {
    f"blk.{i}.weight": np.random.default_rng(i).standard_normal((i + 1, 32), np.float32)
    for i in range(7)
}


def write(path: Path, *, per_part: int, name: str = "tiny") -> None:
    """A model in parts of so many tensors, 0 for one file."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=per_part)
    writer.add_string("general.name", name)
    for tensor, values in TENSORS.items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    write(tmp_path / "it.gguf", per_part=3)
    found = sorted(tmp_path.iterdir())
    assert [path.name for path in found] == [f"it-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_any_part_names_the_whole_model(parts: list[Path]):
    for path in parts:
        file = GGUFFile(path)
        assert file.metadata["general.name"] == "tiny"
        assert set(file.shapes) == set(TENSORS)
        for name, values in TENSORS.items():
            np.testing.assert_array_equal(file.read(name), values)
            assert file.file(name) == parts[int(name[4]) // 3]


def test_one_file_is_the_same(tmp_path: Path):
    write(tmp_path / "it.gguf", per_part=0)
    file = GGUFFile(tmp_path / "it.gguf")
    np.testing.assert_array_equal(file.read("blk.6.weight"), TENSORS["blk.6.weight"])


def swap(parts: list[Path]) -> None:
    shutil.copyfile(parts[2], parts[1])


def repeat(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes().replace(b"blk.4.weight", b"blk.1.weight"))


def announce_more(parts: list[Path]) -> None:
    key = b"split.tensors.count" + b"\x05\x00\x00\x00"
    data = parts[0].read_bytes()
    assert key + b"\x07" in data
    parts[0].write_bytes(data.replace(key + b"\x07", key + b"\x08"))


def rename(parts: list[Path]) -> None:
    parts[0].rename(parts[0].with_name("model.gguf"))


def of_four(parts: list[Path]) -> None:
    parts[0].rename(parts[0].with_name("it-00001-of-00004.gguf"))


DAMAGE = {
    "a part is missing": (
        lambda parts: parts[1].unlink(),
        r"1 are not in its folder \(it-00002-of",
    ),
    "a part stands for another": (swap, r"it-00002-of-00003.gguf says that it is part 3 of 3"),
    "a tensor in two parts": (repeat, "has \\['blk.1.weight'\\], which a part before has, too"),
    "more was announced": (announce_more, "announces 8 tensors in 3 parts, which have 7"),
    "no number": (rename, "its name does not say which"),
    "another number": (of_four, "its name does not say which"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_no_whole_model_is_told(case: str, parts: list[Path]):
    damage, sentence = DAMAGE[case]
    damage(parts)
    first = min(parts[0].parent.glob("*.gguf"))
    if case in ("no number", "another number"):
        first = next(path for path in parts[0].parent.glob("*.gguf") if path not in parts)
    with pytest.raises(UserError, match=sentence):
        read_model_header(first)
