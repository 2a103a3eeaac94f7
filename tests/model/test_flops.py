"""Useful FLOPs against counts by hand of the public models' shapes."""

import dataclasses

import pytest

from configs import models
from model.flops import (
    decode_flops_per_token,
    forward_flops_per_token,
    training_flops_per_token,
)
from tests import tiny


def test_mixtral_forward_at_its_published_shape():
    """Two per weight, and four per visible key and channel of 32 heads of 128."""
    attention = 2 * 4096 * 128 * (32 + 8)
    experts = 4096 * 8 + 2 * 3 * 4096 * 14_336
    weights = 32 * (attention + experts + 2 * 4096) + 4096 + 4096 * 32_000
    keys = 32 * 4 * 32 * 128 * (4096 + 1) / 2
    model = models.mixtral_8x7b()
    assert forward_flops_per_token(model, 4096) == pytest.approx(2 * weights + keys, rel=1e-9)
    assert training_flops_per_token(model, 4096) == 3 * forward_flops_per_token(model, 4096)
    at_the_end = 2 * weights + 32 * 4 * 32 * 128 * 4096
    assert decode_flops_per_token(model, 4096) == pytest.approx(at_the_end, rel=1e-9)


def test_latent_attention_counts_its_own_widths():
    """DeepSeek-V3: keys of 192, values of 128, 128 heads, 61 layers."""
    model = dataclasses.replace(models.deepseek_v3(), multi_token=None)
    weights = model.num_active_parameters - model.vocab_size * model.d_model
    keys = 61 * 2 * 128 * (192 + 128) * (4096 + 1) / 2
    assert forward_flops_per_token(model, 4096) == pytest.approx(2 * weights + keys, rel=1e-9)


def test_the_module_that_looks_ahead_is_trained_but_not_asked():
    model = models.deepseek_v3()
    plain = dataclasses.replace(model, multi_token=None)
    assert forward_flops_per_token(model, 256) == forward_flops_per_token(plain, 256)
    more = training_flops_per_token(model, 256) / training_flops_per_token(plain, 256)
    assert 1 + 1 / 61 < more < 1 + 3 / 61  # a layer of 61, a projection, another output layer


def test_windows_bound_what_is_seen():
    """A windowed layer of 12 and two sinks beside a global one, 32 channels each."""
    model = tiny.model()
    wide, long = forward_flops_per_token(model, 64), decode_flops_per_token(model, 64)
    near = forward_flops_per_token(model, 1)
    assert long - near == pytest.approx(4 * 32 * (64 - 1) + 4 * 32 * (14 - 1))
    assert near < wide < long
