"""Experts with biases and a clamped activation: against numpy, on any mesh by any transport, and as
the plain ones where they add nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.architecture import LayerSpec
from configs.feed_forward import MoEConfig, RouterConfig
from model.experts import WEIGHT_AXES, expert_function
from model.transformer import Transformer, abstract_variables, init_variables
from parallel.expert import apply_experts
from parallel.mesh import make_mesh
from tests import oracle, tiny
from tests.probes import Parity

CLAMPED = {"activation": "clamped_swiglu", "swiglu_limit": 0.7, "swiglu_alpha": 1.702}
GPT_OSS = tiny.moe(
    num_shared_experts=0, bias=True, router=RouterConfig(top_k=2, bias=True), **CLAMPED
)
LAYERS = {
    "gpt-oss": GPT_OSS,
    "clamped": tiny.moe(**CLAMPED),
    "biased": tiny.moe(bias=True),
}
CONFIG = tiny.model(
    num_layers=3,
    pattern=tuple(LayerSpec(attention=tiny.attention(), ffn=ffn) for ffn in LAYERS.values()),
)
LENGTH, D = 20, 12


@pytest.fixture(scope="module")
def parity():
    return Parity(CONFIG, LENGTH, tolerance=3e-5)


def test_equals_the_numpy_oracle(parity):
    parity.check()


@pytest.mark.parametrize("wrong", ["up without 1", "gate bounded below", "one bias"])
def test_wrong_experts_are_told_apart(parity, wrong):
    parity.check_told_apart(wrong)


def test_shapes_starts_and_counts():
    """Active: what each of two experts brings, and the router's whole bias."""
    model = Transformer(CONFIG)
    abstract, axes = abstract_variables(model)
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == CONFIG.num_parameters
    names = axes["params"]["periods"]["layer_0"]["moe"]
    assert names["gate_up_bias"] == ("layers", "expert", None, "mlp")
    assert names["down_bias"] == ("layers", "expert", "embed")
    plain = dataclasses.replace(GPT_OSS, bias=False, router=RouterConfig(top_k=2))
    assert GPT_OSS.num_parameters(32) - plain.num_parameters(32) == 8 * (2 * 16 + 32) + 8
    more = GPT_OSS.num_active_parameters(32) - plain.num_active_parameters(32)
    assert more == 2 * (2 * 16 + 32) + 8
    start = jax.jit(lambda: init_variables(model, 0)["params"]["periods"]["layer_0"]["moe"])()
    shapes = {"gate_up_bias": (1, 8, 2, 16), "down_bias": (1, 8, 32), "router_bias": (1, 8)}
    for name, shape in shapes.items():
        np.testing.assert_array_equal(start[name], np.zeros(shape))


def weights_of(config: MoEConfig) -> dict[str, np.ndarray]:
    random, experts, d_ff = np.random.RandomState(0), config.num_experts, config.d_ff
    shapes = {
        "gate_up": (experts, D, 2, d_ff),
        "down": (experts, d_ff, D),
        "gate_up_bias": (experts, 2, d_ff),
        "down_bias": (experts, D),
    }
    return {name: random.randn(*shape).astype(np.float32) for name, shape in shapes.items()}


def forward_and_gradients(**transport):
    """Gradients of a scalar in x, gates and weights, and the output."""

    def scalar(x, gates, weights, ids):
        out, _ = apply_experts(
            x,
            ids,
            gates,
            weights,
            grouped_fn=expert_function(GPT_OSS, "auto", weights),
            num_experts=GPT_OSS.num_experts,
            weight_axes=WEIGHT_AXES,
            **transport,
        )
        pattern = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out * pattern).sum(), out

    return jax.jit(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True))


def some_tokens(num_tokens: int):
    """x, gates and ids; a few choices fall on no expert, and expert 7 gets none."""
    random = np.random.RandomState(1)
    ids = np.stack([random.permutation(7)[:2] for _ in range(num_tokens)])
    ids = np.where(random.rand(num_tokens, 2) < 0.2, -1, ids).astype(np.int32)
    x = random.randn(num_tokens, D).astype(np.float32)
    return x, random.rand(num_tokens, 2).astype(np.float32), ids


def test_each_choice_brings_its_gate_of_its_own_experts_bias():
    x, gates, ids = some_tokens(13)
    weights = weights_of(GPT_OSS)
    _, out = forward_and_gradients()(x, gates, weights, ids)
    expected = np.zeros_like(x)
    for t, k in zip(*np.nonzero(ids >= 0), strict=True):
        expected[t] += gates[t, k] * oracle.expert(x[t], weights, ids[t, k], GPT_OSS)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "transport"),
    [
        ((2, 2, 2), {"transport": "gather"}),
        ((1, 4, 2), {"transport": "all_to_all", "capacity_factor": 8.0}),
        pytest.param(
            (1, 4, 1),
            {"transport": "all_to_all", "capacity_factor": 1.0},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["gather", "roomy buffers", "tight buffers"],
)
def test_any_mesh_equals_no_mesh(sizes, transport):
    """Forward and gradients; with a tensor axis the biases count once."""
    x, gates, ids = some_tokens(13)
    weights = weights_of(GPT_OSS)
    expected = forward_and_gradients()(x, gates, weights, ids)
    mesh = make_mesh(*sizes)
    placed = jax.device_put(weights, NamedSharding(mesh, PartitionSpec("expert")))
    with jax.set_mesh(mesh):
        found = forward_and_gradients(**transport)(x, gates, placed, ids)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(np.asarray(theirs)).max()
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * scale)  # sums in another order
