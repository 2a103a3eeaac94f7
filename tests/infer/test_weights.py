"""Weights in few bits: the model computes what the rounded weights say, in every kind of layer."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.attention import (
    IndexerConfig,
    LatentAttentionConfig,
    LocalSparseAttentionConfig,
    RelativeAttentionConfig,
)
from configs.checks import UserError
from configs.feed_forward import ContextConfig, DenseConfig, RouterConfig
from infer.generate import generate
from infer.load import abstract_on_mesh
from infer.logits import full_logits
from infer.weights import check_format, converted, converter, formats_of, num_bytes
from kernels import native
from kernels.quantize import QTensor, dequantize
from model.transformer import Transformer
from model.unstacked import unstack
from parallel.mesh import make_mesh
from tests import tiny
from tests.probes import drawn

WIDE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
GLOBAL = tiny.attention(**WIDE, window_size=None, num_sink_tokens=0)
MOE = tiny.moe(d_ff=64)
LATENT = LatentAttentionConfig(
    num_heads=4,
    query_rank=64,
    latent_rank=64,
    nope_head_dim=16,
    rope_head_dim=16,
    value_head_dim=32,
    indexer=IndexerConfig(num_heads=4, head_dim=32, top_k=6),
)
SPARSE = LocalSparseAttentionConfig(**WIDE, window_size=4)
RELATIVE = RelativeAttentionConfig(num_heads=4, head_dim=32, memory_length=9)
CONTEXT = tiny.moe(
    d_ff=64, router=RouterConfig(top_k=2, context=ContextConfig(kind="causal", window_size=9))
)


def of(*specs, **changes):
    changes = {"d_model": 64, "vocab_size": 320, "num_layers": 2 * len(specs)} | changes
    return tiny.model(pattern=specs, **changes)


CONFIGS = {
    "dense": of(LayerSpec(attention=GLOBAL, ffn=DenseConfig(d_ff=96)), tie_embeddings=True),
    "experts": of(
        LayerSpec(attention=tiny.attention(**WIDE), ffn=MOE),
        LayerSpec(attention=LATENT, ffn=CONTEXT),
    ),
    "gpt-oss": of(
        LayerSpec(
            attention=tiny.attention(**WIDE, bias=True, sink_logits=True, num_sink_tokens=0),
            ffn=dataclasses.replace(MOE, bias=True, num_shared_experts=0),
        )
    ),
    "sparse": of(LayerSpec(attention=SPARSE, ffn=DenseConfig(d_ff=96))),
    "relative": of(LayerSpec(attention=RELATIVE, ffn=DenseConfig(d_ff=96))),
}
TOKENS = np.random.RandomState(0).randint(0, 320, 24).tolist()


def in_format(config, weights):
    """The model, apart, and its variables in the format."""
    model, variables = unstack(Transformer(config), drawn(config, seed=6))
    copies = jax.tree.map(lambda x: x, variables)
    return model, converted(copies, converter(model, weights))


def is_quantised(x) -> bool:
    return isinstance(x, QTensor)


@pytest.mark.parametrize(
    ("name", "weights"),
    [*((name, weights) for name in CONFIGS for weights in ("int8", "int4")), ("experts", "fp8")],
)
def test_the_model_is_that_of_the_rounded_weights(name, weights):
    """Against the same program on the floats that the few bits stand for; and they were rounded."""
    model, variables = in_format(CONFIGS[name], weights)
    held = jax.tree.leaves(variables, is_leaf=is_quantised)
    assert sum(map(is_quantised, held)) >= 5 * len(model.config.pattern) // 2
    floats = jax.tree.map(
        lambda x: dequantize(x) if is_quantised(x) else x, variables, is_leaf=is_quantised
    )
    expected = full_logits(model, floats, TOKENS)
    # Float32 sums in another order, and x held to 2^-23 of its block's largest.
    np.testing.assert_allclose(full_logits(model, variables, TOKENS), expected, atol=2e-5)
    _, exact = unstack(Transformer(CONFIGS[name]), drawn(CONFIGS[name], seed=6))
    assert np.abs(full_logits(model, exact, TOKENS) - expected).max() > 2e-3


def test_bytes_are_those_of_the_format():
    """Of all weights but norms, biases and routers; scales of 16 bits for 32 weights."""
    config = CONFIGS["dense"]
    sizes = {}
    for weights in ("float32", "bfloat16", "int8", "int4"):
        model, variables = in_format(config, weights)
        sizes[weights] = num_bytes(variables)
        rounded = sum(np.prod(model_shape) for model_shape in _shapes(model, weights))
    assert rounded > 0.98 * config.num_parameters
    per_weight = {name: size / config.num_parameters for name, size in sizes.items()}
    assert per_weight["float32"] == pytest.approx(4.0, rel=0.01)
    assert per_weight["bfloat16"] == pytest.approx(2.0, rel=0.02)
    scale = 2 if native.is_available() else 4
    assert per_weight["int8"] == pytest.approx(1 + scale / 32, rel=0.05)


def _shapes(model, weights):
    chosen = formats_of(model, weights)
    abstract, *_ = [abstract_on_mesh(model, None)]
    leaves = jax.tree.leaves_with_path(abstract["params"])
    return [x.shape for path, x in leaves if jax.tree_util.keystr(path) in chosen]


def test_int4_keeps_embedding_and_output_in_int8():
    model, variables = in_format(CONFIGS["sparse"], "int4")
    found = {name: variables["params"][name].format for name in ("embedding", "output")}
    assert found == {"embedding": "int8", "output": "int8"}
    layer = variables["params"]["periods"]["layer_0"]["attention"]
    assert layer["q"].format == "int4"
    assert layer["q"].shape == (1, 64, 4, 32)
    assert model.config.num_periods == 1


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_generation_reads_them(weights):
    """The engine's steps, of one token and of pieces, give the full pass's best tokens."""
    model, variables = in_format(CONFIGS["experts"], weights)
    made = generate(model, variables, [TOKENS[:9]], max_new_tokens=5, piece=16).tokens[0]
    row = TOKENS[:9]
    for token in made:
        assert token == full_logits(model, variables, row)[-1].argmax()
        row.append(token)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_experts_over_a_mesh_equal_one_device(weights):
    """Few bits are split by expert alone; to 1e-5 of the largest logit."""
    model, variables = in_format(CONFIGS["experts"], weights)
    expected = full_logits(model, variables, TOKENS)
    mesh = make_mesh(1, 4, 1)
    floats = unstack(Transformer(CONFIGS["experts"]), drawn(CONFIGS["experts"], seed=6))[1]
    abstract = abstract_on_mesh(model, mesh, weights=weights)
    placed = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), floats, abstract)
    placed = converted(placed, converter(model, weights))
    gate_up = placed["params"]["periods"]["layer_0"]["moe"]["gate_up"]
    assert gate_up.values.sharding.shard_shape(gate_up.values.shape)[1] == 2
    found = full_logits(model, placed, TOKENS, mesh=mesh)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_what_can_not_be_is_said():
    with pytest.raises(UserError, match="weights=int3 must be one of float32, bfloat16, fp8, int8"):
        check_format("int3")
    with pytest.raises(UserError, match=r"weights=int4 can't be split over the mesh axis 'tensor'"):
        check_format("int4", make_mesh(1, 1, 2))
    _, variables = in_format(CONFIGS["dense"], "int8")
    other = Transformer(dataclasses.replace(CONFIGS["dense"], d_model=128))
    with pytest.raises(ValueError, match=r"can't be a QTensor of shape"):
        full_logits(other, variables, TOKENS)
