"""Mistyped settings, as people type them, and what each was meant to be."""

import dataclasses

import pytest

from configs.checks import UserError
from configs.cli import known_runs, load_run
from configs.near_names import hint, likeness, setting_names
from configs.optimizer import OptimizerConfig
from scripts import command

MEANT = {
    "--optimizer.lr": "--optimizer.learning-rate",
    "--optimizer.LR": "--optimizer.learning-rate",
    "--lr": "--optimizer.learning-rate",
    "--learning_rate": "--optimizer.learning-rate",
    "--optimizer.learning_rat": "--optimizer.learning-rate",
    "--optimizer.wd": "--optimizer.weight-decay",
    "--optimizer.warmup": "--optimizer.warmup-steps",
    "--optimizer.clip": "--optimizer.clip-norm",
    "--optimizer.epsilon": "--optimizer.eps",
    "--optimizer.momentun": "--optimizer.momentum",
    "--bs": "--batch-size",
    "--batch": "--batch-size",
    "--batchsize": "--batch-size",
    "--stepps": "--steps",
    "--num-steps": "--steps",
    "--seq-len": "--data.seq-len",
    "--data.sequence-length": "--data.seq-len",
    "--model.hidden-size": "--model.d-model",
    "--model.layers": "--model.num-layers",
    "--model.n-layers": "--model.num-layers",
    "--mesh.experts": "--mesh.expert",
    "--seeds": "--seed",
    "--dtype": "--execution.compute-dtype",
    "--checkpoint.interval": None,
    "--rundir": "--run-dir",
    "--run_dir": "--run-dir",
    "--colour": None,
}


@pytest.mark.parametrize("typed", MEANT)
def test_the_nearest_setting(typed):
    settings = dict(setting_names(known_runs()["v31_nano"]()))
    told, wanted = hint(typed, settings, ["--run-dir", "--help"]), MEANT[typed]
    assert f"did you mean {wanted}?" in told if wanted else "did you mean" not in told


@pytest.mark.parametrize("overrides", [["--optimizer.lr", "0.1"], ["--optimizer.lr=0.1"]])
def test_an_unknown_setting_is_answered_with_its_neighbour(overrides):
    sentence = r"^unknown option --optimizer.lr: did you mean --optimizer.learning-rate\? \("
    with pytest.raises(UserError, match=sentence):
        load_run("v31_nano", overrides)


def test_every_unknown_setting_is_named():
    with pytest.raises(UserError, match=r"--lr: did you mean.*; unknown option --bs: did"):
        load_run("v31_nano", ["--lr", "1", "--steps", "30", "--bs", "2"])


def test_settings_of_what_a_run_has_not():
    with pytest.raises(UserError, match=r"distill is None in this run, so it has no settings"):
        load_run("v31_nano", ["--distill.top-k", "3"])


def test_a_name_far_from_all_is_answered_with_its_section():
    with pytest.raises(UserError, match=r"--checkpoint.interval: there are .*--checkpoint.every"):
        load_run("v31_nano", ["--checkpoint.interval", "3"])
    with pytest.raises(UserError, match="unexpected 'extra': settings are given as --name value"):
        load_run("v31_nano", ["extra"])


@pytest.mark.parametrize("name", ["v31_nano", "v1_nano", "deepseek_v3_nano", "v31_nano_student"])
@pytest.mark.thinned(2)
def test_every_setting_is_nearest_to_itself_and_can_be_given(name):
    """The names are those that the command line takes: asked of it, for all of a run."""
    settings = dict(setting_names(known_runs()[name]()))
    assert all(likeness(x, x) > max(likeness(x, y) for y in settings if y != x) for x in settings)
    simple = {k: v for k, v in settings.items() if isinstance(v, (int, str)) and k != "--name"}
    words = [word for key, value in simple.items() for word in (key, str(value))]
    assert load_run(name, words) == known_runs()[name]()


def test_an_option_of_a_verb_is_near_too():
    made = command.parser("A verb.")
    made.add_argument("--temperature", type=float)
    with pytest.raises(UserError, match="unknown option --temprature: did you mean --temperature"):
        made.parse_args(["--temprature", "1"])
    with pytest.raises(UserError, match="unrecognized arguments: stray"):
        made.parse_args(["stray"])


# --- What a choice makes meaningless -------------------------------------------------------------


@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
def test_adamw_with_cosine_takes_two_words(form):
    text = [form.format("--optimizer.kind", "adamw"), form.format("--optimizer.schedule", "cosine")]
    run = load_run("v31_nano", " ".join(text).split())
    before = known_runs()["v31_nano"]()
    changes = {"kind": "adamw", "schedule": "cosine", "momentum": None, "decay_fraction": None}
    assert run == dataclasses.replace(
        before, optimizer=dataclasses.replace(before.optimizer, **changes)
    )
    assert isinstance(run.optimizer, OptimizerConfig)


def test_each_choice_alone():
    assert load_run("v31_nano", ["--optimizer.kind", "adamw"]).optimizer.decay_fraction == 0.7
    assert load_run("v31_nano", ["--optimizer.schedule", "cosine"]).optimizer.momentum == 0.95
    assert load_run("v3_7b", ["--execution.transport", "gather"]).execution.capacity_factor is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["--optimizer.kind", "adamw", "--optimizer.momentum", "0.9"],
        ["--optimizer.momentum", "0.9", "--optimizer.kind", "adamw"],
        ["--optimizer.schedule", "cosine", "--optimizer.decay_fraction", "0.5"],
    ],
)
def test_what_is_asked_for_and_would_be_ignored_is_still_refused(overrides):
    with pytest.raises(UserError, match="goes with"):
        load_run("v31_nano", overrides)


def test_a_run_without_overrides_is_the_function_itself():
    for name, function in known_runs().items():
        assert load_run(name) == function()
