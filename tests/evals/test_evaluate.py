"""Evaluation of a run whose text is no Python: what applies is shown and written, one by one."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from checkpoint.provenance import weights_fingerprint
from checkpoint.run_directory import read_run
from configs.checks import UserError
from data.packing import TokenFile
from evals import opening
from evals.aggregation import Score
from evals.opening import load_run, run_evaluation
from evals.page import _cell
from evals.results import Result, read_results, write_results, write_run_report
from evals.results_form import GroupScores, TaskScores
from evals.run import evaluate
from evals.task_list import find_tasks
from evals.tasks import line_completion
from evals.tasks.base import Skipped
from infer.run_weights import RunWeights, load_model
from infer.sources import open_source
from model.transformer import Transformer, hidden_states, init_variables, output_weights
from model.unstacked import unstack
from scripts import command, compare, evaluate_all
from scripts import evaluate as verb
from tests import tiny
from tests.checkpoint.tiny_folder import byte_level, write_llama, write_tokenizer
from train.loop import fit

TASKS = "line_completion,stdlib_bpb"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("evaluate")
    for path in tiny.write_sources(tmp_path).iterdir():
        path.write_text(path.read_text().replace("def ", "a story of "))
    fit(tiny.run(tmp_path, steps=3), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "keep_compiled", lambda: None)
    monkeypatch.setattr(opening, "FOLDER", tmp_path / "evaluations")


def read_json(path):
    return json.loads(path.read_text())


def test_a_task_that_does_not_apply_is_skipped_with_its_reason(run_dir, tmp_path, capsys):
    verb.main([str(run_dir), "--tasks", TASKS, "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert "line_completion skipped: it needs held-out Python functions" in out
    assert "stdlib_bpb" in out
    assert "gzip_bpb" in out
    (result,) = read_results(run_dir / "evals.json")
    assert result.task == "stdlib_bpb"
    assert 0 < result.value < 16
    beside = read_json(run_dir / "evals.json")
    assert (run_dir / beside.pop("samples_folder")).resolve() == tmp_path.resolve()
    assert beside == read_json(tmp_path / "results.json")


def test_results_say_which_weights_they_are_of(run_dir):
    """And the report, of those that are not the newest."""
    verb.main([str(run_dir), "--tasks", "stdlib_bpb"])
    (result,) = read_results(run_dir / "evals.json")
    sha256 = weights_fingerprint(load_model(read_run(run_dir), run_dir)[1])
    newest = RunWeights(step=3, sha256=sha256)
    assert result.weights == newest
    shown = (run_dir / "report.html").read_text()
    assert f"{result.value:.4f} ± {result.standard_error:.4f} bits per byte" in shown
    assert "stale" not in shown
    tree = read_json(run_dir / "evals.json")
    for weights, sentence in (
        (newest, None),
        (RunWeights(step=2, sha256=sha256), "at step 2 .*, the newest are those at step 3"),
        (
            RunWeights(step=3, sha256="0" * 64),
            r"at step 3 \(00000000\), the newest are the weights",
        ),
        (None, "measured before results kept which weights they are of"),
    ):
        tree["weights"] = weights and dataclasses.asdict(weights)
        write_results(run_dir / "evals.json", tree)
        write_run_report(run_dir)
        shown = (run_dir / "report.html").read_text()
        assert ("stale" in shown) == (sentence is not None)
        assert sentence is None or re.search(f"stale: .*{sentence}", shown)


def test_results_of_the_older_form_are_read(run_dir):
    older = Result("stdlib_bpb", 1, 2.5, 0.25, "bits per byte", 7, {"gzip_bpb": 3.0}, None)
    (run_dir / "evals.json").write_text(json.dumps([dataclasses.asdict(older)]))
    assert read_results(run_dir / "evals.json") == [older]
    write_run_report(run_dir)
    assert "2.5000 ± 0.2500 bits per byte" in (run_dir / "report.html").read_text()


def test_damaged_results_do_not_keep_a_run_from_its_report(run_dir):
    (run_dir / "evals.json").write_text("[{")
    write_run_report(run_dir)
    assert "python -m scripts.evaluate makes it again" in (run_dir / "report.html").read_text()


def test_nothing_that_applies_is_an_error(run_dir):
    with pytest.raises(UserError, match="none of the tasks line_completion applies to"):
        verb.main([str(run_dir), "--tasks", "line_completion"])


def test_a_result_is_written_when_it_is_there(run_dir, tmp_path, monkeypatch):
    """The task after it may fail, or be interrupted."""
    bits, lines = find_tasks(["stdlib_bpb", "line_completion"])

    def interrupted(_):
        raise KeyboardInterrupt

    evaluation = run_evaluation(run_dir, load_run(run_dir), output=tmp_path)
    found = evaluate(evaluation, [bits, dataclasses.replace(lines, load=interrupted)])
    assert isinstance(next(found), TaskScores)
    with pytest.raises(KeyboardInterrupt):
        next(found)
    assert list(read_json(tmp_path / "results.json")["results"]) == ["stdlib_bpb"]


def test_reasons_name_the_tokenizer_where_it_is_that(run_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(line_completion, "begins_line", lambda tokenizer: [])
    evaluation = run_evaluation(run_dir, load_run(run_dir), output=tmp_path)
    skipped, _ = evaluate(evaluation, find_tasks(TASKS.split(",")))
    assert isinstance(skipped, Skipped)
    assert "needs a byte-level tokenizer" in skipped.reason


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A public checkpoint of random weights with its tokenizer, and a folder of short texts."""
    tmp_path = tmp_path_factory.mktemp("letters")
    write_llama(tmp_path / "model", hidden_size=256)
    write_tokenizer(tmp_path / "model", byte_level())
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / f"texts/{i}.txt").write_text(f"The capital of France is {i} Paris" * 2)
    return tmp_path


def test_a_model_that_is_no_run_is_measured_on_a_text(letters, capsys):
    """Its bits per byte are those of a plain pass over each text that is held out."""
    options = ["--text", str(letters / "texts"), "--suffix", ".txt", "--held-out", "0.5"]
    options += ["--folder", str(letters / "evals"), "--tasks", "stdlib_bpb"]
    verb.main([str(letters / "model"), *options])
    (path,) = (letters / "evals").glob("*/evals.json")
    (results,) = opening.FOLDER.glob("*/*/results.json")
    assert f"results: {results}" in capsys.readouterr().out.replace("\n", "")
    assert read_json(results).items() <= read_json(path).items()
    (result,) = read_results(path)
    model, variables = open_source(str(letters / "model")).load()
    tokenizer, nats, size = byte_level(), 0.0, 0
    (held_out,) = path.parent.glob("text_*/held_out.bin")
    for name in TokenFile(held_out).sidecar.names:
        text = (letters / "texts" / name).read_text()
        tokens = np.array([[0, *tokenizer.encode(text).ids]])
        hidden, _ = hidden_states(model, variables, tokens, np.arange(tokens.size)[None])
        logits = np.asarray(hidden[0] @ output_weights(model, variables), np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= log_probs[np.arange(tokens.size - 1), tokens[0, 1:]].sum()
        size += len(text.encode())
    assert 0 < size < 8 * 60
    assert result.value == pytest.approx(nats / np.log(2) / size, rel=1e-5)
    assert result.weights is not None
    assert result.weights.step is None
    verb.main([str(letters / "model"), *options, "--weights", "int8"])
    (rounded,) = read_results(path.with_name("evals_int8.json"))
    assert rounded.value == pytest.approx(result.value, rel=0.02)
    assert rounded.value != result.value


def test_a_text_that_changed_is_read_anew(letters):
    options = ["--text", str(letters / "changing"), "--suffix", ".txt", "--held-out", "0.5"]
    options += ["--folder", str(letters / "anew"), "--tasks", "stdlib_bpb"]
    shutil.copytree(letters / "texts", letters / "changing")
    sizes = []
    for word in ("Paris", "Berlin"):
        for path in (letters / "changing").iterdir():
            path.write_text(path.read_text().replace("Paris", word))
        verb.main([str(letters / "model"), *options])
        (path,) = (letters / "anew").glob("*/evals.json")
        sizes.append(read_results(path)[0].details["bytes"])
    assert sizes[1] == sizes[0] * 66 / 64  # "Berlin" is a letter longer, twice in 64


def test_two_models_side_by_side(run_dir, tmp_path, capsys):
    """A copy differs in nothing; the run's own questions are asked of both."""
    shutil.copytree(run_dir, tmp_path / "copy")
    questions = tmp_path / "mine.jsonl"
    lines = [
        {"context": f"return {n}", "choices": [" - 1", " other", ""], "answer": n % 2}
        for n in range(6)
    ]
    lines[0]["context"] = "a story of " * 60  # longer than the model's context
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    arguments = [str(run_dir), "--against", str(tmp_path / "copy"), "--output", str(out)]
    verb.main([*arguments, "--tasks", f"stdlib_bpb,{questions}"])
    shown = capsys.readouterr().out
    assert "of the samples are longer than the model's context" in shown
    assert "samples/s" in shown
    differences = read_json(out / "comparison.json")["differences"]
    assert [(d["task"], d["metric"]) for d in differences] == [
        ("stdlib_bpb", "bits_per_byte"),
        ("stdlib_bpb", "byte_perplexity"),
        ("mine", "acc"),
        ("mine", "acc_norm"),
    ]
    assert all(d["difference"] == 0 and d["interval"] == [0, 0] for d in differences)
    assert differences[2]["mcnemar_p"] == 1.0
    assert (out / "comparison" / "report.html").exists()
    tree = read_json(out / "results.json")
    assert tree["results"]["mine"]["cut_context_rate,none"] == 1 / 6
    line = json.loads((out / "samples_mine.jsonl").read_text().splitlines()[1])
    assert len(line["log_likelihoods"]) == 3
    assert line["log_likelihoods"][2] == 0.0  # the empty one


@pytest.mark.slow
def test_weights_are_known_however_they_lie(letters, run_dir):
    """Layers stacked or apart, and a run's on any mesh by the fingerprint it is known by."""
    source = open_source(str(letters / "model"))
    model = Transformer(tiny.model(num_layers=4))
    stacked = (model, init_variables(model, 0))
    apart = unstack(*stacked)
    assert apart[0].config.num_periods < model.config.num_periods
    assert opening.weights_identity(source, *apart) == opening.weights_identity(source, *stacked)
    run = open_source(str(run_dir))
    assert opening.weights_identity(run, *run.load()) == load_run(run_dir).weights
    changed = jax.tree.map(lambda x: x, stacked[1])
    changed["params"]["embedding"] = -changed["params"]["embedding"]
    other = opening.weights_identity(source, stacked[0], changed)
    assert other != opening.weights_identity(source, *stacked)


def test_a_folder_of_texts_is_a_task(letters, tmp_path):
    """Its bits per byte are those of each file alone."""
    name = f"bpb:{letters / 'texts'}"
    verb.main([str(letters / "model"), "--tasks", name, "--output", str(tmp_path), "--limit", "3"])
    (path,) = tmp_path.glob("samples_bpb*.jsonl")
    lines = [json.loads(line) for line in path.open()]
    assert len(lines) == 3
    nats, size = (sum(line["bits_per_byte"][i] for line in lines) for i in (0, 1))
    found = read_json(tmp_path / "results.json")["results"][name]
    assert not list(tmp_path.glob("*/evals.json"))  # they are of held-out text
    assert found["bits_per_byte,none"] == pytest.approx(-nats / size / np.log(2))
    assert size == sum(len(line["doc"]["text"].encode()) for line in lines)


def test_what_does_not_go_with_a_model_is_said(letters, run_dir):
    model, run = str(letters / "model"), str(run_dir)
    for arguments, sentence in (
        ([model, "--initial"], "--initial is of a run"),
        ([model, "--length", "65"], "--length 65 must be from 2 to the model's 64"),
        ([model, "--held-out", "1"], "--held-out 1.0 must lie between 0 and 1"),
        ([model, "--text", str(letters / "none")], "is no folder and no file"),
        ([run, "--length", "9"], "--length 9 goes with --text"),
        ([run, "--limit", "0"], "--limit 0 must be at least 1"),
        ([run, "--tasks", "stdlib_bp"], "there is no task 'stdlib_bp': did you mean stdlib_bpb?"),
        ([run, "--unprotected"], "--unprotected is for tasks that run a model's code"),
        ([model, "--batch-tokens", "0"], "batch_tokens=0 must be at least 1"),
        (["--tasks", "stdlib_bpb"], "name a model: a run, a folder, a file, or smollm2"),
        ([run, "--held-out", "0.5"], "--held-out 0.5 goes with --text"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            verb.main(arguments)


def test_several_models_are_one_page(run_dir, tmp_path, capsys, monkeypatch):
    """Which says what was not asked of which, and why."""
    monkeypatch.chdir(tmp_path)
    questions = tmp_path / "colours.jsonl"
    line = {"context": "Grass is", "choices": [" green", " loud"], "answer": 0}
    questions.write_text(json.dumps(line) + "\n")
    (tmp_path / "empty").mkdir()
    models = [str(run_dir), str(tmp_path / "empty")]
    chosen = ["--tasks", f"{questions},line_completion", "--output", str(tmp_path / "page")]
    evaluate_all.main([*models, "runs/quickstart/teacher", *chosen])
    page = (tmp_path / "page" / "report.html").read_text()
    assert re.search(r"colours</td><td>acc</td><td>[01]\.0000\s\(1\)", page)
    assert "line_completion: it needs held-out Python functions" in page
    assert page.count("<li>") == 3
    assert "runs/quickstart/teacher was left out: make quickstart makes it" in page
    assert f"{tmp_path / 'empty'} was left out: " in page
    assert (tmp_path / "page" / "shares.png").exists()
    with pytest.raises(UserError, match=r"no model could be asked: .*empty was left out"):
        evaluate_all.main([models[1], *chosen])
    with pytest.raises(UserError, match="--answers 0 must be at least 1"):
        evaluate_all.main([*models, "--answers", "0"])


def test_a_page_says_how_many_answers_were_cut_off():
    found = GroupScores({}, 2, empty_rate=0.0, truncated_rate=0.5)
    cell = _cell(Score(0.5, 0.25), found)
    assert cell.replace("\u00a0", " ") == "0.5000 ± 0.2500 (2); 50% cut off"
    assert cell.split(" ") == ["0.5000\u00a0±\u00a00.2500\u00a0(2);", "50%\u00a0cut\u00a0off"]


def test_compared_runs_have_their_evaluations_side_by_side(run_dir, tmp_path, capsys):
    """One run twice, under two names: the same scores, and no difference in any sample."""
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    (other / "evals.json").unlink(missing_ok=True)
    compare.main([str(run_dir), str(other), "--to", str(tmp_path / "page")])
    assert "sample by sample" not in capsys.readouterr().out
    for folder in (run_dir, other):
        verb.main([str(folder), "--tasks", "stdlib_bpb", "--output", str(tmp_path / folder.name)])
    capsys.readouterr()
    compare.main([str(run_dir), str(other), "--to", str(tmp_path / "page")])
    out = capsys.readouterr().out
    (result,) = read_results(run_dir / "evals.json")
    shown = f"{result.value:.4f} ± {result.standard_error:.4f} ({result.count})"
    assert out.count(shown) == 2
    page = (tmp_path / "page" / "report.html").read_text()
    assert f"<td>{shown}</td><td>{shown}</td>" in page
    assert "<td>+0.0000</td><td>+0.0000 to +0.0000</td>" in page
    shutil.rmtree(tmp_path / "other" / "checkpoints")  # what was measured stays
    shutil.rmtree(tmp_path / run_dir.name)
    compare.main([str(run_dir), str(other), "--to", str(tmp_path / "page")])
    assert "sample by sample" not in capsys.readouterr().out
