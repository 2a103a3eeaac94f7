"""Packages that some tasks need and the project does without: the extra `evaluation`."""

import importlib
from types import ModuleType

from configs.checks import UserError


def optional_module(name: str, requirement: str, reason: str) -> ModuleType:
    """A module of an optional package.

    Args:
      requirement: as pip names it, with its version.
      reason: what the task needs it for.
    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{reason} is done by a package that is not installed here ({error}): pip install "
            f"{requirement}, or -e '.[evaluation]' in the checkout"
        ) from error
