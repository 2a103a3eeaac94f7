"""The GPU report's parts that run models, in small: a training step, decoding by the model's own
step and by the engine.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import decoding, training
from infer.load import inference_model
from model.transformer import Transformer
from model.unstacked import unstacked_config


@pytest.mark.slow
def test_the_training_part_trains(tmp_path):
    run = training.shrunk(training.olmoe_run(num_layers=1, rows=1, length=64))
    found = training.measure(run, steps=2, folder=tmp_path)
    assert found["losses"][-1] < found["losses"][0]
    assert found["tokens"] == 64
    assert found["tokens_per_second"] > 0
    assert max(found["load_cv"]) > 0.05
    with training.balanced_routing():
        dealt = training.measure(run, steps=1)
    assert max(dealt["load_cv"]) == 0.0  # 64 tokens of 8 experts: 8 rows for each of 64


def small_decoder() -> Transformer:
    """In widths that are a format's own, not too small for it."""
    run = training.shrunk(training.olmoe_run(2, length=256))
    (layer,) = run.model.pattern
    attention = dataclasses.replace(layer.attention, head_dim=64)
    ffn = dataclasses.replace(layer.ffn, d_ff=64)
    pattern = (dataclasses.replace(layer, attention=attention, ffn=ffn),)
    config = dataclasses.replace(run.model, pattern=pattern)
    model = inference_model(dataclasses.replace(run, model=config))
    return Transformer(unstacked_config(model.config), model.execution)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "int4"])
def test_the_decoding_part_decodes(weights):
    model = small_decoder()
    (found,) = decoding.measure_all(model, [(weights, 3)], context=70, num_steps=2)
    assert 8 <= found["experts_used"] <= 3 * 8
    width, heads, d_ff, vocab, experts = 64, 2 * 64, 64, 512, found["experts_used"]
    attention, norms = 4 * width * heads, 4 * (2 * width + 2 * heads)
    of_experts, head = 3 * width * d_ff * 64, width * vocab
    if weights == "bfloat16":
        used = 2 * of_experts * experts / 64
        expected = 2 * (2 * attention + used + norms + 4 * width * 64) + 2 * head
        expected += 2 * width * 3 + 4 * width  # tokens' embeddings, the last norm
        keys = 2 * 2 * heads * 3 * 70 * 2
        assert found["least_bytes"] == pytest.approx(expected + keys)
    else:
        (floats,) = decoding.measure_all(model, [("bfloat16", 3)], context=70, num_steps=1)
        assert found["least_bytes"] < 0.8 * floats["least_bytes"]


@pytest.mark.slow
def test_the_engine_is_timed_in_full_steps():
    found = decoding.measure_engine(small_decoder(), "int8", 3, context=70, num_steps=4)
    assert len(found["seconds_per_step"]) == 4
    assert found["prompt_tokens_per_second"] > 0


@pytest.mark.slow
def test_decoding_steps_attend_to_what_earlier_ones_wrote():
    """Two steps equal one step and then another: the same tokens, keys and values."""
    model = small_decoder()
    variables, num_pages = decoding.draw_variables(model, "float32"), 2
    tables_BN = jnp.array(decoding.pages_of(2, num_pages))
    token_B, position_B = jnp.array([3, 5], jnp.int32), jnp.array([70, 70], jnp.int32)

    def steps(count, token_B, position_B, state):
        run = decoding.decode(model, count, variables, token_B, position_B, state, tables_BN)
        return run[:2]

    both, after_both = steps(2, token_B, position_B, decoding.draw_state(model, 2, num_pages))
    one, state = steps(1, token_B, position_B, decoding.draw_state(model, 2, num_pages))
    two, after_two = steps(1, one, position_B + 1, state)
    np.testing.assert_array_equal(both, two)
    for x, y in zip(jax.tree.leaves(after_both), jax.tree.leaves(after_two), strict=True):
        np.testing.assert_array_equal(x, y)
