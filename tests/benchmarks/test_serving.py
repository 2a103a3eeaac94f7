"""scripts.bench_serving: the load is the one that was asked for, figures are those of the answers,
servers take turns, absences are told."""

import json
import math
import os
import stat
import sys

import numpy as np
import pytest

from benchmarks.serving import load, measured, servers
from benchmarks.serving.load import Answer, Ask, Traffic
from benchmarks.serving.measured import Measured
from benchmarks.serving.request import Request
from configs.checks import UserError
from infer.sources import open_source
from scripts import bench_serving
from tests.checkpoint.tiny_folder import byte_level, write_llama, write_tokenizer
from tests.infer.server.scripted import ScriptedEngine, byte_tokenizer, served

TOKENIZER = byte_tokenizer()


class Counting(ScriptedEngine):
    """Notes the most requests that it had at once."""

    most = 0

    def step(self):
        self.most = max(self.most, len(self.live))
        return super().step()


@pytest.fixture(scope="module")
def engine():
    said = TOKENIZER.encode("x" * 30)
    return Counting(TOKENIZER, lambda request: said, step_seconds=0.003)


@pytest.fixture(scope="module")
def url(engine):
    with served(engine, TOKENIZER, most_waiting=3) as made:
        yield made.url


def test_lengths_have_the_means_that_were_asked_for():
    settings = {"prompt_mean": 161.0, "answer_mean": 338.0}
    pairs = load.draw_lengths(4000, 3, longest=100_000, **settings)
    means = np.mean(pairs, axis=0)
    # Standard error of the mean of a log-normal: mean * sqrt(e - 1) / sqrt(n), 2% here.
    np.testing.assert_allclose(means, [161, 338], rtol=0.08)
    assert pairs == load.draw_lengths(4000, 3, longest=100_000, **settings)
    short = load.draw_lengths(500, 3, longest=64, **settings)
    assert max(p + a for p, a in short) <= 64
    assert min(map(min, short)) >= load.SHORTEST


def test_prompts_have_their_lengths_and_lie_apart():
    text = "".join(chr(97 + i % 26) for i in range(5000))
    asks = load.make_asks(TOKENIZER, text, [(20, 3), (50, 4)] * 20, seed=0)
    assert [len(a.prompt) for a in asks] == [20, 50] * 20
    assert len({a.prompt[:12] for a in asks}) > 10


def test_an_answer_is_timed_piece_by_piece(url):
    answers, seconds = load.run_load(url, [Ask("a", 12)], Traffic(clients=1), 0, {})
    (made,) = answers
    assert (made.error, made.tokens, made.cached_tokens) == (None, 12, 0)
    assert len(made.gaps) == 11
    assert 0.003 < made.first_token < made.seconds <= seconds
    assert made.first_token + sum(made.gaps) <= made.seconds
    assert np.median(made.gaps) == pytest.approx(0.003, rel=0.9)


def test_clients_wait_for_their_answers(url, engine):
    engine.most = 0
    answers, _ = load.run_load(url, [Ask("a", 6)] * 12, Traffic(clients=3), 0, {})
    assert [a.tokens for a in answers] == [6] * 12
    assert 2 <= engine.most <= 3


def test_requests_come_at_random_times_whether_or_not_others_are_answered(url, engine):
    """12 within about 12 / 200 s, more than are answered meanwhile: a bounded queue says no."""
    engine.most = 0
    answers, seconds = load.run_load(url, [Ask("a", 30)] * 12, Traffic(rate=200.0), 0, {})
    assert engine.most > 4
    failed = [a for a in answers if a.error]
    assert failed
    assert all(a.error.startswith("429 ") for a in failed)
    made = measured.measure(answers, seconds)
    assert (made.requests, made.failed) == (12, len(failed))
    assert made.tokens == 30 * (12 - len(failed))


def test_figures_are_those_of_the_answers(tmp_path, capsys):
    answers = [Answer(1.0, i / 10, [0.1, 0.3], 3) for i in range(1, 6)] + [Answer(error="no")]
    made = measured.measure(answers, 2.0)
    assert (made.requests, made.failed, made.tokens, made.tokens_per_second) == (6, 1, 15, 7.5)
    assert (made.first_token_p50, made.between_p50) == (pytest.approx(0.3), pytest.approx(0.2))
    assert made.first_token_p99 == pytest.approx(0.496)
    slow = measured.measure(answers, 4.0)
    assert measured.ratios([made, slow], [slow, slow]) == [2.0, 1.0]
    none = measured.measure([Answer(error="no")], 1.0)
    assert math.isnan(none.first_token_p50)
    turns = {"one": [made, made], "two": [slow, slow], "none": [none, none]}
    assert measured.as_json(turns)["none"][0]["first_token_p50"] is None
    measured.print_turns(turns, "a title")
    assert "0.50x" in capsys.readouterr().out
    measured.draw(turns, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


FAKE = """#!{python}
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200), self.end_headers(), self.wfile.write(b"{{}}")
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200), self.end_headers()
        for text in "abc":
            self.wfile.write(b'data: {{"choices": [{{"text": "%s"}}]}}\\n\\n' % text.encode())
        self.wfile.write(b"data: [DONE]\\n\\n")
    def log_message(self, *_):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("llama")
    write_llama(made, max_position_embeddings=512)
    write_tokenizer(made, byte_level(), tokenizer_config={"eos_token": "<|endoftext|>"})
    return made


def test_llama_cpp_is_a_peer_where_its_server_is(monkeypatch, tmp_path, folder):
    """The binary that is found in PATH, with the file of 16 bits; where there is none, a reason."""
    source = open_source(str(folder))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(servers, "missing", lambda *_: "no llama_cpp")
    command, reason = servers.llama_command(source, tmp_path, "bfloat16", rows=2, length=64)
    assert command is None
    assert reason.startswith("no llama_cpp: install llama-server")
    binary = tmp_path / "llama-server"
    binary.write_text(FAKE.format(python=sys.executable))
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    command, reason = servers.llama_command(source, tmp_path, "fp8", rows=2, length=64)
    assert (command, reason) == (None, "it has no format like --weights fp8")
    command, _ = servers.llama_command(source, tmp_path, "bfloat16", rows=2, length=64)
    assert command.arguments[:3] == (str(binary), "-m", str(tmp_path / "F16.gguf"))
    assert (tmp_path / "F16.gguf").read_bytes()[:4] == b"GGUF"
    assert command.arguments[5:9] == ("-np", "2", "-c", "128")
    with servers.started(command) as server:
        answers, _ = load.run_load(server.url, [Ask("a", 3)], Traffic(clients=1), 0, server.extra)
    assert (server.name, answers[0].tokens, answers[0].error) == ("llama.cpp F16", 3, None)


def test_a_server_that_does_not_start_says_why():
    command = servers.Command("it", (sys.executable, "-c", "import sys; sys.exit('no room')"))
    with (
        pytest.raises(servers.ServerFailure, match="it did not start: no room"),
        servers.started(command),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rounds", "0"], "--rounds 0 must be greater than 0"),
        (["--rate", "-1"], "--rate -1.0 must be greater than 0"),
        (["--step-seconds", "0"], "--step-seconds 0.0 must be greater than 0"),
        (["--shared", "8"], "--shared 8 must be at least 32 tokens"),
        (["--prompt-mean", "0"], "--prompt-mean 0.0 must be greater than 0"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_can_not_be_measured(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        bench_serving.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["load", "prefix", "drafts", "start"])
@pytest.mark.sampled
def test_each_part_at_a_tiny_size(monkeypatch, tmp_path, folder, capsys, part):
    """Real servers in processes of their own, and llama.cpp's by a stand-in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = [str(folder), "--weights", "bfloat16", "--requests", "4", "--rounds", "1"]
    arguments += ["--rows", "2", "--clients", "2", "--length", "256", "--shared", "300"]
    arguments += ["--answer-mean", "12", "--json", str(tmp_path / "a.json")]
    arguments += ["--picture", str(tmp_path / "a.png"), *([] if part == "load" else [f"--{part}"])]
    if part == "load":
        binary = tmp_path / "llama-server"
        binary.write_text(FAKE.format(python=sys.executable))
        binary.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    bench_serving.main(arguments)
    found = json.loads((tmp_path / "a.json").read_text())
    names = {
        "load": ["continuous", "static", "llama.cpp F16"],
        "prefix": ["read", "memory", "disk"],
        "drafts": ["edits, off", "edits, ngram", "drawn, off", "drawn, ngram"],
        "start": ["cold", "warm"],
    }[part]
    turns = found[part]["turns"]
    assert list(turns) == names
    assert all(len(x) == 1 and not x[0]["failed"] for x in turns.values())
    assert all(Measured(**x[0]).tokens_per_second > 0 for x in turns.values())
    assert (tmp_path / f"a_{part}.png").exists()
    if part == "prefix":
        assert found[part]["cached_tokens"] == {"read": 0, "memory": 256, "disk": 256}
    if part == "start":
        starts = [found[part]["starts"][name][0] for name in names]
        for items in starts:
            whole = items.pop("in all")
            assert whole == pytest.approx(sum(items.values()))
            assert all(seconds > 0 for seconds in items.values())
    assert found["settings"]["requests"] == Request(requests=4).requests
    assert names[-1].split()[0] in capsys.readouterr().out
