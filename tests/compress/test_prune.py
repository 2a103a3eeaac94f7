"""Pruning: what adds nothing goes without a trace, the rest in the order of what it adds."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from compress import sizes
from compress.experts import averaged, dense_model, merged_model
from compress.importance import expert_scores, measure
from compress.layered import run_layer
from compress.prune import prune, without_layers
from compress.quality import compare, hidden_of
from compress.sizes import Budget
from configs.checks import UserError
from configs.feed_forward import RouterConfig
from infer.logits import full_logits
from model.transformer import Transformer
from tests import tiny
from tests.compress import models

TOKENS = list(np.random.default_rng(1).integers(0, 300, 24))
GONE = {"heads": [1, 3], "channels": [0, 5, 17, 40, 41, 42, 43, 44], "experts": [2, 5]}
WIDTH = [3, 4, 9, 10, 20, 25, 30, 31]


def logits(config, variables) -> np.ndarray:
    return full_logits(Transformer(config), variables, TOKENS)


@pytest.fixture(scope="module")
def mixed():
    """A model with experts, in layers, and its sums."""
    model = models.as_layers(models.MIXED, models.drawn(models.MIXED))
    return model, measure(model, models.steps())


def planted(axis: str):
    """The mixed model with some units that add nothing."""
    variables = models.drawn(models.MIXED)
    periods = variables["params"]["periods"]
    for layer in periods.values():
        if axis == "heads":
            layer["attention"]["o"][:, GONE["heads"]] = 0
        if axis == "width":
            layer["attention"]["o"][..., WIDTH] = 0
            for ffn in (layer.get("ffn"), layer.get("moe"), layer.get("moe", {}).get("shared")):
                if ffn is not None:
                    ffn["down"][..., WIDTH] = 0
    if axis == "ffn":
        periods["layer_1"]["ffn"]["down"][:, GONE["channels"]] = 0
        for e in range(8):  # each expert its own
            periods["layer_0"]["moe"]["down"][:, e, [e, e + 1, e + 2]] = 0
        periods["layer_0"]["moe"]["shared"]["down"][:, [1, 2, 15]] = 0
    if axis == "width":
        variables["params"]["embedding"][:, WIDTH] = 0
    if axis == "experts":
        state = variables["router_state"]["periods"]["layer_0"]["moe"]["state"]
        state.bias_E[:, GONE["experts"]] = -100
    return variables


@pytest.mark.parametrize(
    ("axis", "share"), [("heads", 0.5), ("ffn", 0.84), ("width", 0.75), ("experts", 0.75)]
)
@pytest.mark.thinned(2)
def test_units_that_add_nothing_go_without_a_trace(axis, share):
    variables = planted(axis)
    model = models.as_layers(models.MIXED, variables)
    target = sizes.shrunk_config(models.MIXED, {axis: share})
    smaller, lost = prune(model, target, measure(model, models.steps()))
    config, pruned = smaller.assembled()
    assert config == target
    assert config.num_parameters < models.MIXED.num_parameters
    assert sum(x.size for x in _leaves(pruned["params"])) == config.num_parameters
    np.testing.assert_allclose(
        logits(config, pruned), logits(models.MIXED, variables), atol=2e-5, rtol=1e-4
    )
    if axis == "heads":
        assert lost[0].heads == (1, 3)
    if axis == "experts":
        assert lost[0].experts == (2, 5)
        state = pruned["router_state"]["periods"]["layer_0"]["moe"]["state"]
        assert state.bias_E.shape == (1, 6)
        assert (state.bias_E == 0).all(), "the bias of experts that stay"


def _leaves(tree) -> list:
    return [x for v in tree.values() for x in (_leaves(v) if isinstance(v, dict) else [v])]


def test_scores_of_experts_are_those_of_the_paper(mixed):
    """REAP by its equation, token by token."""
    model, sums = mixed
    layer, step = model.layers[0], models.steps()[0]
    x_BLD = model.ends["embedding"][np.asarray(step.tokens_BL)]
    _, taps = run_layer(model, layer, jnp.asarray(x_BLD), step)
    moe, x_TD = layer.params["moe"], np.asarray(taps["ffn"]).reshape(-1, 32).astype(np.float64)
    total, sizes_sum, count = np.zeros(8), np.zeros(8), np.zeros(8)
    for x_D in x_TD:
        scores_E = np.exp(x_D @ moe["router"])
        scores_E /= scores_E.sum()
        best = np.argsort(-scores_E)[:2]
        for e in best:
            gate, up = (x_D @ moe["gate_up"][e][:, i] for i in range(2))
            size = np.linalg.norm((gate / (1 + np.exp(-gate)) * up) @ moe["down"][e])
            total[e] += scores_E[e] / scores_E[best].sum() * size
            sizes_sum[e] += size
            count[e] += 1
    seen = np.maximum(count, 1)
    np.testing.assert_allclose(expert_scores(sums[0], "reap"), total / seen, rtol=1e-4)
    np.testing.assert_allclose(expert_scores(sums[0], "norm"), sizes_sum / seen, rtol=1e-4)
    np.testing.assert_array_equal(expert_scores(sums[0], "frequency"), count)


def test_important_units_are_kept_rather_than_random_ones_rather_than_the_least(mixed):
    """Channels of very different sizes: what stays decides what is lost."""
    variables = models.drawn(models.MIXED)
    factors = np.exp(np.random.default_rng(3).normal(0, 2, 48)).astype(np.float32)
    variables["params"]["periods"]["layer_1"]["ffn"]["down"] *= factors[None, :, None]
    model = models.as_layers(models.MIXED, variables)
    sums = measure(model, models.steps())
    target = sizes.shrunk_config(models.MIXED, {"ffn": 0.5})
    divergences = []
    for order in ("best", "random", "worst"):
        own = [dict(s) for s in sums]
        channels = own[1]["channels"]
        random = np.random.default_rng(4).permutation(len(channels)).astype(float)
        own[1]["channels"] = {"best": channels, "random": random, "worst": -channels}[order]
        smaller, _ = prune(model, target, own)
        divergences.append(compare(model, smaller, models.steps(seed=5)).divergence)
    assert divergences == sorted(divergences)
    assert divergences[0] < 0.5 * divergences[2]


def test_layers_go_by_their_influence(mixed):
    variables = models.drawn(models.DENSE)
    for tree in ("attention", "ffn"):  # layer 0 does nothing
        name = "o" if tree == "attention" else "down"
        variables["params"]["periods"]["layer_0"][tree][name][0] = 0
    model = models.as_layers(models.DENSE, variables)
    sums = measure(model, models.steps())
    smaller, own, gone = without_layers(model, sums, 1)
    config, pruned = smaller.assembled()
    assert gone == [0]
    assert len(own) == 2
    assert config.num_layers == 1
    np.testing.assert_allclose(logits(config, pruned), logits(models.DENSE, variables), atol=1e-5)
    with pytest.raises(UserError, match="must lie between 1 and"):
        without_layers(model, sums, 3)


@pytest.mark.parametrize("budget", [{"keep": 0.7}, {"parameters": 30_000}])
def test_a_budget_is_met_and_used(budget):
    budget = Budget(**budget)
    found = sizes.sized(models.MIXED, budget, ("heads", "ffn"))
    assert budget.is_met(models.MIXED, found)
    ffn = found.pattern[1].ffn
    one_more = dataclasses.replace(ffn, d_ff=ffn.d_ff + 8)
    wider = dataclasses.replace(
        found, pattern=(found.pattern[0], dataclasses.replace(found.pattern[1], ffn=one_more))
    )
    assert not budget.is_met(models.MIXED, wider)


def test_active_parameters_are_a_budget_of_their_own():
    budget = Budget(active_parameters=20_000)
    axes = sizes.default_axes(models.MIXED, budget)
    found = sizes.sized(models.MIXED, budget, axes)
    assert found.num_active_parameters <= 20_000 < models.MIXED.num_active_parameters
    assert found.pattern[0].ffn.num_experts == 8


def test_groups_of_a_router_keep_as_many_experts_each():
    router = RouterConfig(top_k=2, num_groups=2, top_groups=1)
    ffn = tiny.moe(router=router)
    assert sizes.fewer_experts(ffn, 0.1) == 4, "top_k of the one group that is chosen"
    assert sizes.fewer_experts(ffn, 0.75) == 6


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Budget(), "name one of"),
        (lambda: Budget(keep=0.5, parameters=3), "name one of"),
        (lambda: Budget(keep=1.5), "must lie in"),
        (lambda: sizes.sized(models.MIXED, Budget(parameters=100), ("ffn",)), "at least"),
        (lambda: sizes.sized(models.DENSE, Budget(keep=0.5), ("experts",)), "no experts"),
        (lambda: sizes.parsed_count("many"), "is no count"),
    ],
)
def test_impossible_sizes_are_told(build, sentence):
    with pytest.raises(UserError, match=sentence):
        build()


def test_equal_experts_merge_into_themselves(mixed):
    """Units in another order are the same expert."""
    model, sums = mixed
    order = np.random.default_rng(0).permutation(16)
    moe = model.layers[0].params["moe"]
    twin = {
        "gate_up": np.stack([moe["gate_up"][0], moe["gate_up"][0][..., order]]),
        "down": np.stack([moe["down"][0], moe["down"][0][order]]),
    }
    merged = averaged(twin, np.array([0, 1]), 0, np.array([3.0, 1.0]))
    np.testing.assert_allclose(merged["gate_up"], twin["gate_up"][0], atol=1e-6)
    np.testing.assert_allclose(merged["down"], twin["down"][0], atol=1e-6)
    target = sizes.shrunk_config(models.MIXED, {"experts": 0.5})
    taken_in = merged_model(model, target, sums, "reap")
    assert len(hidden_of(prune(taken_in, target, sums)[0], models.steps())) == 1


@pytest.mark.slow
def test_a_dense_layer_is_its_experts_where_gates_are_constant():
    ffn = tiny.moe(num_experts=4, router=RouterConfig(top_k=4))
    config = dataclasses.replace(
        models.MIXED, pattern=(dataclasses.replace(models.MIXED.pattern[0], ffn=ffn),)
    )
    variables = models.drawn(config)
    variables["params"]["periods"]["layer_0"]["moe"]["router"][:] = 0
    model = models.as_layers(config, variables)
    sums = measure(model, models.steps())
    dense, made = dense_model(model, sums, 4).assembled()
    assert dense.pattern[0].ffn.d_ff == 5 * 16
    np.testing.assert_allclose(logits(dense, made), logits(config, variables), atol=2e-5)
    fewer, _ = dense_model(model, sums, 2).assembled()
    assert fewer.pattern[0].ffn.d_ff == 3 * 16
