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


def require_positive(config: Any, *names: str) -> None:
    """
    Raises:
      UserError: one of the config's settings is not above 0.
    """
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name}={value} must be greater than 0")
