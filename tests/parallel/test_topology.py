"""Meshes to compile for: what is refused, and with the plugin that programs compile for a GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from configs.accelerators import ACCELERATORS, H100
from configs.checks import UserError
from parallel import topology
from parallel.topology import compile_only_mesh

ROOT = Path(__file__).resolve().parents[2]
HAS_PLUGIN = bool(
    importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(topology.PLUGIN)
)
needs_plugin = pytest.mark.skipif(
    not HAS_PLUGIN, reason="needs jax-cuda13-plugin: pip install '.[deviceless]'"
)


def test_too_many_devices_are_refused():
    with pytest.raises(UserError, match=r"needs 4,096 devices, at most 2,048"):
        compile_only_mesh(H100, data=64, expert=64)


def test_partly_used_nodes_are_refused():
    with pytest.raises(UserError, match="12 devices, which must be at most 8 or a multiple"):
        compile_only_mesh(H100, data=12)


def test_a_missing_plugin_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setattr(topology, "PLUGIN", "jax_plugins_elsewhere.xla_cuda13")
    with pytest.raises(UserError, match="make plan ARGS="):
        topology.require_plugin()


@pytest.mark.parametrize("accelerator", ACCELERATORS.values(), ids=lambda a: a.name)
def test_data_sheets_agree_with_themselves(accelerator):
    """TF32 runs at half the rate of bfloat16, and memory in XLA's words is the memory."""
    assert accelerator.flops_32 == accelerator.flops_16 / 2
    assert f"device_memory_size: {accelerator.memory}" in accelerator.xla_target


PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_platforms", "cpu")
from configs.accelerators import ACCELERATORS
from parallel.topology import compile_only_mesh
for name, accelerator in ACCELERATORS.items():
    mesh = compile_only_mesh(accelerator, data=4, expert=4)
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    traced = jax.jit(lambda x: (x @ x).sum()).trace(x)
    text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    print(name, mesh.size, "all-reduce" in text)
"""


@needs_plugin
def test_programs_compile_for_devices_that_do_not_exist():
    """In a process of its own: the plugin is registered once, and nothing is said about cuDNN."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.split("\n")[:2] == ["h100 16 True", "a100 16 True"]
    assert done.stderr == ""
