"""moesaic plan-inference as a user types it, and --weights auto."""

import argparse
import json

import pytest

from configs.checks import UserError
from infer.hardware import from_sheet
from scripts import generate, inference_plans, model_options, plan_inference


def test_a_named_config_is_planned_for_a_device(capsys, monkeypatch):
    monkeypatch.setattr(plan_inference.jax.config, "update", lambda *_: None)
    plan_inference.main(["v31_nano", "--device", "h100", "--clients", "3", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["device"]["name"] == "h100"
    assert told["chosen"]["rows"] == 3
    assert told["chosen"]["memory"] <= told["usable_memory"]
    assert set(told["because"]) >= {"weights", "keys and values", "rows", "page", "piece"}
    plan_inference.main(["v31_nano", "--device", "unknown"])
    out = capsys.readouterr().out
    assert "XLA's own" in out
    assert "It fits:" in out


def test_what_does_not_fit_is_a_table_and_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(plan_inference.jax.config, "update", lambda *_: None)
    with pytest.raises(UserError, match="nothing fits; what would: ") as refused:
        plan_inference.main(["v3_7b", "--device", "unknown"])
    assert str(refused.value).startswith("v3_7b on unknown")
    assert "\n" not in str(refused.value)
    assert "too much" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("v31_nano", "--device", "b200"), "invalid choice: 'b200'"),
        (("v31_nan", "--device", "h100"), "did you mean 'v31_nano'"),
        (("v31_nano", "--device", "h100", "--context", "100000"), "--context 100000 must lie"),
        (("v31_nano", "--device", "h100", "--latency-ms", "nan"), "must be a finite number"),
        (("v31_nano", "--device", "h100", "--clients", "0"), "clients=0 must be at least 1"),
        (("v31_nano", "--device", "unknown", "--weights", "int4"), "no kernel of unknown reads"),
        (("v31_nano", "--device", "h100", "--quality-budget", "-1"), "must not be negative"),
    ],
)
def test_bad_input_is_a_sentence(arguments, sentence, monkeypatch):
    monkeypatch.setattr(plan_inference.jax.config, "update", lambda *_: None)
    with pytest.raises(UserError) as refused:
        plan_inference.main([*arguments])
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_auto_settles_what_was_left_open(capsys, monkeypatch):
    class Source:
        name = "tiny"
        config, execution, is_in_four_bits = inference_plans.model_of("v31_nano")

    monkeypatch.setattr(inference_plans, "found_hardware", lambda device: from_sheet("cpu"))
    asked = argparse.Namespace(weights="auto", kv=None, max_rows=4)
    model_options.settle_auto(Source(), asked)  # type: ignore[arg-type]
    assert (asked.weights, asked.kv, asked.max_rows) == ("int8", "int8", 4)
    assert "auto: weights int8, keys and values int8, 4 row(s)" in capsys.readouterr().out
    stated = argparse.Namespace(weights="auto", kv="float32", max_rows=4)
    model_options.settle_auto(Source(), stated)  # type: ignore[arg-type]
    assert stated.kv == "float32"
    named = argparse.Namespace(weights="fp8", kv=None)
    model_options.settle_auto(Source(), named)  # type: ignore[arg-type]
    assert named == argparse.Namespace(weights="fp8", kv=None)


def test_auto_is_for_one_device():
    arguments = ["smollm2", "--weights", "auto", "--dtype", "bfloat16", "--prompt", "x"]
    with pytest.raises(UserError, match="--weights auto plans for one device"):
        generate.main(arguments)
