"""A server that is busy, or still reads its model, is asked again; for how long is bounded."""

import http.server
import json
import threading

import pytest

from configs.checks import UserError
from evals import http_model

BUSY = 8


@pytest.fixture
def server():
    """Its address: it refuses the first BUSY requests with 503."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            is_busy = len(asked) <= BUSY
            body = json.dumps({"error": {"message": "not ready"}} if is_busy else {"it": 1})
            self.send_response(503 if is_busy else 200)
            self.send_header("retry-after", "0")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments):
            """Nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}/v1"
        made.shutdown()
        thread.join()


def test_a_model_that_is_not_ready_is_waited_for(server):
    assert http_model.HttpModel(server, None).ask("/v1/it", None) == {"it": 1}


def test_patience_ends(server, monkeypatch):
    monkeypatch.setattr(http_model, "PATIENCE", -1.0)
    with pytest.raises(UserError, match=r"refuses /v1/it with 503: not ready"):
        http_model.HttpModel(server, None).ask("/v1/it", None)
