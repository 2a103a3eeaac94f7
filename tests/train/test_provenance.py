"""Provenance: a run knows what it was made from, needs its corpus no more, and goes on with nothing
else.
"""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from checkpoint.provenance import read_provenance, weights_fingerprint
from checkpoint.run_corpus import open_run_corpus, read_run_tokenizer
from configs.base import InitConfig
from configs.checks import UserError
from data.pipeline import prepare_corpus
from evals.expert_domains import label_experts
from evals.run import evaluate
from infer.load import load_model
from infer.sources import open_source
from scripts.sources import initial_variables, initial_weights
from tests import tiny
from tests.train.test_loop import stop_after
from train.loop import fit

TEXT = "def function_3(argument): return total"
KEPT = ("provenance.json", "tokenizer.json", "held_out.bin", "held_out.json", "token_counts.npy")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, what it was worth while its corpus was there, and that corpus, moved away."""
    tmp_path = tmp_path_factory.mktemp("provenance")
    tiny.write_sources(tmp_path)
    run = tiny.run(tmp_path)
    fit(run, tmp_path / "run", make_transform=stop_after(3, signal.SIGTERM))
    ids = prepare_corpus(run.data, 300).tokenizer().encode(TEXT).ids
    bits = bits_of(tmp_path / "run")
    (tmp_path / "corpus").rename(tmp_path / "corpus as it was")
    return run, tmp_path, ids, bits


@pytest.fixture
def case(trained, tmp_path):
    """A copy of it without its corpus, to be changed; its config names the old places."""
    run, origin, ids, bits = trained
    shutil.copytree(origin / "run", tmp_path / "run")
    yield run, tmp_path / "run", ids, bits
    shutil.rmtree(origin / "corpus", ignore_errors=True)


def bits_of(run_dir: Path) -> float:
    (result,) = evaluate(run_dir, ["stdlib_bpb"], lambda name: lambda done, total: None)
    assert result.details["unigram_bpb"] > 0
    return result.value


def another_corpus(run) -> None:
    """A corpus of the same settings from a changed source, or another Python's library."""
    sources = Path(run.data.source)
    shutil.move(sources, sources.with_name("as it was"))
    tiny.write_sources(sources.parent, word="something_else")
    prepare_corpus(run.data, 300)
    shutil.rmtree(sources)
    shutil.move(sources.with_name("as it was"), sources)


def same_corpus(run) -> None:
    corpus = Path(run.data.directory)
    shutil.copytree(corpus.with_name("corpus as it was"), corpus)


@pytest.mark.parametrize("change", [None, another_corpus])
def test_a_run_is_read_without_its_corpus_and_makes_none(case, change):
    run, run_dir, ids, bits = case
    if change is not None:
        change(run)
    assert open_source(str(run_dir)).tokenizer().tokenizer.encode(TEXT).ids == ids
    assert bits_of(run_dir) == bits
    with pytest.raises(UserError, match="no held-out document belongs to"):
        label_experts(run_dir, {"a": ["nowhere"], "b": ["elsewhere"]})
    assert Path(run.data.directory).exists() == (change is not None)


def test_checkpoints_hold_the_tokenizer_too(case):
    run, run_dir, ids, _ = case
    (run_dir / "tokenizer.json").unlink()
    assert read_run_tokenizer(run, run_dir).encode(TEXT).ids == ids
    (run_dir / "provenance.json").unlink()
    assert read_run_tokenizer(run, run_dir).encode(TEXT).ids == ids


def flip(path: Path) -> None:
    values = bytearray(path.read_bytes())
    values[len(values) // 2] ^= 1
    path.write_bytes(values)


@pytest.mark.parametrize("name", ["tokenizer.json", "held_out.bin"])
def test_what_was_changed_in_the_folder_is_refused(case, name):
    run, run_dir, _, _ = case
    flip(run_dir / name)
    with pytest.raises(UserError, match=f"{name} is not what the run was trained with"):
        open_run_corpus(run, run_dir)
    (run_dir / name).unlink()
    same_corpus(run)
    fit(run, run_dir)  # as the sentence advises
    assert open_run_corpus(run, run_dir).held_out.sidecar.num_tokens > 0


def test_missing_held_out_tokens_never_advise_to_delete_the_run(case):
    run, run_dir, _, _ = case
    (run_dir / "held_out.json").unlink()
    with pytest.raises(UserError, match="start the command that trained the run again") as error:
        open_run_corpus(run, run_dir)
    assert "delete" not in str(error.value)


def test_a_run_goes_on_with_its_own_corpus_alone(case):
    run, run_dir, _, _ = case
    before = (run_dir / "metrics.jsonl").read_bytes()
    another_corpus(run)
    with pytest.raises(
        UserError, match=r"tokenizer had .*training tokens had .*held out tokens had"
    ):
        fit(run, run_dir)
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(run.data.directory)
    assert fit(run, run_dir).steps == run.steps  # the corpus made anew from the same text


def test_one_token_that_differs_is_enough(case):
    run, run_dir, _, _ = case
    same_corpus(run)
    flip(Path(run.data.directory) / "train.bin")
    with pytest.raises(UserError, match=r"\(training tokens had the SHA-256 .*, now"):
        fit(run, run_dir)


def test_fingerprints_of_another_run_are_refused(case):
    run, run_dir, _, _ = case
    tree = json.loads((run_dir / "provenance.json").read_text())
    tree["corpus"]["tokenizer"] = "0" * 64
    (run_dir / "provenance.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"provenance.json is of another run .*tokenizer had"):
        read_run_tokenizer(run, run_dir)


def make_old(run_dir: Path) -> None:
    """The folder as earlier versions left it."""
    for name in KEPT:
        (run_dir / name).unlink()
    for path in run_dir.glob("checkpoints/*/_CHECKPOINT_METADATA"):
        tree = json.loads(path.read_text())
        for name in ("provenance", "tokenizer"):
            del tree["custom_metadata"][name]
        path.write_text(json.dumps(tree))


def test_an_old_run_is_read_with_its_corpus_and_says_so(case, capsys):
    run, run_dir, ids, bits = case
    make_old(run_dir)
    with pytest.raises(UserError, match=r"keeps no tokenizer.* corpus .* is not there"):
        open_source(str(run_dir)).tokenizer()
    assert not Path(run.data.directory).exists()
    same_corpus(run)
    assert bits_of(run_dir) == bits
    assert open_source(str(run_dir)).tokenizer().tokenizer.encode(TEXT).ids == ids
    assert "before runs kept fingerprints" in capsys.readouterr().err
    fit(run, run_dir)
    assert "before runs kept fingerprints" in capsys.readouterr().err
    assert {path.name for path in run_dir.iterdir()} >= set(KEPT)
    shutil.rmtree(run.data.directory)
    bits_of(run_dir)


def test_a_fingerprint_is_of_values_names_and_shapes():
    tree = {"a": np.arange(6, dtype=np.float32), "b": np.ones(2, np.float32)}
    same = {"b": np.ones(2, np.float32), "a": np.arange(6, dtype=np.float32)}
    assert weights_fingerprint(tree) == weights_fingerprint(same)
    others = [
        {**tree, "a": tree["a"].reshape(2, 3)},
        {**tree, "a": tree["a"][::-1]},
        {**tree, "a": tree["a"].view(np.int32)},
        {"c": tree["a"], "b": tree["b"]},
        {"a": np.nextafter(tree["a"], np.float32(9)), "b": tree["b"]},
    ]
    found = {weights_fingerprint(x) for x in (tree, *others)}
    assert len(found) == 6


# --- A run that begins with another ---------------------------------------------------------------


def heir(run, run_dir: Path, **data):
    """A run that begins with the one in run_dir."""
    init, data = InitConfig(source=str(run_dir)), dataclasses.replace(run.data, **data)
    return dataclasses.replace(run, name="heir", init=init, data=data)


def test_a_source_with_another_tokenizer_is_refused(case, tmp_path):
    run, run_dir, ids, _ = case
    another_corpus(run)
    with pytest.raises(UserError, match=r"tokenizers .* differ \(\d+ of 300 ids stand for other"):
        initial_weights(heir(run, run_dir), tmp_path / "heir")
    # As the sentence advises.
    data = {"tokenizer": str(run_dir), "directory": str(tmp_path / "corpus")}
    follower = heir(run, run_dir, **data)
    begin = initial_weights(follower, tmp_path / "heir")
    assert begin.origin is not None
    assert begin.origin.rows_read == 24  # the same text gives the same rows
    assert prepare_corpus(follower.data, 300).tokenizer().encode(TEXT).ids == ids


def test_a_run_that_began_with_another_knows_which(case, tmp_path):
    run, run_dir, _, _ = case
    same_corpus(run)
    follower = heir(run, run_dir)
    begin = initial_weights(follower, tmp_path / "heir")
    options = {"variables": begin.take(), "initial": begin.origin}
    fit(follower, tmp_path / "heir", make_transform=stop_after(3, signal.SIGTERM), **options)
    known = read_provenance(tmp_path / "heir")
    assert known is not None
    assert known.initial is not None
    assert known.initial.weights == weights_fingerprint(load_model(run, run_dir)[1])
    initial_variables(follower, tmp_path / "heir")
    fit(run, run_dir)  # the source learns on: its weights are others now
    with pytest.raises(UserError, match=r"began with .*at step 3 .* is .*at step 6"):
        initial_variables(follower, tmp_path / "heir")
    again = initial_weights(follower, tmp_path / "heir")
    with pytest.raises(UserError, match=r"initial weights: was .*at step 3 .*, now .*at step 6"):
        fit(follower, tmp_path / "heir", initial=again.origin)
    shutil.rmtree(run_dir)
    gone = initial_weights(follower, tmp_path / "heir")
    assert gone.origin is None
    assert fit(follower, tmp_path / "heir", initial=gone.origin).steps == run.steps
