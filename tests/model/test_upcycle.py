"""Upcycling: experts that compute what the layer did, and versions that only look right do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from configs.architecture import LayerSpec
from configs.checks import UserError
from configs.feed_forward import ContextConfig, DenseConfig, MoEConfig, RouterConfig
from configs.runs import smollm2_code, smollm2_upcycled_code
from model.transformer import (
    Transformer,
    abstract_variables,
    hidden_states,
    output_weights,
    training_pass,
)
from model.upcycle import upcycle, upcycled_config
from parallel.mesh import make_mesh
from parallel.sharding import tree_shardings
from tests import tiny
from tests.probes import drawn

TOKENS = np.random.RandomState(0).randint(0, 300, (4, 24)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(24, dtype=np.int32), (4, 24))
TOLERANCE = 1e-5  # float32 sums in another order

WINDOWED = LayerSpec(attention=tiny.attention(), ffn=DenseConfig(d_ff=48))
GLOBAL = LayerSpec(
    attention=tiny.attention(window_size=None, num_sink_tokens=0), ffn=DenseConfig(d_ff=40)
)
BIASED = dataclasses.replace(GLOBAL, ffn=DenseConfig(d_ff=40, bias=True))
DENSE = tiny.model(pattern=(GLOBAL,), num_layers=2, tie_embeddings=True)
UPCYCLED = upcycled_config(DENSE, num_experts=4, top_k=2)
SHAPES = {
    "one kind of layer": (DENSE, 1),
    "every second layer": (tiny.model(pattern=(BIASED,), num_layers=4), 2),
    "behind a prefix": (  # two kinds of layers, every fourth
        tiny.model(prefix=(WINDOWED,), pattern=(WINDOWED, GLOBAL), num_layers=5),
        4,
    ),
}
ROUTERS = {
    "sigmoid with bias": RouterConfig(
        top_k=3, scores="sigmoid", balance="loss_free", bias_rate=1e-3
    ),
    "one to three, context": RouterConfig(
        top_k=3,
        num_null_experts=2,
        target_k=2.0,
        context=ContextConfig(kind="causal", window_size=6, num_heads=2, head_dim=8),
    ),
}


def hidden(config, variables, mesh=None):
    model = Transformer(config)

    def forward(variables):
        return hidden_states(model, variables, TOKENS, POSITIONS)[0]

    if mesh is None:
        return jax.jit(forward)(variables)
    abstract, axes = abstract_variables(model)
    placed = jax.device_put(variables, tree_shardings(mesh, axes, abstract))
    with jax.set_mesh(mesh):
        return jax.jit(forward)(placed)


def with_router(config, router):
    def change(spec):
        if not isinstance(spec.ffn, MoEConfig):
            return spec
        return dataclasses.replace(spec, ffn=dataclasses.replace(spec.ffn, router=router))

    return dataclasses.replace(config, pattern=tuple(map(change, config.pattern)))


def check_the_same_function(dense, upcycled, mesh=None):
    variables = drawn(dense)
    after = upcycle(variables, dense, upcycled)
    abstract, _ = abstract_variables(Transformer(upcycled))
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (after, abstract)]
    assert shapes[0] == shapes[1]
    np.testing.assert_allclose(
        hidden(upcycled, after, mesh), hidden(dense, variables), atol=TOLERANCE
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_the_upcycled_model_is_the_same_function(name):
    dense, every = SHAPES[name]
    check_the_same_function(dense, upcycled_config(dense, num_experts=4, top_k=2, every=every))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
def test_other_routers_are_exact_too(name):
    check_the_same_function(DENSE, with_router(UPCYCLED, ROUTERS[name]))


@pytest.mark.slow
def test_it_is_the_same_function_on_expert_shards():
    dense, every = SHAPES["every second layer"]
    upcycled = upcycled_config(dense, num_experts=4, top_k=2, every=every)
    check_the_same_function(dense, upcycled, make_mesh(1, 4, 1))


@pytest.fixture(scope="module")
def after():
    return upcycle(drawn(DENSE), DENSE, UPCYCLED, seed=5)


def test_gates_that_do_not_sum_to_one_are_another_function_and_are_refused(after):
    """The plausible mistake: softmax gates as OLMoE has them."""
    wrong = with_router(UPCYCLED, RouterConfig(top_k=2, normalize_gates=False))
    error = np.abs(hidden(wrong, after) - hidden(DENSE, drawn(DENSE))).max()
    assert error > 100 * TOLERANCE
    with pytest.raises(UserError, match="gates that don't sum to 1"):
        upcycle(drawn(DENSE), DENSE, wrong)


def changed_units(new, old):
    """[P, E, F] of each matrix: hidden units with an entry that is another one."""
    is_new = {name: np.asarray(new[name] != old[name]) for name in ("gate_up", "down")}
    return {
        "gate": is_new["gate_up"][..., 0, :].any(axis=-2),
        "up": is_new["gate_up"][..., 1, :].any(axis=-2),
        "down": is_new["down"].any(axis=-1),
    }


@pytest.mark.slow
def test_drop_draws_whole_units_one_set_for_each_expert(after):
    dropped = upcycle(drawn(DENSE), DENSE, UPCYCLED, drop=0.25, seed=5)
    moe, kept = (
        jax.tree.map(np.asarray, variables["params"]["periods"]["layer_0"]["moe"])
        for variables in (dropped, after)
    )
    np.testing.assert_array_equal(moe["router"], kept["router"])
    changed = changed_units(moe, kept)
    lost_PEF = changed["gate"]
    for units in changed.values():  # a set drawn for each matrix would differ
        np.testing.assert_array_equal(units, lost_PEF)
    assert (lost_PEF.sum(axis=-1) == 10).all()  # a quarter of 40
    sets = {tuple(np.flatnonzero(row)) for row in lost_PEF.reshape(-1, 40)}
    assert len(sets) == 2 * 4  # each expert of each layer has its own
    columns = np.broadcast_to(lost_PEF[:, :, None], moe["gate_up"][..., 1, :].shape)
    new, old = (x["gate_up"][..., 1, :][columns] for x in (moe, kept))
    assert new.std() == pytest.approx(old.std(), rel=0.05)


def test_the_check_of_whole_units_sees_sets_that_differ():
    """The published script's mistake, written out: one set of units for each matrix."""
    random = np.random.RandomState(0)
    old = {"gate_up": random.randn(1, 2, 8, 2, 40), "down": random.randn(1, 2, 40, 8)}
    new = {name: x.copy() for name, x in old.items()}
    for expert in range(2):
        for half in range(2):
            new["gate_up"][0, expert, :, half, random.permutation(40)[:10]] += 1
        new["down"][0, expert, random.permutation(40)[:10]] += 1
    changed = changed_units(new, old)
    assert (changed["gate"] != changed["down"]).any()
    assert (changed["gate"] != changed["up"]).any()


def test_routers_are_drawn_layer_by_layer_and_from_the_seed(after):
    again, other = (upcycle(drawn(DENSE), DENSE, UPCYCLED, seed=seed) for seed in (5, 6))
    first, again, other = (
        np.asarray(variables["params"]["periods"]["layer_0"]["moe"]["router"])
        for variables in (after, again, other)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    assert first.std() == pytest.approx(32**-0.5, rel=0.2)
    assert (first[0] != first[1]).all()  # periods don't share one


def test_gradients_reach_every_expert_and_not_yet_the_router(after):
    model = Transformer(UPCYCLED)

    def loss(params):
        state = {"params": params, "router_state": {}}
        hidden_BLD, sown, _ = training_pass(model, state, TOKENS, POSITIONS)
        logits = hidden_BLD @ output_weights(model, state)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[..., None], axis=-1)
        stats = sown["router"]["periods"]["layer_0"]["moe"]["stats"]
        return nats.mean(), stats.counts_E

    gradients, counts_PE = jax.jit(jax.grad(loss, has_aux=True))(after["params"])
    moe = gradients["periods"]["layer_0"]["moe"]
    assert (np.asarray(counts_PE) > 0).all()
    for name, dims in (("gate_up", (2, 3, 4)), ("down", (2, 3))):
        assert (np.abs(np.asarray(moe[name])).max(axis=dims) > 0).all(), name
    # Experts that are alike give the router nothing to choose by.
    assert np.abs(moe["router"]).max() < 1e-3 * np.abs(moe["down"]).max()


def test_counts_are_those_of_the_published_model_and_its_experts():
    dense, upcycled = models.smollm2_135m(), models.smollm2_4x135m()
    assert dense.num_parameters == 134_515_008
    assert upcycled == upcycled_config(dense, num_experts=4, top_k=2)
    experts, router = 30 * 3 * 576 * 1536, 30 * 576 * 4
    assert upcycled.num_parameters == dense.num_parameters + 3 * experts + router
    assert upcycled.num_active_parameters == dense.num_parameters + experts + router
    half = upcycled_config(dense, num_experts=8, top_k=2, every=2)
    assert half.num_parameters == dense.num_parameters + (7 * experts + router * 2) // 2


def test_both_arms_differ_in_the_model_alone():
    dense, upcycled = smollm2_code(), smollm2_upcycled_code()
    assert dataclasses.replace(upcycled, name=dense.name, model=dense.model) == dense


def test_what_is_no_upcycling_is_refused():
    variables = drawn(DENSE)
    wider = dataclasses.replace(GLOBAL, ffn=DenseConfig(d_ff=44))
    other = upcycled_config(tiny.model(pattern=(wider,), num_layers=2), num_experts=4, top_k=2)
    sentence = r"pattern.0.ffn.d_ff was 40, now 44; model.tie_embeddings was True, now False"
    with pytest.raises(UserError, match=sentence):
        upcycle(variables, DENSE, other)
    with pytest.raises(UserError, match=r"drop=1.0 must lie in \[0, 1\)"):
        upcycle(variables, DENSE, UPCYCLED, drop=1.0)
    with pytest.raises(UserError, match="every=3 must divide the 2 layers"):
        upcycled_config(DENSE, num_experts=4, top_k=2, every=3)
    with pytest.raises(UserError, match="found no dense layer"):
        upcycled_config(UPCYCLED, num_experts=4, top_k=2)
    with pytest.raises(UserError, match="multiple of the dense model's 2 layers, got 1"):
        upcycle(variables, tiny.model(pattern=(WINDOWED, GLOBAL)), UPCYCLED)
    shared = dataclasses.replace(GLOBAL, ffn=tiny.moe(d_ff=40))
    with pytest.raises(UserError, match="num_shared_experts=1"):
        upcycle(variables, DENSE, dataclasses.replace(DENSE, pattern=(shared,)))
