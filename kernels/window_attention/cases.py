"""Named shapes that the tests, the compile checks and the benchmarks of window_attention share."""

from dataclasses import dataclass
from typing import Literal


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
    num_sink_tokens: int = 0


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
    "sinks": Case(length=300, documents=(300,), window_size=50, num_sink_tokens=4),
    "sinks_packed": Case(
        length=320, documents=(2, 100, 180, 38), window_size=33, num_sink_tokens=4
    ),
    "sinks_exceed_window": Case(length=200, documents=(200,), window_size=3, num_sink_tokens=9),
}


@dataclass(frozen=True, kw_only=True)
class CompiledCase:
    """A call of a real model's size, for the GPU compiler alone."""

    head_dim: int = 128
    value_dim: int | None = None
    """None: head_dim."""
    num_heads: int = 16
    num_kv_heads: int = 4
    length: int = 4096
    window_size: int | None = 1024
    num_sink_tokens: int = 4
    sink_logits: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    kernel: Literal["forward", "gradient_q", "gradient_kv"] = "forward"
    compiler: Literal["triton", "mosaic"] = "triton"
    """Mosaic is for Hopper alone."""
    most_traffic: float = 1.15
    """Times the least bytes, by compile_checks/attention_traffic.py."""
    most_spilled: int = 0
    """Bytes that registers may spill to memory, where no version without was as fast on a GPU."""


LONG = {"length": 16_384, "window_size": None, "num_sink_tokens": 0, "most_traffic": 3.0}
"""Each byte takes part in thousands of products: reading it again costs nothing."""

COMPILED = {
    "causal": CompiledCase(window_size=None, num_sink_tokens=0),
    "long": CompiledCase(num_heads=32, num_kv_heads=8, **LONG),
    "long_gradient_q": CompiledCase(kernel="gradient_q", **LONG),
    "long_gradient_kv": CompiledCase(kernel="gradient_kv", most_spilled=96, **LONG),
    "window": CompiledCase(num_sink_tokens=0),
    "sinks": CompiledCase(),
    "narrow": CompiledCase(head_dim=64, sink_logits=True),
    "ragged": CompiledCase(length=4001),
    "latent": CompiledCase(
        head_dim=192, value_dim=128, num_kv_heads=16, window_size=None, num_sink_tokens=0
    ),
    "float32": CompiledCase(head_dim=64, dtype="float32"),
    "float32_gradient_q": CompiledCase(head_dim=64, dtype="float32", kernel="gradient_q"),
    "float32_gradient_kv": CompiledCase(head_dim=64, dtype="float32", kernel="gradient_kv"),
    "sinks_gradient_q": CompiledCase(kernel="gradient_q"),
    "sinks_gradient_kv": CompiledCase(kernel="gradient_kv", most_spilled=96),
    "narrow_gradient_q": CompiledCase(head_dim=64, kernel="gradient_q"),
    "narrow_gradient_kv": CompiledCase(head_dim=64, kernel="gradient_kv", most_spilled=96),
    "ragged_gradient_kv": CompiledCase(length=4001, kernel="gradient_kv", most_spilled=96),
    "latent_gradient_q": CompiledCase(
        head_dim=192, value_dim=128, num_kv_heads=16, num_sink_tokens=0, kernel="gradient_q"
    ),
    "latent_gradient_kv": CompiledCase(
        head_dim=192, value_dim=128, num_kv_heads=16, num_sink_tokens=0, kernel="gradient_kv"
    ),
    "mosaic_causal": CompiledCase(window_size=None, num_sink_tokens=0, compiler="mosaic"),
    "mosaic_long": CompiledCase(num_heads=32, num_kv_heads=8, compiler="mosaic", **LONG),
    "mosaic_sinks": CompiledCase(compiler="mosaic", most_spilled=8),
    "mosaic_narrow": CompiledCase(head_dim=64, sink_logits=True, compiler="mosaic"),
    "mosaic_ragged": CompiledCase(length=4001, sink_logits=True, compiler="mosaic", most_spilled=8),
    "mosaic_narrow_values": CompiledCase(value_dim=64, compiler="mosaic"),
}
