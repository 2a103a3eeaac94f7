"""Named shapes that the tests, the compile checks and the benchmarks of paged attention share."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Case:
    lengths: tuple[int, ...]
    page_size: int = 16
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 16
    window_size: int | None = None
    num_sink_tokens: int = 0


CASES = {
    "ragged": Case(lengths=(1, 47, 0, 16, 17)),
    "window": Case(lengths=(70, 15, 33), window_size=20),
    "sinks": Case(lengths=(96, 20, 4), window_size=18, num_sink_tokens=3),
    "multi_query": Case(lengths=(40, 9), num_kv_heads=1),
}


@dataclass(frozen=True, kw_only=True)
class CompiledCase:
    """A call of a real model's size, for the GPU compiler alone."""

    batch: int = 64
    max_pages: int = 128
    page_size: int = 64
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    pages: Literal["bfloat16", "int8"] = "bfloat16"
    window_size: int | None = None
    num_sink_tokens: int = 0

    @property
    def num_pages(self) -> int:
        """No sequence shares one."""
        return self.batch * self.max_pages


COMPILED = {
    "full": CompiledCase(),
    "window": CompiledCase(window_size=1024, num_sink_tokens=4),
    "narrow": CompiledCase(head_dim=64, page_size=32, batch=4),
    "int8": CompiledCase(pages="int8"),
    "int8_window": CompiledCase(pages="int8", window_size=1024, num_sink_tokens=4),
    "int8_narrow": CompiledCase(pages="int8", head_dim=64, page_size=32, batch=4),
}


@dataclass(frozen=True, kw_only=True)
class LatentCase:
    """Of paged_latent_attention, with widths for the tests."""

    lengths: tuple[int, ...]
    page_size: int = 64
    num_heads: int = 6
    latent_rank: int = 32
    rope_head_dim: int = 16
    window_size: int | None = None
    num_sink_tokens: int = 0


LATENT_CASES = {
    "ragged": LatentCase(lengths=(1, 70, 0, 64, 33)),
    "window": LatentCase(lengths=(150, 31, 66), window_size=40),
    "sinks": LatentCase(lengths=(190, 20, 4), window_size=18, num_sink_tokens=35),
    "many_heads": LatentCase(lengths=(40, 9), num_heads=80, page_size=16),
}


@dataclass(frozen=True, kw_only=True)
class CompiledLatentCase:
    """DeepSeek's widths: 128 heads of V2 and V3, 16 of V2-Lite."""

    batch: int = 64
    max_pages: int = 128
    page_size: int = 64
    num_heads: int = 128
    latent_rank: int = 512
    rope_head_dim: int = 64
    nope_head_dim: int = 128
    pages: Literal["bfloat16", "int8"] = "bfloat16"
    """Of the latents; rotary keys are bfloat16."""
    window_size: int | None = None
    num_sink_tokens: int = 0

    @property
    def num_pages(self) -> int:
        """No sequence shares one."""
        return self.batch * self.max_pages


COMPILED_LATENT = {
    "full": CompiledLatentCase(),
    "window": CompiledLatentCase(window_size=4096, num_sink_tokens=4),
    "few_heads": CompiledLatentCase(num_heads=16),
    "int8": CompiledLatentCase(pages="int8"),
    "int8_few_heads": CompiledLatentCase(pages="int8", num_heads=16),
}
