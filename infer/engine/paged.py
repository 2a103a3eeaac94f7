"""An engine's programs for a model whose experts are paged: a step begins and ends as of any other
model, and between the two runs layer by layer (infer/expert_paging.py)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from configs.checks import require
from infer import steps
from infer.choice import Logprobs, score_tokens
from infer.engine.options import EngineOptions
from infer.expert_cache import PagingCounts
from infer.expert_paging import PagedModel
from infer.model_draft import ModelDraft
from infer.ngram_draft import NgramDraft
from infer.speculative import VerifiedDraft, begin_verify, end_verify
from infer.steps import Pieces, StateSize
from model.model_state import ModelState, with_pages_of
from model.step import make_step

_begin_mixed = jax.jit(steps.begin_mixed, donate_argnums=1)
_end_mixed = jax.jit(steps.end_mixed)
_begin_rows = jax.jit(steps.begin_rows, static_argnums=(0, 1))
_end_rows = jax.jit(steps.end_rows, static_argnums=0)
_begin_decode = jax.jit(steps.begin_decode)
_whole = jax.jit(partial(make_step, is_whole=True))
_begin_verify = jax.jit(begin_verify, donate_argnums=2)
_end_verify = jax.jit(end_verify, static_argnums=(0, 9), donate_argnums=5)


class PagedPrograms:
    """See Programs."""

    def __init__(self, paged: PagedModel) -> None:
        self.paged, self.model, self.variables = paged, paged.model, paged.outside
        self.are_kept = False

    def check(self, options: EngineOptions, mesh: Mesh | None) -> None:
        """
        Raises:
          UserError: what needs all layers in one program, or several devices.
        """
        require(
            mesh is None,
            "experts are paged on one device, and there is a mesh: leave the mesh or resident "
            "experts out",
        )
        require(
            options.exit_threshold is None,
            "exit_threshold leaves a program of all layers, and with paged experts each has one of "
            "its own: leave exit_threshold or resident experts out",
        )
        draft = options.draft
        require(
            draft is None or isinstance(draft, NgramDraft | ModelDraft),
            f"draft={type(draft).__name__} runs layers of the model by themselves, which paged "
            "experts don't: draft with ngram or a smaller model, or leave resident experts out",
        )

    def read_mixed(
        self,
        pieces: Pieces,
        state: ModelState,
        tables_RN: Any,
        preference: Any,
        with_experts: bool = False,
    ) -> Any:
        step, state = _begin_mixed(pieces, state, tables_RN, preference)
        hidden_1TD, state, chosen = self.paged.run(step, state, with_experts)
        return *_end_mixed(hidden_1TD, pieces), state, chosen

    def read_rows(
        self,
        size: StateSize,
        tokens_BL: Any,
        positions_BL: Any,
        rows_B: Any,
        is_first_B: Any,
        state: ModelState,
        tables_RN: Any,
        preference: Any,
        with_experts: bool = False,
    ) -> Any:
        rest = (tokens_BL, positions_BL, rows_B, is_first_B, state, tables_RN, preference)
        step, own = _begin_rows(self.model, size, *rest)
        hidden_BLD, own, chosen = self.paged.run(step, own, with_experts)
        state = with_pages_of(state, own)  # those that it had are gone: the step wrote to them
        return *_end_rows(size, hidden_BLD, positions_BL, rows_B, state, own), chosen

    def decode(
        self,
        token_R: Any,
        position_R: Any,
        state: ModelState,
        tables_RN: Any,
        preference: Any,
        with_experts: bool = False,
    ) -> Any:
        step = _begin_decode(token_R, position_R, tables_RN, preference)
        hidden_R1D, state, chosen = self.paged.run(step, state, with_experts)
        return self.logits(hidden_R1D[:, 0]), state, chosen

    def verify(
        self,
        tokens_RN: Any,
        positions_RN: Any,
        state: ModelState,
        tables_RP: Any,
        preference: Any,
        *rest: Any,
    ) -> VerifiedDraft:
        *choice, with_experts, with_hidden = rest
        step, state = _begin_verify(tokens_RN, positions_RN, state, tables_RP, preference)
        hidden_RND, state, chosen = self.paged.run(step, state, with_experts)
        made = _end_verify(self.model, self.variables, hidden_RND, step, *choice, with_hidden)
        return made._replace(state=state, chosen=chosen)

    def logits(self, hidden_RD: jax.Array) -> jax.Array:
        return steps.logits_of(self.model, self.variables, hidden_RD)

    def score(self, hidden_TD: jax.Array, next_T: Any) -> Logprobs:
        return score_tokens(self.model, self.variables, hidden_TD, next_T)

    def weights(self) -> Any:
        return self.paged.weights()

    def warm_ups(self) -> list[Callable[[], None]]:
        return [self.paged.fill]

    def hidden(self, tokens_BL: Any, positions_BL: Any) -> jax.Array:
        return self.paged.run(_whole(tokens_BL, positions_BL), None)[0]

    def paging(self) -> PagingCounts:
        return self.paged.counts()
