"""Building blocks of Mosaic kernels: Hopper's warpgroups, tensor cores and shared memory.

A warpgroup is 128 threads that hold an array in their registers, spread in a layout, and start
products together (wgmma). The interpreter of jax 0.10 has no layouts, no left operand in registers,
no transposed view and no dynamic slice of shared memory: each function here that needs one has
another form for it. So tests run all of a kernel but these functions' other halves, which are
compiled for Hopper and were run nowhere (docs/gpu_kernels.md).

One warpgroup copies to shared memory what the others compute with, through a Ring. An operand of
wgmma there is `swizzled`. M, N and K are a product's rows, columns and contraction.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.backend import Target

SUMS = plgpu.Layout.WGMMA
"""Of a product's float32 sums, of 16-bit left operands, and of what is computed with them."""
OF_ROW = SUMS.reduce(1)
"""Of one value for each row of SUMS."""
OF_COLUMN = SUMS.reduce(0)
PACKED = {8: plgpu.Layout.WGMMA_UPCAST_2X, 4: plgpu.Layout.WGMMA_UPCAST_4X}
"""Of numbers of so many bits that become a 16-bit left operand: each thread reads whole words."""


COPY_REGISTERS, COMPUTE_REGISTERS = 40, 232
"""Of each thread of a warpgroup that copies, and of two that compute: together a core's."""

SWIZZLED_ROWS = 8
"""Rows over which the order of `swizzled` memory repeats."""


def swizzled(width: int, bits: int) -> tuple[Any, ...]:
    """How shared memory orders rows of `width` numbers, so that no two threads wait for a bank.

    A copy to it must begin at a row that SWIZZLED_ROWS divides, of an array whose rows it divides:
    a GPU reads zeros otherwise, and the interpreter does not show it.
    """
    swizzle = plgpu.find_swizzle(width * bits)
    return (
        plgpu.TilingTransform((SWIZZLED_ROWS, 8 * swizzle // bits)),
        plgpu.SwizzleTransform(swizzle),
    )


def pad_rows(x: jax.Array, axis: int, block: int, target: Target) -> jax.Array:
    """x with rows of zeros up to a multiple of SWIZZLED_ROWS, as copies of blocks of it need.

    A GPU clips a block that ends beyond an array; the interpreter would leave it out.
    """
    missing = -x.shape[axis] % (block if target.platform == "interpret" else SWIZZLED_ROWS)
    widths = [(0, missing if dim == axis else 0) for dim in range(x.ndim)]
    return jnp.pad(x, widths) if missing else x


def spread(x: jax.Array, layout: Any, target: Target) -> jax.Array:
    """x in a layout."""
    return x if target.platform == "interpret" else plgpu.layout_cast(x, layout)


def read(
    ref: Any, layout: Any, target: Target, *, start: Any = 0, rows: int | None = None
) -> jax.Array:
    """Rows of shared memory from `start` on, or all, in a layout."""
    size: int = rows or ref.shape[0]
    if target.platform == "interpret":
        return lax.dynamic_slice_in_dim(ref[...], start, size)
    part = ref if size == ref.shape[0] else ref.at[pl.ds(start, size)]
    whole = {"idx": ()} if jax.__version_info__ < (0, 11) else {}
    # What isn't swizzled is a row or column of numbers, of which each thread reads a few.
    is_operand = len(ref.shape) > 1
    return plgpu.load(part, **whole, layout=layout, optimized=is_operand)


def write_transposed(ref_NM: Any, values_MN: jax.Array, target: Target) -> None:
    """Writes the transpose of values that are spread as sums to shared memory.

    Not swizzled, where each row can be copied on by itself; threads wait for banks.
    """
    if target.platform == "interpret":
        ref_NM[...] = values_MN.T
        return
    values_MN = plgpu.layout_cast(values_MN, plgpu.Layout.WGMMA_TRANSPOSED)
    if hasattr(plgpu, "store"):  # from jax 0.12 on
        plgpu.store(ref_NM.T, values_MN, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        ref_NM.T[...] = values_MN


def product(
    a_MK: Any, b_NK: Any, target: Target, meanwhile: Callable[[], None] = lambda: None
) -> jax.Array:
    """a b^T, float32 [M, N].

    Args:
      a_MK: an array spread as sums, or a ref.
      b_NK: a ref.
      meanwhile: done once the product has begun, before its result is waited for.
    """
    if target.platform == "interpret":
        meanwhile()
        return _dot(a_MK[...], b_NK[...].T)

    def multiply(sums):
        plgpu.wgmma(sums, a_MK, b_NK.T)
        meanwhile()
        return sums[...]

    return pl.run_scoped(
        multiply, plgpu.WGMMAAccumulatorRef((a_MK.shape[0], b_NK.shape[0]), jnp.float32)
    )


def add_product(sums_MN: jax.Array, a_MK: jax.Array, b_KN: Any, target: Target) -> jax.Array:
    """sums + a b, float32 [M, N], of an array and a ref."""
    if target.platform == "interpret":
        return sums_MN + _dot(a_MK, b_KN[...])

    def multiply(sums):
        plgpu.wgmma(sums, a_MK, b_KN)

    sums: Any = plgpu.WGMMAAccumulatorRef.init(sums_MN)
    return pl.run_state(multiply)(sums)


def sum_of_products(
    num_steps: Any,
    operands: Callable[[Any], tuple[Any, Any]],
    release: Callable[[Any], None],
    shape: tuple[int, int],
    target: Target,
    *,
    transpose: bool = False,
    meanwhile: Callable[[], Any] = lambda: None,
) -> tuple[jax.Array, Any]:
    """The sum over steps of their a b, float32 [M, N], and what `meanwhile` returned.

    With `transpose`, of their a b^T. The sums stay in registers, and a step's product runs while
    the next one starts.

    Args:
      operands: waits for a step's refs and returns them, of a [M, K] and b [K, N] or [N, K].
      release: called in turn for each step once its refs have been read, by products alone.
      meanwhile: done while the last product runs.
    """

    def release_before(k):
        pl.when(k > 0)(lambda: release(k - 1))

    if target.platform == "interpret":

        def add(k, sums_MN):
            a_MK, b = operands(k)
            sums_MN += _dot(a_MK[...], b[...].T if transpose else b[...])
            release_before(k)
            return sums_MN

        sums_MN = lax.fori_loop(0, num_steps, add, jnp.zeros(shape, jnp.float32))
        release_before(num_steps)
        return sums_MN, meanwhile()

    def add_all(sums):
        def start(k, _):
            a_MK, b = operands(k)
            plgpu.wgmma(sums, a_MK, b.T if transpose else b)
            plgpu.wgmma_wait(1)  # all but this one
            release_before(k)

        lax.fori_loop(0, num_steps, start, None)
        found = meanwhile()
        plgpu.wgmma_wait(0)
        release_before(num_steps)
        return sums[...], found

    return pl.run_scoped(add_all, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


# --- Copies ahead of the computation -------------------------------------------------------------


class Ring(NamedTuple):
    """Slots of shared memory which one warpgroup fills in turn, and others read and give back.

    Both count steps from the start of the kernel on: step i has slot i modulo their number.
    """

    filled: Any
    """Barriers, one per slot, which the copies arrive at."""
    free: Any
    """Barriers, one per slot, which the readers arrive at."""

    def slot(self, step: Any) -> jax.Array:
        return lax.rem(step, jnp.int32(self.filled.shape[0]))


def barriers(num_slots: int, num_copies: int, num_readers: int) -> Ring:
    """A Ring for a kernel's scratch; a slot is filled by num_copies copies."""
    filled = plgpu.Barrier(num_arrivals=num_copies, num_barriers=num_slots)
    return Ring(filled, plgpu.Barrier(num_arrivals=num_readers, num_barriers=num_slots))


def fill(ring: Ring, step: Any, copies: Iterable[tuple[Any, Any]]) -> None:
    """Starts copies from global memory to their refs of slots, once the step's slot is free."""
    slot = ring.slot(step)

    @pl.when(step >= ring.filled.shape[0])
    def _wait():
        plgpu.barrier_wait(ring.free.at[slot])

    for source, slots in copies:
        plgpu.copy_gmem_to_smem(source, slots.at[slot], ring.filled.at[slot])


def wait_filled(ring: Ring, step: Any) -> jax.Array:
    """Returns the step's slot when its copies are there; the reader ends with `give_back`."""
    slot = ring.slot(step)
    plgpu.barrier_wait(ring.filled.at[slot])
    return slot


def give_back(ring: Ring, slot: jax.Array, *, threads_read: bool = True) -> None:
    """Lets the slot be filled again.

    Args:
      threads_read: whether threads have read it themselves, not only products, which have ended.
    """
    if threads_read:
        plgpu.commit_smem()  # what they have read is ordered before the next copy
    plgpu.barrier_arrive(ring.free.at[slot])


def wait_free(ring: Ring, num_steps: jax.Array) -> None:
    """Waits until all slots are given back, after the last of num_steps steps."""

    def wait(step, _):
        plgpu.barrier_wait(ring.free.at[ring.slot(step)])

    lax.fori_loop(jnp.maximum(num_steps - ring.filled.shape[0], 0), num_steps, wait, None)


def _dot(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
    return lax.dot(a_MK, b_KN, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
