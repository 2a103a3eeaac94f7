"""Requests to the server, and when one is tried again."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from deepseek.answers import retry_after

COMPLETIONS, CHAT = "completions", "chat/completions"
LONGEST_WAIT = 60.0
"""Seconds before another try at most."""
TRIED_AGAIN = (408, 409, 429)


@dataclass(frozen=True)
class Settings:
    """How a client reaches its server."""

    api_key: str | None
    endpoint: str
    model: str | None
    timeout: float | httpx.Timeout
    max_retries: int
    headers: Mapping[str, str] | None = None

    @property
    def base_url(self) -> str:
        base = self.endpoint.rstrip("/")
        return base if base.endswith("/v1") else base + "/v1"

    def all_headers(self) -> dict[str, str]:
        made = dict(self.headers or {})
        if self.api_key:
            made["authorization"] = f"Bearer {self.api_key}"
        return made

    def wait(self, attempt: int, answer: httpx.Response | None) -> float | None:
        """Seconds until the next try; None: there is none.

        Args:
          attempt: tries that failed, 1 or more.
          answer: of the server; None where it gave none.
        """
        if attempt > self.max_retries:
            return None
        if answer is not None:
            if answer.headers.get("x-should-retry") == "false":
                return None
            if answer.status_code not in TRIED_AGAIN and answer.status_code < 500:
                return None
            asked = retry_after(answer)
            if asked is not None:
                return min(max(asked, 0.0), LONGEST_WAIT)
        return min(0.5 * 2 ** (attempt - 1), 8.0) * random.uniform(0.75, 1.0)


def body_of(settings: Settings, given: Mapping[str, Any], *, stream: bool) -> dict[str, Any]:
    """A body of what was given; what is None is left out.

    Args:
      given: keyword arguments, with `extra` as a mapping of further fields.
    """
    fields = dict(given)
    extra = fields.pop("extra", None) or {}
    made = {"model": settings.model} | fields | dict(extra)
    made = {name: value for name, value in made.items() if value is not None}
    if stream:
        made |= {"stream": True, "stream_options": {"include_usage": True}}
    return made


Messages = Sequence[Mapping[str, Any]]
