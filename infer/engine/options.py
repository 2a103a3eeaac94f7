"""How an engine generates."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from configs.architecture import ModelConfig
from configs.checks import require, require_positive
from infer.model_draft import ModelDraft
from infer.mtp_draft import MtpDraft
from infer.ngram_draft import NgramDraft
from infer.self_speculative import Draft
from model.model_state import unpageable_reason


@dataclass(frozen=True)
class EngineOptions:
    """How an engine generates."""

    max_rows: int = 8
    """Sequences at once, R. The size of every step: a request's tokens are the same bit for bit,
    alone or among others, as long as it is the same (docs/inference.md)."""
    max_length: int = 1024
    """Tokens of a sequence at most, prompt and text."""
    max_prompt: int | None = None
    """Tokens of a prompt at most; None is what max_length leaves."""
    batching: Literal["continuous", "static"] = "continuous"
    """continuous: a row that is free takes the next request at once. static, to compare with: only
    when all rows are free, as many as wait."""
    piece: int = 512
    """Tokens of prompts that a step reads at most."""
    target_seconds: float | None = None
    """That a step should take: while prompts are read, fewer of their tokens are in a step, as the
    last steps show, so that the tokens of other requests come in time. None: `piece` of them."""
    block: int | None = None
    """Tokens that a program reads at once, of one prompt or of several; shorter prompts are read
    by smaller ones. A power of two; more than `piece` are never needed. None is 128 on a CPU, which
    is as fast for each token as more, and 512 elsewhere."""
    kv_dtype: str | None = None
    """Of keys and values: float32, bfloat16 or int8; None is the compute dtype."""
    num_pages: int | None = None
    """Pages that all sequences share; None gives each row max_length slots."""
    page_size: int = 64
    """Positions of a page, and the grid on which prefixes are kept."""
    prefix_cache: bool = False
    """Prompts that begin alike are read once: whole pages of a prefix are kept until the room is
    needed. Where layers keep something in rows, so is that as it was after a prefix."""
    state_bytes: int = 1 << 30
    """Of kept states at most, for models whose layers keep something in rows."""
    host_cache_bytes: int = 0
    """Of pages that gave way on the device, in the host's memory."""
    cache_dir: str | None = None
    """A folder for prefixes that outlive the process."""
    disk_cache_bytes: int = 10 << 30
    """Of its files at most."""
    keeps_experts: bool = False
    """Tells requests that ask the experts of each token, and counts the tokens of each expert."""
    exit_threshold: float | None = None
    """New tokens leave the model at the first exit this sure of the next one (infer/early_exit.py);
    prompts are read by all layers."""
    draft: Draft | NgramDraft | ModelDraft | MtpDraft | None = None
    """A Draft: the first layers draft, the others verify (infer/self_speculative.py): the same
    greedy text in fewer steps. An NgramDraft: the text's own tokens do (infer/ngram_draft.py), with
    a ModelDraft a smaller model (infer/model_draft.py), with an MtpDraft the model's own
    multi-token module (infer/mtp_draft.py), as long as it pays: the same text, sampled or not, but
    for ties in the last bit."""

    def __post_init__(self) -> None:
        require_positive(self, "max_rows", "max_length", "piece", "page_size")
        require(
            self.batching in ("continuous", "static"),
            f"batching={self.batching} must be continuous or static",
        )
        require(
            self.target_seconds is None or self.target_seconds > 0,
            f"target_seconds={self.target_seconds} must be greater than 0",
        )
        require(
            self.block is None or (self.block > 0 and self.block & (self.block - 1) == 0),
            f"block={self.block} must be a power of two",
        )
        require(
            self.kv_dtype in (None, "float32", "bfloat16", "int8"),
            f"kv={self.kv_dtype} must be float32, bfloat16 or int8",
        )
        require(
            self.num_pages is None or self.num_pages > 1,
            f"num_pages={self.num_pages} must be at least 2: page 0 belongs to nobody",
        )
        require(
            self.prefix_cache or (self.cache_dir is None and not self.host_cache_bytes),
            "cache_dir and host_cache_bytes keep prefixes, and have no effect without "
            "prefix_cache=True",
        )
        for name in ("state_bytes", "host_cache_bytes", "disk_cache_bytes"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        names = [n for n in ("exit_threshold", "draft") if getattr(self, n) is not None]
        require(len(names) < 2, f"{' and '.join(names)} can't go together: leave one out")
        require(
            not self.has_detour or self.num_pages is None,
            f"{' and '.join(names)} and num_pages can't go together: leave one out",
        )
        require(
            not self.has_detour or not self.keeps_experts,
            f"{' and '.join(names)} and keeps_experts can't go together: leave one out",
        )
        require(
            self.exit_threshold is None or not math.isnan(self.exit_threshold),
            "exit_threshold is NaN, which no confidence reaches: give a number",
        )

    @property
    def has_detour(self) -> bool:
        """Whether tokens go another way than through all layers in their order, which has no pages
        and no preferences."""
        return isinstance(self.draft, Draft) or self.exit_threshold is not None


def with_pages(options: EngineOptions, config: ModelConfig) -> EngineOptions:
    """The options with pages for all rows and half as many again, which keep prefixes; unchanged
    for a model whose state can't lie in pages, or that leaves or drafts early."""
    if options.has_detour or unpageable_reason(config) is not None:
        return options
    per_row = -(-options.max_length // options.page_size)
    kept = max(per_row * options.max_rows // 2, per_row)
    return replace(options, num_pages=per_row * options.max_rows + kept + 1)
