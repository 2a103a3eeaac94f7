"""What an engine runs: the model's programs, with the arrays that they take first."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from infer import steps
from infer.choice import Logprobs, score_tokens
from infer.engine.options import EngineOptions
from infer.expert_cache import PagingCounts
from infer.kept_programs import KeptPrograms
from infer.speculative import verify
from infer.steps import StateSize
from model.transformer import Transformer, Variables, hidden_states


class Programs(Protocol):
    """The steps of infer/steps.py and infer/speculative.py, each without model and variables, of a
    model that they run whole or layer by layer."""

    model: Transformer
    variables: Variables
    """What all layers need beside their own: embedding, last norm, output layer."""

    def check(self, options: EngineOptions, mesh: Mesh | None) -> None:
        """
        Raises:
          UserError: options that these programs can't follow.
        """
        ...

    @property
    def are_kept(self) -> bool:
        """Whether steps are programs that take arrays however they are laid out."""
        ...

    @property
    def read_mixed(self) -> Callable[..., Any]: ...

    @property
    def read_rows(self) -> Callable[..., Any]: ...

    @property
    def decode(self) -> Callable[..., Any]: ...

    @property
    def verify(self) -> Callable[..., Any]: ...

    def logits(self, hidden_RD: jax.Array) -> jax.Array:
        """Of hidden states, float32 [R, V]."""
        ...

    def score(self, hidden_TD: jax.Array, next_T: Any) -> Logprobs:
        """See infer.choice.score_tokens."""
        ...

    def weights(self) -> Any:
        """All that is the model's, to be told from others by."""
        ...

    def warm_ups(self) -> list[Callable[[], None]]:
        """What else there is to compile."""
        ...

    def hidden(self, tokens_BL: Any, positions_BL: Any) -> jax.Array:
        """What the output layer reads of whole texts, [B, L, D]; no state is kept."""
        ...

    def paging(self) -> PagingCounts | None:
        """Of experts that are brought; None: all are there."""
        ...


class WholeModel:
    """One program for a step: all layers in it."""

    def __init__(self, model: Transformer, variables: Variables) -> None:
        self.model, self.variables = model, variables
        self._kept = KeptPrograms(variables)

    def check(self, options: EngineOptions, mesh: Mesh | None) -> None:
        del options, mesh

    @property
    def are_kept(self) -> bool:
        return self._kept.is_active

    def read_mixed(self, *given: Any) -> Any:
        return self._run(steps.read_mixed, given, 4)

    def read_rows(self, size: StateSize, *given: Any) -> Any:
        return self._run(steps.read_rows, given, 7, size)

    def decode(self, *given: Any) -> Any:
        return self._run(steps.decode, given, 5)

    def verify(self, *given: Any) -> Any:
        return self._run(verify, given, 10)

    def logits(self, hidden_RD: jax.Array) -> jax.Array:
        return self._run(steps.logits_of, (hidden_RD,), 1)

    def score(self, hidden_TD: jax.Array, next_T: Any) -> Logprobs:
        return self._run(score_tokens, (hidden_TD, next_T), 2)

    def _run(self, function: Any, given: tuple[Any, ...], count: int, *first: Any) -> Any:
        """
        Args:
          given: `count` arrays, and what the function is compiled for.
          first: what else it is compiled for, after the model.
        """
        before, after = (self.model, *first), given[count:]
        return self._kept.run(function, *given[:count], before=before, after=after)

    def weights(self) -> Variables:
        return self.variables

    def warm_ups(self) -> list[Callable[[], None]]:
        return []

    def hidden(self, tokens_BL: Any, positions_BL: Any) -> jax.Array:
        return _hidden(self.model, self.variables, tokens_BL, positions_BL)

    def paging(self) -> None:
        return None


@partial(jax.jit, static_argnums=0)
def _hidden(
    model: Transformer, variables: Variables, tokens_BL: jax.Array, positions_BL: jax.Array
) -> jax.Array:
    return hidden_states(model, variables, tokens_BL, positions_BL, is_whole=True)[0]
