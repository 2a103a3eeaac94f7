"""A server for each module, whose engine says what the newest message asks it to."""

import httpx
import openai
import pytest

from tests.infer.server.scripted import ScriptedEngine, byte_tokenizer, served

TEXT = "Grüße 한국어 👩‍👩‍👧 and a STOP that ends it"


def echoed(tokenizer):
    """The reply to a request: what its prompt has after "say:", else TEXT."""

    def reply(request):
        text = tokenizer.decode(request.prompt, specials=True)
        _, found, said = text.rpartition("say:")
        said = said.partition("<|im_end|>")[0]
        return tokenizer.encode(said if found else TEXT)

    return reply


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def engine(tokenizer):
    return ScriptedEngine(tokenizer, echoed(tokenizer))


@pytest.fixture(scope="module")
def server(engine, tokenizer):
    with served(engine, tokenizer) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=20) as made:
        yield made


def user(text):
    return [{"role": "user", "content": text}]
