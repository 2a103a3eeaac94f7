"""Provenance: a run knows what it was made from, needs its corpus no more, and goes on with nothing
else.
"""

import dataclasses
import json
import re
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
from evals.expert_domains import ExpertLabels, LayerLabels, label_experts, read_preference
from evals.opening import load_run, run_evaluation
from evals.run import evaluate_task
from evals.scoring import BITS_PER_BYTE
from evals.task_list import find_tasks
from infer.run_weights import RunWeights, load_model, load_with_identity
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
    output = run_dir / "evaluation"
    evaluation = run_evaluation(run_dir, load_run(run_dir), output=output, may_set_aside=True)
    found = evaluate_task(evaluation, find_tasks(["stdlib_bpb"])[0])
    assert found.baselines["unigram_bpb"] > 0
    return found.total.scores[BITS_PER_BYTE].value


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
@pytest.mark.thinned(2)
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


@pytest.mark.parametrize("name", KEPT[1:])
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


def test_a_corpus_made_anew_from_other_files_is_refused_with_what_to_do(case, tmp_path):
    """As a version that collects other files makes it; a run may begin as advised."""
    run, run_dir, _, _ = case
    (Path(run.data.source) / "tests").mkdir(exist_ok=True)
    shutil.copy(Path(run.data.source) / "module_0.py", Path(run.data.source) / "tests" / "a.py")
    try:
        with pytest.raises(UserError, match="training tokens had") as refused:
            fit(run, run_dir)
        corpus, sentence = run.data.directory, str(refused.value)
        assert f"put back the folder {corpus} that it was trained on" in sentence
        (advised,) = re.findall(
            r"\(--init.source (\S+) --data.tokenizer (\S+) "
            r"--data.directory (\S+) --run-dir NEW\)",
            sentence,
        )
        assert advised == (str(run_dir), str(run_dir), f"{corpus}_2")
        follower = heir(run, run_dir, tokenizer=advised[1], directory=str(tmp_path / "corpus_2"))
        begin = initial_weights(follower, tmp_path / "NEW")
        assert begin.origin is not None
        assert begin.origin.weights == weights_fingerprint(load_model(run, run_dir)[1])
    finally:
        shutil.rmtree(Path(run.data.source) / "tests")


def test_other_settings_beside_another_corpus_are_not_blamed_on_the_corpus(case):
    run, run_dir, _, _ = case
    another_corpus(run)
    with pytest.raises(UserError, match=r"objective was .*: give what it was started with, or"):
        fit(run, run_dir, objective="distillation")


def test_held_out_documents_of_another_tokenizer_are_refused(case):
    """In a run that keeps no fingerprint of its sidecar, too."""
    run, run_dir, _, bits = case
    without_later_fingerprints(run_dir)
    assert bits_of(run_dir) == bits
    sidecar = json.loads((run_dir / "held_out.json").read_text())
    (run_dir / "held_out.json").write_text(json.dumps(sidecar | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(UserError, match="another tokenizer's tokens than the run's: remove it"):
        open_run_corpus(run, run_dir)


def test_fingerprints_that_a_run_lacks_are_noted_when_it_goes_on(case):
    run, run_dir, _, _ = case
    whole = read_provenance(run_dir)
    without_later_fingerprints(run_dir)
    assert read_provenance(run_dir) != whole
    counts = np.load(run_dir / "token_counts.npy")
    np.save(run_dir / "token_counts.npy", counts[::-1])  # unnoticed, and so not to be trusted
    same_corpus(run)
    fit(run, run_dir)
    assert read_provenance(run_dir) == whole
    np.testing.assert_array_equal(np.load(run_dir / "token_counts.npy"), counts)
    newest = json.loads((run_dir / "checkpoints" / "6" / "_CHECKPOINT_METADATA").read_text())
    assert newest["custom_metadata"]["provenance"]["corpus"]["token_counts"] is not None


def without_later_fingerprints(run_dir: Path) -> None:
    """The provenance as the first version that kept one wrote it."""
    for path in (*run_dir.glob("checkpoints/*/_CHECKPOINT_METADATA"), run_dir / "provenance.json"):
        tree = json.loads(path.read_text())
        known = tree.get("custom_metadata", {}).get("provenance", tree)
        for name in ("held_out_documents", "token_counts"):
            del known["corpus"][name]
        path.write_text(json.dumps(tree))


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


# --- What was made of a run's weights ------------------------------------------------------------


def test_labels_of_other_weights_are_refused(case, capsys):
    """Of another step, or of a run that was trained anew in the same folder."""
    run, run_dir, _, _ = case
    _, _, weights = load_with_identity(run, run_dir)
    assert weights.sha256 == weights_fingerprint(load_model(run, run_dir)[1])
    experts = {"low": [0], "high": [1, 2]}
    layer = LayerLabels(layer="layer_0", period=0, experts=experts, npmi=[[0.0] * 8] * 2)
    labels = ExpertLabels(domains=["low", "high"], threshold=0.0, layers=[layer], weights=weights)

    def preferred(labels: ExpertLabels) -> list[int]:
        (run_dir / "expert_domains.json").write_text(json.dumps(dataclasses.asdict(labels)))
        return np.flatnonzero(read_preference(run_dir, "high")["layer_0"]).tolist()

    assert preferred(labels) == [1, 2]
    assert capsys.readouterr().err == ""
    assert preferred(dataclasses.replace(labels, weights=None)) == [1, 2]
    assert "before labels kept which weights they are of" in capsys.readouterr().err
    for other, sentence in (
        (
            RunWeights(step=2, sha256=weights.sha256),
            "step 2 .*, and the newest are those at step 3",
        ),
        (RunWeights(step=3, sha256="0" * 64), "step 3 .00000000., and the newest are the weights"),
    ):
        with pytest.raises(UserError, match=sentence) as refused:
            preferred(dataclasses.replace(labels, weights=other))
        assert f"python -m scripts.label_experts {run_dir} makes it again" in str(refused.value)
    layer = dataclasses.replace(layer, experts={"low": [0], "high": [-1]})
    with pytest.raises(UserError, match="labels the experts of another model"):
        preferred(dataclasses.replace(labels, layers=[layer]))


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
