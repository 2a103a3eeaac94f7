"""Generation with a share of the experts resident, and what paging would bring, as one types it."""

import json
import re

import pytest
from safetensors.numpy import save_file

from configs.checks import UserError
from scripts import expert_paging, generate
from tests.checkpoint.cases import read_case
from tests.checkpoint.parity.weights import draw
from tests.checkpoint.tiny_folder import byte_level, write_tokenizer


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
        (["--resident-experts", "0.5", "--kv", "int8"], "--kv can't go together"),
        (["--resident-experts", "0.5", "--mesh.expert", "2"], "--mesh.expert can't go together"),
        (["--resident-experts", "0.5", "--weights", "auto"], "--weights auto can't go together"),
        (["--resident-experts", "0.5", "--draft-ngram"], "--draft-ngram can't go together"),
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


def test_nothing_to_page(folder, tmp_path):
    with pytest.raises(UserError, match="nothing to read"):
        expert_paging.main([str(folder)])
    (tmp_path / "bad").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is no UTF-8"):
        expert_paging.main([str(folder), "--prompt-file", str(tmp_path / "bad")])
