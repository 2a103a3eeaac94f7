"""Named shapes that the tests and the benchmarks of grouped_matmul share."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    rows: int
    d_in: int
    d_out: int
    group_sizes: tuple[int, ...]


CASES = {
    "balanced": Case(rows=96, d_in=16, d_out=24, group_sizes=(24, 24, 24, 24)),
    "skewed": Case(rows=131, d_in=16, d_out=24, group_sizes=(70, 1, 13, 47)),
    "empty_groups": Case(rows=50, d_in=16, d_out=8, group_sizes=(0, 33, 0, 17, 0)),
    "one_hot_group": Case(rows=77, d_in=8, d_out=16, group_sizes=(0, 0, 77, 0)),
    "single_rows": Case(rows=5, d_in=8, d_out=8, group_sizes=(1, 1, 1, 1, 1)),
    "rows_past_the_end": Case(rows=90, d_in=16, d_out=8, group_sizes=(10, 0, 41)),
    "no_rows_used": Case(rows=32, d_in=8, d_out=8, group_sizes=(0, 0)),
    "one_group": Case(rows=64, d_in=16, d_out=16, group_sizes=(64,)),
    "many_groups": Case(rows=300, d_in=8, d_out=8, group_sizes=(3,) * 60 + (30,) * 4),
    "tile_edges": Case(rows=768, d_in=8, d_out=8, group_sizes=(128, 127, 129, 256, 1)),
}
