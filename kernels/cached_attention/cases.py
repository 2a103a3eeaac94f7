"""Named calls that the tests of cached attention, and the compile checks, share."""

from dataclasses import dataclass, replace
from typing import Literal

from kernels.cached_attention.state import Options


@dataclass(frozen=True, kw_only=True)
class Case:
    lengths: tuple[int, ...]
    """Positions that each row holds."""
    tokens: tuple[tuple[int, int, int], ...]
    """(row, first position, count) of the tokens that ask, in their order; row -1: padding."""
    slots: int | None = None
    """Of each row: where a row has more positions, it holds the sinks and the newest."""
    page_size: int | None = None
    """Pages instead of slots."""
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 16
    value_width: int | None = None
    """None: head_dim."""
    is_latent: bool = False
    """Values are entries of the keys."""
    window_size: int | None = None
    num_sink_tokens: int = 0
    has_sink_logits: bool = False
    scale: float | None = None
    score_cap: float | None = None
    chunk_size: int | None = None
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Of the state."""
    scale_dtype: Literal["float32", "bfloat16"] = "float32"


DECODED = ((0, 0, 1), (1, 46, 1), (2, 299, 1), (3, 64, 1))
MIXED = ((2, 299, 1), (-1, 0, 2), (1, 30, 17), (0, 0, 1), (-1, 0, 1), (3, 25, 40), (1, 3, 1))
LENGTHS = (1, 47, 300, 65)

XLA_CASES = {
    "capped": Case(
        lengths=LENGTHS, tokens=MIXED, slots=85, window_size=40, num_sink_tokens=5, score_cap=0.7
    ),
    "capped_pages": Case(lengths=LENGTHS, tokens=DECODED, page_size=16, score_cap=0.7),
    "chunks": Case(lengths=LENGTHS, tokens=MIXED, slots=301, chunk_size=24),
    "chunks_of_pages": Case(lengths=LENGTHS, tokens=MIXED, page_size=16, chunk_size=24),
}
"""What "reference" and "xla" alone can do."""

CASES = {
    "decode": Case(lengths=LENGTHS, tokens=DECODED, slots=320),
    "chunk": Case(lengths=(150,), tokens=((0, 50, 100),), slots=150),
    "mixed": Case(lengths=LENGTHS, tokens=MIXED, slots=301),
    "long": Case(
        lengths=(1500, 700),
        tokens=((0, 1490, 10), (1, 699, 1)),
        slots=1600,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
    ),
    "empty_row": Case(lengths=(0, 9), tokens=((0, 3, 2), (1, 8, 1)), slots=12),
    "paged": Case(lengths=LENGTHS, tokens=MIXED, page_size=16),
    "odd_pages": Case(lengths=LENGTHS, tokens=MIXED, page_size=7, head_dim=17, value_width=5),
    "ring": Case(lengths=LENGTHS, tokens=MIXED, slots=80, window_size=40),
    "ring_sinks": Case(lengths=LENGTHS, tokens=MIXED, slots=85, window_size=40, num_sink_tokens=5),
    "wide_sinks": Case(
        lengths=(200,), tokens=((0, 5, 195),), slots=200, window_size=3, num_sink_tokens=9
    ),
    "paged_window": Case(lengths=LENGTHS, tokens=MIXED, page_size=32, window_size=33),
    "sink_logits": Case(lengths=LENGTHS, tokens=MIXED, slots=300, has_sink_logits=True),
    "multi_head": Case(lengths=LENGTHS, tokens=MIXED, slots=300, num_kv_heads=6),
    "multi_query": Case(lengths=(70,), tokens=((0, 60, 10),), page_size=8, num_kv_heads=1),
    "bfloat16": Case(lengths=LENGTHS, tokens=MIXED, slots=300, dtype="bfloat16"),
    "int8": Case(lengths=LENGTHS, tokens=MIXED, slots=300, dtype="int8"),
    "paged_int8": Case(
        lengths=LENGTHS, tokens=MIXED, page_size=16, dtype="int8", scale_dtype="bfloat16"
    ),
    "latent": Case(
        lengths=LENGTHS,
        tokens=MIXED,
        slots=310,
        num_heads=20,
        num_kv_heads=1,
        head_dim=40,
        value_width=32,
        is_latent=True,
        scale=0.2,
    ),
    "many_heads": Case(
        lengths=(90,),
        tokens=((0, 85, 5),),
        slots=90,
        num_heads=400,
        num_kv_heads=2,
        value_width=3,
    ),
    "latent_int8": Case(
        lengths=LENGTHS,
        tokens=DECODED,
        page_size=16,
        num_heads=5,
        num_kv_heads=1,
        head_dim=40,
        value_width=32,
        is_latent=True,
        dtype="int8",
    ),
}


@dataclass(frozen=True, kw_only=True)
class CompiledCase:
    """A call of a real model's size, for the GPU compiler alone."""

    num_tokens: int = 512
    num_rows: int = 64
    length: int = 8192
    """Slots of a row, or positions of its pages."""
    page_size: int | None = None
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    value_width: int | None = None
    """Of a latent state; None: its values are apart."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    is_int8: bool = False
    window_size: int | None = None
    num_sink_tokens: int = 0
    one_per_row: bool = False

    @property
    def options(self) -> Options:
        return Options(
            window_size=self.window_size,
            num_sink_tokens=self.num_sink_tokens,
            scale=self.head_dim**-0.5,
            value_width=self.value_width or self.head_dim,
            one_per_row=self.one_per_row,
        )


DEEPSEEK = CompiledCase(num_heads=128, num_kv_heads=1, head_dim=576, value_width=512)

COMPILED = {
    "slots": CompiledCase(),
    "slots_decode": CompiledCase(num_tokens=64, one_per_row=True),
    "few_tokens": CompiledCase(num_tokens=4, num_rows=1),
    "prompt": CompiledCase(num_rows=1),
    "prompt_paged": CompiledCase(num_rows=1, page_size=64),
    "ring": CompiledCase(length=1088, window_size=1024, num_sink_tokens=4, head_dim=64),
    "paged": CompiledCase(page_size=64),
    "paged_decode": CompiledCase(page_size=64, num_tokens=64),
    "paged_int8": CompiledCase(page_size=64, is_int8=True),
    "paged_int8_decode": CompiledCase(page_size=64, is_int8=True, num_tokens=64),
    "latent": replace(DEEPSEEK, page_size=64),
    "latent_int8": replace(DEEPSEEK, is_int8=True),
    "latent_few_tokens": replace(DEEPSEEK, page_size=64, num_heads=16, num_tokens=4, num_rows=1),
    "latent_few_heads": replace(DEEPSEEK, page_size=64, num_heads=16),
    "latent_few_heads_int8": replace(DEEPSEEK, page_size=64, num_heads=16, is_int8=True),
    "latent_few_heads_decode": replace(DEEPSEEK, page_size=64, num_heads=16, num_tokens=64),
    "latent_few_heads_int8_decode": replace(
        DEEPSEEK, page_size=64, num_heads=16, num_tokens=64, is_int8=True
    ),
    "odd_head": CompiledCase(head_dim=80, num_heads=24),
    "wide_head": CompiledCase(head_dim=256, num_kv_heads=4, page_size=64),
    "float32": CompiledCase(dtype="float32", head_dim=64),
    "float32_latent": replace(DEEPSEEK, dtype="float32", page_size=64),
}
