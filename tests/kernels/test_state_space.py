"""Mamba-2's recurrence: chunks and steps give what the equations say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels.state_space

state_space = jax.jit(kernels.state_space.state_space, static_argnames="implementation")
GROUPS, HEADS, KEYS, VALUES = 2, 4, 8, 6


def draw(length, *, rows=2, seed=0, decay=1.0):
    """Operands, and a state that tokens before have left."""
    random = np.random.RandomState(seed)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    return {
        "q_BLGK": normal(rows, length, GROUPS, KEYS),
        "k_BLGK": normal(rows, length, GROUPS, KEYS),
        "v_BLHV": normal(rows, length, HEADS, VALUES),
        "log_decay_BLH": -decay * np.exp(normal(rows, length, HEADS)),
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
            if position < 0:
                continue
            for h in range(HEADS):
                g = h // (HEADS // GROUPS)
                s = states[b, h] if position > 0 else np.zeros((KEYS, VALUES))
                s = np.exp(o["log_decay_BLH"][b, i, h]) * s
                s = s + np.outer(o["k_BLGK"][b, i, g], o["v_BLHV"][b, i, h])
                states[b, h], out[b, i, h] = s, s.T @ o["q_BLGK"][b, i, g]
    return out, states


def close(found, expected, is_token=None):
    out, state = (np.asarray(x, np.float64) for x in found)
    size = max(np.abs(expected[0]).max(), 1.0)
    if is_token is not None:
        out, expected = out[is_token], (expected[0][is_token], expected[1])
    np.testing.assert_allclose(out, expected[0], atol=1e-5 * size)
    np.testing.assert_allclose(state, expected[1], atol=1e-5 * size)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("length", [1, 7, 70, 128])
@pytest.mark.thinned(2)
def test_it_is_what_the_equations_say(length, implementation):
    operands = draw(length, decay=0.2)
    close(state_space(**operands, implementation=implementation), equations(operands))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_documents_see_nothing_of_each_other_and_padding_changes_nothing(implementation):
    """Documents that begin inside chunks and at their borders; padding within and at the end."""
    operands = draw(90, decay=0.1)
    first, second = np.arange(90, dtype=np.int32) + 3, np.arange(90, dtype=np.int32)
    first[20:64], first[64:66], first[66:] = np.arange(44), np.arange(2), np.arange(24)
    first[50:53], first[80:] = -1, -1
    second[85:] = -1
    operands["positions_BL"] = np.stack([first, second])
    for name in ("q_BLGK", "k_BLGK", "v_BLHV"):
        operands[name][operands["positions_BL"] < 0] = 1e4
    found = state_space(**operands, implementation=implementation)
    close(found, equations(operands), operands["positions_BL"] >= 0)


def test_pieces_give_what_the_whole_gives():
    operands = draw(50, decay=0.1)
    expected = equations(operands)
    outs, state = [], operands.pop("state_BHKV")
    for begin, end in ((0, 17), (17, 18), (18, 50)):
        piece = {name: x[:, begin:end] for name, x in operands.items()}
        out, state = state_space(**piece, state_BHKV=state)
        outs.append(out)
    close((np.concatenate(outs, axis=1), state), expected)


@pytest.mark.parametrize("decay", [0.0, 300.0])
def test_decays_from_none_to_all(decay):
    """Nothing forgotten, and all of it at once: exponentials that no float32 holds."""
    operands = draw(70, decay=decay)
    close(state_space(**operands), equations(operands))


def test_gradients_are_those_of_the_recurrence():
    operands = draw(40, decay=0.3)
    operands["positions_BL"][0, 25:] = np.arange(15)
    positions = operands.pop("positions_BL")
    weights = draw(40, seed=1)

    def loss(operands, implementation):
        out, state = state_space(**operands, positions_BL=positions, implementation=implementation)
        return (out * weights["v_BLHV"]).sum() + (state * weights["state_BHKV"]).sum()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    expected, found = grad(operands, "reference"), grad(operands, "xla")
    for name, want in expected.items():  # twice the promise: both passes sum in another order
        np.testing.assert_allclose(found[name], want, atol=2e-5 * np.abs(want).max(), err_msg=name)


def test_shapes_that_do_not_fit_are_named():
    operands = draw(4)
    with pytest.raises(ValueError, match=r"log_decay \(2, 4, 3\)"):
        state_space(**operands | {"log_decay_BLH": np.zeros((2, 4, 3), np.float32)})
    with pytest.raises(ValueError, match="H a multiple of G"):
        state_space(**operands | {"v_BLHV": np.zeros((2, 4, 3, VALUES), np.float32)})
    with pytest.raises(ValueError, match=r"state .* float32"):
        state_space(**operands | {"state_BHKV": jnp.zeros((2, HEADS, KEYS, VALUES), jnp.bfloat16)})
