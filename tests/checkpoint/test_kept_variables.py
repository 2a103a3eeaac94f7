"""Files of variables as they lie in memory: read to the bit, or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint import kept_variables
from checkpoint.kept_variables import TAIL, DamagedFile, read_kept, write_kept
from kernels.quantize import MatrixDims, QTensor, quantize, repack

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int8", "uint8", "int32", "bool")


def some_variables():
    rng = np.random.default_rng(0)

    def rounded(format, packing, **options):
        w = jnp.asarray(rng.normal(size=(2, 64, 4, 8)), jnp.float32)
        made = quantize(w, format, dims=MatrixDims(1, 2), block_size=32, **options)
        return repack(made, packing)

    plain = {name: jnp.asarray(rng.normal(size=(3, 7)) * 9).astype(name) for name in DTYPES}
    return {
        "params": {
            "z": {**plain, "scalar": jnp.float32(3.5), "none": jnp.zeros((4, 0))},
            "a": {
                "int4": rounded("int4", "panels", scale_dtype="bfloat16"),
                "affine": rounded("int4", "panels", scale_dtype="bfloat16", is_affine=True),
                "int8": rounded("int8", "canonical"),
                "fp8": rounded("fp8_e4m3", "canonical").as_matrices(),
            },
        },
        "router_state": {},
    }


def written(path, variables, of="this"):
    with path.open("wb") as file:
        write_kept(file, of, variables)
    return path


def check_equal(found, wanted):
    """Tree, dtypes, fields, places and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        name = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape, a.weak_type) == (b.dtype, b.shape, b.weak_type), name
        np.testing.assert_array_equal(
            *(np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b)), err_msg=name
        )


@pytest.mark.parametrize("group", [1, 2**26])
def test_what_is_read_is_what_was_written(tmp_path, monkeypatch, group):
    """In one group, or each array in one of its own."""
    monkeypatch.setattr(kept_variables, "PIECE_BYTES", group)
    variables = some_variables()
    found = read_kept(written(tmp_path / "a", variables), "this")
    check_equal(found, variables)
    assert isinstance(found["params"]["a"]["int4"], QTensor)
    assert found["router_state"] == {}
    assert all(x.committed for x in jax.tree.leaves(found))


def test_arrays_are_where_they_were_read(tmp_path):
    """Nothing is copied: they lie in the pages of their group as in the file."""
    variables = {"a": jnp.arange(100.0), "b": jnp.arange(7, dtype=jnp.int8), "c": jnp.ones(3)}
    found = read_kept(written(tmp_path / "a", variables), "this")
    begins = [found[name].unsafe_buffer_pointer() for name in "abc"]
    assert begins[0] % 4096 == 0
    assert [x - begins[0] for x in begins] == [0, 448, 512]


def test_a_file_of_something_else_is_none(tmp_path):
    path = written(tmp_path / "a", some_variables())
    assert read_kept(path, "that") is None
    with pytest.raises(FileNotFoundError):
        read_kept(tmp_path / "b", "this")


def flipped(place):
    def damage(data):
        data[place] ^= 4
        return data

    return damage


def lost_page(data):
    data[4096:8192] = bytes(4096)
    return data


@pytest.mark.parametrize(
    "damage",
    [
        flipped(0),
        flipped(9000),
        flipped(-1),
        flipped(-TAIL.size),
        flipped(-TAIL.size + 6),
        flipped(-TAIL.size - 1),
        flipped(-TAIL.size - 200),
        lost_page,
        lambda data: data[:-1],
        lambda data: data[: -TAIL.size],
        lambda data: data[4096:],
        lambda data: data[: len(data) // 2],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: data + bytes(8),
        lambda data: bytes(len(data)),
    ],
)
def test_damage_is_found(tmp_path, damage):
    variables = {"a": jnp.asarray(np.random.default_rng(0).integers(1, 99, 5000), jnp.int32)}
    path = written(tmp_path / "a", variables)
    path.write_bytes(damage(bytearray(path.read_bytes())))
    with pytest.raises(DamagedFile):
        read_kept(path, "this")
