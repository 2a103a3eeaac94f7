"""Generation with a share of the experts resident, and what paging would bring, as one types it."""

import asyncio
import json
import re
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.checks import UserError
from infer.engine import Request
from infer.sampling import Sampling
from infer.server import small_routes
from infer.sources import open_source
from scripts import expert_paging, generate, serve, served
from tests.checkpoint.cases import read_case
from tests.checkpoint.parity.weights import draw
from tests.checkpoint.tiny_folder import byte_level, write_tokenizer
from tests.infer.server.kinds import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Mixtral whose vocabulary has a token for each byte."""
    made = tmp_path_factory.mktemp("mixtral")
    config, shapes, _, _ = read_case("mixtral")
    old, config["vocab_size"] = config["vocab_size"], 300
    (made / "config.json").write_text(json.dumps(config))
    own = {name: [300 if n == old else n for n in shape] for name, shape in shapes.items()}
    save_file({name: draw(name, tuple(s)) for name, s in own.items()}, made / "model.safetensors")
    write_tokenizer(made, byte_level(), tokenizer_config={"eos_token": "<|endoftext|>"})
    return made


def test_the_text_is_the_same_and_what_was_brought_is_told(folder, tmp_path, capsys):
    asked = [str(folder), "--prompt", "abc", "--max-new-tokens", "6"]
    generate.main(asked)
    expected = capsys.readouterr().out.split("\n---")[0]
    generate.main([*asked, "--resident-experts", "0.5", "--expert-dir", str(tmp_path / "files")])
    out = capsys.readouterr().out
    assert out.split("\n---")[0] == expected
    told = re.search(
        r"experts: 2 of each layer resident, (\d+) asked for, (\d+) waited for, (\d+) brought "
        r"ahead: hit rate (-?[\d.]+)% \(Belady's, which knows the future: ([\d.]+)%\)",
        out,
    )
    assert told is not None
    requests, waited, ahead = map(int, told.groups()[:3])
    assert float(told[4]) == pytest.approx(100 * (1 - (waited + ahead) / requests), abs=0.06)
    assert float(told[4]) <= float(told[5])
    assert len(list((tmp_path / "files").iterdir())) == 2 * 2  # two layers, two weights


def test_policies_are_told_for_programs(folder, tmp_path, capsys):
    path = tmp_path / "prompt.txt"
    path.write_text("hello world")
    asked = [str(folder), "--prompt-file", str(path), "--max-new-tokens", "3", "--json"]
    expert_paging.main(asked)
    found = json.loads(capsys.readouterr().out)
    assert {x["share"] for x in found} == {0.5, 0.75}  # an eighth holds no token's experts
    for share in (0.5, 0.75):
        own = {x["policy"]: x for x in found if x["share"] == share}
        assert own["lru"]["counts"]["requests"] == own["Belady"]["counts"]["requests"]
        assert max(x["hit_rate"] for x in own.values()) == own["Belady"]["hit_rate"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--resident-experts", "0.5", "--exit-threshold", "1"],
            "--exit-threshold can't go",
        ),
        (["--resident-experts", "0.5", "--adapter", "x"], "--adapter can't go together"),
        (["--resident-experts", "0.5", "--mesh.expert", "2"], "--mesh.expert can't go together"),
        (["--resident-experts", "0.5", "--weights", "auto"], "--weights auto can't go together"),
        (["--resident-experts", "0.5", "--draft-exit", "1"], "--draft-exit can't go together"),
        (["--resident-experts", "2"], "must be a share above 0"),
        (["--resident-experts", "nan"], "must be a share above 0"),
        (["--resident-experts", "0.25"], "are 1, and a token goes to 2"),
        (["--no-expert-forecast"], "--no-expert-forecast has no effect"),
        (["--expert-dir", "x"], "--expert-dir has no effect without --resident-experts"),
    ],
)
def test_options_that_do_not_go_together(folder, more, sentence, monkeypatch):
    monkeypatch.setattr(generate, "asked_mesh", lambda arguments: None)
    with pytest.raises(UserError, match=sentence):
        generate.main([str(folder), "--prompt", "x", *more])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--mesh.expert", "2"], "--mesh.expert can't go together"),
        (["--draft", "mtp"], "--draft mtp can't go together"),
        (["--allow-updates"], "with the weights that it began with"),
    ],
)
def test_what_is_not_served_with_experts_outside(folder, more, sentence, monkeypatch):
    monkeypatch.setattr(serve, "asked_mesh", lambda arguments: None)
    with pytest.raises(UserError, match=sentence):
        serve.main([str(folder), "--resident-experts", "0.5", *more])


def test_what_is_served_is_the_same(folder, tmp_path):
    """Several texts at once, greedy and drawn, and embeddings; what was brought is told."""
    source, found = open_source(str(folder)), {}
    more = ["--resident-experts", "0.5", "--expert-dir", str(tmp_path / "files")]
    for name, options in (("whole", []), ("paged", more)):
        size = ["--max-rows", "2", "--max-length", "16", "--cache-dir", str(tmp_path / "prefixes")]
        asked = serve.parser().parse_args([str(folder), *size, *options])
        service = served.make_service(source, asked, served.engine_options(source, asked), None)
        engine = service.engine.engine
        texts = [answer.tokens for answer in run(engine, requests())]
        assert service.embed is not None
        found[name] = texts, service.embed(list(range(9)))
        service.metrics.step(engine.stats())
    assert found["paged"][0] == found["whole"][0]
    np.testing.assert_allclose(found["paged"][1], found["whole"][1], atol=1e-6)
    counts = engine.stats().paging
    assert counts is not None
    assert 0 < counts.on_demand < counts.requests
    text = service.metrics.text().decode()
    label = f'{{model_name="{folder.name}"}}'
    assert f"moesaic:experts_waited_for_total{label} {counts.on_demand:.1f}" in text
    assert f"moesaic:expert_hit_rate{label} {counts.hit_rate}" in text
    told = asyncio.run(small_routes.stats(service, cast(Any, None)))
    assert json.loads(json.dumps(told))["paging"]["ready_rate"] == counts.ready_rate


def requests() -> list[Request]:
    greedy, drawn = Sampling(), [Sampling(0.9, top_p=0.9, seed=seed) for seed in range(2)]
    prompts = [range(3, 13), [5, 9], [7, 200, 31], range(60, 70)]
    pairs = zip(prompts, (greedy, *drawn, greedy), strict=True)
    return [Request(list(prompt), 6, sampling=sampling) for prompt, sampling in pairs]


def test_nothing_to_page(folder, tmp_path):
    with pytest.raises(UserError, match="nothing to read"):
        expert_paging.main([str(folder)])
    (tmp_path / "bad").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is no UTF-8"):
        expert_paging.main([str(folder), "--prompt-file", str(tmp_path / "bad")])
