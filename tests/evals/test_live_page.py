"""The page of a run that is being trained: what it answers at each state of the folder."""

import json
import threading
import urllib.error
import urllib.request

import pytest

from configs.serialization import to_json
from evals.live_page import MOST_POINTS, make_server, run_state, thinned
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    run = tiny.run(tmp_path, steps=10)
    (tmp_path / "run" / "config.json").write_text(to_json(run))
    return tmp_path / "run"


def lines(count: int) -> str:
    made = [
        {"step": i, "loss": 5.0 - i / 10, "seconds": 2.0, "load_cv": [0.1, 0.3]}
        for i in range(1, count + 1)
    ]
    made[-1] |= {"validation_loss": 4.5, "source_losses": {"a": 1.0}, "grad_norm": None}
    return "".join(json.dumps(line) + "\n" for line in made)


def test_a_run_from_before_its_first_step_to_a_line_cut_short(folder):
    assert run_state(folder)["step"] == 0
    (folder / "metrics.jsonl").write_text(lines(4) + '{"step": 5, "lo')
    (folder / "samples.jsonl").write_text('{"step": 2, "prompt": "x", "text": "<b>"}\n{"st')
    state = run_state(folder)
    assert (state["step"], state["steps"], state["seconds_left"]) == (4, 10, 12.0)
    curves = {x["title"]: x["lines"] for x in state["curves"]}
    assert curves["loss"]["validation_loss"] == [[4, 4.5]]
    assert len(curves["loss"]["loss"]) == 4
    assert curves["load's coefficient of variation"]["load_cv, largest"][0] == [1, 0.3]
    assert curves["loss by source"] == {"a": [[4, 1.0]]}
    assert "gradient norm" not in curves  # it was not finite
    assert [x["text"] for x in state["samples"]] == ["<b>"]


def test_long_logs_are_thinned_and_keep_their_end():
    kept = thinned([{"step": i} for i in range(5000)])
    assert len(kept) <= MOST_POINTS
    assert kept[-1]["step"] == 4999


def test_the_server_answers_with_the_page_the_state_and_sentences(folder):
    (folder / "metrics.jsonl").write_text(lines(3))
    with make_server(folder, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]

        def get(path: str) -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                return answer.read().decode()

        page = get("/")
        assert str(folder) in page
        assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # self-contained
        state = json.loads(get("/state.json"))
        assert state["step"] == 3
        assert state["numbers"]["grad_norm"] is None
        (folder / "metrics.jsonl").write_text("broken\n" + lines(3))
        assert "is not JSON" in json.loads(get("/state.json"))["error"]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("/config.json")
        server.shutdown()
