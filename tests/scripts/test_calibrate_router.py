"""moesaic calibrate-router, and serve with what it makes, on models that say what was planted."""

import itertools
import json

import httpx
import numpy as np
import pytest

from configs.checks import UserError
from infer.engine import EngineOptions
from infer.query_router import report_of
from infer.scored_questions import read_questions
from infer.server.keys import ApiKeys
from infer.sources import open_source
from scripts import calibrate_router, offloading, serve, served
from tests.checkpoint.tiny_folder import byte_level, sentencepiece, write_llama, write_tokenizer
from tests.infer.server.scripted import Served

KNOWN = "abcdefgh"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small model that goes on with the alphabet, and a large one that goes back in it."""
    made, tokenizer = tmp_path_factory.mktemp("models"), byte_level()
    for name, text in (("small", KNOWN), ("large", KNOWN[::-1])):
        ids = tokenizer.encode(text).ids
        write_llama(made / name, dict(itertools.pairwise(ids)))
        write_tokenizer(made / name, tokenizer, tokenizer_config={"eos_token": "<|endoftext|>"})
    return made


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """The small model is right where it knows how a question goes on."""
    rng, lines = np.random.default_rng(0), []
    for i in range(80):
        at = int(rng.integers(0, 4))
        easy = i % 5 != 0
        text = KNOWN[at : at + 4] if easy else "".join(rng.choice(list("zyxwvu"), 4))
        lines.append(json.dumps({"prompt": text, "small": int(easy), "large": 1}))
    path = tmp_path_factory.mktemp("questions") / "scored.jsonl"
    path.write_text("\n".join([*lines, ""]))
    return path


@pytest.fixture(scope="module")
def router(folders, questions):
    out = questions.with_name("router.json")
    asked = ["--questions", str(questions), "--out", str(out)]
    calibrate_router.main([str(folders / "small"), *asked])
    return out


def test_a_router_that_is_written_keeps_hard_questions_from_the_small_model(router, folders):
    found = offloading.read_router(router)
    assert found.small == str(folders / "small")
    assert found.report.questions == 20
    assert found.report.pgr == 1.0
    assert found.report.call_share == pytest.approx(0.2, abs=0.15)
    assert found.report.random_pgr == found.report.call_share
    assert "performance gap recovered 100.0%" in report_of(found)


@pytest.mark.slow
def test_both_models_answer_behind_one_endpoint(router, folders):
    small, large = str(folders / "small"), str(folders / "large")
    arguments = serve.parser().parse_args(
        [large, "--small", small, "--router", str(router), "--max-rows", "2", "--no-prefix-cache"]
    )
    source = open_source(large)
    options = served.engine_options(source, arguments)
    service = served.make_service(source, arguments, options, None)
    server = Served(service, ApiKeys([]), lambda: served.warm_up_all(service))
    try:
        for prompt, text in (("abc", "d"), ("zyxf", "e")):
            body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
            assert answer["choices"][0]["text"] == text
        told = httpx.get(f"{server.url}/stats").json()["offload"]
        assert (told["small_requests"], told["large_requests"]) == (1, 1)
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--small", "smollm2"], "--small needs the --router"),
        (["--router", "r.json"], "--small needs the --router"),
        (["--small", "a", "--router", "b", "--allow-updates"], "--allow-updates exchanges"),
    ],
)
def test_options_that_do_not_go_together(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        offloading.check_offload_options(serve.parser().parse_args(["x", *arguments]))


def test_routers_that_are_none(router, folders, tmp_path):
    source, options = open_source(str(folders / "large")), EngineOptions()
    for name, text, sentence in (
        ("missing", None, "there is no router"),
        ("damaged", "{", "is not valid JSON"),
        ("other", router.read_text().replace("small/", "x").replace("/small", "/x"), "calibrated"),
        ("short", router.read_text().replace('"scales": [', '"scales": [1,'), "a weight, a mean"),
    ):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        asked = ["x", "--small", str(folders / "small"), "--router", str(path)]
        with pytest.raises(UserError, match=sentence):
            offloading.open_offload(source, serve.parser().parse_args(asked), options)


def test_models_of_two_vocabularies_are_refused(folders, tmp_path):
    other = tmp_path / "other"
    write_llama(other)
    write_tokenizer(other, sentencepiece())
    with pytest.raises(UserError, match="number tokens differently"):
        offloading.require_one_vocabulary(
            open_source(str(other)), open_source(str(folders / "large"))
        )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"prompt": "x", "small": 1}\n', "line 1 needs"),
        ('{"prompt": "x", "small": 0, "large": 1}\n\nnot json\n', "line 3 is not valid JSON"),
        (b"\xff", "is no UTF-8"),
    ],
)
def test_files_of_questions_that_are_none(text, sentence, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=sentence):
        read_questions(path)
