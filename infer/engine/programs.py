"""What an engine runs: the model's programs, with the arrays that they take first."""

from dataclasses import dataclass
from typing import Any, Protocol

from jax.sharding import Mesh

from infer import steps
from infer.engine.options import EngineOptions
from infer.expert_cache import PagingCounts
from infer.speculative import VerifiedDraft, verify
from infer.steps import StateSize
from model.transformer import Transformer, Variables


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

    def read_mixed(self, *given: Any) -> Any: ...

    def read_rows(self, size: StateSize, *given: Any) -> Any: ...

    def decode(self, *given: Any) -> Any: ...

    def verify(self, *given: Any) -> VerifiedDraft: ...

    def weights(self) -> Any:
        """All that is the model's, to be told from others by."""
        ...

    def warm_up(self) -> None:
        """Runs what else there is to compile."""
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

    def read_mixed(self, *given: Any) -> Any:
        return steps.read_mixed(self.model, self.variables, *given)

    def read_rows(self, size: StateSize, *given: Any) -> Any:
        return steps.read_rows(self.model, size, self.variables, *given)

    def decode(self, *given: Any) -> Any:
        return steps.decode(self.model, self.variables, *given)

    def verify(self, *given: Any) -> VerifiedDraft:
        return verify(self.model, self.variables, *given)

    def weights(self) -> Variables:
        return self.variables

    def warm_up(self) -> None:
        pass

    def paging(self) -> None:
        return None
