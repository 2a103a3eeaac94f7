"""JSON bodies: read within a size and a time, and held to a schema."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ValidationError

from configs.near_names import hint
from infer.server.errors import ApiError, invalid

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Model = TypeVar("Model", bound=BaseModel)


async def read_body(
    receive: Receive, *, most_bytes: int, seconds: float, told: int | None
) -> bytes:
    """The body of a request.

    Args:
      told: its length as the header has it; a longer one is refused before it is read.
    Raises:
      ApiError: it is too long, or too slow.
    """
    if told is not None and told > most_bytes:
        raise _too_long(told, most_bytes)
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise asyncio.CancelledError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most_bytes:
                    raise _too_long(size, most_bytes)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {seconds:g} s: send it again") from error


def _too_long(size: int, most: int) -> ApiError:
    return ApiError(
        413,
        f"the body has {size:,} bytes or more, at most {most:,} are read: shorten it, or start the "
        "server with a larger --max-body-bytes",
        code="request_too_large",
    )


def parse(model: type[Model], raw: bytes) -> Model:
    """The body as this schema has it.

    Raises:
      ApiError: it is no JSON object, or breaks the schema; the first fault is named.
    """
    try:
        value = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is no JSON ({error}): send a JSON object") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise invalid(f"the body must be a JSON object, got {kind}: put the fields into {{}}")
    return validated(model, value)


def validated(model: type[Model], value: dict[str, Any]) -> Model:
    """The object as this schema has it.

    Raises:
      ApiError: it breaks the schema; the first fault is named.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _fault(error, sorted(model.model_fields)) from error
    except RecursionError as error:
        raise invalid("the body is nested too deep: flatten it") from error


def _fault(error: ValidationError, names: Sequence[str]) -> ApiError:
    """The fault that most likely is the client's: of a union, that of the alternative which was
    read furthest."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    fault = max(faults, key=lambda f: (f["type"] == "extra_forbidden", len(f["loc"])))
    if len(faults) > 1 and faults[0]["type"] == "missing":
        fault = faults[0]
    place = ".".join(str(part) for part in fault["loc"] if not _is_alternative(part))
    if fault["type"] == "extra_forbidden":
        known = hint(place, {}, list(names)) if len(fault["loc"]) == 1 else ""
        message = f"{place} is not a field that this server knows{known or ': leave it out'}"
    else:
        message = f"{place}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"
    return invalid(message, param=place.partition(".")[0] or None, code=fault["type"])


def _is_alternative(part: str | int) -> bool:
    """Whether pydantic means an alternative of a union by it, not a place in the body."""
    return isinstance(part, str) and (
        part[:1].isupper() or "[" in part or part in ("str", "int", "constrained-str")
    )
