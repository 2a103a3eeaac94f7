"""Named shapes that the tests, the compile checks and the benchmarks of grouped_matmul share."""

from dataclasses import dataclass
from typing import Literal

from kernels.quantize import Format


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


@dataclass(frozen=True, kw_only=True)
class CompiledCase:
    """A call of a real model's size, for the GPU compiler alone; rows are spread over all groups.

    Widths and experts are DeepSeek-V2-Lite's: 2048 and 1408, 64 experts.
    """

    rows: int
    d_in: int = 2048
    d_out: int = 1408
    num_groups: int = 64
    format: Format | Literal["bf16", "float32"] = "bf16"
    """Of the weights; float32 of the rows, too, which are bfloat16 elsewhere."""
    fp8_rows: bool = False
    """Rows in fp8, which Hopper multiplies."""
    contraction: Literal["forward", "gradient_x", "gradient_w"] = "forward"
    compiler: Literal["triton", "mosaic"] = "triton"
    """Mosaic is for Hopper alone."""
    gated: bool = False
    gathered: bool = False
    most_traffic: float = 1.15
    """Times the least bytes, by compile_checks/traffic.py."""


DECODE, FEW, SOME, PREFILL = 8 * 64, 32 * 64, 128 * 64, 1024 * 64
"""Rows; each has other tiles."""
SONIC = 8 * 32_768

COMPILED = {
    "bf16_decode": CompiledCase(rows=DECODE),
    "bf16_few": CompiledCase(rows=FEW),
    "bf16_some": CompiledCase(rows=SOME),
    "bf16_prefill": CompiledCase(rows=PREFILL),
    "bf16_down": CompiledCase(rows=PREFILL, d_in=1408, d_out=2048),
    "bf16_gathered": CompiledCase(rows=PREFILL, gathered=True),
    "bf16_swiglu_decode": CompiledCase(rows=DECODE, gated=True),
    "bf16_swiglu_some": CompiledCase(rows=SOME, gated=True),
    "bf16_swiglu_prefill": CompiledCase(rows=PREFILL, gated=True, gathered=True),
    "bf16_gradient_x": CompiledCase(rows=PREFILL, contraction="gradient_x"),
    "bf16_gradient_w": CompiledCase(rows=PREFILL, contraction="gradient_w"),
    # An expert's rows are 29 MB and its matrix 117 MB. The grid's waves and the experts don't begin
    # together, so that an expert's rows are read in two waves, and L2 can't hold them in between.
    "mixtral_down": CompiledCase(
        rows=8192, d_in=14_336, d_out=4096, num_groups=8, most_traffic=1.2
    ),
    "mixtral_gradient_x": CompiledCase(
        rows=8192,
        d_in=4096,
        d_out=14_336,
        num_groups=8,
        contraction="gradient_x",
        most_traffic=1.2,
    ),
    "mixtral_gradient_w": CompiledCase(
        rows=16_384, d_in=4096, d_out=14_336, num_groups=8, contraction="gradient_w"
    ),
    # SonicMoE's and tokamax' published shapes, and OLMoE's, whose layer gpu-report trains.
    "sonic_up": CompiledCase(rows=SONIC, d_in=4096, d_out=1024, num_groups=128, gated=True),
    "sonic_down": CompiledCase(rows=SONIC, d_in=1024, d_out=4096, num_groups=128),
    "sonic_gradient_x": CompiledCase(
        rows=SONIC, d_in=1024, d_out=4096, num_groups=128, contraction="gradient_x"
    ),
    "sonic_gradient_w": CompiledCase(
        rows=SONIC, d_in=1024, d_out=4096, num_groups=128, contraction="gradient_w"
    ),
    "mixtral_up": CompiledCase(rows=8192, d_in=4096, d_out=14_336, num_groups=8),
    "olmoe": CompiledCase(rows=2048 * 64, d_in=2048, d_out=2048),
    "olmoe_gradient_x": CompiledCase(
        rows=2048 * 64, d_in=2048, d_out=2048, contraction="gradient_x"
    ),
    "olmoe_gradient_w": CompiledCase(
        rows=2048 * 64, d_in=2048, d_out=2048, contraction="gradient_w"
    ),
    "float32_prefill": CompiledCase(rows=PREFILL, format="float32"),
    "int8_decode": CompiledCase(rows=DECODE, format="int8"),
    "int8_few": CompiledCase(rows=FEW, format="int8"),
    "int8_prefill": CompiledCase(rows=PREFILL, format="int8"),
    "int8_swiglu_decode": CompiledCase(rows=DECODE, format="int8", gated=True),
    "int8_swiglu_prefill": CompiledCase(rows=PREFILL, format="int8", gated=True, gathered=True),
    "int8_gradient_x": CompiledCase(rows=PREFILL, format="int8", contraction="gradient_x"),
    "int4_decode": CompiledCase(rows=DECODE, format="int4"),
    "int4_prefill": CompiledCase(rows=PREFILL, format="int4"),
    "int4_swiglu_decode": CompiledCase(rows=DECODE, format="int4", gated=True),
    "int4_swiglu_prefill": CompiledCase(rows=PREFILL, format="int4", gated=True, gathered=True),
    "int4_gradient_x": CompiledCase(rows=PREFILL, format="int4", contraction="gradient_x"),
    "fp8_decode": CompiledCase(rows=DECODE, format="fp8_e4m3"),
    "fp8_prefill": CompiledCase(rows=PREFILL, format="fp8_e4m3"),
    "fp8_swiglu_decode": CompiledCase(rows=DECODE, format="fp8_e4m3", gated=True),
    "fp8_swiglu_prefill": CompiledCase(rows=PREFILL, format="fp8_e4m3", gated=True, gathered=True),
    "fp8_rows_decode": CompiledCase(rows=DECODE, format="fp8_e4m3", fp8_rows=True),
    "fp8_rows_prefill": CompiledCase(rows=PREFILL, format="fp8_e4m3", fp8_rows=True),
    "fp8_rows_swiglu": CompiledCase(
        rows=PREFILL, format="fp8_e4m3", fp8_rows=True, gated=True, gathered=True
    ),
    "fp8_gradient_x": CompiledCase(rows=PREFILL, format="fp8_e4m3", contraction="gradient_x"),
    "mosaic_bf16_prefill": CompiledCase(rows=PREFILL, compiler="mosaic"),
    "mosaic_bf16_down": CompiledCase(rows=PREFILL, d_in=1408, d_out=2048, compiler="mosaic"),
    "mosaic_sonic_down": CompiledCase(
        rows=SONIC, d_in=1024, d_out=4096, num_groups=128, compiler="mosaic"
    ),
    "mosaic_olmoe": CompiledCase(rows=2048 * 64, d_in=2048, d_out=2048, compiler="mosaic"),
    "mosaic_olmoe_gradient_x": CompiledCase(
        rows=2048 * 64, d_in=2048, d_out=2048, contraction="gradient_x", compiler="mosaic"
    ),
    "mosaic_int8_decode": CompiledCase(rows=DECODE, format="int8", compiler="mosaic"),
    "mosaic_int8_few": CompiledCase(rows=FEW, format="int8", compiler="mosaic"),
    "mosaic_int8_some": CompiledCase(rows=SOME, format="int8", compiler="mosaic"),
    "mosaic_int8_prefill": CompiledCase(rows=PREFILL, format="int8", compiler="mosaic"),
    "mosaic_int8_swiglu_decode": CompiledCase(
        rows=DECODE, format="int8", gated=True, compiler="mosaic"
    ),
    "mosaic_int8_swiglu_few": CompiledCase(rows=FEW, format="int8", gated=True, compiler="mosaic"),
    "mosaic_int8_swiglu_prefill": CompiledCase(
        rows=PREFILL, format="int8", gated=True, gathered=True, compiler="mosaic"
    ),
    "mosaic_int4_decode": CompiledCase(rows=DECODE, format="int4", compiler="mosaic"),
    "mosaic_int4_prefill": CompiledCase(rows=PREFILL, format="int4", compiler="mosaic"),
    "mosaic_int4_swiglu_decode": CompiledCase(
        rows=DECODE, format="int4", gated=True, compiler="mosaic"
    ),
    "mosaic_int4_swiglu_prefill": CompiledCase(
        rows=PREFILL, format="int4", gated=True, gathered=True, compiler="mosaic"
    ),
    "mosaic_fp8_decode": CompiledCase(rows=DECODE, format="fp8_e4m3", compiler="mosaic"),
    "mosaic_fp8_prefill": CompiledCase(rows=PREFILL, format="fp8_e4m3", compiler="mosaic"),
    "mosaic_fp8_swiglu_decode": CompiledCase(
        rows=DECODE, format="fp8_e4m3", gated=True, compiler="mosaic"
    ),
    "mosaic_fp8_swiglu_prefill": CompiledCase(
        rows=PREFILL, format="fp8_e4m3", gated=True, gathered=True, compiler="mosaic"
    ),
}
