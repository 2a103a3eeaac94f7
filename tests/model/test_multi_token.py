"""Multi-token modules: against numpy, the model itself as their limit, and what each place sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec, MultiTokenConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from configs.models import deepseek_v3
from model.multi_token import ahead
from model.transformer import (
    Transformer,
    abstract_variables,
    hidden_and_router,
    hidden_states,
    output_weights,
    training_pass,
)
from tests import oracle, tiny
from tests.probes import drawn, inputs

LENGTH = 20
TOLERANCE = 5e-5  # float32 through up to four layers against float64


def config_of(depth: int = 2):
    layer = LayerSpec(attention=tiny.attention(), ffn=tiny.moe())
    return tiny.model(multi_token=MultiTokenConfig(depth=depth, layer=layer))


CONFIG = config_of()


@jax.jit
def states(variables, tokens, positions):
    """The model's hidden states and each module's, [1 + depth, B, L, D]."""
    model = Transformer(CONFIG)
    hidden, sown, _ = training_pass(model, variables, tokens, positions)
    return jnp.stack([hidden, *(sown["multi_token"][f"hidden_{k}"][0] for k in range(2))])


@pytest.fixture(scope="module")
def variables():
    return drawn(CONFIG)


def test_equals_the_numpy_oracle_and_not_its_wrong_version(variables):
    """Which reads the embedding of y_t instead of y_{t+1}."""
    tokens, positions = inputs(CONFIG, LENGTH)
    packed = np.concatenate([positions[:, :7], positions[:, : LENGTH - 7]], axis=1)
    main, *ours = (x[0] for x in states(variables, tokens, packed))
    params, main = jax.device_get(variables["params"]), np.float64(main)
    expected = oracle.multi_token(params, CONFIG, main, tokens[0], packed[0])
    np.testing.assert_allclose(np.stack(ours), expected, atol=TOLERANCE)
    wrong = oracle.multi_token(params, CONFIG, main, tokens[0], packed[0], read_current=True)
    assert np.abs(np.stack(ours) - wrong).max() > 1000 * TOLERANCE


def test_a_module_that_only_passes_on_gives_the_models_logits(variables):
    """W_p takes h alone, the block adds nothing, and all norms have scale 1."""
    params = jax.tree.map(lambda x: x, variables["params"])
    one = jnp.ones(CONFIG.d_model)
    module = params["multi_token_0"]
    layer = jax.tree.map(lambda x: x, module["layer"])
    layer["attention"]["o"] *= 0
    layer["moe"]["down"] *= 0
    layer["moe"]["shared"]["down"] *= 0
    eye = jnp.eye(CONFIG.d_model)
    params["multi_token_0"] = module | {
        "layer": layer,
        "projection": jnp.concatenate([eye, 0 * eye]),
        "hidden_norm": {"scale": one},
        "norm": {"scale": one},
    }
    params["final_norm"] = {"scale": one}
    passing = variables | {"params": params}
    main, first, _ = states(passing, *inputs(CONFIG, LENGTH))
    w = output_weights(Transformer(CONFIG), passing)
    # A norm of a norm has eps twice more, beside states of mean square 0.03 in the trunk.
    np.testing.assert_allclose(first @ w, main @ w, rtol=1e-4, atol=1e-5)


def test_a_place_sees_the_tokens_up_to_its_own_reach(variables):
    """Module k's state at t depends on token t + k and, bitwise, on none after it."""
    tokens, positions = inputs(CONFIG, LENGTH)
    before = states(variables, tokens, positions)
    for t in (3, 11):
        for k in (1, 2):
            changed = tokens.copy()
            changed[:, t + k :] = (changed[:, t + k :] + 7) % CONFIG.vocab_size
            after = states(variables, changed, positions)
            np.testing.assert_array_equal(before[k, :, :t], after[k, :, :t])
            assert (before[k, :, t] != after[k, :, t]).any()


@pytest.mark.slow
def test_without_being_asked_nothing_is_computed(variables):
    tokens, positions = inputs(CONFIG, LENGTH)
    plain = dataclasses.replace(CONFIG, multi_token=None)

    def lowered(config):
        part = abstract_variables(Transformer(config))[0]
        params = {name: variables["params"][name] for name in part["params"]}
        read = jax.jit(
            lambda p: hidden_states(Transformer(config), {"params": p}, tokens, positions)[0]
        )
        used = {name: x for name, x in params.items() if not name.startswith("multi_token")}
        extra = {name: x for name, x in params.items() if name.startswith("multi_token")}
        return read.lower(used | extra).as_text(), read

    with_modules, without = lowered(CONFIG)[0], lowered(plain)[0]
    assert with_modules.count("dot_general") == without.count("dot_general")
    _, sown = hidden_and_router(Transformer(CONFIG), variables, tokens, positions)
    assert "multi_token" not in sown
    assert "multi_token_0" not in sown["router"]


def test_looking_ahead_is_a_shift_that_ends_in_zeros():
    x = jnp.arange(6).reshape(1, 6)
    np.testing.assert_array_equal(ahead(x, 2), [[2, 3, 4, 5, 0, 0]])


def test_the_configs_count_is_the_models_and_is_counted_apart():
    abstract, _ = abstract_variables(Transformer(CONFIG))
    size = sum(x.size for x in jax.tree.leaves(abstract["params"]))
    assert size == CONFIG.num_parameters + CONFIG.num_multi_token_parameters
    plain = dataclasses.replace(CONFIG, multi_token=None)
    assert CONFIG.num_parameters == plain.num_parameters
    assert plain.num_multi_token_parameters == 0
    assert config_of(1).num_multi_token_parameters * 2 == CONFIG.num_multi_token_parameters


def test_deepseek_v3s_module_has_the_published_size():
    """The model card gives 11.5B of its own (11.61B by its config) and 685B for the checkpoint: the
    model and the module with its copies of the embedding and the output layer."""
    model = deepseek_v3()
    own = model.num_multi_token_parameters
    assert own == pytest.approx(11.5e9, rel=0.01)
    copies = 2 * model.vocab_size * model.d_model
    assert model.num_parameters == pytest.approx(671e9, rel=0.001)
    assert model.num_parameters + own + copies == pytest.approx(685e9, rel=0.001)


def test_settings_without_effect_are_refused():
    layer = LayerSpec(attention=tiny.attention(), ffn=DenseConfig(d_ff=8))
    with pytest.raises(UserError, match=r"multi_token.depth=0 must be at least 1"):
        MultiTokenConfig(depth=0, layer=layer)
    with pytest.raises(UserError, match=r"multi_token.loss_weight=0.0 must be greater than 0"):
        MultiTokenConfig(layer=layer, loss_weight=0.0)
