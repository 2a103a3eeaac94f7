"""Bodies that nobody thought of, made from /openapi.json."""

import importlib
import logging

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.infer.server.conftest import echoed
from tests.infer.server.scripted import ScriptedEngine, byte_tokenizer, served

pytestmark = pytest.mark.slow
POSTED = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/v1/embeddings", "/tokenize", "/detokenize", "/infill",
)  # fmt: skip


@pytest.fixture(scope="module")
def schemathesis():
    """The package, which takes long to import: the fast tests do without it."""
    return importlib.import_module("schemathesis")


@pytest.fixture(scope="module")
def server():
    tokenizer = byte_tokenizer()
    logging.getLogger("moesaic.server").setLevel(logging.CRITICAL)
    embed = lambda ids: np.ones(4)  # noqa: E731
    with served(ScriptedEngine(tokenizer, echoed(tokenizer)), tokenizer, embed=embed) as made:
        yield made


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path", POSTED)
@pytest.mark.sampled
def test_no_body_makes_the_server_fail(schemathesis, server, path, mode):
    """Every answer is one of success or of the client's fault, in the documented shape."""
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation, mode = api[path]["POST"], schemathesis.GenerationMode(mode)

    @settings(
        max_examples=30,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        if isinstance(case.body, dict):
            case.body.pop("model", None)  # any other name than ours is all that would be tested
        answer = case.call()
        case.validate_response(answer, checks=[schemathesis.checks.not_a_server_error])
        assert answer.status_code in (200, 400, 413), answer.text
        if answer.status_code != 200:
            assert "message" in answer.json()["error"]

    check()
