"""Files of random bytes, and whole files with bytes flipped, put in or cut off: read as they are,
or refused in a sentence."""

import json
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint.logical_tensors import LogicalTensors
from configs.checks import UserError
from formats.block_floats import encode_fp8, encode_mxfp4
from formats.safetensors.reader import open_tensors
from formats.safetensors.writer import TensorWriter

MAX_BYTES = 20_000_000
"""Far below what a header may claim; the files have at most some thousand bytes."""

FUZZ = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
QUANTIZATION = {
    None: None,
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
}


def checkpoint_files(folder, method) -> dict[str, bytes]:
    """A sharded checkpoint with a weight of this method, by file name."""
    weight = np.random.default_rng(0).normal(size=(2, 4, 64)).astype(np.float32)
    arrays = {"norm": np.ones(8, np.float32), "ids": np.arange(3), "plain": weight[0]}
    if method == "fp8":
        arrays["w"], arrays["w_scale_inv"] = encode_fp8(weight[0], (128, 128))
    if method == "mxfp4":
        arrays["w_blocks"], arrays["w_scales"] = encode_mxfp4(weight)
    plan = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    with TensorWriter(folder, plan, max_shard_bytes=1060) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def damaged(content: bytes, draw) -> bytes:
    """Some bytes flipped, put in, repeated or cut; mostly in the header, where they matter."""
    text = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(text) - 1, 0)) | st.integers(0, 300))
        kind = draw(st.sampled_from(["flip", "insert", "cut", "digit", "repeat", "remove"]))
        if kind == "flip" and at < len(text):
            text[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            text[at:at] = draw(st.binary(max_size=8))
        elif kind == "cut":
            del text[at:]
        elif kind == "digit":
            digits = [i for i, byte in enumerate(text[8:600], 8) if chr(byte).isdigit()]
            if digits:
                text[draw(st.sampled_from(digits))] = draw(st.sampled_from(b"0123456789-.e[]"))
        elif kind == "repeat":
            text[at:at] = text[at : at + draw(st.integers(1, 80))]
        else:
            del text[at : at + draw(st.integers(1, 80))]
    return bytes(text)


def read_or_refuse(folder, quantization) -> bool:
    """Whether everything can be read: then it is what stands in the file, and finite."""
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    sentence = ""
    try:
        files = open_tensors(folder)
        for name, info in files.tensors.items():
            array = files.read(name)
            assert array.tobytes() == bytes_by_the_format(info.file.read_bytes())[name]
        tensors = LogicalTensors(files, quantization)
        for name, shape in tensors.shapes.items():
            value = tensors.read(name)
            assert value.shape == shape
            assert np.isfinite(value).all()
    except UserError as refusal:
        sentence = str(refusal)
    assert tracemalloc.get_traced_memory()[1] - before < MAX_BYTES
    assert len(sentence) < 1500
    assert not sentence or sentence.isprintable()
    return not sentence


def bytes_by_the_format(content: bytes) -> dict[str, bytes]:
    """Each tensor's bytes, by the shortest reading of the format."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    return {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}


@pytest.fixture(autouse=True)
def _trace():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "fp8", "mxfp4"])
def test_damaged_checkpoint_is_read_as_it_is_or_refused(tmp_path, method):
    whole = checkpoint_files(tmp_path, method)
    assert len(whole) > 2  # shards and their index
    outcomes = set()

    @FUZZ
    @given(st.data())
    def fuzz(data):
        name = data.draw(st.sampled_from(sorted(whole)))
        (tmp_path / name).write_bytes(damaged(whole[name], data.draw))
        outcomes.add(read_or_refuse(tmp_path, QUANTIZATION[method]))
        (tmp_path / name).write_bytes(whole[name])

    fuzz()
    assert outcomes == {True, False}  # neither side is empty: the test has teeth
    assert read_or_refuse(tmp_path, QUANTIZATION[method])


@pytest.mark.slow
@FUZZ
@given(st.binary(max_size=400), st.booleans())
def test_random_bytes_are_refused(tmp_path, content, with_length):
    start = struct.pack("<Q", max(len(content) - 4, 0)) if with_length else b""
    (tmp_path / "model.safetensors").write_bytes(start + content)
    with pytest.raises(UserError):
        open_tensors(tmp_path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["F32", "U8", "BF16", "F8_E8M0", "BOOL", "\x1b", "é"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F8_E8M0", "BOOL", "F8_E4M3"]) | JSON,
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, 10**15, 2**31, 2**63]), max_size=5) | JSON,
        "data_offsets": st.lists(st.sampled_from([0, 1, 4, 8, 16, 10**15]), max_size=3) | JSON,
    }
)


@pytest.mark.slow
@FUZZ
@given(st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=4) | JSON, st.integers(0, 40))
def test_any_json_as_header_is_read_as_it_is_or_refused(tmp_path, header, data_bytes):
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(data_bytes)
    (tmp_path / "model.safetensors").write_bytes(content)
    read_or_refuse(tmp_path, None)


@pytest.mark.slow
@FUZZ
@given(JSON | st.fixed_dictionaries({"weight_map": JSON}))
def test_any_json_as_index_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        open_tensors(tmp_path)


@pytest.mark.slow
def test_what_is_accepted_the_public_library_accepts(tmp_path):
    *_, whole, _ = checkpoint_files(tmp_path / "whole", "fp8").values()
    path = tmp_path / "model.safetensors"

    @FUZZ
    @given(st.data())
    def fuzz(data):
        path.write_bytes(damaged(whole, data.draw))
        try:
            files = open_tensors(tmp_path)
        except UserError:
            return
        theirs = dict(safetensors.deserialize(path.read_bytes()))
        assert theirs.keys() == files.tensors.keys()
        for name, entry in theirs.items():
            assert files.tensors[name].shape == tuple(entry["shape"])

    fuzz()
