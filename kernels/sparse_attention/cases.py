"""Named shapes that the tests and the benchmarks of both sparse attentions share."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    batch: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    documents: tuple[int, ...]
    """Lengths of the documents packed into each row; what is left of a row is padding."""
    length: int = 200
    window_size: int = 10
    num_sink_tokens: int = 4
    """power_attention only."""
    block_size: int = 8
    """summary_attention only."""


CASES = {
    "one_document": Case(documents=(200,)),
    "packed": Case(documents=(3, 100, 1, 96)),
    "packed_on_blocks": Case(documents=(64, 128, 8)),
    "padded": Case(documents=(40, 130)),
    "one_row": Case(length=1, documents=(1,)),
    "window_beyond_length": Case(length=70, documents=(1, 69), window_size=500),
    "sinks_exceed_window": Case(documents=(90, 110), window_size=3, num_sink_tokens=9),
    "window_of_one": Case(
        length=40, documents=(40,), window_size=1, num_sink_tokens=0, block_size=1, num_kv_heads=1
    ),
}
