"""Early exit: the full model where nobody leaves, a slow loop in numpy where some do, and one rule
in two forms.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec, MixtureOfDepthsConfig
from configs.checks import UserError
from configs.feed_forward import ContextConfig, DenseConfig, RouterConfig
from infer import early_exit
from infer.early_exit import check_exits, exit_hidden, exit_step
from infer.generate import generate
from model.model_state import init_state
from model.step import make_step
from model.transformer import Transformer, hidden_states, output_weights
from model.unstacked import unstack, unstacked_config
from tests import oracle, tiny
from tests.probes import drawn

DEPTH = MixtureOfDepthsConfig(capacity=0.5, selection="threshold")
GLOBAL = tiny.attention(window_size=None, num_sink_tokens=0)
DENSE = DenseConfig(d_ff=16)
CONFIG = tiny.model(
    prefix=(LayerSpec(attention=GLOBAL, ffn=DENSE),),
    pattern=(
        LayerSpec(attention=GLOBAL, ffn=DENSE),
        LayerSpec(attention=tiny.attention(window_size=5), ffn=tiny.moe(), depth=DEPTH),
    ),
    num_layers=7,
)
MODEL = Transformer(unstacked_config(CONFIG))
LENGTH, THRESHOLD = 16, 0.25
TOKENS = np.random.RandomState(0).randint(0, 300, (2, LENGTH)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))


@pytest.fixture(scope="module")
def stacked():
    """An output layer that is now and then sure, so that tokens leave at all exits."""
    made = drawn(CONFIG, seed=2)
    made["params"]["output"] *= 60.0
    return made


@pytest.fixture(scope="module")
def variables(stacked):
    return unstack(Transformer(CONFIG), stacked)[1]


@jax.jit
def read_step(variables, token, position, cache, threshold):
    return exit_step(MODEL, variables, token, position, cache, threshold)


def read_all(variables, threshold):
    """Logits and layers of each token, read one by one, and the cache at the end."""
    cache, logits, layers = init_state(MODEL.config, 2, LENGTH, "float32"), [], []
    for t in range(LENGTH):
        step = read_step(variables, TOKENS[:, t], POSITIONS[:, t], cache, threshold)
        cache = step.state
        logits.append(step.logits_BV)
        layers.append(step.layers_B)
    return np.stack(logits, 1), np.stack(layers, 1), cache


@pytest.fixture(scope="module")
def early(variables):
    logits, layers, cache = read_all(variables, THRESHOLD)
    assert set(np.unique(layers)) == {3, 5, 7}, "the threshold should make tokens leave everywhere"
    return logits, layers, cache


def test_a_threshold_above_one_is_the_full_model_bit_for_bit(variables):
    logits, layers, cache = read_all(variables, 2.0)
    full = init_state(MODEL.config, 2, LENGTH, "float32")

    @jax.jit
    def read(variables, token, position, cache):
        hidden, cache = hidden_states(MODEL, variables, token[:, None], position[:, None], cache)
        return hidden[:, 0] @ output_weights(MODEL, variables), cache

    for t in range(LENGTH):
        expected, full = read(variables, TOKENS[:, t], POSITIONS[:, t], full)
        np.testing.assert_array_equal(logits[:, t], expected)
    jax.tree.map(np.testing.assert_array_equal, cache, full)
    assert (layers == 7).all()


@pytest.mark.slow
def test_the_loop_is_the_masked_form(variables, early):
    """Token by token, each row as if alone: one leaves while the other goes on."""
    logits, layers, _ = early
    masked = jax.jit(lambda v, t: exit_hidden(MODEL, v, TOKENS, POSITIONS, t))
    hidden, expected_layers = masked(variables, THRESHOLD)
    np.testing.assert_array_equal(layers, expected_layers)
    assert (layers[0] != layers[1]).any()
    # float32 sums over cached keys in another order; logits are of order 10.
    np.testing.assert_allclose(logits, hidden @ output_weights(MODEL, variables), atol=1e-4)
    whole, all_layers = masked(variables, 2.0)
    expected, _ = jax.jit(lambda v: hidden_states(MODEL, v, TOKENS, POSITIONS))(variables)
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    assert (np.asarray(all_layers) == 7).all()


def slow_loop(params, tokens, threshold, forget=False):
    """One row in numpy, layer by layer: logits, layers, and each layer's input; `forget` is a wrong
    version that computes a skipped layer's keys from a state that went on.
    """
    positions, documents = np.arange(LENGTH), np.zeros(LENGTH)
    x, eps = params["embedding"][tokens], CONFIG.norm_eps
    x = oracle.block(x, params["prefix_0"], CONFIG.prefix[0], eps, positions, documents)
    shown, exited, layers, entering = x, np.zeros(LENGTH, bool), np.ones(LENGTH, int), []
    for period in range(CONFIG.num_periods):
        for i, spec in enumerate(CONFIG.pattern):
            layer = oracle._pick(params["periods"][f"layer_{i}"], period)
            entering.append(x)
            after = oracle.block(x, layer, spec, eps, positions, documents)
            x = after if forget else np.where(exited[:, None], x, after)
            layers += ~exited
        shown = np.where(exited[:, None], shown, x)
        hidden = oracle.rms_norm(shown, params["final_norm"]["scale"], eps)
        logits = hidden @ params["output"]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p = np.sort(p / p.sum(-1, keepdims=True), axis=-1)
        exited = exited | (p[:, -1] - p[:, -2] >= threshold)
    return logits, layers, entering


def test_keys_of_skipped_layers_come_from_the_state_that_left(stacked, early):
    params = oracle._float64(jax.device_get(stacked["params"]))
    logits, layers, cache = early
    for row in range(2):
        expected, expected_layers, entering = slow_loop(params, TOKENS[row], THRESHOLD)
        np.testing.assert_array_equal(layers[row], expected_layers)
        np.testing.assert_allclose(logits[row], expected, atol=1e-3)
        for period in range(CONFIG.num_periods):
            layer = oracle._pick(params["periods"]["layer_0"], period)
            h = oracle.rms_norm(
                entering[2 * period], layer["attention_norm"]["scale"], CONFIG.norm_eps
            )
            values = np.einsum("LD,DGC->LGC", h, layer["attention"]["kv"][:, 1])
            kept = cache.periods[2 * period].attention.v_RSGW[row]
            np.testing.assert_allclose(kept, values, atol=1e-4)
    wrong, _, _ = slow_loop(params, TOKENS[0], THRESHOLD, forget=True)
    assert np.abs(wrong - logits[0]).max() > 0.1


def test_filling_a_skipped_period_costs_its_keys_alone(variables):
    """No attention, no feed-forward, no expert is left in the compiled program."""
    state = init_state(MODEL.config, 1, 64, "float32")
    x, at = jnp.zeros((1, 1, 32)), jnp.zeros((1, 1), jnp.int32)

    def fill(variables, state, x, at):
        step = make_step(at, at).replace(layers=(0, 2), is_exited_BL=jnp.ones((1, 1), bool))
        return early_exit.run_layers(MODEL, variables, x, step, state)[1]

    compiled = jax.jit(fill).lower(variables, state, x, at).compile()
    flops = compiled.cost_analysis()["flops"]
    keys_and_values = 2 * (2 * 32 * 2 * 2 * 8)  # two layers of [D, 2, G, C]
    assert flops < 2 * keys_and_values  # norms, RoPE and the choice of slots beside them
    layers = [variables["params"]["periods"][f"layer_{i}"] for i in range(2)]
    everything = sum(x.size for x in jax.tree.leaves(layers))
    assert flops < 2 * everything / 4  # far below one pass through the period's weights


def test_generation_with_and_without_exits():
    config = tiny.model(pattern=CONFIG.pattern[:1], num_layers=3)
    model, variables = Transformer(config), drawn(config)
    prompts = [[0, 5, 17, 200], [0, 3]]
    full = generate(model, variables, prompts, max_new_tokens=6)
    same = generate(model, variables, prompts, max_new_tokens=6, exit_threshold=2.0)
    assert same.tokens == full.tokens
    assert (full.mean_layers, same.mean_layers) == (None, 3.0)
    least = generate(model, variables, prompts, max_new_tokens=6, exit_threshold=0.0)
    assert least.mean_layers == 1.0
    with pytest.raises(UserError, match="exit_threshold and a preference for experts can't go"):
        generate(model, variables, prompts, max_new_tokens=1, exit_threshold=0.5, preference={})


def test_what_can_not_be_skipped_is_refused():
    router = RouterConfig(top_k=2, context=ContextConfig(kind="causal", window_size=4))
    seeing = LayerSpec(attention=GLOBAL, ffn=tiny.moe(router=router))
    training = LayerSpec(attention=GLOBAL, ffn=DENSE, depth=MixtureOfDepthsConfig(capacity=0.5))
    for pattern, layers, sentence in (
        ((seeing,), 2, "without router.context"),
        ((training,), 2, r"use the config that model\.depth\.with_threshold_selection"),
        ((CONFIG.pattern[0],), 1, "no effect on a model of one period"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_exits(Transformer(tiny.model(pattern=pattern, num_layers=layers)))
