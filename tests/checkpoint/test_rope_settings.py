"""Rotary scaling in config.json, against the factors that transformers and DeepSeek's code make."""

import math

import pytest

from checkpoint.config_reader import Settings
from checkpoint.families import rope_section
from configs.checks import UserError
from configs.rope import RopeScaling, YarnConfig

GROUPED = {"max_position_embeddings": 256}
LATENT = GROUPED | {"kv_lora_rank": 16}
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64}


def read(values: dict, scaling: dict) -> RopeScaling | None:
    return rope_section.read_rope(Settings(values | {"rope_scaling": scaling}, "it"), 10_000.0)[1]


def growth(m: float) -> float:
    return 0.1 * m * math.log(40) + 1


SCALES = [
    ({}, growth(1), 1.0),
    ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, growth(1) ** 2),
    ({"mscale": 0.707, "mscale_all_dim": 1.0}, growth(0.707) / growth(1), growth(1) ** 2),
    ({"mscale": 1.0, "mscale_all_dim": 0.707}, growth(1) / growth(0.707), growth(0.707) ** 2),
    ({"mscale": 0.5}, growth(1), 1.0),
    ({"mscale_all_dim": 0.5}, growth(1), growth(0.5) ** 2),
    ({"attention_factor": 0.7}, 0.7, 1.0),
    ({"attention_factor": 1.0, "mscale": 2.0, "mscale_all_dim": 0.5}, 1.0, growth(0.5) ** 2),
]
"""(what is given, factor of sines and cosines, factor of latent attention's scores) by transformers
5's _compute_yarn_parameters and yarn_apply_mscale."""


@pytest.mark.parametrize(("given", "turned", "scores"), SCALES)
def test_latent_attentions_rotary_part_is_scaled_apart(given, turned, scores):
    yarn = read(LATENT, YARN | given)
    assert isinstance(yarn, YarnConfig)
    assert yarn.logit_scale == pytest.approx(scores, rel=1e-9)
    assert yarn.rotary_scale == pytest.approx(turned, rel=1e-9)
    written = rope_section.write_rope(10_000.0, yarn, is_on_sines=True)["rope_scaling"]
    assert read(LATENT, written) == yarn
    # DeepSeek's own code knows no attention_factor.
    own = growth(written["mscale"]) / growth(written["mscale_all_dim"])
    assert own == pytest.approx(turned, rel=1e-9)


@pytest.mark.parametrize(("given", "turned"), [case[:2] for case in SCALES])
def test_grouped_query_logits_have_the_factors_square(given, turned):
    yarn = read(GROUPED, YARN | given)
    assert isinstance(yarn, YarnConfig)
    assert yarn.logit_scale * yarn.rotary_scale**2 == pytest.approx(turned**2, rel=1e-9)
    written = rope_section.write_rope(10_000.0, yarn)["rope_scaling"]
    assert read(GROUPED, written) == yarn
    assert written.get("attention_factor", growth(1)) == pytest.approx(turned, rel=1e-9)


@pytest.mark.parametrize(
    "given", [{"attention_factor": 0.0}, {"mscale": -4.0, "mscale_all_dim": 1.0}]
)
def test_factors_that_leave_no_logits(given):
    for values in (GROUPED, LATENT):
        with pytest.raises(UserError, match="leave nothing of the scores"):
            read(values, YARN | given)


def test_dynamic_is_plain_within_the_context():
    """Its base is theta (factor L / max_position_embeddings - (factor - 1))^(C / (C - 2)) where L
    is the text's length, or max_position_embeddings for shorter ones."""
    assert read(GROUPED, {"type": "dynamic", "factor": 8.0}) is None


def test_scores_that_transformers_scales_without_yarn_are_told():
    linear = {"rope_type": "linear", "factor": 4.0, "mscale_all_dim": 1.0}
    assert read(GROUPED, linear) is not None
    with pytest.raises(UserError, match=r"mscale_all_dim=1.0, expected None or 0"):
        read(LATENT, linear)
