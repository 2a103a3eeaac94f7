"""Reading GGUF: values as the gguf package has them, and damage told in a sentence."""

import struct
from pathlib import Path

import gguf as public
import ml_dtypes
import numpy as np
import pytest

from configs.checks import UserError
from formats.gguf.reader import GGUFFile
from tests.formats.gguf_bytes import (
    ARRAY,
    BOOL,
    I32,
    STRING,
    U32,
    gguf,
    pair,
    small,
    tensor,
    text,
)

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ2_0", "MXFP4")
"""That the package can write."""


def written(path: Path, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """A file with one tensor, and its values as the package decodes them."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    kind_ = public.GGMLQuantizationType[kind]
    packed = public.quants.quantize(values, kind_)
    writer = public.GGUFWriter(path, "llama")
    writer.add_array("llama.list", [[1, 2], [3]])
    writer.add_float64("llama.wide", 0.1)
    writer.add_tensor("before", np.ones(3, np.float32))
    writer.add_tensor("it", packed, raw_dtype=kind_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return public.quants.dequantize(packed, kind_)


@pytest.mark.parametrize("kind", KINDS)
def test_values_as_the_package_has_them(kind: str, tmp_path: Path, monkeypatch):
    """Read whole and in parts, decoded a few rows at a time."""
    want = written(tmp_path / "it.gguf", (3, 5, 256), kind)
    monkeypatch.setattr("formats.gguf.reader._ENTRIES", 512)
    file = GGUFFile(tmp_path / "it.gguf")
    assert file.shapes == {"before": (3,), "it": (3, 5, 256)}
    assert file.metadata["llama.list"] == [[1, 2], [3]]
    assert file.metadata["llama.wide"] == 0.1
    np.testing.assert_array_equal(file.read("it"), want)
    np.testing.assert_array_equal(file.read_rows("it", 1, 3), want[1:])
    np.testing.assert_array_equal(file.read_rows("before", 1, 3), np.ones(2))
    rounded = file.read("it", ml_dtypes.bfloat16)
    np.testing.assert_array_equal(rounded, want.astype(ml_dtypes.bfloat16))
    packed, read_kind = file.raw("it")
    assert read_kind.name == kind
    np.testing.assert_array_equal(public.quants.dequantize(packed, read_kind), want)


def test_the_small_file_is_whole(tmp_path: Path):
    (tmp_path / "it.gguf").write_bytes(small())
    file = GGUFFile(tmp_path / "it.gguf")
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    values = np.random.default_rng(0).standard_normal(48).astype(np.float32)
    np.testing.assert_array_equal(file.read("matrix"), values[8:40].reshape(4, 8))


F32_ONE = struct.pack("<f", 1.0) * 8
DEEP = struct.pack("<IQIQIQ", ARRAY, 1, ARRAY, 1, U32, 1) + bytes(4)
WRONG = {
    "empty": (b"", "no GGUF file: it begins with b''"),
    "another format": (b"PK\x03\x04" + bytes(40), "begins with b'PK"),
    "version 1": (gguf(version=1), "version 1, expected 2 or 3"),
    "big-endian": (gguf(version=3 << 24), "a big-endian file"),
    "cut in the header": (small()[:200], "the file ends at 200"),
    "cut in the data": (small()[:-4], "'last' of shape \\(8,\\) ends at byte"),
    "too many tensors": (gguf(counts=(2**63, 0)), "announces 9223372036854775808 tensors"),
    "too many keys": (gguf(counts=(0, 2**40)), "announces 1099511627776 metadata keys"),
    "a long string": (
        gguf((pair("k", STRING, struct.pack("<Q", 2**62)),)),
        "needs 4611686018427387904 bytes",
    ),
    "a long array": (
        gguf((pair("k", ARRAY, struct.pack("<IQ", I32, 2**60)),)),
        "announces 1152921504606846976 items of 'k'",
    ),
    "many strings": (
        gguf((pair("k", ARRAY, struct.pack("<IQ", STRING, 2**50)),)),
        "items of 'k'",
    ),
    "deep arrays": (gguf((pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + DEEP),)), "two levels"),
    "an unknown value": (gguf((pair("k", 99, b""),)), "'k' has the unknown value type 99"),
    "a bad truth": (gguf((pair("k", BOOL, b"\x07"),)), "the truth value 7"),
    "no text": (gguf((pair("k", STRING, struct.pack("<Q", 1) + b"\xff"),)), "no UTF-8 text"),
    "a key twice": (gguf((pair("k", BOOL, b"\x01"),) * 2), "metadata key 'k' twice"),
    "parts": (
        gguf((pair("split.count", 2, struct.pack("<H", 3)),)),
        "one of 3 parts of a model, and its name does not say which",
    ),
    "odd alignment": (
        gguf((pair("general.alignment", U32, struct.pack("<I", 24)),)),
        "general.alignment is 24, expected a power of two",
    ),
    "a tensor twice": (gguf((), (tensor("t", (8,), 0, 0),) * 2, F32_ONE), "tensor 't' twice"),
    "overlapping": (
        gguf((), (tensor("t", (16,), 0, 0), tensor("u", (8,), 0, 32)), F32_ONE * 2),
        "tensor 'u' begins at byte .* inside 't'",
    ),
    "unaligned": (gguf((), (tensor("t", (4,), 0, 4),), F32_ONE), "a multiple of 32"),
    "past the end": (gguf((), (tensor("t", (8,), 0, 2**63),), F32_ONE), "ends at byte"),
    "overflowing": (
        gguf((), (tensor("t", (2**32, 2**32, 4), 0, 0),), F32_ONE),
        "ends at byte",
    ),
    "five dims": (gguf((), (tensor("t", (1,) * 5, 0, 0),), F32_ONE), "has 5 dims"),
    "no dims": (gguf((), (tensor("t", (), 0, 0),), F32_ONE), "has 0 dims"),
    "nothing along a dim": (gguf((), (tensor("t", (8, 0), 0, 0),), F32_ONE), "at least 1"),
    "a broken block": (gguf((), (tensor("t", (8,), 8, 0),), F32_ONE * 2), "divisible by 32"),
    "an unknown type": (gguf((), (tensor("t", (8,), 77, 0),), F32_ONE), "the unknown type 77"),
}


@pytest.mark.parametrize("case", WRONG)
def test_damage_is_told(case: str, tmp_path: Path):
    data, sentence = WRONG[case]
    path = tmp_path / "it.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError, match=sentence) as told:
        GGUFFile(path)
    assert str(path) in str(told.value)


def test_no_file_is_told(tmp_path: Path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(UserError, match="can't be read"):
            GGUFFile(path)


def test_values_that_are_not_finite_are_told(tmp_path: Path):
    """In the file, or made so by rounding."""
    data = bytearray(small())
    data[-4:] = struct.pack("<f", np.inf)
    data[-36:-32] = struct.pack("<f", 1e6)
    path = tmp_path / "it.gguf"
    path.write_bytes(data)
    file = GGUFFile(path)
    assert np.isfinite(file.read("first")).all()
    with pytest.raises(UserError, match=r"'last' in .*it.gguf has values that are not finite"):
        file.read("last")
    with pytest.raises(UserError, match=r"'matrix' .* not finite as float16"):
        file.read("matrix", np.float16)


def test_a_type_without_decoder_is_told(tmp_path: Path):
    path = tmp_path / "it.gguf"
    path.write_bytes(gguf((), (tensor("t", (8,), 26, 0),), F32_ONE))
    with pytest.raises(UserError, match="the type I32, for which there is no decoder"):
        GGUFFile(path).read("t")


def test_a_file_that_shrinks_is_told(tmp_path: Path):
    path = tmp_path / "it.gguf"
    path.write_bytes(small())
    file = GGUFFile(path)
    path.write_bytes(small()[:-8])
    with pytest.raises(UserError, match="became shorter while 'last' was read"):
        file.read("last")


def test_versions_and_names(tmp_path: Path):
    """Version 2 reads alike, and a name may be any text."""
    path = tmp_path / "it.gguf"
    path.write_bytes(gguf((), (tensor("größe", (8,), 0, 0),), F32_ONE, version=2))
    assert GGUFFile(path).shapes == {"größe": (8,)}
    assert text("ß") == b"\x02" + bytes(7) + "ß".encode()
