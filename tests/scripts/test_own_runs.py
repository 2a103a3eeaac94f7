"""A run of a user's own file, from its first step to the command that goes on with its folder."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint import run_directory
from checkpoint.run_directory import EXPERIMENT, read_run
from configs import feed_forward
from configs.base import DistillConfig
from configs.checks import UserError
from configs.cli import named_run
from configs.feed_forward import RouterConfig
from model import router, router_scores
from scripts import command
from scripts.named_runs import own_loss
from tests import tiny
from tests.scripts.test_scripts import run, settings
from train.loop import fit

FILE = """
import dataclasses

from configs.runs import v31_nano


def mine():
    return dataclasses.replace(v31_nano(), name="mine", seed=5)
"""


@pytest.mark.slow
def test_a_run_of_ones_own_goes_on_by_its_folder(tmp_path: Path):
    tiny.write_sources(tmp_path)
    file, run_dir = tmp_path / "my_experiments.py", tmp_path / "a run"
    file.write_text(FILE)
    run(tmp_path, "train", f"{file}:mine", *settings(tmp_path), "--run-dir", str(run_dir))
    assert (run_dir / EXPERIMENT).read_text() == FILE
    first = read_run(run_dir)
    assert (first.name, first.seed, first.steps) == ("mine", 5, 12)

    run(tmp_path, "train", str(run_dir), "--steps", "14")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert read_run(run_dir).steps == 14
    assert (run_dir / EXPERIMENT).read_text() == FILE

    _, err = run(tmp_path, "train", str(run_dir), "--run-dir", str(tmp_path / "other"), code=2)
    assert "is a run to go on with, --run-dir" in err
    _, err = run(tmp_path, "train", str(run_dir), "--seed", "4", code=2)
    assert "holds a run with another config (seed was 5, now 4)" in err
    _, err = run(tmp_path, "distill", str(run_dir), code=2)
    assert "--teacher is missing" in err
    file.write_text("raise RuntimeError('mine')\n")
    _, err = run(tmp_path, "train", f"{file}:mine", code=2)
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.splitlines()[-1] == f"error: {file} line 1 raised RuntimeError: mine: mend the file"


LOSS = """
import dataclasses
from pathlib import Path

from tests import tiny
from train.losses import cross_entropy


def doubled(logits, inputs, shared=None):
    loss, _ = cross_entropy(logits, inputs)
    return 2 * loss, {{"doubled": 2 * loss}}


nothing = 3


def mine():
    base = tiny.run(Path({folder!r}), steps=3)
    return dataclasses.replace(base, name="mine", objective="doubled")


def many():
    return {{"one": mine()}}
"""


@pytest.mark.slow
def test_an_objective_of_ones_own_is_minimised_and_its_file_executed_only_by_name(tmp_path: Path):
    tiny.write_sources(tmp_path)
    file, run_dir = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(LOSS.format(folder=str(tmp_path)))
    run(tmp_path, "train", f"{file}:mine", "--run-dir", str(run_dir))
    _, err = run(tmp_path, "train", str(run_dir), "--steps", "5", code=2)
    assert f"such as --experiment {run_dir}/experiment.py" in err
    kept = str(run_dir / EXPERIMENT)
    run(tmp_path, "train", str(run_dir), "--steps", "5", "--experiment", kept)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    for line in lines:
        assert line["loss"] == line["doubled"] == pytest.approx(2 * line["cross_entropy"])
    run(tmp_path, "sweep", f"{file}:many", "--dir", str(tmp_path / "many"))
    swept = (tmp_path / "many" / "one" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["loss"] for x in swept] == [line["loss"] for line in lines[:3]]


def test_the_function_that_a_run_names_is_found_in_the_file_that_the_user_names(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(LOSS.format(folder=str(tmp_path)))
    mine = named_run(f"{file}:mine")
    assert own_loss(dataclasses.replace(mine, objective=None), file, tmp_path) is None
    loss = own_loss(mine, file, tmp_path)
    assert loss is not None
    logits_BcV = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    targets_Bc = np.array([[0, 4, -1], [2, -1, 1]])
    total, sums = loss(jnp.asarray(logits_BcV), {"targets": jnp.asarray(targets_Bc)}, None)
    log_p = logits_BcV - np.log(np.exp(logits_BcV).sum(axis=-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.maximum(targets_Bc, 0)[..., None], axis=-1)[..., 0]
    expected = -picked[targets_Bc >= 0].sum()
    assert float(total) == float(sums["doubled"]) == pytest.approx(2 * expected, rel=1e-6)
    assert float(sums["cross_entropy"]) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match="none is executed unless it is named"):
        own_loss(mine, None, tmp_path)
    for name, sentence in (("gone", "has no 'gone'"), ("nothing", "is 3, no function")):
        with pytest.raises(UserError, match=sentence):
            own_loss(dataclasses.replace(mine, objective=name), file, tmp_path)
    with pytest.raises(UserError, match=r"which scripts\.train alone executes"):
        fit(mine, tmp_path / "run")
    with pytest.raises(UserError, match="this run has preference or distill settings"):
        dataclasses.replace(mine, distill=DistillConfig())


ROUTER = """
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from model.router_scores import ScoreKind, add_scores
from tests import tiny

add_scores(
    "softplus",
    ScoreKind(
        forward=jax.nn.softplus,
        inverse=lambda score, known, logit: score + jnp.log(-jnp.expm1(-score)),
        is_shared=False,
        is_bounded=False,
    ),
)


def mine():
    moe = tiny.moe(router=dataclasses.replace(tiny.moe().router, scores="softplus"))
    layer = dataclasses.replace(tiny.model().pattern[0], ffn=moe)
    base = tiny.run(Path({folder!r}), steps=3)
    return dataclasses.replace(base, name="mine", model=tiny.model(pattern=(layer,)))
"""


@pytest.fixture
def own_scores(monkeypatch):
    """What a file adds is gone after the test."""
    monkeypatch.setattr(router_scores, "SCORES", dict(router_scores.SCORES))
    monkeypatch.setattr(feed_forward, "SCORES", set(feed_forward.SCORES))
    monkeypatch.setattr(router, "SCORES", router_scores.SCORES)


def test_router_scores_of_ones_own_are_there_once_their_file_is_named(tmp_path, own_scores):
    file = tmp_path / "mine.py"
    file.write_text(ROUTER.format(folder=str(tmp_path)))
    with pytest.raises(UserError, match=r"'softplus' is none of .* name it with --experiment FILE"):
        RouterConfig(top_k=2, scores="softplus")
    command.parser("").parse_args(["--experiment", str(file)])
    config = RouterConfig(top_k=2, scores="softplus", normalize_gates=False)
    logits_TE = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    found = router.route(jnp.asarray(logits_TE), config)
    best_TK = np.argsort(-logits_TE, axis=1)[:, :2]
    np.testing.assert_array_equal(found.expert_ids_TK, best_TK)
    scores_TE = np.log1p(np.exp(logits_TE))
    expected_TK = np.take_along_axis(scores_TE, best_TK, axis=1)
    np.testing.assert_allclose(found.gates_TK, expected_TK, rtol=1e-6)
    with pytest.raises(UserError, match="there are router scores 'softmax' already"):
        router_scores.add_scores("softmax", router_scores.SCORES["softplus"])


@pytest.mark.slow
def test_a_run_with_router_scores_of_its_file_trains_and_generates(tmp_path: Path):
    tiny.write_sources(tmp_path)
    file, run_dir = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(ROUTER.format(folder=str(tmp_path)))
    run(tmp_path, "train", f"{file}:mine", "--run-dir", str(run_dir))
    asked = ("generate", str(run_dir), "--prompt", "a", "--max-new-tokens", "2")
    _, err = run(tmp_path, *asked, code=2)
    assert "router.scores='softplus' is none of" in err
    run(tmp_path, *asked, "--experiment", str(run_dir / EXPERIMENT))


def test_a_changed_file_replaces_the_one_before_only_where_no_step_was_done(tmp_path, monkeypatch):
    for step, text in ((None, "a"), (None, "b"), (3, "b"), (3, "c"), (7, "d")):
        monkeypatch.setattr(run_directory, "latest_step", lambda _, step=step: step)
        run_directory._keep_experiment(tmp_path, text)
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {
        "experiment.py": "d",
        "experiment_until_step_3.py": "b",
        "experiment_until_step_7.py": "c",
    }
