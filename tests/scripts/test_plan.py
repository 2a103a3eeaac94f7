"""python -m scripts.plan as a user types it, on host devices."""

import re

import pytest

from configs.checks import UserError
from scripts import command, plan
from tests.parallel.test_topology import HAS_PLUGIN, needs_plugin
from tests.scripts.test_scripts import run


@pytest.mark.slow
def test_a_plan_of_host_devices_has_tables_and_a_page(tmp_path):
    out, _ = run(
        tmp_path,
        *("plan", "v31_nano", "--device", "cpu", "--mesh", "expert=4", "--run-dir", str(tmp_path)),
    )
    assert "mesh data=1 expert=4 tensor=1, 8 row(s) of 256 tokens" in out
    for title in ("Memory of one device", "One step of one device", "Collectives of one step"):
        assert title in out
    page = tmp_path / "plans" / "train_cpu_1x4x1" / "report.html"
    assert str(page) in out
    assert page.read_text().count("<table>") == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("v31_nano", "--device", "b200"), "invalid choice: 'b200'"),
        (("v31_nano", "--mesh", "experts=2"), "--mesh experts=2 must be sizes of the axes"),
        (("v31_nano", "--mesh", "expert=3"), "num_experts=16 must be divisible by the 'expert'"),
        (("deepseek_v3", "--mesh", "data=64,expert=64"), "at most 2,048"),
        (("v31_nano", "--device", "cpu", "--search"), "--search ranks by a GPU's rates"),
        (("v31_nano_student", "--device", "cpu"), "learns from a teacher"),
    ],
)
def test_what_can_not_be_planned_is_said_in_a_sentence(arguments, sentence, monkeypatch):
    monkeypatch.setattr(command, "use_host_devices", lambda count: None)  # they are there
    with pytest.raises(UserError, match=re.escape(sentence)) as refused:
        plan.main([*arguments])
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(HAS_PLUGIN, reason="jax-cuda13-plugin is installed")
def test_a_gpu_without_the_plugin_names_the_extra(tmp_path):
    """In a process of its own: it chooses JAX's platforms."""
    _, err = run(tmp_path, "plan", "v31_nano", code=2)
    assert "make plan ARGS=" in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@needs_plugin
@pytest.mark.slow
def test_a_plan_for_gpus_bounds_the_step(tmp_path):
    out, err = run(
        tmp_path, *("plan", "v31_nano", "--mesh", "data=2,expert=4", "--run-dir", str(tmp_path))
    )
    assert "A step takes at least" in out
    assert "It fits" in out
    assert "Traceback" not in err
