"""The model as the routes see it."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from configs.checks import UserError
from data.tokenizers.infilling import find_marks
from data.tokenizers.public_tokenizer import PublicTokenizer
from infer.server.errors import ApiError, invalid
from infer.server.reply_text import END_THINK
from infer.server.token_texts import TokenTexts
from model.step import Preference

FindPreference = Callable[[Sequence[str]], Preference]
"""Of domains of experts, "markup" or "markup:0.8" each. Raises UserError for one that there is
not."""


@dataclass(eq=False)
class ServedModel:
    """What a request needs to know of the model beside its engine."""

    name: str
    tokenizer: PublicTokenizer
    vocab_size: int
    max_length: int
    """Tokens of a prompt and its text at most."""
    find_preference: FindPreference
    aliases: tuple[str, ...] = ()
    """Further names that it answers to."""
    created: int = field(default_factory=lambda: int(time.time()))
    version: int = 0
    """How often its weights were updated."""

    @functools.cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer, self.vocab_size)

    @functools.cached_property
    def marks(self) -> tuple[int, int, int] | None:
        """Tokens that begin prefix, suffix and middle; None for a model that fills in nothing."""
        return find_marks(self.tokenizer.tokenizer)

    @property
    def thinks(self) -> bool:
        """Whether its chat template knows thinking."""
        return END_THINK in (self.tokenizer.chat_template or "")

    def check_name(self, wanted: str | None) -> None:
        """
        Raises:
          ApiError: another model is asked for.
        """
        if wanted not in (None, "", self.name, *self.aliases):
            raise not_found(wanted or "", self.name)

    def preference(self, wanted: str | Sequence[str] | None) -> Preference | None:
        """
        Raises:
          ApiError: domains that the model's experts don't have.
        """
        names = [wanted] if isinstance(wanted, str) else list(wanted or ())
        if not names:
            return None
        try:
            return self.find_preference(names)
        except UserError as error:
            raise invalid(str(error), "expert_preference") from error


def not_found(wanted: str, name: str) -> ApiError:
    return ApiError(
        404,
        f"there is no model {wanted[:200]!r} here, only {name!r}: name it, or leave model out",
        param="model",
        code="model_not_found",
    )
