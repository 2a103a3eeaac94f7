"""grouped_matmul's bfloat16 Mosaic kernel for Hopper in Pallas' interpreter, in float32.

The interpreter runs all but the other halves of kernels/warpgroups.py: warpgroups as threads,
copies, barriers, the order of tiles and their borders; and no wgmma, swizzling or shared staging.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # what the interpreter found

from kernels import backend
from kernels.backend import H100, INTERPRET
from kernels.grouped_matmul import grouped_matmul
from kernels.grouped_matmul import pallas_mosaic as kernel

D_IN, D_OUT = 48, 80
"""Three steps of 16 inputs; two and a half blocks of 32 outputs. The gradient: five, and one and a
half."""
SIZES = {
    "ragged": (9, 0, 40, 1, 17, 0, 5),
    "one_hot": (0, 78, 0),
    "no_rows_used": (0, 0),
}
"""Of 88 or 82 rows in tiles of 16: the last ones belong to no group."""
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of at most 88 terms, of size about 1


def draw(sizes="ragged", num_rows=88):
    random, sizes = np.random.RandomState(4), SIZES[sizes]
    x, dy = random.randn(num_rows, D_IN), random.randn(num_rows, D_OUT)
    dy[sum(sizes) :] = 0.0
    w = random.randn(len(sizes), D_IN, D_OUT) * D_IN**-0.5
    x, w, dy = (jnp.asarray(a, jnp.float32) for a in (x, w, dy))
    return x, w, jnp.asarray(sizes, jnp.int32), dy


@jax.jit
def interpreted(*operands):
    return kernel.grouped_matmul(*operands, target=INTERPRET)


@jax.jit
def reference(*operands):
    return grouped_matmul(*operands, implementation="reference")


@pytest.mark.parametrize(
    ("sizes", "num_rows"),
    [
        ("ragged", 88),
        pytest.param("ragged", 82, marks=pytest.mark.slow),
        pytest.param("one_hot", 88, marks=pytest.mark.slow),
        pytest.param("no_rows_used", 82, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
@pytest.mark.sampled
def test_the_kernel_equals_the_reference_and_no_wrong_version(sizes, num_rows):
    x, w, sizes, _ = draw(sizes, num_rows)
    found = interpreted(x, w, sizes)
    np.testing.assert_allclose(found, reference(x, w, sizes), **TOLERANCE)
    assert not np.any(found[sizes.sum() :])
    assert not gpu_callbacks.get_races().races_found
    if sizes.sum():
        assert np.abs(found - reference(x, w, jnp.roll(sizes, 1))).max() > 0.1


@pytest.mark.slow
def test_the_gradients_of_gathered_rows():
    x, w, sizes, dy = draw()
    rows = jnp.asarray(np.random.RandomState(0).randint(0, 88, 88), jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(function, x, w):
        return jax.vjp(function, x, w)[1](dy)

    ours = functools.partial(
        kernel.grouped_matmul, group_sizes_E=sizes, rows_R=rows, target=INTERPRET
    )
    found = gradients(ours, x, w)
    assert not gpu_callbacks.get_races().races_found
    expected = gradients(lambda x, w: reference(x[rows], w, sizes), x, w)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="a race is an exception from 0.11 on")
def test_a_slot_given_back_too_early_is_a_race(monkeypatch):
    def read_late(ring, step):
        slot = wait_filled(ring, step)
        give_back(ring, slot)
        return slot

    wait_filled, give_back = kernel.wait_filled, kernel.give_back
    monkeypatch.setattr(kernel, "wait_filled", read_late)
    monkeypatch.setattr(kernel, "give_back", lambda ring, slot, threads_read: None)
    ours = functools.partial(kernel.grouped_matmul, target=INTERPRET)
    jax.jit(ours)(*draw()[:3]).block_until_ready()
    assert gpu_callbacks.get_races().races_found


# --- What the kernel lacks, and who asks for it ---------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "shape", "sentence"),
    [
        (jnp.float32, (1, 64, 64), "multiplies bfloat16, x is float32: cast it"),
        (jnp.bfloat16, (1, 64, 96), "multiples of 64, and these are 64 x 96"),
    ],
)
def test_what_the_kernel_cannot_multiply_is_said(dtype, shape, sentence):
    x, w = jnp.ones((4, 64), dtype), jnp.ones(shape, dtype)
    with pytest.raises(NotImplementedError, match=sentence):
        kernel.grouped_matmul(x, w, jnp.ones(1, jnp.int32), target=H100)


def test_the_op_takes_it_by_name():
    x, w, sizes, _ = draw()
    with pytest.raises(NotImplementedError, match=r"needs a Hopper GPU .* default device is cpu"):
        grouped_matmul(x, w, sizes, implementation="mosaic")


@pytest.mark.parametrize(
    ("num_rows", "dtype", "mosaic_time", "is_taken"),
    [
        (256, jnp.bfloat16, 0.8, True),
        (255, jnp.bfloat16, 0.8, False),
        (256, jnp.float32, 0.8, False),
        (256, jnp.bfloat16, 1.2, False),
    ],
)
def test_auto_takes_it_for_many_rows_where_it_was_faster(
    monkeypatch, num_rows, dtype, mosaic_time, is_taken
):
    times = {"case": {"triton": 1.0, "mosaic": mosaic_time}}
    monkeypatch.setattr(backend, "measured", lambda: {"90": {"grouped_matmul/bf16": times}})
    for module in ("backend", "grouped_matmul.api"):
        monkeypatch.setattr(f"kernels.{module}.current_target", lambda: H100)
    x, w = jnp.ones((num_rows, 64), dtype), jnp.ones((2, 64, 128), dtype)
    traced = jax.make_jaxpr(functools.partial(grouped_matmul))(x, w, jnp.full(2, 128, jnp.int32))
    assert ("mosaic_grouped_matmul" in str(traced)) == is_taken
