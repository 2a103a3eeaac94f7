"""Answers of the server, and what of them is an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from deepseek.errors import ApiError, RateLimited, class_of


@dataclass(frozen=True)
class Usage:
    """Tokens that a request took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's, how many came from the server's cache."""

    @classmethod
    def of(cls, usage: Mapping[str, Any] | None) -> Usage:
        usage = usage or {}
        details = usage.get("prompt_tokens_details") or {}
        return cls(
            usage.get("prompt_tokens", 0),
            usage.get("completion_tokens", 0),
            details.get("cached_tokens", 0),
        )


@dataclass(frozen=True)
class Generation:
    """A generated text."""

    generated_text: str
    finish_reason: str | None = None
    """stop: it ended; length: max_tokens or the context did."""
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    reasoning: str = ""
    """What a thinking model thought first."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    request_id: str | None = None

    def __str__(self) -> str:
        return self.generated_text


def generation(answer: httpx.Response) -> Generation:
    """Of a completion's or a chat's whole answer."""
    body = answer.json()
    choice = body["choices"][0]
    message = choice.get("message")
    return Generation(
        (choice.get("text") if message is None else message.get("content")) or "",
        choice.get("finish_reason"),
        Usage.of(body.get("usage")),
        body.get("model", ""),
        (message or {}).get("reasoning_content") or "",
        tuple((message or {}).get("tool_calls") or ()),
        answer.headers.get("x-request-id"),
    )


def failure(answer: httpx.Response) -> ApiError:
    """The error that an answer tells of; its body must have been read."""
    try:
        fields = answer.json()["error"]
        message, code, param = fields["message"], fields.get("code"), fields.get("param")
    except (ValueError, KeyError, TypeError):
        message, code, param = answer.text[:500] or answer.reason_phrase, None, None
    made = class_of(answer.status_code)(
        message,
        status=answer.status_code,
        code=code,
        param=param,
        request_id=answer.headers.get("x-request-id"),
    )
    if isinstance(made, RateLimited):
        made.retry_after = retry_after(answer)
    return made


def retry_after(answer: httpx.Response) -> float | None:
    """Seconds that the server asks to wait."""
    try:
        return float(answer.headers["retry-after"])
    except (KeyError, ValueError):
        return None


@dataclass
class Collected:
    """A stream's text so far."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    request_id: str | None = None
    is_done: bool = False

    def take(self, line: str) -> str:
        """The text that a line of the stream brings.

        Raises:
          ApiError: the server failed on the way.
        """
        if not line.startswith("data:"):
            return ""
        data = line[5:].strip()
        if data == "[DONE]":
            self.is_done = True
            return ""
        chunk = json.loads(data)
        if "error" in chunk:
            error = chunk["error"]
            raise class_of(500)(
                error["message"],
                status=500,
                code=error.get("code"),
                param=error.get("param"),
                request_id=self.request_id,
            )
        self.model = chunk.get("model", self.model)
        if chunk.get("usage"):
            self.usage = Usage.of(chunk["usage"])
        if not chunk.get("choices"):
            return ""
        choice = chunk["choices"][0]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta") or {}
        self.reasoning += delta.get("reasoning_content") or ""
        new = choice.get("text") or delta.get("content") or ""
        self.text += new
        return new

    def generation(self) -> Generation:
        return Generation(
            self.text,
            self.finish_reason,
            self.usage,
            self.model,
            self.reasoning,
            request_id=self.request_id,
        )
