"""A task that has nothing to ask of a model."""

from dataclasses import dataclass

from configs.checks import UserError


class NotApplicable(UserError):
    """The task has nothing to measure on this model; the sentence says why."""


@dataclass(frozen=True)
class Skipped:
    """A task without scores."""

    task: str
    reason: str
    is_error: bool = False
    """Whether it was meant to have some: its data or settings are wrong."""
