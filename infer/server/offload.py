"""Answers of a small model where a router holds a question simple, behind the same routes.

Both models have one vocabulary, so that a prompt is the same tokens for either. What is about the
served model itself (log-probabilities, a preference for its experts) goes to the served model.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from infer.engine import Request
from infer.query_router import Router
from infer.server.engine_thread import EngineThread

LOG = logging.getLogger("moesaic.server")


@dataclass(eq=False)
class Offload:
    """A small model beside the served one, and who is asked."""

    small: EngineThread
    router: Router
    features: Callable[[Sequence[int]], np.ndarray]
    """Of a prompt; called on the small engine's thread."""
    max_length: int
    """Tokens of a prompt and its text that the small engine has room for."""
    large_length: int
    """The same of the large one: a request for all of it takes what the small one has."""
    num_small: int = 0
    num_large: int = 0
    """Requests that went to each."""

    async def choose(
        self, requests: Sequence[Request], large: EngineThread
    ) -> tuple[EngineThread, Sequence[Request]]:
        """The engine that answers these requests, which belong together, and how it is asked."""
        fitted = [self._fitted(request) for request in requests]
        own = [request for request in fitted if request is not None]
        is_small = len(own) == len(requests) and self.small.failure is None
        prompts = {tuple(request.prompt) for request in own} if is_small else set()
        for prompt in prompts:
            is_small = is_small and await self._is_simple(prompt)
        if is_small:
            self.num_small += len(requests)
            return self.small, own
        self.num_large += len(requests)
        return large, requests

    def _fitted(self, request: Request) -> Request | None:
        """The request as the small engine has room for it; None: it is not for it."""
        asks_of_model = request.prompt_logprobs or request.num_logprobs is not None
        asks_of_model |= request.wants_experts or request.preference is not None
        if asks_of_model or len(request.prompt) < 2:
            return None
        room = self.max_length - len(request.prompt)
        if request.max_new_tokens <= room:
            return request
        wants_all = len(request.prompt) + request.max_new_tokens >= self.large_length
        return replace(request, max_new_tokens=room) if wants_all and room > 0 else None

    async def _is_simple(self, prompt: tuple[int, ...]) -> bool:
        try:
            features_F = await self.small.call(lambda engine: self.features(prompt))
        except Exception:
            LOG.exception("a question could not be looked at: the large model answers it")
            return False
        return self.router.is_small(features_F)

    def stats(self) -> dict[str, Any]:
        """What the page and programs are shown."""
        total = self.num_small + self.num_large
        return {
            "small_model": self.router.small,
            "small_requests": self.num_small,
            "large_requests": self.num_large,
            "call_share": self.num_large / total if total else None,
        }
