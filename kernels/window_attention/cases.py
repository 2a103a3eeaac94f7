"""Named shapes that the tests and the benchmarks of window_attention share."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    batch: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    documents: tuple[int, ...]
    """Lengths of the documents packed into each row; what is left of a row is padding."""
    length: int
    window_size: int | None = None
    num_sinks: int = 0


CASES = {
    "causal": Case(length=96, documents=(96,)),
    "one_row": Case(length=1, documents=(1,)),
    "multi_query": Case(length=70, documents=(70,), num_kv_heads=1),
    "packed": Case(length=200, documents=(3, 120, 1, 76)),
    "padded": Case(length=150, documents=(40, 60)),
    "window": Case(length=257, documents=(257,), window_size=65),
    "window_of_one": Case(length=130, documents=(130,), window_size=1),
    "window_at_block_edge": Case(length=256, documents=(256,), window_size=64),
    "window_beyond_length": Case(length=100, documents=(100,), window_size=500),
    "sinks": Case(length=300, documents=(300,), window_size=50, num_sinks=4),
    "sinks_packed": Case(length=320, documents=(2, 100, 180, 38), window_size=33, num_sinks=4),
    "sinks_exceed_window": Case(length=200, documents=(200,), window_size=3, num_sinks=9),
}
