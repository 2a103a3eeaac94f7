"""The run that is planned, from a command line's words."""

import pytest

from configs.base import MeshConfig
from configs.checks import UserError
from planning.request import parse_mesh, planned_run


def test_the_short_form_of_a_mesh():
    assert parse_mesh("data=32,expert=64") == MeshConfig(data=32, expert=64)
    assert parse_mesh("tensor=2") == MeshConfig(tensor=2)


@pytest.mark.parametrize("text", ["32x64", "data=", "depth=2", "data=2,data=4", "data=-1", ""])
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(UserError, match="such as data=16,expert=32"):
        parse_mesh(text)


def test_a_size_of_zero_is_refused():
    with pytest.raises(UserError, match="must be at least 1"):
        parse_mesh("data=0")


def test_a_device_keeps_its_rows_on_another_mesh():
    run = planned_run("deepseek_v3", "data=32,expert=64", [])
    assert run.mesh == MeshConfig(data=32, expert=64)
    assert run.batch_size == 2048  # one row for each of 512 devices in the run
    assert (
        planned_run("deepseek_v3", "data=32,expert=64", ["--batch-size", "4096"]).batch_size == 4096
    )


def test_without_a_mesh_it_is_the_run_itself():
    run = planned_run("deepseek_v3", None, ["--data.seq-len", "2048"])
    assert (run.mesh, run.data.seq_len) == (MeshConfig(data=16, expert=32), 2048)


def test_two_meshes_are_refused():
    with pytest.raises(UserError, match="give one of them"):
        planned_run("v31", "data=8", ["--mesh.data", "4"])


def test_an_unknown_run_is_refused_by_name():
    with pytest.raises(UserError, match="did you mean 'deepseek_v3'"):
        planned_run("deepseek_v33", "data=8", [])
