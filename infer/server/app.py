"""The server's routes in one table, and the application made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route as Path

from infer.server import small_routes
from infer.server.chat import chat
from infer.server.completions import complete
from infer.server.embeddings import embeddings
from infer.server.errors import ApiError
from infer.server.http_layer import Admission, App, CancelOnDisconnect, Endpoint, Handler
from infer.server.infill import fim, infill
from infer.server.keys import ApiKeys
from infer.server.messages import count_tokens, messages
from infer.server.openapi import Described, openapi
from infer.server.responses import responses
from infer.server.schemas import ChatBody, CompletionBody
from infer.server.schemas_messages import CountTokensBody, MessagesBody
from infer.server.schemas_responses import ResponsesBody
from infer.server.schemas_small import (
    DetokenizeBody,
    EmbeddingBody,
    InfillBody,
    TokenizeBody,
    UpdateBody,
)
from infer.server.service import Call, Service


@dataclass(frozen=True)
class Route(Described):
    """One path, and what answers it."""

    handler: Handler
    dialect: str = "openai"
    is_public: bool = False
    """Whether it is answered without an API key."""


async def _openapi(service: Service, call: Call) -> Any:
    return openapi(ROUTES)


ROUTES: Sequence[Route] = (
    Route("POST", "/v1/chat/completions", "Answers a conversation", ChatBody, chat),
    Route("POST", "/v1/completions", "Continues a text", CompletionBody, complete),
    Route("POST", "/v1/responses", "Answers a conversation", ResponsesBody, responses, "responses"),
    Route("POST", "/v1/messages", "Answers a conversation", MessagesBody, messages, "anthropic"),
    Route(
        "POST",
        "/v1/messages/count_tokens",
        "Its tokens",
        CountTokensBody,
        count_tokens,
        "anthropic",
    ),
    Route("POST", "/v1/embeddings", "Vectors of texts", EmbeddingBody, embeddings),
    Route("POST", "/beta/completions", "The same, as DeepSeek's", CompletionBody, complete),
    Route("POST", "/v1/fim/completions", "The same, as Mistral's", CompletionBody, fim),
    Route("POST", "/infill", "Fills in, as llama.cpp's", InfillBody, infill),
    Route("GET", "/v1/models", "The model that is served", None, small_routes.models),
    Route("GET", "/v1/models/{name:path}", "The same by name", None, small_routes.one_model),
    Route("POST", "/tokenize", "Tokens of a text", TokenizeBody, small_routes.tokenize),
    Route("POST", "/detokenize", "Text of tokens", DetokenizeBody, small_routes.detokenize),
    Route("GET", "/tokenizer_info", "Special tokens", None, small_routes.tokenizer_info),
    Route("GET", "/health", "Whether it works", None, small_routes.health, is_public=True),
    Route("GET", "/ready", "Whether to ask it", None, small_routes.ready, is_public=True),
    Route("GET", "/version", "Of server and weights", None, small_routes.version),
    Route("GET", "/metrics", "For Prometheus", None, small_routes.metrics),
    Route("GET", "/stats", "What the page shows", None, small_routes.stats),
    Route("GET", "/props", "For llama.cpp's clients", None, small_routes.props),
    Route("POST", "/pause", "Makes no further step", None, small_routes.pause),
    Route("POST", "/resume", "Goes on", None, small_routes.resume),
    Route("POST", "/update_weights", "Other weights", UpdateBody, small_routes.update_weights),
    Route("GET", "/openapi.json", "This table, for programs", None, _openapi),
    Route("GET", "/", "A page to talk to", None, small_routes.page, is_public=True),
)

PROBES = frozenset(("/health", "/ready", "/metrics", "/stats"))


def make_app(service: Service, keys: ApiKeys) -> App:
    """The ASGI application."""
    paths = [
        Path(r.path, Endpoint(service, r.handler, r.body, r.dialect), methods=[r.method])
        for r in ROUTES
    ]
    inner = Starlette(routes=paths, exception_handlers={HTTPException: _http_error})
    public = frozenset(route.path for route in ROUTES if route.is_public)
    return Admission(CancelOnDisconnect(inner), keys, public, PROBES)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    sentence = {
        404: f"there is nothing at {path}: /openapi.json lists the routes",
        405: f"{path} does not answer {method}: /openapi.json lists the routes",
    }.get(error.status_code, str(error.detail))
    shaped = ApiError(error.status_code, sentence)
    return JSONResponse(shaped.openai(), error.status_code, dict(error.headers or {}))
