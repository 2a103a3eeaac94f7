"""DeepSeek-V3.2's sparse attention: which keys a query of latent attention sees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import HyperConnectionConfig, LayerSpec, MultiTokenConfig
from configs.attention import IndexerConfig, LatentAttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from model.attention.indexer import Index, chosen_keys, imitation_loss
from model.flops import decode_flops_per_token
from model.model_state import init_state, rewind
from model.transformer import Transformer, abstract_variables, hidden_states
from model.unstacked import unstack
from tests import tiny
from tests.probes import Parity, check_causality, check_decode, check_devices, inputs

SPARSE = LatentAttentionConfig(
    num_heads=3,
    query_rank=12,
    latent_rank=10,
    nope_head_dim=8,
    rope_head_dim=4,
    value_head_dim=6,
    indexer=IndexerConfig(num_heads=3, head_dim=6, top_k=5),
)
LENGTH = 24


def config_of(attention: LatentAttentionConfig):
    dense = LayerSpec(attention=attention, ffn=DenseConfig(d_ff=16))
    return tiny.model(prefix=(dense,), pattern=(dense,), num_layers=2)


CONFIG = config_of(SPARSE)
SHARED = LayerSpec(
    attention=dataclasses.replace(SPARSE, shares_indexer=True), ffn=DenseConfig(d_ff=16)
)
SHARING = tiny.model(prefix=CONFIG.prefix, pattern=(*CONFIG.pattern, SHARED), num_layers=5)
"""Two repetitions of a layer with an indexer and one that takes its choice, after a third."""


def with_top_k(top_k: int):
    indexer = dataclasses.replace(SPARSE.indexer, top_k=top_k)
    return config_of(dataclasses.replace(SPARSE, indexer=indexer))


@pytest.fixture(scope="module")
def parity():
    """Two documents in the row; the second has more keys than a query may see."""
    return Parity(CONFIG, LENGTH, tolerance=3e-5)


@pytest.fixture(scope="module")
def shared():
    return Parity(SHARING, LENGTH, tolerance=1e-4)


@pytest.fixture(scope="module")
def variables(parity):
    return parity.variables


@functools.cache
def step_of(config):
    model = Transformer(config)
    return jax.jit(lambda v, t, p, c: hidden_states(model, v, t, p, c))


def read(config, variables, tokens, positions, cache=None):
    return step_of(config)(variables, tokens, positions, cache)


def test_equals_the_numpy_oracle(parity):
    parity.check()


@pytest.mark.parametrize("wrong", ["no relu", "last turned", "no norm"])
def test_wrong_indexers_are_told_apart(parity, wrong):
    parity.check_told_apart(wrong)


def test_a_shared_choice_equals_the_numpy_oracle(shared):
    shared.check()


@pytest.mark.parametrize("wrong", ["first of its kind", "no choice"])
def test_wrong_choices_are_told_apart(shared, wrong):
    shared.check_told_apart(wrong)


@pytest.mark.slow
def test_layers_that_share_a_choice_apart_scanned_and_in_a_state(shared):
    check_decode(SHARING, shared.variables, LENGTH, 11)
    check_causality(SHARING, shared.variables, LENGTH)
    check_devices(SHARING, shared.variables, LENGTH, (2, 2, 1), tolerance=5e-5)
    tokens, positions = inputs(SHARING, LENGTH)
    expected, _ = read(SHARING, shared.variables, tokens, positions)
    apart, own = unstack(Transformer(SHARING), shared.variables)
    found, _ = read(apart.config, own, tokens, positions)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_with_room_for_all_keys_it_is_plain_latent_attention(variables):
    """Bitwise where no row is longer than top_k; to rounding where only no document is."""
    tokens, positions = inputs(CONFIG, LENGTH)
    plain = config_of(dataclasses.replace(SPARSE, indexer=None))
    expected, _ = read(plain, variables, tokens, positions)
    hidden, _ = read(with_top_k(LENGTH), variables, tokens, positions)
    np.testing.assert_array_equal(hidden, expected)
    assert np.abs(read(CONFIG, variables, tokens, positions)[0] - expected).max() > 1e-2
    short = np.arange(LENGTH, dtype=np.int32)[None] % 5
    expected, _ = read(plain, variables, tokens, short)
    hidden, _ = read(CONFIG, variables, tokens, short)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)


@pytest.mark.parametrize("prefill", [4, pytest.param(15, marks=pytest.mark.slow)])
def test_absorbed_decode_equals_full_forward(variables, prefill):
    check_decode(CONFIG, variables, LENGTH, prefill)


@pytest.mark.slow
@pytest.mark.parametrize("taken_back", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_padding_and_tokens_taken_back_are_not_chosen(variables, taken_back):
    """Rows of 9 and 14 tokens padded to 16, of which the last are replaced by others."""
    tokens = np.random.RandomState(2).randint(0, 300, (2, LENGTH)).astype(np.int32)
    cache, lengths = init_state(CONFIG, 2, LENGTH, "float32"), np.array([[9], [14]])
    places = np.arange(LENGTH, dtype=np.int32)[None].repeat(2, axis=0)
    positions = np.where(places < lengths, places, -1)[:, :16]
    _, cache = read(CONFIG, variables, tokens[:, :16], positions, cache)
    starts = lengths - taken_back
    cache = rewind(cache, jnp.asarray(starts[:, 0]))
    changed = np.where(places < starts, tokens, (tokens + 7) % 300)
    more = (starts + np.arange(3)).astype(np.int32)
    hidden, _ = read(CONFIG, variables, np.take_along_axis(changed, more, 1), more, cache)
    expected, _ = read(CONFIG, variables, changed, places)
    expected = np.take_along_axis(np.asarray(expected), more[:, :, None], 1)
    np.testing.assert_allclose(hidden, expected, atol=1e-4)


def test_future_tokens_change_nothing_before_them(variables):
    check_causality(CONFIG, variables, LENGTH)


def test_of_equal_scores_the_first_keys_are_chosen():
    """Scores of six visible keys and a better one that is not, of which three are chosen."""
    scores = np.array([0, 2, 0, 0, 3, 0, 9], np.float32)
    index = Index(jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1)))
    visible = jnp.asarray([[[True] * 6 + [False]]])
    chosen = chosen_keys(index, jnp.asarray(scores)[None, :, None], visible, 3)
    assert np.flatnonzero(chosen[0, 0]).tolist() == [0, 1, 4]
    few = jnp.asarray([[[True, False, True] + [False] * 4]])
    chosen = chosen_keys(index, jnp.asarray(scores)[None, :, None], few, 3)
    assert np.flatnonzero(chosen[0, 0]).tolist() == [0, 2]


def test_the_loss_is_the_kl_of_the_attention_and_the_scores():
    """Against numpy in float64, with a query that sees nothing and blocks that are cut."""
    random = np.random.RandomState(0)
    length, heads = 150, 3
    q, k = (random.randn(1, length, heads, 6).astype(np.float32) for _ in range(2))
    index = Index(
        jnp.asarray(random.randn(1, length, 2, 4), jnp.float32),
        jnp.asarray(random.randn(1, length, 4), jnp.float32),
        jnp.asarray(random.randn(1, length, 2), jnp.float32),
    )
    mask = np.tril(random.rand(1, length, length) < 0.4)
    mask[0, 7] = False
    found = jax.jit(imitation_loss)(q, k, index, mask)
    total, count = 0.0, 0
    for t in range(length):
        seen = np.flatnonzero(mask[0, t])
        if not len(seen):
            continue
        p = np.zeros(len(seen))
        for h in range(heads):
            a = k[0, seen, h].astype(np.float64) @ q[0, t, h] / np.sqrt(6)
            p += np.exp(a - a.max()) / np.exp(a - a.max()).sum() / heads
        relu = np.maximum(np.asarray(index.q_BLHC)[0, t] @ np.asarray(index.k_BLC)[0, seen].T, 0)
        scores = np.asarray(index.weights_BLH, np.float64)[0, t] @ relu
        log_guess = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        total, count = total + (p * (np.log(p) - log_guess)).sum(), count + 1
    assert count == mask.any(-1).sum() < length
    np.testing.assert_allclose(found, total / count, rtol=1e-5)


def test_shapes_counts_and_the_cache():
    abstract, _ = abstract_variables(Transformer(CONFIG))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == CONFIG.num_parameters
    own = jax.tree.map(jnp.shape, abstract["params"]["prefix_0"]["attention"]["indexer"])
    norm = {"scale": (6,), "bias": (6,)}
    assert own == {"q": (12, 3, 6), "k": (32, 6), "k_norm": norm, "weights": (32, 3)}
    assert kept(CONFIG) == 2 * LENGTH * (10 + 4 + 6)


def kept(config) -> int:
    """Numbers that the layers keep of a text."""
    cache = jax.eval_shape(lambda: init_state(config, 1, LENGTH, "float32"))
    return sum(x.size for x in jax.tree.leaves(cache) if x.dtype == jnp.float32)


def test_a_layer_that_shares_an_indexer_has_none():
    """No weights, no keys and no scores of it: in 5 layers are 3 indexers."""
    abstract, _ = abstract_variables(Transformer(SHARING))
    assert sum(x.size for x in jax.tree.leaves(abstract["params"])) == SHARING.num_parameters
    assert "indexer" not in abstract["params"]["periods"]["layer_1"]["attention"]
    assert kept(SHARING) == LENGTH * (5 * (10 + 4) + 3 * 6)
    longer = decode_flops_per_token(SHARING, 60) - decode_flops_per_token(SHARING, 20)
    assert longer == 3 * 2 * 40 * 3 * 6


def test_work_is_bounded_but_for_the_scores():
    """Each of 40 more keys before a query: two layers, two flops, three heads of six."""
    longer = decode_flops_per_token(CONFIG, 60) - decode_flops_per_token(CONFIG, 20)
    assert longer == 2 * 2 * 40 * 3 * 6


def test_what_it_can_not_do_is_said():
    with pytest.raises(UserError, match="query_rank=None has none"):
        dataclasses.replace(SPARSE, query_rank=None)
    indexer = dataclasses.replace(SPARSE.indexer, head_dim=2)
    with pytest.raises(UserError, match=r"indexer.head_dim=2 must be at least rope_head_dim=4"):
        dataclasses.replace(SPARSE, indexer=indexer)
    with pytest.raises(UserError, match=r"loss_weight=0.0 must be greater than 0"):
        dataclasses.replace(SPARSE.indexer, loss_weight=0.0)
    with pytest.raises(UserError, match="shares_indexer=True has no effect with indexer=None"):
        dataclasses.replace(SPARSE, indexer=None, shares_indexer=True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"prefix": (), "pattern": (SHARED,), "num_layers": 1},
            "shares_indexer, and no layer before it has the same attention without it",
        ),
        (
            {"pattern": SHARING.pattern[::-1]},
            "shares_indexer and reads layer 0 of the prefix at first and layer 2 of the pattern",
        ),
        ({"hyper_connections": HyperConnectionConfig()}, "shares_indexer is not built with hyper"),
    ],
)
def test_a_choice_that_is_nobodys_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(SHARING, **change)
    with pytest.raises(UserError, match="and a module has no layer before it"):
        MultiTokenConfig(layer=SHARED)
