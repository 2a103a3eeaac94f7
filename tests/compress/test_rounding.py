"""Rounding: what changes nothing before it, what it loses against what it promises to."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from checkpoint.rounded import RoundedParameter
from compress.assignment import assigned, costs, fisher, knapsack, weights_of
from compress.folding import best_factor, places, rotated, rotation, scale_inputs, smoothing
from compress.gptq import gptq, prepare, row_losses
from compress.grids import Grid, choose_steps, decoded, nearest_codes, round_to_nearest
from compress.inputs import grams_of, read_inputs
from compress.layered import embed, ends_model
from compress.quality import compare
from compress.rounding import (
    in_floats,
    layer_dims,
    leaf,
    parsed_methods,
    prepared,
    round_model,
    smoothed,
)
from configs.checks import UserError
from infer.logits import full_logits
from model.transformer import Transformer
from tests.compress import models

TOKENS = list(np.random.default_rng(1).integers(0, 300, 24))
INT4, INT8 = Grid("int4", 16, "bfloat16"), Grid("int8", 16, "bfloat16")
GRIDS = [
    Grid("int4", 32, "float16"),
    Grid("int4", 32, "float16", is_affine=True),
    Grid("int8", 0, "bfloat16"),
    Grid("fp8", 0, "bfloat16"),
]


def correlated(outputs: int = 24, inputs: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the sum of squares of inputs that go together."""
    random = np.random.default_rng(0)
    x_TK = random.standard_normal((400, inputs)) @ random.standard_normal((inputs, inputs))
    return random.standard_normal((outputs, inputs)).astype(np.float32), x_TK.T @ x_TK


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_never_loses_more_than_round_to_nearest(grid):
    w_NK, h_KK = correlated()
    losses = []
    for codes, steps in (round_to_nearest(w_NK, grid), gptq(w_NK, prepare(h_KK), grid)):
        low, high = grid.range
        assert ((codes >= low) & (codes <= high)).all()
        losses.append(row_losses(w_NK - decoded(codes, steps, grid), h_KK))
    assert (losses[1] <= losses[0]).all(), "of each output"
    assert losses[1].sum() < 0.75 * losses[0].sum()


def test_gptq_is_the_equations_of_the_paper():
    """Column by column, as A.5 says: the update by the inverse's Cholesky factor."""
    w_NK, h_KK = correlated(3, 8)
    grid = Grid("int4", 0, "float32")
    order = np.argsort(-np.diag(h_KK), kind="stable")
    damped = h_KK[np.ix_(order, order)] + 0.01 * np.diag(h_KK).mean() * np.eye(8)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    np.testing.assert_allclose(prepare(h_KK).upper_KK, upper, rtol=1e-4, atol=1e-6)
    steps = choose_steps(w_NK, grid, np.diag(h_KK))
    w, codes = w_NK[:, order].astype(np.float64), np.zeros((3, 8))
    for j in range(8):
        codes[:, j] = nearest_codes(w[:, j], steps.scales_NS[:, 0], grid)
        error = (w[:, j] - codes[:, j] * steps.scales_NS[:, 0]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    expected = np.empty_like(codes)
    expected[:, order] = codes
    found, found_steps = gptq(w_NK, prepare(h_KK), grid)
    for n in range(3):  # rows that round to nearest did better on have its codes
        if (found_steps.scales_NS[n] == steps.scales_NS[n]).all():
            np.testing.assert_array_equal(found[n], expected[n])


def test_rounding_to_nearest_leaves_zeros_and_holds_its_bound():
    w_NK = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    w_NK[2] = 0
    grid = Grid("int8", 32, "float32")
    codes, steps = round_to_nearest(w_NK, grid)
    error = np.abs(decoded(codes, steps, grid) - w_NK)
    assert (error <= np.repeat(np.abs(steps.scales_NS), 32, axis=1) * 0.5001).all()
    assert (decoded(codes, steps, grid)[2] == 0).all()


@pytest.mark.parametrize("config", [models.MIXED, models.DENSE], ids=["experts", "dense"])
def test_a_rotated_model_is_the_same_function(config):
    variables = models.drawn(config)
    for layer in variables["params"]["periods"].values():  # scales that turning must not forget
        for norm in ("attention_norm", "ffn_norm"):
            layer[norm]["scale"] *= np.linspace(0.5, 2, 32, dtype=np.float32)
    model = models.as_layers(config, variables)
    turned, found = rotated(model).assembled()
    assert not turned.tie_embeddings
    before = full_logits(Transformer(config), variables, TOKENS)
    np.testing.assert_allclose(
        full_logits(Transformer(turned), found, TOKENS), before, atol=1e-4, rtol=1e-4
    )
    moved = np.abs(found["params"]["embedding"] - variables["params"]["embedding"])
    assert moved.max() > 0.1


def test_a_rotation_is_orthogonal_and_spreads_any_input():
    for width in (576, 32, 12):
        turn = rotation(width)
        np.testing.assert_allclose(turn @ turn.T, np.eye(width), atol=1e-12)
        assert np.abs(turn).max() < 0.75


@pytest.mark.parametrize("config", [models.MIXED, models.DENSE], ids=["experts", "dense"])
def test_scaled_inputs_leave_the_function(config):
    variables = models.drawn(config)
    model = models.as_layers(config, variables)
    layers = []
    for layer in model.layers:
        for name in places(layer):
            width = {"attention": 32, "ffn": 32, "heads": 16}.get(name, layer.spec.ffn.d_ff)
            factor = np.exp(np.random.default_rng(len(name)).normal(0, 1, width))
            layer = scale_inputs(layer, name, factor)
        layers.append(layer)
    assert set(places(layers[-1])) == {"attention", "heads", "ffn", "hidden"}
    _, scaled = dataclasses.replace(model, layers=tuple(layers)).assembled()
    before = full_logits(Transformer(config), variables, TOKENS)
    np.testing.assert_allclose(
        full_logits(Transformer(config), scaled, TOKENS), before, atol=1e-4, rtol=1e-4
    )


@pytest.fixture(scope="module")
def outliers():
    """A dense model whose norms make some inputs large, as trained ones do."""
    variables = models.drawn(models.DENSE)
    for layer in variables["params"]["periods"].values():
        for norm in ("attention_norm", "ffn_norm"):
            layer[norm]["scale"][..., ::9] *= 20
            layer[norm]["scale"] /= 3
    return models.as_layers(models.DENSE, variables)


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_smoothing_keeps_the_function_and_the_sums_of_its_inputs(outliers, method):
    steps, layer = models.steps(), outliers.layers[0]
    xs = [embed(ends_model(outliers), outliers.ends, s.tokens_BL) for s in steps]
    inputs = read_inputs(outliers, layer, xs, steps)
    own = dict.fromkeys(layer_dims(outliers.config, layer.spec), INT4)
    changed, expected = smoothed(outliers.config, layer, own, inputs, (method,))
    found = read_inputs(outliers, changed, xs, steps)
    for name in ("attention", "heads", "ffn", "hidden"):
        scale = np.abs(found[name].gram_KK).max()
        np.testing.assert_allclose(
            found[name].gram_KK, expected[name].gram_KK, atol=1e-4 * scale, rtol=1e-3
        )


def test_awq_without_an_exponent_is_round_to_nearest():
    factor, exponent = best_factor(np.array([1.0, 4.0, 0.0]), lambda m: float(np.ptp(m)))
    assert exponent == 0
    assert (factor == 1).all()


def test_smoothing_factors_are_the_equations_of_the_paper():
    x, w = np.array([4.0, 0.0, 9.0]), np.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(smoothing(x, w, 0.5), [2.0, 1.0, 1.5])


def divergence_of(model, methods, assignment) -> float:
    rounded = round_model(prepared(model, methods), assignment, methods, models.steps(8))
    return compare(model, in_floats(rounded), models.steps(seed=5)).divergence


def test_methods_lose_less_than_round_to_nearest(outliers):
    assignment = {path: INT4 for path in weights_of(outliers) if path != "embedding"}
    losses = {m: divergence_of(outliers, m, assignment) for m in (("rtn",), ("gptq",), ("awq",))}
    assert losses[("gptq",)] < losses[("rtn",)]
    assert losses[("awq",)] < losses[("rtn",)]


def test_every_weight_of_experts_learns_from_its_own_inputs():
    model = models.as_layers(models.MIXED, models.drawn(models.MIXED))
    steps, layer = models.steps(), model.layers[0]
    xs = [embed(ends_model(model), model.ends, s.tokens_BL) for s in steps]
    inputs = read_inputs(model, layer, xs, steps)
    assert sum(inputs[f"experts.{e}"].tokens for e in range(8)) == 2 * 4 * 32
    for path, dims in layer_dims(model.config, layer.spec).items():
        w = leaf(layer.params, path)
        stack, read, _ = dims.split(w.shape)
        grams = grams_of(inputs, path, int(np.prod(stack)))
        assert grams is not None
        assert {g.shape for g in grams} == {(int(np.prod(read)),) * 2}


def test_a_knapsack_is_as_good_as_trying_all():
    random = np.random.default_rng(0)
    for _ in range(5):
        options = [
            [
                (float(c), int(s))
                for c, s in zip(random.random(3), random.integers(1, 30, 3), strict=True)
            ]
            for _ in range(7)
        ]
        budget = sum(max(s for _, s in item) for item in options) * 2 // 3
        chosen = knapsack(options, budget)
        assert chosen is not None
        best = min(
            sum(cost for cost, _ in pick)
            for pick in itertools.product(*options)
            if sum(size for _, size in pick) <= budget
        )
        picked = [item[c] for item, c in zip(options, chosen, strict=True)]
        assert sum(size for _, size in picked) <= budget
        assert sum(cost for cost, _ in picked) == pytest.approx(best)
    assert knapsack([[(0.0, 5)]], 4) is None


@pytest.fixture(scope="module")
def uneven():
    """A dense model whose layers matter very differently."""
    variables = models.drawn(models.DENSE)
    periods = variables["params"]["periods"]["layer_0"]
    periods["ffn"]["down"][0] *= 0.02
    periods["attention"]["o"][1] *= 0.02
    variables["params"]["embedding"] *= 3
    return models.as_layers(models.DENSE, variables)


def test_assignment_by_sensitivity_beats_random_and_inverted(uneven):
    """At equal bytes; and its cost is about what was expected."""
    information = fisher(uneven, models.steps())
    weights = {k: x for k, x in weights_of(uneven).items() if k != "embedding"}
    options = costs(weights, [INT4, INT8], information)
    sizes = [sum(item[c][2] for item in options.values()) for c in (0, 1)]
    best = assigned(options, sum(sizes) // 2)
    assert best is not None
    inverted = {p: [(g, -c, n) for g, c, n in item] for p, item in options.items()}
    worst = assigned(inverted, sum(sizes) // 2)
    assert worst is not None
    random = np.random.default_rng(0)
    drawn = {
        p: [
            (g, float(r), n)
            for (g, _, n), r in zip(item, random.random(2) * [1, 0.01], strict=True)
        ]
        for p, item in options.items()
    }
    middle = assigned(drawn, sum(sizes) // 2)
    assert middle is not None
    losses = [divergence_of(uneven, ("rtn",), found[0]) for found in (best, middle, worst)]
    assert losses[0] < losses[1] < losses[2]
    assert 0.4 * losses[0] < best[1] < 2.5 * losses[0]


def test_information_tells_the_divergence_of_small_changes(uneven):
    """Random signs, so that what goes across the diagonal cancels."""
    information = fisher(uneven, models.steps(8))
    for path in ("gate_up", "down"):
        _, variables = uneven.assembled()
        w = variables["params"]["periods"]["layer_0"]["ffn"][path]
        change = 0.02 * np.random.default_rng(0).choice([-1.0, 1.0], w.shape).astype(np.float32)
        expected = 0.5 * sum(
            (information[f"{i}.ffn.{path}"] * change[i] ** 2).sum() for i in range(2)
        )
        w += change
        moved = models.as_layers(models.DENSE, variables)
        found = compare(uneven, moved, models.steps(8)).divergence
        assert 0.7 < found / expected < 1.4


def test_methods_are_named_once_and_go_together():
    assert parsed_methods("rotate,gptq") == ("rotate", "gptq")
    for text, sentence in (
        ("best", "must be of"),
        ("gptq,rtn", "take one of"),
        ("awq,smoothquant", "take one of"),
        ("gptq,gptq", "twice"),
    ):
        with pytest.raises(UserError, match=sentence):
            parsed_methods(text)


def test_a_layer_that_was_kept_is_not_rounded_again(tmp_path, outliers):
    """What a folder holds of a killed pass is what it would have made."""
    assignment = dict.fromkeys([p for p in weights_of(outliers) if p != "embedding"], INT4)
    steps = models.steps()
    first = round_model(outliers, assignment, ("gptq",), steps, folder=tmp_path)
    (tmp_path / "layer_1.npz").unlink()
    again = round_model(outliers, assignment, ("gptq",), steps, folder=tmp_path)
    for before, after in zip(first.layers, again.layers, strict=True):
        pairs = zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True)
        for x, y in pairs:
            assert type(x) is type(y)
            values = [v.values() if isinstance(v, RoundedParameter) else v for v in (x, y)]
            np.testing.assert_array_equal(*values)
