"""A teacher behind a server, which answers from a table of bigrams as OpenAI's interface does."""

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import DistillConfig
from configs.checks import UserError
from data.pipeline import prepare_corpus
from tests import tiny
from tests.train.test_divergences import kl, softmax
from train.divergences import divergence, kept_and_tail
from train.loop import mesh_of
from train.server_teacher import ServerTeacher, documents, server_view

V = 300
LOGITS_VV = 3 * np.random.RandomState(0).randn(V, V)


class Bigrams(BaseHTTPRequestHandler):
    """Names tokens by their texts; `says_ids` as "token_id:N" where it is asked to."""

    tokenizer: Any = None
    says_ids, busy = False, 0

    def do_GET(self):
        self._answer(200, {"data": [{"id": "bigrams"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "return_tokens_as_token_ids" in body and not self.says_ids:
            self._answer(400, {"error": "unknown parameter"})
            return
        if type(self).busy:
            type(self).busy -= 1
            self._answer(503, {"error": "busy"})
            return
        choices = [self._choice(i, p, body["logprobs"]) for i, p in enumerate(body["prompt"])]
        self._answer(200, {"choices": choices[::-1]})  # in any order

    def _choice(self, index, prompt, count):
        top, name = [None], self._name
        for token in prompt:
            log_p = np.log(softmax(LOGITS_VV[token]))
            top.append({name(i): log_p[i] for i in np.argsort(-log_p)[:count].tolist()})
        logprobs = {"tokens": [name(i) for i in [*prompt, 0]], "top_logprobs": top}
        return {"index": index, "logprobs": logprobs}

    def _name(self, token):
        if self.says_ids:
            return f"token_id:{token}"
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def _answer(self, code, tree):
        data = json.dumps(tree).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("served")
    tiny.write_sources(tmp_path)
    run = tiny.run(tmp_path, distill=DistillConfig(top_k=5))
    Bigrams.tokenizer = prepare_corpus(run.data, V).tokenizer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bigrams)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield run, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def batch():
    tokens = np.random.RandomState(1).randint(1, V, (8, 32)).astype(np.int32)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32)).copy()
    positions[0, 10:] -= 10  # a second document
    positions[1, 20:] = -1  # padding
    return {"tokens": jnp.asarray(tokens), "positions": jnp.asarray(positions)}


@pytest.mark.parametrize("says_ids", [True, False])
def test_what_a_server_says_is_the_divergence_in_bins(served, says_ids, monkeypatch):
    """Of bigrams a document's beginning changes nothing: each place has its token's row."""
    run, url = served
    monkeypatch.setattr(Bigrams, "says_ids", says_ids)
    monkeypatch.setattr(Bigrams, "busy", 1)
    monkeypatch.setattr("time.sleep", lambda _: None)
    teacher = ServerTeacher(url, Bigrams.tokenizer, V)
    seen = server_view(run, teacher, mesh_of(run))(batch())
    ids, logs = np.asarray(seen["teacher_ids"]), np.asarray(seen["teacher_log_probs"])
    p = softmax(LOGITS_VV[np.asarray(seen["tokens"])])
    is_token = np.asarray(seen["positions"]) >= 0
    best = np.argsort(-p, axis=-1)[..., :5]
    if says_ids:
        np.testing.assert_array_equal(ids[is_token], best[is_token])
    np.testing.assert_array_equal(ids[~is_token], -1)
    known = ids >= 0
    assert known[is_token].mean() > 0.5
    expected = np.log(np.take_along_axis(p, np.maximum(ids, 0), axis=-1))
    np.testing.assert_allclose(logs[known], expected[known], rtol=1e-6)
    q = softmax(np.random.RandomState(2).randn(8, 32, V))
    args = (seen["teacher_ids"], seen["teacher_log_probs"], seen["teacher_tail"])
    bins = kept_and_tail(jnp.log(jnp.float32(q)), *args)
    found = np.asarray(divergence("forward_kl", bins))[is_token]
    assert (found <= kl(p, q)[is_token] * (1 + 1e-4)).all()  # bins are never above the whole
    if says_ids:
        rest = [np.where(known, np.take_along_axis(x, best, -1), 0).sum(-1) for x in (p, q)]
        kept = [np.take_along_axis(x, best, -1) for x in (p, q)]
        tail = (1 - rest[0]) * np.log((1 - rest[0]) / (1 - rest[1]))
        by_hand = (kept[0] * np.log(kept[0] / kept[1])).sum(-1) + tail
        np.testing.assert_allclose(found, by_hand[is_token], rtol=1e-4)


def test_documents_of_a_row():
    positions = np.array([3, 4, 0, 1, 2, 0, -1, -1])
    assert documents(positions) == [slice(0, 2), slice(2, 5), slice(5, 6)]
    assert documents(np.array([-1, -1])) == []


def test_servers_that_cannot_teach(served, monkeypatch):
    run, url = served
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(UserError, match=r"127.0.0.1:9/v1/models can't be used"):
        ServerTeacher("http://127.0.0.1:9/v1", Bigrams.tokenizer, V)
    teacher = ServerTeacher(f"{url}#bigrams", Bigrams.tokenizer, V)
    assert teacher.origin.name.endswith("/v1#bigrams")
    hot = dataclasses.replace(run, distill=DistillConfig(top_k=5, temperature=2.0))
    with pytest.raises(UserError, match=r"leave distill\.temperature at 1"):
        server_view(hot, teacher, mesh_of(run))
    monkeypatch.setattr(Bigrams, "_name", lambda self, token: f"<{token}>")
    with pytest.raises(UserError, match="must number tokens as the student does"):
        ServerTeacher(url, Bigrams.tokenizer, V)
