"""Safetensors files: as the public library writes them, and refused in a sentence when damaged."""

import json
import resource
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save

from configs.checks import UserError
from formats.safetensors.reader import open_tensors
from formats.safetensors.writer import TensorWriter

LIBRARY_HEADER = (
    b'{"__metadata__":{"format":"pt"},"i64":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},'
    b'"f64":{"dtype":"F64","shape":[1],"data_offsets":[8,16]},"f32":{"dtype":"F32","shape":[1],'
    b'"data_offsets":[16,20]},"i32":{"dtype":"I32","shape":[1],"data_offsets":[20,24]},'
    b'"bf16":{"dtype":"BF16","shape":[1],"data_offsets":[24,26]},"f16":{"dtype":"F16","shape":[1],'
    b'"data_offsets":[26,28]},"i16":{"dtype":"I16","shape":[1],"data_offsets":[28,30]},'
    b'"e8m0":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[30,31]},"e4m3":{"dtype":"F8_E4M3",'
    b'"shape":[1],"data_offsets":[31,32]},"e5m2":{"dtype":"F8_E5M2","shape":[1],'
    b'"data_offsets":[32,33]},"i8":{"dtype":"I8","shape":[1],"data_offsets":[33,34]},'
    b'"u8":{"dtype":"U8","shape":[1],"data_offsets":[34,35]},"bool":{"dtype":"BOOL","shape":[1],'
    b'"data_offsets":[35,36]}}       '
)
"""What safetensors 0.8.0 writes from torch for one tensor of each dtype, named in another order."""

# Minus 1.5 where there is a sign and a fraction; the codes of the small floats by hand:
# sign, exponent with its bias, fraction.
LIBRARY_BYTES = (
    struct.pack("<qdfi", -2, -1.5, -1.5, -2)
    + struct.pack("<HHh", 0b1_01111111_1000000, 0b1_01111_1000000000, -2)
    + bytes([127 + 3, 0b1_0111_100, 0b1_01111_10])
    + struct.pack("<bB?", -2, 254, True)
)
VALUES = {"i64": -2, "i32": -2, "i16": -2, "i8": -2, "u8": 254, "bool": True, "e8m0": 8.0}
DTYPES = {
    "f64": np.float64,
    "bool": np.bool_,
    "u8": np.uint8,
    "i8": np.int8,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "i16": np.int16,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "i32": np.int32,
    "f32": np.float32,
    "i64": np.int64,
}


def each_dtype():
    return {name: np.array([VALUES.get(name, -1.5)], dtype) for name, dtype in DTYPES.items()}


def file_bytes(header, data=b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape=(2, 2), begin=0, end=16, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write(folder, arrays, **settings):
    plan = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    with TensorWriter(folder, plan, **settings) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return folder


def some_arrays():
    rng = np.random.default_rng(0)
    return {
        "b": rng.normal(size=(3, 4)).astype(np.float32),
        "odd": rng.integers(0, 256, 3).astype(np.uint8),
        "a": rng.normal(size=(5, 2)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(7.0),
        "empty": np.zeros((0, 4), np.float16),
    }


def assert_same(files, arrays):
    assert files.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        found = files.read(name)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()


def test_reads_and_writes_what_the_public_library_writes(tmp_path):
    expected = struct.pack("<Q", len(LIBRARY_HEADER)) + LIBRARY_HEADER + LIBRARY_BYTES
    (tmp_path / "model.safetensors").write_bytes(expected)
    assert_same(open_tensors(tmp_path), each_dtype())
    ours = write(tmp_path / "ours", each_dtype())
    assert (ours / "model.safetensors").read_bytes() == expected


def test_the_public_library_reads_and_writes_the_same(tmp_path):
    arrays = some_arrays()
    path = write(tmp_path, arrays) / "model.safetensors"
    assert save(arrays, {"format": "pt"}) == path.read_bytes()
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(array, arrays[name])


def test_shards_come_back_by_tensor_and_by_rows(tmp_path):
    arrays = some_arrays()
    write(tmp_path, arrays, max_shard_bytes=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert index["weight_map"]["b"] == "model-00001-of-00002.safetensors"
    files = open_tensors(tmp_path)
    assert_same(files, arrays)
    np.testing.assert_array_equal(files.read_rows("a", 1, 4), arrays["a"][1:4])
    assert files.read_rows("empty", 0, 0).shape == (0, 4)


def test_files_without_index_are_one_checkpoint(tmp_path):
    arrays = some_arrays()
    write(tmp_path, arrays, max_shard_bytes=60)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(open_tensors(tmp_path), arrays)


def test_links_into_the_cache_of_hugging_face_are_followed(tmp_path):
    arrays = some_arrays()
    blobs, snapshot = write(tmp_path / "blobs", arrays, max_shard_bytes=60), tmp_path / "snapshot"
    snapshot.mkdir()
    for path in list(blobs.iterdir()):
        path.rename(path.with_name(f"{hash(path.name):x}"))
        (snapshot / path.name).symlink_to(f"../blobs/{hash(path.name):x}")
    assert_same(open_tensors(snapshot), arrays)


HUGE = 10**15
DAMAGED = {
    "empty": (b"", "has 0 bytes"),
    "five bytes": (b"\x01\0\0\0\0", "has 5 bytes"),
    "header longer than the file": (b"\xff" * 8 + b"{}", "header has 18446744073709551615 bytes"),
    "header cut": (file_bytes({"x": entry()}, bytes(16))[:30], "truncated"),
    "no json": (file_bytes(b"{nothing"), "is no JSON"),
    "no utf-8": (file_bytes(b'{"\xff": 1}'), "is no JSON"),
    "html": (file_bytes(b"<html></html>"), "no safetensors file"),
    "a list": (file_bytes(b"[1]"), "no safetensors file"),
    "nested": (file_bytes(b'{"x":' + b"[" * 100_000), "nested too deeply"),
    "digits": (file_bytes(b'{"x":' + b"9" * 10_000 + b"}"), "is no JSON"),
    "metadata": (file_bytes({"__metadata__": {"a": 1}}), "__metadata__ is {'a': 1}"),
    "same name twice": (
        file_bytes(b'{"x":%b,"x":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(16)),
        "has 'x' twice",
    ),
    "same key twice": (
        file_bytes(b'{"x":{"dtype":"F32","dtype":"I32","shape":[0],"data_offsets":[0,0]}}'),
        "has 'dtype' twice",
    ),
    "entry is a number": (file_bytes({"x": 3}), "'x' is described by 3"),
    "no shape": (file_bytes({"x": {"dtype": "F32", "data_offsets": [0, 0]}}), "needs dtype, shape"),
    "unknown dtype": (file_bytes({"x": entry(dtype="C64")}, bytes(16)), "'x' has dtype 'C64'"),
    "dtype is a list": (file_bytes({"x": entry(dtype=["F32"])}, bytes(16)), "has dtype"),
    "negative": (file_bytes({"x": entry((-2, -2))}, bytes(16)), r"'x' has shape \[-2, -2\]"),
    "fraction": (file_bytes({"x": entry((2.0, 2))}, bytes(16)), r"shape \[2.0, 2\]"),
    "truth": (file_bytes({"x": entry((True, 4))}, bytes(16)), r"shape \[True, 4\]"),
    "many dims": (file_bytes({"x": entry((1,) * 70, 0, 4)}, bytes(4)), "at most 32"),
    "overflow": (file_bytes({"x": entry((2**32, 2**32), 0, 0)}), "more than any file holds"),
    "overflow behind zero": (file_bytes({"x": entry((0, 2**62, 2**62), 0, 0)}), "more than any"),
    "more than the file": (
        file_bytes({"x": entry((HUGE,), 0, 4 * HUGE)}, bytes(16)),
        "'x' needs the bytes up to 4000000000000000 after the header, but the file holds 16",
    ),
    "offsets and shape": (file_bytes({"x": entry((3,))}, bytes(16)), "needs 12 bytes.*hold 16"),
    "offsets backwards": (file_bytes({"x": entry((2, 2), 16, 0)}, bytes(16)), "first <= second"),
    "negative offset": (file_bytes({"x": entry((2, 2), -16, 0)}, bytes(16)), "two whole numbers"),
    "three offsets": (
        file_bytes({"x": entry() | {"data_offsets": [0, 8, 16]}}, bytes(16)),
        "two whole numbers",
    ),
    "overlap": (
        file_bytes({"x": entry(), "y": entry((2, 2), 8, 24)}, bytes(24)),
        r"'y' has data_offsets \[8, 24\], which overlap with tensor 'x' at byte 16",
    ),
    "hole": (
        file_bytes({"x": entry(), "y": entry((2, 2), 20, 36)}, bytes(36)),
        "which leave a hole after tensor 'x' at byte 16",
    ),
    "hole at first": (file_bytes({"x": entry((2, 2), 4, 20)}, bytes(20)), "the header's end"),
    "truncated": (file_bytes({"x": entry()}, bytes(15)), "the file holds 15: it is truncated"),
    "too long": (file_bytes({"x": entry()}, bytes(17)), "holds 17 bytes.*its tensors fill 16"),
    "terminal codes in a name": (file_bytes({"\x1b[2J": 3}), r"tensor '\\x1b\[2J' is"),
    "half a character": (file_bytes(b'{"\\ud800": 3}'), r"tensor '\\ud800' is"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_refused_before_a_tensor_is_read(tmp_path, case):
    content, sentence = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=sentence) as refusal:
            open_tensors(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert str(path) in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_absurd_header_of_a_large_file_is_not_read(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # a hole on the disk
    with pytest.raises(UserError, match="more than the 100000000 allowed"):
        open_tensors(tmp_path)


def change_index(change):
    """A damage: `change` gets the parsed index and what it gives back is written."""

    def damage(folder):
        path = folder / "model.safetensors.index.json"
        new = change(json.loads(path.read_text()))
        path.write_bytes(new if isinstance(new, bytes) else json.dumps(new).encode())

    return damage


def rename_in_index(file):
    def change(index):
        shards = sorted(set(index["weight_map"].values()))
        new = {shards[0]: file}
        index["weight_map"] = {n: new.get(f, f) for n, f in index["weight_map"].items()}
        return index

    return change_index(change)


def without_tensor(index):
    index["weight_map"].pop("b")
    return index


def duplicate_tensor(folder):
    (folder / "model.safetensors.index.json").unlink()
    (folder / "other.safetensors").write_bytes(file_bytes({"b": entry((0,), 0, 0)}))


def directory_for_a_shard(folder):
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()


def unlink(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


SHARD, SHARD_2 = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"
OUTSIDE = "may only name files of its own folder"
SPOILED = {
    "no json": (change_index(lambda _: b"{"), "is no JSON"),
    "list": (change_index(lambda _: [1]), "must be a JSON object"),
    "no map": (change_index(lambda _: {"metadata": {}}), "needs a weight_map.*has None"),
    "empty map": (change_index(lambda _: {"weight_map": {}}), "needs a weight_map"),
    "map is a list": (change_index(lambda _: {"weight_map": ["x"]}), "needs a weight_map"),
    "file is a number": (change_index(lambda _: {"weight_map": {"b": 3}}), "needs a weight_map"),
    "name twice": (change_index(lambda _: b'{"weight_map":{"b":"x","b":"y"}}'), "has 'b' twice"),
    "parent": (rename_in_index("../x.safetensors"), rf"'../x.safetensors'.*{OUTSIDE}"),
    "absolute": (rename_in_index("/etc/passwd"), rf"'/etc/passwd'.*{OUTSIDE}"),
    "backslash": (rename_in_index("..\\x.safetensors"), OUTSIDE),
    "subfolder": (rename_in_index("x/y.safetensors"), OUTSIDE),
    "dots": (rename_in_index(".."), OUTSIDE),
    "nul": (rename_in_index("x\0.safetensors"), OUTSIDE),
    "long name": (rename_in_index("x" * 5000 + ".safetensors"), "which is missing"),
    "a pickle": (rename_in_index("pytorch_model.bin"), "no .safetensors file"),
    "missing shard": (unlink(SHARD), f"names the file '{SHARD}', which is missing"),
    "missing, no index": (unlink(SHARD, INDEX), f"lacks '{SHARD}'.*numbered to 2, 1 are missing"),
    "shard is a folder": (directory_for_a_shard, "no plain file"),
    "tensor not there": (
        change_index(lambda i: {"weight_map": i["weight_map"] | {"z": SHARD}}),
        f"says that tensor 'z' is in '{SHARD}', but it is in no file",
    ),
    "tensor elsewhere": (
        change_index(lambda i: {"weight_map": i["weight_map"] | {"scalar": SHARD}}),
        f"'scalar' is in '{SHARD}', but it is in 'model-00002",
    ),
    "tensor not named": (change_index(without_tensor), "has tensor 'b', which .* doesn't name"),
    "tensor twice": (duplicate_tensor, "tensor 'b' is in two files, .* and .*other.safetensors"),
    "two checkpoints": (
        lambda folder: (folder / "model.safetensors").write_bytes(file_bytes({})),
        "holds both model.safetensors and an index",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_index_is_refused(tmp_path, case):
    damage, sentence = SPOILED[case]
    write(tmp_path, some_arrays(), max_shard_bytes=60)
    damage(tmp_path)
    with pytest.raises(UserError, match=sentence) as refusal:
        open_tensors(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert len(str(refusal.value)) < 800


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "m.pth", "m.ckpt", "m.pkl"])
def test_pickles_are_refused_unopened(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    path.chmod(0)
    with pytest.raises(UserError, match=f"'{name}', which may run code .* convert it"):
        open_tensors(tmp_path)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no checkpoint: model\.safetensors"):
        open_tensors(tmp_path)
    with pytest.raises(UserError, match="doesn't exist"):
        open_tensors(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="give the folder that it lies in"):
        open_tensors(tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: (path.rename(path.with_name("x")), path.write_bytes(bytes(1000))),
    ],
    ids=["shorter", "longer", "another"],
)
def test_file_that_changes_after_opening_is_noticed(tmp_path, change):
    write(tmp_path, some_arrays())
    files = open_tensors(tmp_path)
    change(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="changed while it was read, at tensor 'b'"):
        files.read("b")


def test_file_that_vanishes_after_opening_is_named(tmp_path):
    files = open_tensors(write(tmp_path, some_arrays()))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="can't be read: No such file"):
        files.read("b")


def test_bytes_that_are_no_truth_values_are_refused(tmp_path):
    content = file_bytes({"t": entry((3,), 0, 3, "BOOL")}, b"\0\1\2")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="'t' is BOOL and has bytes other than 0 and 1"):
        open_tensors(tmp_path).read("t")


class Killed(Exception):
    pass


def test_writer_goes_on_with_the_first_shard_that_is_not_whole(tmp_path):
    arrays = some_arrays()
    plan = [(name, array.dtype, array.shape) for name, array in arrays.items()]

    def be_killed():
        with TensorWriter(tmp_path, plan, max_shard_bytes=50) as writer:
            for name in ("b", "odd", "a"):
                writer.write(name, arrays[name])
            raise Killed

    with pytest.raises(Killed):
        be_killed()
    assert {p.name for p in tmp_path.iterdir()} == {SHARD, f"{SHARD_2}.partial"}
    first = (tmp_path / SHARD).stat()
    with TensorWriter(tmp_path, plan, max_shard_bytes=50) as writer:
        assert [name for name in arrays if writer.done(name)] == ["b"]
        for name, array in arrays.items():
            writer.write(name, array)
    assert {p.name for p in tmp_path.iterdir()} == {SHARD, SHARD_2, INDEX}
    assert (tmp_path / SHARD).stat() == first
    assert_same(open_tensors(tmp_path), arrays)


def test_writer_refuses_another_checkpoint_and_removes_nothing(tmp_path):
    arrays = some_arrays()
    write(tmp_path, arrays, max_shard_bytes=60)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for other in (arrays | {"b": arrays["a"]}, {"b": arrays["b"]}):
        with pytest.raises(UserError, match="belongs to another checkpoint"):
            write(tmp_path, other, max_shard_bytes=60)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(UserError, match="can't be written: File exists"):
        write(tmp_path / SHARD, arrays)


def test_a_disk_that_takes_no_more_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = TensorWriter(tmp_path, [("x", np.float32, (100_000,))])
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match=r"model\.safetensors can't be written: File too large"):
            writer.write("x", np.zeros(100_000, np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not writer.done("x")
    assert not (tmp_path / "model.safetensors").exists()


def test_writer_refuses_an_array_that_was_not_planned(tmp_path):
    with (
        pytest.raises(AssertionError, match="float64"),
        TensorWriter(tmp_path, [("x", np.float32, (2,))]) as writer,
    ):
        writer.write("x", np.zeros(2))
    with pytest.raises(AssertionError, match="never written"):
        TensorWriter(tmp_path, [("x", np.float32, (2,))]).__exit__(None, None, None)
    assert not (tmp_path / "model.safetensors").exists()
