"""The gated delta rule: chunks and the recurrence give what the equations say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.delta_rule import delta_rule

HEADS, KEYS, VALUES = 2, 8, 6
compiled = jax.jit(delta_rule, static_argnames="implementation")


def draw(length, *, rows=2, channels=1, seed=0, decay=1.0):
    """Operands, keys of length 1; and a state that tokens before have left."""
    random = np.random.RandomState(seed)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    dims = rows, length, HEADS
    k = normal(*dims, KEYS)
    return {
        "q_BLHK": normal(*dims, KEYS),
        "k_BLHK": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v_BLHV": normal(*dims, VALUES),
        "log_decay_BLHK": -decay * np.exp(normal(*dims, channels)),
        "beta_BLH": random.uniform(0, 1, dims).astype(np.float32),
        "positions_BL": np.tile(np.arange(5, 5 + length, dtype=np.int32), (rows, 1)),
        "state_BHKV": normal(rows, HEADS, KEYS, VALUES),
    }


def equations(operands):
    """Token by token in float64."""
    o = {name: np.asarray(x, np.float64) for name, x in operands.items()}
    rows, length = operands["positions_BL"].shape
    out, states = np.zeros(o["v_BLHV"].shape), o["state_BHKV"].copy()
    for b in range(rows):
        for i in range(length):
            position = operands["positions_BL"][b, i]
            for h in range(HEADS):
                k, v, beta = o["k_BLHK"][b, i, h], o["v_BLHV"][b, i, h], o["beta_BLH"][b, i, h]
                if position < 0:
                    continue
                s = states[b, h] if position > 0 else np.zeros((KEYS, VALUES))
                s = np.exp(o["log_decay_BLHK"][b, i, h])[:, None] * s
                s = (np.eye(KEYS) - beta * np.outer(k, k)) @ s + beta * np.outer(k, v)
                states[b, h], out[b, i, h] = s, s.T @ o["q_BLHK"][b, i, h]
    return out, states


def close(found, expected, is_token=None):
    out, state = (np.asarray(x, np.float64) for x in found)
    size = max(np.abs(expected[0]).max(), 1.0)
    if is_token is not None:
        out, expected = out[is_token], (expected[0][is_token], expected[1])
    np.testing.assert_allclose(out, expected[0], atol=1e-5 * size)
    np.testing.assert_allclose(state, expected[1], atol=1e-5 * size)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("channels", [1, KEYS])
@pytest.mark.parametrize("length", [1, 7, 70, 128])
@pytest.mark.thinned(3)
def test_it_is_what_the_equations_say(length, channels, implementation):
    operands = draw(length, channels=channels, decay=0.2)
    close(compiled(**operands, implementation=implementation), equations(operands))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("channels", [1, KEYS])
def test_documents_see_nothing_of_each_other_and_padding_changes_nothing(channels, implementation):
    """Documents that begin inside chunks and at their borders; padding within and at the end."""
    operands = draw(90, channels=channels, decay=0.1)
    first, second = np.arange(90, dtype=np.int32) + 3, np.arange(90, dtype=np.int32)
    first[20:64], first[64:66], first[66:] = np.arange(44), np.arange(2), np.arange(24)
    first[50:53], first[80:] = -1, -1
    second[85:] = -1
    operands["positions_BL"] = np.stack([first, second])
    for name in ("q_BLHK", "k_BLHK", "v_BLHV"):
        operands[name][operands["positions_BL"] < 0] = 1e4
    found = compiled(**operands, implementation=implementation)
    close(found, equations(operands), operands["positions_BL"] >= 0)


@pytest.mark.parametrize("channels", [1, KEYS])
def test_pieces_give_what_the_whole_gives(channels):
    operands = draw(50, channels=channels, decay=0.1)
    expected = equations(operands)
    outs, state = [], operands.pop("state_BHKV")
    for begin, end in ((0, 17), (17, 18), (18, 50)):
        piece = {name: x[:, begin:end] for name, x in operands.items()}
        out, state = compiled(**piece, state_BHKV=state)
        outs.append(out)
    close((np.concatenate(outs, axis=1), state), expected)


@pytest.mark.parametrize("channels", [1, KEYS])
@pytest.mark.parametrize("decay", [0.0, 300.0])
def test_decays_from_none_to_all(decay, channels):
    """Nothing forgotten, and all of it at once: exponentials that no float32 holds."""
    operands = draw(70, channels=channels, decay=decay)
    close(compiled(**operands), equations(operands))


def test_the_same_key_again_and_again():
    """The system of a chunk is then as far from the identity as it can be."""
    operands = draw(128, decay=0.0)
    operands["k_BLHK"] = np.repeat(operands["k_BLHK"][:, :1], 128, axis=1)
    operands["beta_BLH"] = np.ones_like(operands["beta_BLH"])
    close(compiled(**operands), equations(operands))
    # With beta 1 the state gives back the value that the key was last given.
    read, _ = compiled(**operands | {"q_BLHK": operands["k_BLHK"]})
    # Of a key whose length is 1 to within float32, through 128 corrections.
    np.testing.assert_allclose(read, operands["v_BLHV"], atol=1e-4)


@pytest.mark.parametrize("channels", [1, KEYS])
def test_gradients_are_those_of_the_recurrence(channels):
    operands = draw(40, channels=channels, decay=0.3)
    operands["positions_BL"][0, 25:] = np.arange(15)
    positions = operands.pop("positions_BL")
    weights = draw(40, seed=1)

    def loss(operands, implementation):
        out, state = delta_rule(**operands, positions_BL=positions, implementation=implementation)
        return (out * weights["v_BLHV"]).sum() + (state * weights["state_BHKV"]).sum()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    expected, found = grad(operands, "reference"), grad(operands, "xla")
    for name, want in expected.items():  # twice the promise: both passes sum in another order
        np.testing.assert_allclose(found[name], want, atol=2e-5 * np.abs(want).max(), err_msg=name)


def test_shapes_that_do_not_fit_are_named():
    operands = draw(4)
    with pytest.raises(ValueError, match=r"beta \(2, 4, 3\)"):
        delta_rule(**operands | {"beta_BLH": np.zeros((2, 4, 3), np.float32)})
    with pytest.raises(ValueError, match=r"log_decay \(2, 4, 2, 3\)"):
        delta_rule(**operands | {"log_decay_BLHK": np.zeros((2, 4, 2, 3), np.float32)})
    with pytest.raises(ValueError, match=r"state .* float32"):
        delta_rule(**operands | {"state_BHKV": jnp.zeros((2, HEADS, KEYS, VALUES), jnp.bfloat16)})
