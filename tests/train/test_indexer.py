"""Training DeepSeek-V3.2's indexer: it learns where the attention looks, from its own loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.architecture import LayerSpec
from configs.attention import IndexerConfig, LatentAttentionConfig
from configs.base import ExecutionConfig
from configs.feed_forward import DenseConfig
from model.transformer import Transformer, output_weights, training_pass
from model.unstacked import unstack
from tests import tiny
from tests.probes import drawn, inputs
from train.losses import collect_indexer_losses, weighted_indexer_loss

LENGTH, TOP_K = 48, 8
SPARSE = LatentAttentionConfig(
    num_heads=2,
    query_rank=16,
    latent_rank=12,
    nope_head_dim=8,
    rope_head_dim=4,
    value_head_dim=8,
    indexer=IndexerConfig(num_heads=4, head_dim=8, top_k=TOP_K),
)
LAYER = LayerSpec(attention=SPARSE, ffn=DenseConfig(d_ff=32))
CONFIG = tiny.model(prefix=(LAYER,), pattern=(LAYER,), num_layers=3)
MODEL = Transformer(CONFIG)


def losses_of(variables, tokens, positions):
    """The next tokens' loss and the indexers'."""
    hidden, sown, _ = training_pass(MODEL, variables, tokens, positions)
    logits = hidden[:, :-1] @ output_weights(MODEL, variables)
    target = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -target.mean(), weighted_indexer_loss(collect_indexer_losses(sown), CONFIG)


def is_of_indexer(path) -> bool:
    return any(getattr(key, "key", "") == "indexer" for key in path)


@pytest.mark.slow
def test_each_loss_teaches_its_own_part_alone():
    """The next token's loss has no gradient on the indexer, the indexer's none on the rest."""
    variables, (tokens, positions) = drawn(CONFIG), inputs(CONFIG, LENGTH)
    both = jax.jit(jax.jacrev(lambda v: jnp.stack(losses_of(v, tokens, positions))))(variables)
    for path, gradient in jax.tree.leaves_with_path(both["params"]):
        of_tokens, of_indexer = (np.abs(np.asarray(g)).max() for g in gradient)
        own, other = (of_indexer, of_tokens) if is_of_indexer(path) else (of_tokens, of_indexer)
        assert other == 0.0, path
        assert own > 0.0, path


def test_it_learns_where_the_attention_looks():
    """With room for all keys, of a model that stays as it is and looks at few of them."""
    wide = dataclasses.replace(SPARSE.indexer, top_k=LENGTH)
    layer = dataclasses.replace(LAYER, attention=dataclasses.replace(SPARSE, indexer=wide))
    model = Transformer(tiny.model(pattern=(layer,), num_layers=1))
    variables = drawn(model.config, seed=3)
    attention = variables["params"]["periods"]["layer_0"]["attention"]
    attention["q"] *= 12.0
    rows = np.random.RandomState(0).randint(0, 300, (8, LENGTH)).astype(np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (8, 1))
    optimizer = optax.adam(5e-3)

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            given = {"params": params, "router_state": {}}
            _, sown, _ = training_pass(model, given, rows, positions)
            return weighted_indexer_loss(collect_indexer_losses(sown), model.config)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return value, optax.apply_updates(params, updates), opt_state

    params, opt_state = variables["params"], optimizer.init(variables["params"])
    first, params, opt_state = step(params, opt_state)
    for _ in range(150):
        last, params, opt_state = step(params, opt_state)
    assert first > 0.1
    assert last < 0.5 * first
    for path, before in jax.tree.leaves_with_path(variables["params"]):
        if not is_of_indexer(path):
            after = jax.tree.leaves_with_path(params)
            np.testing.assert_array_equal(dict(after)[path], before)


SHARED = LayerSpec(
    attention=dataclasses.replace(SPARSE, shares_indexer=True), ffn=DenseConfig(d_ff=32)
)
SHARING = tiny.model(prefix=(LAYER,), pattern=(LAYER, SHARED), num_layers=11)
"""Six layers with an indexer, and five that take its choice; a loop runs the last ten."""


def test_a_layer_that_shares_an_indexer_has_no_loss_of_one():
    tokens, positions = inputs(SHARING, LENGTH)
    model, variables = Transformer(SHARING), drawn(SHARING)
    _, sown, _ = jax.eval_shape(lambda v: training_pass(model, v, tokens, positions), variables)
    found = {
        jax.tree_util.keystr(path): x.shape
        for path, x in jax.tree.leaves_with_path(sown["router"])
        if path[-1].key == "indexer_loss"
    }
    own, attention = ("prefix_0", "periods']['layer_0"), "']['attention']['indexer_loss']"
    assert found == {f"['{own[0]}{attention}": (), f"['{own[1]}{attention}": (5,)}


@pytest.mark.slow
def test_a_shared_choice_trains_the_same_scanned_recomputed_and_in_a_row():
    tokens, positions = inputs(SHARING, LENGTH)
    variables = drawn(SHARING)

    def gradients(model, variables):
        def loss(params):
            hidden, sown, _ = training_pass(
                model, variables | {"params": params}, tokens, positions
            )
            learned = weighted_indexer_loss(collect_indexer_losses(sown), model.config)
            weights_D = np.arange(SHARING.d_model, dtype=np.float32)
            return (hidden**2 * weights_D[None, None]).mean() + learned

        return jax.jit(jax.grad(loss))(variables["params"])

    kept, again = (
        gradients(Transformer(SHARING, ExecutionConfig(remat=kind)), variables)
        for kind in ("none", "full")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), kept, again)
    apart = gradients(*unstack(Transformer(SHARING), variables))
    for i in range(2):  # indexers apart: the mean over losses weighs a stack as one layer
        one, other = kept["periods"][f"layer_{i}"], apart["periods"][f"layer_{4 + i}"]
        one, other = one["attention"]["kv_up"][2], other["attention"]["kv_up"][0]
        assert np.abs(one).max() > 1e-3
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
