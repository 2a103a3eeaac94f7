"""POST /v1/embeddings: the mean of a text's last hidden states, of length 1.

T tokens, D d_model.
"""

import base64
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infer.engine.programs import Programs
from infer.server.completions import first_ids, prompts_of
from infer.server.errors import ApiError, invalid
from infer.server.plan import check_text
from infer.server.schemas_small import EmbeddingBody
from infer.server.service import Call, Service, Usage

SHORTEST = 16
"""Tokens that a text is padded to at least; longer ones to a power of two."""


@dataclass(eq=False)
class Embedder:
    """Embeds texts with a model; each length, a power of two, is compiled when it first comes."""

    programs: Programs
    mesh: Mesh | None = None

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """The vector of a text's tokens, float32 [D]."""
        length = max(SHORTEST, 1 << (len(ids) - 1).bit_length())
        length = max(min(length, self.programs.model.config.context_length), len(ids))
        tokens_1L, positions_1L = (
            np.zeros((1, length), np.int32),
            np.full((1, length), -1, np.int32),
        )
        tokens_1L[0, : len(ids)], positions_1L[0, : len(ids)] = ids, np.arange(len(ids))
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            hidden_1LD = self.programs.hidden(tokens_1L, positions_1L)
            return np.asarray(_mean(hidden_1LD, positions_1L))


@jax.jit
def _mean(hidden_1LD: jax.Array, positions_1L: jax.Array) -> jax.Array:
    """The mean over tokens of what goes into the output layer, scaled to length 1, float32 [D]."""
    is_token_L1 = (positions_1L[0] >= 0)[:, None]
    sum_D = jnp.where(is_token_L1, hidden_1LD[0].astype(jnp.float32), 0.0).sum(axis=0)
    return sum_D / jnp.maximum(jnp.linalg.norm(sum_D), 1e-12)


async def embeddings(service: Service, call: Call) -> Any:
    """A vector for each text."""
    body: EmbeddingBody = call.body
    model = service.model
    model.check_name(body.model)
    service.check_open()
    if service.embed is None:
        raise ApiError(400, "this server makes no embeddings", code="not_supported")
    prompts = []
    for text in prompts_of(body.input):
        ids = model.tokenizer.encode(check_text(text, "input")) if isinstance(text, str) else text
        ids = ids or first_ids(model)
        if not ids or len(ids) > model.max_length:
            raise invalid(f"a text has {len(ids)} tokens: 1 to {model.max_length} fit", "input")
        if max(ids) >= model.vocab_size:
            raise invalid(f"tokens must lie in [0, {model.vocab_size})", "input")
        prompts.append(ids)
    embed = service.embed
    data = []
    for i, ids in enumerate(prompts):  # one by one: texts that are generated go on between them
        vector = await service.engine.call(lambda engine, ids=ids: embed(ids))
        data.append({"object": "embedding", "index": i, "embedding": _written(vector, body)})
    count = sum(map(len, prompts))
    call.count(Usage(count))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": model.name, "usage": usage}


def _written(vector_D: np.ndarray, body: EmbeddingBody) -> Any:
    if body.encoding_format == "base64":
        return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    return vector_D.astype(float).tolist()
