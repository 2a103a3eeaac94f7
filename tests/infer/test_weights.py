"""Weights in few bits: the model computes what the rounded weights say, in every kind of layer."""

import dataclasses
import functools

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
from configs.per_layer_embeddings import PerLayerEmbeddingConfig
from configs.recurrent_attention import GatedDeltaConfig, ShortConvConfig
from infer.generate import generate
from infer.load import abstract_on_mesh
from infer.logits import full_logits
from infer.weights import check_format, converted, converter, formats_of, num_bytes
from kernels import native
from kernels.quantize import QTensor, dequantize
from model import layers
from model.transformer import Transformer
from model.unstacked import unstack
from parallel.mesh import make_mesh
from tests import tiny
from tests.exact_rows import exact_rows, own_programs, wrap_products
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
DELTA = GatedDeltaConfig(
    num_heads=4, key_head_dim=32, value_head_dim=32, decay="channel", gate_rank=64
)
CONTEXT = tiny.moe(
    d_ff=64, router=RouterConfig(top_k=2, context=ContextConfig(kind="causal", window_size=9))
)


INPUTS = RouterConfig(top_k=2, scores="sigmoid", normalize_gates=False, gates_on="inputs")


def of(*specs, **changes):
    changes = {"d_model": 64, "vocab_size": 320, "num_layers": 2 * len(specs)} | changes
    return tiny.model(pattern=specs, **changes)


CONFIGS = {
    "dense": of(LayerSpec(attention=GLOBAL, ffn=DenseConfig(d_ff=96)), tie_embeddings=True),
    "experts": of(
        LayerSpec(attention=tiny.attention(**WIDE), ffn=MOE),
        LayerSpec(attention=LATENT, ffn=CONTEXT),
        LayerSpec(attention=dataclasses.replace(LATENT, shares_indexer=True), ffn=MOE),
        num_layers=3,
    ),
    "gpt-oss": of(
        LayerSpec(
            attention=tiny.attention(**WIDE, bias=True, sink_logits=True, num_sink_tokens=0),
            ffn=dataclasses.replace(MOE, bias=True, num_shared_experts=0),
        )
    ),
    "switches": of(
        LayerSpec(
            attention=dataclasses.replace(
                GLOBAL, rotary_dim=16, qk_norm="head", qk_norm_after_rope=True, score_scale=0.2
            ),
            ffn=dataclasses.replace(MOE, shared_gate=True),
            norms="sandwich",
        ),
        LayerSpec(
            attention=dataclasses.replace(GLOBAL, rotary_dim=0, bias=True, output_bias=False),
            ffn=dataclasses.replace(MOE, shared_gate=True),
            norms="post",
        ),
        num_layers=2,
        embedding_scale=2.0,
        residual_scale=0.5,
        logit_scale=1.5,
    ),
    "gemma": of(
        LayerSpec(
            attention=dataclasses.replace(
                GLOBAL, qk_norm="head", value_norm=True, values_from_keys=True, score_cap=2.0
            ),
            ffn=dataclasses.replace(
                MOE,
                activation="geglu",
                router=RouterConfig(top_k=2, expert_scales=True, input_norm=True),
            ),
            norms="sandwich",
            dense=DenseConfig(d_ff=96, activation="geglu"),
            output_scale=True,
        ),
        LayerSpec(
            attention=dataclasses.replace(GLOBAL, chunk_size=9),
            ffn=dataclasses.replace(MOE, router=INPUTS),
        ),
        num_layers=2,
        logit_cap=2.0,
    ),
    "shared keys": of(
        LayerSpec(attention=GLOBAL, ffn=MOE),
        LayerSpec(attention=dataclasses.replace(GLOBAL, shares_keys=True), ffn=MOE),
        num_layers=2,
        per_layer_embeddings=PerLayerEmbeddingConfig(width=64),
    ),
    "sparse": of(LayerSpec(attention=SPARSE, ffn=DenseConfig(d_ff=96))),
    "relative": of(LayerSpec(attention=RELATIVE, ffn=DenseConfig(d_ff=96))),
    "delta": of(
        LayerSpec(attention=DELTA, ffn=DenseConfig(d_ff=96)),
        LayerSpec(attention=ShortConvConfig(channels=64), ffn=DenseConfig(d_ff=96)),
        LayerSpec(
            attention=dataclasses.replace(GLOBAL, output_gate=True), ffn=DenseConfig(d_ff=96)
        ),
        num_layers=3,
    ),
}
TOKENS = np.random.RandomState(0).randint(0, 320, 24).tolist()


@functools.cache
def exact_model(config):
    """The model, apart, and its variables as they were drawn."""
    return unstack(Transformer(config), drawn(config, seed=6))


def in_format(config, weights):
    """The model, apart, and its variables in the format."""
    model, variables = exact_model(config)
    copies = jax.tree.map(lambda x: x, variables)
    return model, converted(copies, converter(model, weights))


__all__ = ["exact_rows"]  # a fixture


def is_quantised(x) -> bool:
    return isinstance(x, QTensor)


@jax.jit
def with_floats(variables):
    """The floats that the few bits stand for."""
    return jax.tree.map(
        lambda x: dequantize(x) if is_quantised(x) else x, variables, is_leaf=is_quantised
    )


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        *((name, weights) for name in CONFIGS for weights in ("int8", "int4")),
        ("experts", "fp8"),
        *((name, "int4_affine") for name in ("dense", "experts", "gpt-oss")),
    ],
)
@pytest.mark.thinned(4)
@pytest.mark.usefixtures("exact_rows")
def test_the_model_is_that_of_the_rounded_weights(name, weights):
    """Against the same program on the floats that the few bits stand for; and they were rounded."""
    model, variables = in_format(CONFIGS[name], weights)
    held = jax.tree.leaves(variables, is_leaf=is_quantised)
    assert sum(map(is_quantised, held)) >= 5 * len(model.config.pattern) // 2
    expected = full_logits(model, with_floats(variables), TOKENS)
    # Float32 sums in another order, and x held to 2^-23 of its block's largest.
    np.testing.assert_allclose(full_logits(model, variables, TOKENS), expected, atol=2e-5)
    _, exact = exact_model(CONFIGS[name])
    # Thirty times the tolerance above: int8 of gpt-oss, the least, differs by 1.2e-3.
    assert np.abs(full_logits(model, exact, TOKENS) - expected).max() > 6e-4


def in_float32(variables):
    return jax.tree.map(lambda x: x.astype("float32") if x.dtype != "int32" else x, variables)


@pytest.mark.parametrize("name", ["dense", "experts", "gpt-oss"])
def test_bfloat16_weights_are_read_as_they_are_stored(name, exact_rows):
    """Against the same program on float32 copies of them: tied and own output layers, experts."""
    model, variables = in_format(CONFIGS[name], "bfloat16")
    floats = jax.jit(in_float32)(variables)
    expected = full_logits(model, floats, TOKENS)
    np.testing.assert_allclose(full_logits(model, variables, TOKENS), expected, atol=2e-5)
    text = jax.jit(functools.partial(layers.project, "BD,DF->BF")).lower(
        jax.ShapeDtypeStruct((2, 64), "float32"), jax.ShapeDtypeStruct((64, 96), "bfloat16")
    )
    assert ("moesaic_bfloat16_matmul" in text.as_text()) == native.is_available()


# --- Rows in 8 bits ------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch):
    """(name, arguments, result) of each product with a QTensor that is run, in numpy."""
    seen = []

    def wrap(multiply):
        def call(x, weight, *others, **options):
            y = multiply(x, weight, *others, **options)
            if is_quantised(weight):
                text = [other for other in others if isinstance(other, str)]
                arrays = [other for other in others if not isinstance(other, str)]
                jax.debug.callback(
                    lambda *values: seen.append((multiply.__name__, *text, *values)),
                    *(x, weight, *arrays, y),
                )
            return y

        return call

    wrap_products(monkeypatch, wrap, own_programs())
    return seen


STEPS = {"int4": 127, "int8": 32767}
"""Of x that meets weights of the format, up to a block's largest magnitude."""


def rounded(x_RK, block: int, steps: int = STEPS["int4"]):
    """Each block of inputs in so many whole steps of its largest magnitude, float64."""
    blocks = np.asarray(x_RK, np.float64).reshape(len(x_RK), -1, block)
    step = np.abs(blocks).max(-1, keepdims=True) / steps
    return (np.rint(blocks / np.where(step > 0, step, 1)) * step).reshape(x_RK.shape)


def oracle(name, *arguments):
    """The same product in float64, of rows in 8 bits where weights are int4, in 16 where int8."""
    if name == "matmul":
        equation, x, weight = arguments
        x_RK = np.asarray(x, np.float64).reshape(-1, weight.matrix_shape[0])
        x_RK = rounded(x_RK, weight.block_size, STEPS[weight.format])
        return np.einsum(equation, x_RK.reshape(x.shape), np.asarray(dequantize(weight)))
    x_RK, weight, sizes_E = arguments
    x_RK, w = rounded(x_RK, weight.block_size), np.asarray(dequantize(weight), np.float64)
    w_EKN = w.reshape(*w.shape[:2], -1)
    experts_R = np.repeat(np.arange(len(sizes_E)), sizes_E)
    y_RN = np.einsum("rk,rkn->rn", x_RK[: len(experts_R)], w_EKN[experts_R])
    if name == "grouped_swiglu":
        gate, up = np.split(y_RN, 2, axis=1)
        return gate / (1 + np.exp(-gate)) * up
    return y_RN


needs_native = pytest.mark.skipif(not native.is_available(), reason="XLA takes rows as they are")


@needs_native
@pytest.mark.slow
def test_few_rows_that_meet_int4_are_rounded_to_8_bits(products):
    """Each product of a pass beside numpy's. Of eight tokens: many rows are multiplied in bfloat16
    where the processor can, which tests/kernels holds to its bound.
    """
    model, variables = in_format(CONFIGS["experts"], "int4")
    full_logits(model, variables, TOKENS[:8])
    jax.effects_barrier()
    assert {name for name, *_ in products} == {"matmul", "grouped_matmul", "grouped_swiglu"}
    for *arguments, y in products:
        expected = oracle(*arguments)
        found = np.asarray(y).reshape(-1, y.shape[-1])[: expected.size // y.shape[-1]]
        expected = expected.reshape(found.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@needs_native
@pytest.mark.parametrize("length", [8, 24])
def test_rounding_rows_costs_little_beside_rounding_weights_to_int4(length):
    """A step of x is 1/127 of a block's largest, one of the weights 1/7: some 18 times as long."""
    model, variables = in_format(CONFIGS["dense"], "int4")
    _, exact = exact_model(CONFIGS["dense"])
    by_default, exact_rows, exact_weights = (
        full_logits(model, held, TOKENS[:length])
        for held in (variables, with_floats(variables), exact)
    )
    error = np.sqrt(np.mean(np.square(by_default - exact_rows)))
    assert 0 < error < np.sqrt(np.mean(np.square(exact_weights - exact_rows))) / 10


# --- Bytes, formats and meshes -------------------------------------------------------------------


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
@pytest.mark.thinned(2)
def test_generation_reads_them(weights):
    """The engine's steps, of one token and of pieces, give the full pass's best tokens."""
    model, variables = in_format(CONFIGS["experts"], weights)
    made = generate(model, variables, [TOKENS[:9]], max_new_tokens=5, piece=16).tokens[0]
    best = full_logits(model, variables, [*TOKENS[:9], *made]).argmax(-1)
    assert made == best[8:-1].tolist()


def on_mesh(config, weights, mesh):
    """The model's variables in the format, laid out as a source lays them out."""
    model, floats = exact_model(config)
    abstract = abstract_on_mesh(model, mesh, weights=weights)
    placed = jax.device_put(jax.device_get(floats), jax.tree.map(lambda a: a.sharding, abstract))
    return converted(placed, converter(model, weights))


@pytest.mark.usefixtures("exact_rows")
@pytest.mark.parametrize(
    ("name", "weights", "sizes"),
    [
        ("experts", "int4", (1, 4, 1)),
        ("experts", "int8", (1, 2, 2)),
        ("gpt-oss", "int4", (1, 1, 2)),
        ("experts", "int4_affine", (1, 2, 2)),
        ("dense", "fp8", (2, 1, 2)),
        ("relative", "int8", (1, 1, 4)),
        ("switches", "int8", (1, 4, 1)),
        ("shared keys", "int8", (1, 2, 2)),
    ],
)
@pytest.mark.thinned(3)
def test_a_mesh_equals_one_device(name, weights, sizes):
    """To 1e-5 of the largest logit: parts of a sum are added in another order. Rows that are
    rounded would be so otherwise: a device of the mesh has as many of them for fewer experts.
    """
    model, variables = in_format(CONFIGS[name], weights)
    expected = full_logits(model, variables, TOKENS)
    mesh = make_mesh(*sizes)
    found = full_logits(model, on_mesh(CONFIGS[name], weights, mesh), TOKENS, mesh=mesh)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_device_holds_its_part_of_few_bits():
    """Experts by expert and feed-forward width, heads by head; the embedding is whole."""
    mesh = make_mesh(1, 2, 2)
    params = on_mesh(CONFIGS["experts"], "int8", mesh)["params"]
    layer = params["periods"]["layer_0"]
    whole = in_format(CONFIGS["experts"], "int8")[1]["params"]
    assert own_share(params["embedding"]) == 1
    assert own_share(layer["attention"]["q"]) == own_share(layer["attention"]["o"]) == 1 / 2
    assert own_share(layer["moe"]["gate_up"]) == own_share(layer["moe"]["down"]) == 1 / 4
    total = layer["moe"]["down"].values
    assert total.size == whole["periods"]["layer_0"]["moe"]["down"].values.size


def own_share(weight) -> float:
    """Of a weight's stored values, how much each device has."""
    values = weight.values
    return np.prod(values.sharding.shard_shape(values.shape)) / values.size


def test_parts_are_of_a_mesh():
    mesh = make_mesh(1, 1, 2)
    model, _ = exact_model(CONFIGS["dense"])
    variables = on_mesh(CONFIGS["dense"], "int8", mesh)
    with pytest.raises(ValueError, match="a weight in 2 parts needs as many devices"):
        full_logits(model, variables, TOKENS)


def test_what_can_not_be_is_said():
    with pytest.raises(UserError, match="weights=int3 must be one of float32, bfloat16, fp8, int8"):
        check_format("int3")
    _, variables = in_format(CONFIGS["dense"], "int8")
    other = Transformer(dataclasses.replace(CONFIGS["dense"], d_model=128))
    with pytest.raises(ValueError, match=r"can't be a QTensor of shape"):
        full_logits(other, variables, TOKENS)
