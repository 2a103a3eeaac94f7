"""The whole model against numpy, its cache, its masks, and the ways it can be executed."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import ExecutionConfig, MeshConfig
from model.layers import unembed
from model.model_state import init_state
from model.transformer import (
    MAX_UNROLLED_LAYERS,
    Transformer,
    abstract_variables,
    hidden_and_router,
    hidden_states,
    init_variables,
    output_weights,
)
from parallel.mesh import make_mesh
from parallel.sharding import tree_shardings
from tests import oracle, tiny
from tests.probes import drawn

CONFIG = tiny.model()
MODEL = Transformer(CONFIG)
DECODE_TOLERANCE = 1e-4  # float32, sums over cached keys in another order


@pytest.fixture(scope="module")
def variables():
    """Random weights, norms included: all-one scales would hide a norm that is left out."""
    abstract, _ = abstract_variables(MODEL)
    random = np.random.RandomState(7)

    def draw(x):
        mean = 1.0 if x.shape[-1] == CONFIG.d_model and x.size <= 2 * CONFIG.d_model else 0.0
        fan_in = CONFIG.d_model
        return (mean + random.randn(*x.shape) * fan_in**-0.5).astype(np.float32)

    return jax.device_put(jax.tree.map(draw, abstract))


@jax.jit
def forward(variables, tokens, positions):
    hidden, _ = hidden_states(MODEL, variables, tokens, positions)
    return hidden, hidden @ output_weights(MODEL, variables)


@partial(jax.jit, static_argnames="is_whole")
def read(variables, tokens, positions, state, is_whole=False):
    """Logits and the state: prefill or decode."""
    hidden, state = hidden_states(MODEL, variables, tokens, positions, state, is_whole=is_whole)
    return hidden @ output_weights(MODEL, variables), state


begin = jax.jit(init_variables, static_argnums=(0, 1))
"""Weights drawn from a seed; a program to each."""
SEED = 3


def tokens_of(length: int, seed: int = 0, batch: int = 1) -> np.ndarray:
    random = np.random.RandomState(seed)
    return random.randint(0, CONFIG.vocab_size, (batch, length)).astype(np.int32)


def positions_of(*documents: int, batch: int = 1) -> np.ndarray:
    row = np.concatenate([np.arange(n) for n in documents]).astype(np.int32)
    return np.broadcast_to(row, (batch, len(row)))


@pytest.mark.parametrize("documents", [(40,), (5, 1, 20, 14)])
def test_equals_the_numpy_oracle(variables, documents):
    tokens, positions = tokens_of(40), positions_of(*documents)
    hidden, logits = forward(variables, tokens, positions)
    expected_hidden, expected_logits = oracle.transformer(
        jax.device_get(variables["params"]), CONFIG, tokens[0], positions[0]
    )
    # float32 through the layers against float64; activations are of order 1.
    np.testing.assert_allclose(hidden[0], expected_hidden, atol=2e-4)
    np.testing.assert_allclose(logits[0], expected_logits, atol=2e-3)


def test_a_wrong_window_is_rejected_by_the_oracle(variables):
    """Off by one in the window: the plausible mistake."""
    local = CONFIG.pattern[0]
    attention = dataclasses.replace(local.attention, window_size=local.attention.window_size + 1)
    wrong = dataclasses.replace(
        CONFIG, pattern=(dataclasses.replace(local, attention=attention), CONFIG.pattern[1])
    )
    tokens, positions = tokens_of(40), positions_of(40)
    hidden, _ = forward(variables, tokens, positions)
    expected, _ = oracle.transformer(
        jax.device_get(variables["params"]), wrong, tokens[0], positions[0]
    )
    assert np.abs(hidden[0] - expected).max() > 1e-3


def test_packed_documents_do_not_see_each_other(variables):
    first, second = tokens_of(17, 1), tokens_of(23, 2)
    packed, _ = forward(variables, np.concatenate([first, second], axis=1), positions_of(17, 23))
    alone, _ = forward(variables, second, positions_of(23))
    np.testing.assert_allclose(packed[:, 17:], alone, atol=1e-5)


@pytest.mark.parametrize("t", [0, 7, 12, 30])
def test_future_tokens_change_no_logit_bitwise(variables, t):
    """Including through the experts: a changed token moves other tokens to other rows of a tile."""
    tokens, positions = tokens_of(40, batch=2), positions_of(40, batch=2)
    changed = tokens.copy()
    changed[:, t + 1 :] = tokens_of(39 - t, 9, batch=2)
    _, before = forward(variables, tokens, positions)
    _, after = forward(variables, changed, positions)
    np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
    assert np.abs(np.asarray(before - after))[:, t + 1 :].max() > 0


@pytest.mark.parametrize("prefill", [1, 5, 12, 14, 15, 29])
@pytest.mark.thinned(2)
def test_prefill_then_decode_equals_one_forward(variables, prefill):
    """At every position, across the window's edge (12) and the full ring (14 slots)."""
    length = 40
    tokens, positions = tokens_of(length, batch=2), positions_of(length, batch=2)
    _, expected = forward(variables, tokens, positions)

    state = init_state(CONFIG, 2, length, "float32")
    first = (tokens[:, :prefill], positions[:, :prefill])
    logits, state = read(variables, *first, state, is_whole=True)
    pieces = [logits]
    for i in range(prefill, length):
        logits, state = read(variables, tokens[:, i : i + 1], positions[:, i : i + 1], state)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), expected, atol=DECODE_TOLERANCE)


def test_prefill_in_chunks_longer_than_the_ring(variables):
    tokens, positions = tokens_of(60), positions_of(60)
    _, expected = forward(variables, tokens, positions)
    state, pieces = init_state(CONFIG, 1, 60, "float32", spare=19), []
    for begin in range(0, 60, 20):
        chunk = slice(begin, begin + 20)
        logits, state = read(variables, tokens[:, chunk], positions[:, chunk], state)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), expected, atol=DECODE_TOLERANCE)


def test_chunks_that_would_write_over_what_they_read_are_refused(variables):
    tokens, positions = tokens_of(20), positions_of(20)
    state = init_state(CONFIG, 1, 60, "float32", spare=18)
    with pytest.raises(ValueError, match="takes 19 at once, make it with spare=19"):
        read(variables, tokens, positions, state)


def test_padding_is_invisible_and_unrouted(variables):
    tokens, positions = tokens_of(20), positions_of(20)
    padded = np.pad(tokens, ((0, 0), (0, 12)))
    padded_positions = np.pad(positions, ((0, 0), (0, 12)), constant_values=-1)
    alone, _ = forward(variables, tokens, positions)
    together, _ = forward(variables, padded, padded_positions)
    np.testing.assert_allclose(together[:, :20], alone, atol=1e-5)
    sown = jax.jit(lambda v: hidden_and_router(MODEL, v, padded, padded_positions)[1])(variables)
    stats = sown["router"]["periods"]["layer_0"]["moe"]["stats"]
    np.testing.assert_array_equal(stats.counts_E.sum(axis=-1), 20 * 2)
    np.testing.assert_array_equal(stats.num_tokens, 20)


EXECUTIONS = {
    "reference kernels": ExecutionConfig(grouped_matmul="reference", window_attention="reference"),
    "rematerialised": ExecutionConfig(remat="full"),
}


@partial(jax.jit, static_argnums=0)
def gradients(model, variables):
    """Of four rows of two documents: the loss and its gradients."""
    tokens, positions = tokens_of(32, batch=4), positions_of(12, 20, batch=4)

    def loss(variables):
        hidden, _ = hidden_states(model, variables, tokens, positions)
        return jnp.square(hidden @ output_weights(model, variables)).mean()

    return jax.value_and_grad(loss)(variables)


@pytest.mark.parametrize("name", EXECUTIONS)
def test_execution_changes_rounding_at_most(variables, name):
    ours = gradients(Transformer(CONFIG, EXECUTIONS[name]), variables)
    theirs = jax.device_get(gradients(MODEL, variables))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_bfloat16_stays_near_float32(variables):
    tokens, positions = tokens_of(40), positions_of(40)
    model = Transformer(CONFIG, ExecutionConfig(compute_dtype="bfloat16"))
    hidden, _ = jax.jit(lambda v: hidden_states(model, v, tokens, positions))(variables)
    assert hidden.dtype == jnp.bfloat16
    exact, _ = forward(variables, tokens, positions)
    error = jnp.abs(hidden.astype(jnp.float32) - exact).mean() / jnp.abs(exact).mean()
    assert error < 0.05  # 8 bits of mantissa through 4 layers; routing may flip for a few tokens


def test_scanned_and_unrolled_are_one_model():
    """More layers than are unrolled: the loop must pick each layer's own weights."""
    deep = tiny.model(num_layers=MAX_UNROLLED_LAYERS + 2)
    model = Transformer(deep)
    variables = drawn(deep)
    tokens, positions = tokens_of(24), positions_of(24)
    hidden, _ = jax.jit(lambda p: hidden_states(model, p, tokens, positions))(variables)
    expected, _ = oracle.transformer(
        jax.device_get(variables["params"]), deep, tokens[0], positions[0]
    )
    np.testing.assert_allclose(hidden[0], expected, atol=3e-4)


MESHES = [
    MeshConfig(data=2),
    MeshConfig(data=2, expert=4),
    MeshConfig(data=2, expert=2, tensor=2),
]


@pytest.mark.parametrize(
    "mesh_config",
    [*(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[:2]), MESHES[2]],
    ids=str,
)
def test_any_mesh_gives_the_same_model_and_gradients(variables, mesh_config):
    expected = jax.device_get(gradients(MODEL, variables))
    mesh = make_mesh(mesh_config.data, mesh_config.expert, mesh_config.tensor)
    abstract, axes = abstract_variables(MODEL)
    with jax.set_mesh(mesh):
        placed = jax.device_put(variables, tree_shardings(mesh, axes, abstract))
        ours = jax.device_get(gradients(MODEL, placed))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1e-6))


def test_parameters_are_split_as_the_table_says():
    mesh = make_mesh(2, 2, 2)
    abstract, axes = abstract_variables(MODEL)
    shardings = tree_shardings(mesh, axes, abstract)
    with jax.set_mesh(mesh):
        placed = jax.jit(lambda: init_variables(MODEL, SEED), out_shardings=shardings)()
    gate_up = placed["params"]["periods"]["layer_0"]["moe"]["gate_up"]
    assert gate_up.shape == (1, 8, 32, 2, 16)
    assert gate_up.addressable_shards[0].data.shape == (1, 4, 16, 2, 8)  # expert, data, tensor
    for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(begin(MODEL, SEED)), strict=True):
        np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b))


def test_tied_embeddings_have_no_output_layer():
    tied = Transformer(tiny.model(tie_embeddings=True))
    abstract, _ = abstract_variables(tied)
    assert "output" not in abstract["params"]
    variables = jax.tree.map(lambda x: np.full(x.shape, 2.0, x.dtype), abstract)
    variables["params"]["embedding"] = np.arange(300 * 32, dtype=np.float32).reshape(300, 32)
    np.testing.assert_array_equal(
        output_weights(tied, variables), variables["params"]["embedding"].T
    )


@pytest.mark.parametrize("config", [CONFIG, tiny.model(tie_embeddings=True)])
def test_the_configs_count_is_the_models(config):
    abstract, _ = abstract_variables(Transformer(config))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == config.num_parameters
    idle_experts = 8 - 2
    per_expert = 3 * 32 * 16
    expected = config.num_parameters - idle_experts * per_expert
    assert config.num_active_parameters == expected


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_bfloat16_are_not_rounded_to_it(tied):
    """Sums stay float32, whichever way round the output layer is held."""
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    model = Transformer(config, ExecutionConfig(compute_dtype="bfloat16"))
    w = output_weights(model, drawn(config), as_stored=True)
    hidden = jax.random.normal(jax.random.key(0), (3, config.d_model), jnp.bfloat16)
    logits = unembed(hidden, w)
    assert logits.dtype == jnp.float32
    w_DV = np.asarray(output_weights(model, drawn(config)), np.float64)
    np.testing.assert_allclose(logits, np.asarray(hidden, np.float64) @ w_DV, atol=1e-5, rtol=1e-5)


def test_a_seed_draws_what_it_always_drew():
    """Sums of sizes of a seed's weights, recorded: runs, papers and bisections rest on them."""
    drawn_now = begin(MODEL, SEED)["params"]
    periods = drawn_now["periods"]
    found = {
        "embedding": drawn_now["embedding"],
        "q": periods["layer_0"]["attention"]["q"],
        "down": periods["layer_0"]["moe"]["down"],
        "gate_up": periods["layer_1"]["ffn"]["gate_up"],
    }
    sums = {name: np.abs(np.asarray(x, np.float64)).sum() for name, x in found.items()}
    recorded = {"embedding": 7555.4145, "q": 140.42518, "down": 410.1078, "gate_up": 441.49861}
    assert sums == pytest.approx(recorded, rel=1e-6)


def test_logits_of_bfloat16_rows_are_not_rounded(monkeypatch):
    """Not even where bfloat16 kernels take many rows, as on a processor with tiles."""
    monkeypatch.setattr("kernels.matmul.bfloat16.is_native", lambda num_rows, dtype: True)
    random = np.random.RandomState(0)
    hidden, w = (jnp.asarray(random.randn(*shape), jnp.bfloat16) for shape in ((64, 96), (96, 80)))
    exact = np.asarray(hidden, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(jax.jit(unembed)(hidden, w), exact, atol=1e-4)
