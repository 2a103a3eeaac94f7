"""Named shapes that the tests and the benchmarks of products with quantised weights share."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    rows: int
    d_in: int
    d_out: int
    group_sizes: tuple[int, ...]
    block_size: int = 128
    scale_dtype: str = "float32"


CASES = {
    "one_row": Case(rows=1, d_in=256, d_out=64, group_sizes=(1,)),
    "one_group": Case(rows=5, d_in=128, d_out=32, group_sizes=(5,)),
    "small_blocks": Case(rows=7, d_in=96, d_out=48, group_sizes=(7,), block_size=32),
    "bfloat16_scales": Case(
        rows=3, d_in=64, d_out=16, group_sizes=(3,), block_size=32, scale_dtype="bfloat16"
    ),
    "skewed": Case(rows=50, d_in=128, d_out=80, group_sizes=(1, 0, 11, 30), block_size=64),
    "rows_past_the_end": Case(rows=20, d_in=64, d_out=32, group_sizes=(9, 2), block_size=8),
    "no_rows_used": Case(rows=4, d_in=64, d_out=16, group_sizes=(0, 0), block_size=64),
    # More rows than a float block (240), more inputs than one (256), odd panels.
    "through_floats": Case(rows=300, d_in=1024, d_out=112, group_sizes=(250, 50)),
}
