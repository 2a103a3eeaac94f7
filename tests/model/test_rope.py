"""Stretched RoPE against tables worked out by hand and against the equations, pair by pair."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.rope import LinearRopeConfig, Llama3RopeConfig, YarnConfig
from kernels import native
from model.layers import rope, rope_frequencies

DEEPSEEK_V3 = YarnConfig(factor=40.0, original_length=4096)
GPT_OSS = YarnConfig(factor=32.0, original_length=4096, truncate=False)
LLAMA_31 = Llama3RopeConfig(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
)


def plain(width: int, base: float) -> np.ndarray:
    return np.array([base ** (-2 * d / width) for d in range(width // 2)])


@pytest.mark.parametrize(
    "scaling",
    [
        YarnConfig(factor=1.0, original_length=4096),
        Llama3RopeConfig(factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=64),
        LinearRopeConfig(factor=1.0),
    ],
)
def test_a_factor_of_one_changes_nothing(scaling):
    assert scaling.logit_scale == 1.0
    np.testing.assert_array_equal(
        rope_frequencies(64, 10_000.0, scaling), rope_frequencies(64, 10_000.0, None)
    )


@pytest.mark.parametrize(
    ("scaling", "base", "first", "last"),
    [
        # 32 turns in 4096 tokens are at pair 64 ln(4096 / 64 pi) / 2 ln 10^4 = 10.47, one turn at
        # 22.51; the code begins at 10 and ends at 23.
        (DEEPSEEK_V3, 10_000.0, 10.0, 23.0),
        # The same with base 150,000, not rounded.
        (GPT_OSS, 150_000.0, 8.0927799, 17.3980245),
    ],
    ids=["DeepSeek-V3", "gpt-oss"],
)
def test_yarns_ramp_is_linear_in_the_pairs_index(scaling, base, first, last):
    ours, before = rope_frequencies(64, base, scaling), plain(64, base)
    for d in range(32):
        stretched = min(max((d - first) / (last - first), 0.0), 1.0)
        slower = before[d] / scaling.factor
        assert ours[d] == pytest.approx((1 - stretched) * before[d] + stretched * slower, rel=1e-6)
    assert (ours[: math.ceil(first)] == before[: math.ceil(first)].astype(np.float32)).all()


def test_the_papers_ramp_is_told_apart():
    """Linear in turns, as the paper's text has it: pair 12 turns 20.6 times in 4096 tokens."""
    theta = 10**-1.5
    kept = (4096 * theta / (2 * np.pi) - 1) / 31
    wrong = kept * theta + (1 - kept) * theta / 40
    ours = rope_frequencies(64, 10_000.0, DEEPSEEK_V3)[12]
    assert ours == pytest.approx(theta * (11 / 13 + 2 / 13 / 40), rel=1e-6)  # 2 of 13 pairs on
    assert abs(wrong / ours - 1) > 0.2


def test_a_ramp_without_length_is_a_step():
    """Where both ends are clipped to pair 0, every other pair is stretched whole."""
    scaling = YarnConfig(factor=4.0, original_length=6, beta_fast=32.0, beta_slow=1.0)
    expected = plain(8, 10_000.0) / np.array([1, 4, 4, 4])
    np.testing.assert_allclose(rope_frequencies(8, 10_000.0, scaling), expected, rtol=1e-6)


def test_llama_3s_mix_is_linear_in_turns():
    """Wavelengths above 8192 are stretched, those below 2048 kept (Llama 3.1's published code)."""
    ours, before = rope_frequencies(128, 500_000.0, LLAMA_31), plain(128, 500_000.0)
    kinds = set()
    for d, frequency in enumerate(before):
        wavelength = 2 * math.pi / frequency
        if wavelength < 2048:
            expected, kind = frequency, "kept"
        elif wavelength > 8192:
            expected, kind = frequency / 8, "stretched"
        else:
            smooth, kind = (8192 / wavelength - 1) / 3, "between"
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        kinds.add(kind)
        assert ours[d] == pytest.approx(expected, rel=1e-6)
    assert len(kinds) == 3
    assert LLAMA_31.logit_scale == 1.0


def test_linear_scaling_divides_the_positions():
    """deepseek-coder: token 4 p stands where token p did, in every pair; dynamic scaling, which
    changes the base instead, leaves the first pair alone."""
    coder = LinearRopeConfig(factor=4.0)
    ours = rope_frequencies(128, 100_000.0, coder)
    np.testing.assert_allclose(4 * ours, plain(128, 100_000.0), rtol=1e-6)
    assert ours[0] == 0.25
    assert coder.logit_scale == 1.0


def test_what_is_turned_is_scaled_by_rotary_scale():
    x = np.random.RandomState(0).randn(1, 5, 2, 8).astype(np.float32)
    positions, plain = np.arange(5)[None], YarnConfig(factor=4.0, original_length=64)
    scaled = dataclasses.replace(plain, rotary_scale=0.8)
    turned = 0.8 * rope(x, positions, 10_000.0, plain)
    np.testing.assert_allclose(rope(x, positions, 10_000.0, scaled), turned, rtol=1e-6)


def test_logits_are_scaled_by_mscale():
    """DeepSeek-V2-Lite: 0.0707 ln 40 + 1 = 1.26080, squared."""
    lite = YarnConfig(factor=40.0, original_length=4096, mscale=0.707)
    assert lite.logit_scale == pytest.approx(1.5896262, rel=1e-6)
    assert DEEPSEEK_V3.logit_scale == pytest.approx(1.8738542, rel=1e-6)
    assert YarnConfig(factor=40.0, original_length=4096, mscale=0.0).logit_scale == 1.0


@pytest.mark.skipif(not native.is_available(), reason="the native library is not built")
def test_equal_angles_have_their_sines_computed_once():
    """And what they turn is what the equations say, with the gradient of a rotation: backwards."""
    random = np.random.RandomState(0)
    q, k = (random.standard_normal((2, 700, heads, 8)).astype(np.float32) for heads in (3, 1))
    positions = np.arange(1400, dtype=np.int32).reshape(2, 700)

    def turned_both(q, k):
        return rope(q, jnp.asarray(positions), 10_000.0) + rope(k, jnp.asarray(positions), 10_000.0)

    program = jax.jit(turned_both).lower(q, k).compile()
    text = program.as_text()
    assert text.count('custom_call_target="moesaic_sines"') == 1
    assert "cosine(" not in text
    angles = positions[:, :, None, None] * plain(8, 10_000.0).astype(np.float32)
    turn = np.exp(1j * angles.astype(np.float32).astype(np.float64))
    first, second = np.split((q + k).astype(np.float64), 2, axis=-1)
    expected = (first + 1j * second) * turn
    expected = np.concatenate([expected.real, expected.imag], axis=-1)
    np.testing.assert_allclose(program(q, k), expected, atol=2e-6)
    d_q = jax.grad(lambda q: (turned_both(q, k) * expected).sum())(q)
    np.testing.assert_allclose(d_q, q + k, atol=1e-5)
