"""Which device a kernel is traced for, and what "auto" makes of it."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from kernels.backend import A100, H100, INTERPRET, Target, auto_takes_triton, current_target
from kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels.quantize import quantize
from kernels.window_attention import window_attention

REACH = {"window_size": 5, "num_sink_tokens": 1}


def device(platform, version="", capability=""):
    client = SimpleNamespace(platform_version=version)
    return SimpleNamespace(platform=platform, client=client, compute_capability=capability)


@pytest.mark.parametrize(
    ("found", "target"),
    [
        (device("cpu"), Target("cpu")),
        (device("gpu", "PJRT C API\ncuda 13000", "8.0"), A100),
        (device("gpu", "PJRT C API\ncuda 13000", "9.0"), H100),
        (device("gpu", "PJRT C API\nrocm 60300", "gfx942"), Target("rocm")),
    ],
)
def test_the_default_device_decides(found, target, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda platform=None: [found])
    assert current_target() == target


def test_a_default_device_that_was_set_decides():
    with jax.default_device(jax.devices("cpu")[3]):
        assert current_target() == Target("cpu")


def test_auto_leaves_a_mesh_to_xla_and_takes_its_own_part():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert auto_takes_triton(H100)
    assert auto_takes_triton(Target("rocm"))
    assert not auto_takes_triton(Target("cpu"))
    assert not auto_takes_triton(Target("cuda", 75))
    inside = []

    def body(x):
        inside.append(auto_takes_triton(H100))
        return x

    with jax.set_mesh(mesh):
        assert not auto_takes_triton(H100)
        spec = PartitionSpec("data")
        jax.eval_shape(jax.shard_map(body, in_specs=spec, out_specs=spec), jnp.zeros(8))
    assert inside == [True]


def pretend_gpu(monkeypatch):
    """Where a GPU would be taken, the interpreter is."""
    for module in ("backend", "window_attention.api", "grouped_matmul.api"):
        monkeypatch.setattr(f"kernels.{module}.current_target", lambda: INTERPRET)


def takes_kernels(calls):
    """Whether each of the calls, function and operands, is traced to a Pallas kernel."""
    return {
        name: "pallas_call" in str(jax.make_jaxpr(functools.partial(function))(*operands))
        for name, (function, *operands) in calls.items()  # partial: not what was traced before
    }


def test_auto_takes_triton_where_it_runs(monkeypatch):
    x, w, sizes = jnp.ones((8, 32)), jnp.ones((2, 32, 16)), jnp.asarray([3, 5])
    q = jnp.ones((1, 8, 2, 4))
    row = jnp.arange(8, dtype=jnp.int32)[None]
    attend = functools.partial(window_attention, **REACH)
    int8 = quantize(w, "int8", block_size=32)
    calls = {
        "grouped_matmul": (grouped_matmul, x, w, sizes),
        "swiglu": (grouped_swiglu, x, w, sizes),
        "int8": (grouped_matmul, x, int8, sizes),
        "attention": (attend, q, q, q, row, 0 * row),
    }
    on_cpu = {name: call for name, call in calls.items() if name != "int8"}  # there in panels
    assert takes_kernels(on_cpu) == dict.fromkeys(on_cpu, False)
    pretend_gpu(monkeypatch)
    assert takes_kernels(calls) == dict.fromkeys(calls, True)
