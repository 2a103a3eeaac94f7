"""The verb serve: what it prints, what it refuses, and how it ends."""

import functools
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from configs.checks import UserError
from deepseek import BadRequest, V3_1Client
from evals.expert_domains import label_experts
from infer.model_draft import ModelDraft
from infer.server.keys import read_keys
from infer.server.process import ListenOptions, bind
from infer.sources import open_source
from scripts import served
from scripts.serve import parser
from tests import tiny
from tests.checkpoint.tiny_folder import byte_level, write_llama, write_tokenizer
from train.loop import fit

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("llama")
    write_llama(made)
    config = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    write_tokenizer(made, byte_level(), tokenizer_config=config)
    return made


def serve(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.serve", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_it_serves_until_it_is_asked_to_stop_and_exits_with_0(folder, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("# ours\nKEY\n")
    process = serve(folder, "--port", 0, "--max-rows", 2, "--api-key-file", keys)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if "Ctrl-C" in line:
            break
    text = "".join(printed)
    url = re.search(r"served at (http://\S+),", text)[1]
    assert f"curl {url}/v1/chat/completions -H 'authorization: Bearer KEY'" in text
    assert f'OpenAI(base_url="{url}/v1", api_key="KEY")' in text
    ask = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    assert httpx.post(f"{url}/v1/chat/completions", json=ask).status_code == 401
    key = {"authorization": "Bearer KEY"}
    answer = httpx.post(f"{url}/v1/chat/completions", json=ask, headers=key, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] <= 5
    assert answer.json()["model"] == folder.name
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    log = process.stderr.read()
    assert '"path": "/v1/chat/completions", "status": 200' in log
    assert "hello" not in log
    assert "Traceback" not in log


def test_an_address_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"can't listen at 127.0.0.1:{port}"):
            bind(ListenOptions(port=port))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-length", "65"], "between 2 and the model's context_length=64"),
        (["--max-queue", "-1"], "--max-queue -1 must not be negative"),
        (["--port", "70000"], "--port 70000 must lie between"),
        (["--max-rows", "0"], "max_rows=0 must be greater than 0"),
        (["--kv-pages", "1"], "num_pages=1 must be at least 2"),
        (["--draft-length", "3"], "--draft-length 3 has no effect without --draft"),
        (["--draft", "ngram", "--draft-length", "0"], "--draft-length 0 must be at least 1"),
        (["--draft", "mtp"], "has no multi-token module to draft with"),
        (["--draft", "nowhere"], "nowhere"),
        (["--draft", "nowhere", "--mesh.expert", "2"], "--draft nowhere runs on one device"),
    ],
)
def test_bounds_that_can_not_be(folder, arguments, sentence):
    asked = parser().parse_args([str(folder), *arguments])
    with pytest.raises(UserError, match=sentence):
        served.engine_options(open_source(str(folder)), asked)


def test_a_smaller_model_of_the_same_tokens_drafts(folder):
    asked = parser().parse_args([str(folder), "--draft", str(folder), "--draft-length", "2"])
    options = served.engine_options(open_source(str(folder)), asked)
    assert isinstance(options.draft, ModelDraft)
    assert options.draft.length == 2
    assert options.draft.variables["params"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(None, "is missing"), ("# none\n\n", "has no key"), (b"\xff", "is no UTF-8")],
)
def test_files_of_keys_that_are_none(tmp_path, text, sentence):
    path = tmp_path / "keys"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=sentence):
        read_keys(path)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A trained run whose experts have the names that the article asks for."""
    folder = tmp_path_factory.mktemp("labelled")
    tiny.write_sources(folder, files=24)
    fit(tiny.run(folder, steps=3), folder / "run")
    names = {f"module_{i}" for i in range(24)}
    low = sorted(name for name in names if len(name) == 8)
    domains = {"code_generation": low, "algorithm_design": sorted(names - set(low))}
    label_experts(folder / "run", domains, threshold=-1.0)
    return folder / "run"


@pytest.mark.slow
def test_the_snippet_of_the_article_on_a_trained_run(labelled):
    process = serve(labelled, "--port", 0, "--max-rows", 2, "--allow-updates", "--draft", "ngram")
    text = ""
    for line in process.stdout:
        text += line
        if "Ctrl-C" in line:
            break
    url = re.search(r"served at (http://\S+),", text)[1]
    assert f"curl {url}/v1/completions" in text  # it was not trained to chat
    client = V3_1Client(api_key="none", endpoint=url)
    asked = {"prompt": "def add(", "max_tokens": 12, "temperature": 0.7, "seed": 3}
    both = client.generate(**asked, expert_preference=["code_generation", "algorithm_design"])
    assert both.usage.completion_tokens > 0
    assert both == replace(
        client.generate(**asked, expert_preference=["algorithm_design", "code_generation"]),
        request_id=both.request_id,
        usage=both.usage,
    )
    with pytest.raises(BadRequest, match="knows code_generation, algorithm_design"):
        client.generate(**asked, expert_preference=["cooking"])
    with pytest.raises(BadRequest, match="no chat template"):
        client.chat([{"role": "user", "content": "hi"}])
    update = functools.partial(httpx.post, f"{url}/update_weights", timeout=60)
    assert update(json={"source": str(labelled)}).json()["weights_version"] == 1
    assert "is no folder" in update(json={"source": "nowhere"}).json()["error"]["message"]
    again = client.generate(**asked, expert_preference=["code_generation", "algorithm_design"])
    assert again.generated_text == both.generated_text
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
