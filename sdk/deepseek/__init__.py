"""Client of a Moesaic server: text, chat sessions, streams, sync and async."""

from deepseek.answers import Generation, Usage
from deepseek.async_client import AsyncChatSession, AsyncTextStream, AsyncV3_1Client
from deepseek.client import ChatSession, TextStream, V3_1Client
from deepseek.errors import (
    ApiError,
    AuthenticationFailed,
    BadRequest,
    ConnectionFailed,
    DeepSeekError,
    NotFound,
    PermissionDenied,
    RateLimited,
    ServerError,
    StreamBroken,
    TimedOut,
)

__all__ = [
    "ApiError",
    "AsyncChatSession",
    "AsyncTextStream",
    "AsyncV3_1Client",
    "AuthenticationFailed",
    "BadRequest",
    "ChatSession",
    "ConnectionFailed",
    "DeepSeekError",
    "Generation",
    "NotFound",
    "PermissionDenied",
    "RateLimited",
    "ServerError",
    "StreamBroken",
    "TextStream",
    "TimedOut",
    "Usage",
    "V3_1Client",
]
