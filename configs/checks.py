"""How configs refuse what makes no sense: one sentence with what came and what was needed."""

from typing import Any


class UserError(ValueError):
    """Bad input that its sender can mend: scripts print the sentence alone and exit with code 2."""


def require(condition: bool, sentence: str) -> None:
    """
    Raises:
      UserError: the condition does not hold; it says `sentence`.
    """
    if not condition:
        raise UserError(sentence)


MAX_SEED = 2**32 - 1
"""JAX's keys and Grain's shuffles take 32 bits: of a larger seed the rest would be ignored."""


def require_seed(seed: int) -> None:
    """
    Raises:
      UserError: a seed that no key has.
    """
    require(0 <= seed <= MAX_SEED, f"seed={seed} must lie in [0, {MAX_SEED}]")


def require_text(text: str, name: str) -> None:
    """
    Raises:
      UserError: characters that UTF-8 has not: bytes of another encoding that came in as text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is no UTF-8 at character {error.start + 1} "
            f"({text[error.start : error.start + 1]!r}): send it as UTF-8"
        ) from error


def require_positive(config: Any, *names: str) -> None:
    """
    Raises:
      UserError: one of the config's settings is not above 0.
    """
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name}={value} must be greater than 0")
