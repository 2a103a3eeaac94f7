"""What an engine runs: the model's programs, with the arrays that they take first."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from infer import steps
from infer.engine.options import EngineOptions
from infer.expert_cache import PagingCounts
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
    def read_mixed(self) -> Callable[..., Any]: ...

    @property
    def read_rows(self) -> Callable[..., Any]: ...

    @property
    def decode(self) -> Callable[..., Any]: ...

    @property
    def verify(self) -> Callable[..., Any]: ...

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


@dataclass
class WholeModel:
    """One program for a step: all layers in it."""

    model: Transformer
    variables: Variables

    def check(self, options: EngineOptions, mesh: Mesh | None) -> None:
        del options, mesh

    @property
    def read_mixed(self) -> Callable[..., Any]:
        return partial(steps.read_mixed, self.model, self.variables)

    def read_rows(self, size: StateSize, *given: Any) -> Any:
        return steps.read_rows(self.model, size, self.variables, *given)

    @property
    def decode(self) -> Callable[..., Any]:
        return partial(steps.decode, self.model, self.variables)

    @property
    def verify(self) -> Callable[..., Any]:
        return partial(verify, self.model, self.variables)

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
