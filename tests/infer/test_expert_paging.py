"""Models of which a share of the experts is resident: texts to the bit, and what was brought."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec, ModelConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, MoEConfig
from configs.models import delta_nano
from infer.expert_paging import PagedModel, load_paged, page
from infer.expert_store import Paging
from infer.generate import generate
from infer.load import inference_execution
from infer.paged_generation import generate_paged
from infer.paging_report import compare_policies, table_of
from infer.sampling import Sampling
from infer.sources import open_source
from infer.weights import converted, converter
from model.transformer import Transformer, abstract_variables
from model.unstacked import unstacked_config
from tests import tiny
from tests.checkpoint.cases import write_case

PROMPT = [(7 * i * i + 3) % 300 for i in range(37)]


def drawn(config: ModelConfig):
    """A model with all its layers once, and weights of unit gain."""
    model = Transformer(unstacked_config(config), inference_execution())
    rng = np.random.default_rng(0)

    def leaf(path, x):
        if "scale" in jax.tree_util.keystr(path):
            return jnp.ones(x.shape, x.dtype)
        return jnp.asarray(rng.normal(size=x.shape) * x.shape[-2] ** -0.5, x.dtype)

    abstract, _ = abstract_variables(model)
    params = jax.tree_util.tree_map_with_path(leaf, abstract["params"])
    return model, {"params": params, "router_state": {}}


@pytest.fixture(scope="module")
def made():
    """Two windowed MoE layers, each before a dense one, and a MoE prefix's router bias."""
    return drawn(tiny.model(num_layers=4, context_length=96))


def text_of(paged: PagedModel, count: int = 20, **options) -> list[int]:
    return generate_paged(paged, PROMPT, max_new_tokens=count, **options).tokens[0]


@pytest.fixture(scope="module")
def resident(made):
    paged = page(*made, Paging(1.0, has_forecast=False))
    return text_of(paged), logits_of(paged)


def logits_of(paged: PagedModel) -> np.ndarray:
    state, rows = paged.new_state(48), []
    for begin in range(0, 32, paged.width):
        logits, state = paged.read(PROMPT[begin : begin + paged.width], begin, state)
        rows.append(np.asarray(logits))
    for place in range(32, 37):
        logits, state = paged.read([PROMPT[place]], place, state)
        rows.append(np.asarray(logits))
    return np.concatenate(rows)


def test_the_text_is_that_of_the_engine(made, resident):
    expected = generate(*made, [PROMPT], max_new_tokens=20).tokens[0]
    assert resident[0] == expected


@pytest.mark.parametrize(
    "paging",
    [
        Paging(0.25),
        Paging(0.25, has_forecast=False),
        pytest.param(Paging(0.5, policy="lru"), marks=pytest.mark.slow),
        pytest.param(Paging(0.625), marks=pytest.mark.slow),
    ],
    ids=lambda p: f"{p.share}-{p.policy}-{p.has_forecast}",
)
def test_the_bits_do_not_depend_on_what_is_resident(made, resident, paging):
    paged = page(*made, paging)
    text, logits = resident
    np.testing.assert_array_equal(logits_of(paged), logits)
    assert text_of(paged) == text
    counts, least = paged.counts(), paged.belady()
    assert counts.requests == least.requests > 0
    assert counts.hit_rate <= least.hit_rate
    assert counts.on_demand > 0
    assert (paged.accuracy() is None) == (not paging.has_forecast)
    assert (counts.ahead > 0) == paging.has_forecast
    for layer in paged.layers:
        if layer.table is not None:
            held = jax.tree.leaves(layer.variables["params"]["moe"]["gate_up"])[0]
            assert len(held) == layer.table.num_slots == round(8 * paging.share)


@pytest.mark.slow
def test_recurrent_layers_are_read_token_by_token():
    """Their prompts, too: they read whole blocks, which a cut would not leave."""
    model, variables = drawn(delta_nano())
    whole, paged = page(model, variables, Paging(1.0)), page(model, variables, Paging(0.25))
    assert paged.width == 1
    np.testing.assert_array_equal(logits_of(paged), logits_of(whole))
    assert paged.counts().on_demand > whole.counts().on_demand


def test_sampled_texts_are_the_same_too(made):
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=5, repetition_penalty=1.2)
    whole = text_of(page(*made, Paging(1.0)), sampling=sampling)
    assert text_of(page(*made, Paging(0.25)), sampling=sampling) == whole
    assert whole == generate(*made, [PROMPT], max_new_tokens=20, sampling=sampling).tokens[0]


@pytest.fixture(scope="module")
def wide():
    """Wide enough for few bits."""
    pattern = (LayerSpec(attention=tiny.attention(), ffn=tiny.moe(d_ff=64)),)
    return drawn(tiny.model(pattern=pattern, d_model=128, context_length=96))


@pytest.mark.parametrize("format", ["int8", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_experts_of_few_bits_lie_in_files(wide, format, tmp_path):
    model, variables = wide
    held = converted(copied(variables), converter(model, format))
    whole = page(model, held, Paging(1.0))
    paged = page(model, held, Paging(0.25, directory=tmp_path))
    np.testing.assert_array_equal(logits_of(paged), logits_of(whole))
    parts = (0, 1) if format == "int8" else (0,)  # values and scales
    names = [f"layer_{i}.{n}.{p}" for i in (0, 1) for n in ("gate_up", "down") for p in parts]
    assert sorted(path.name for path in tmp_path.glob("layer_*")) == sorted(names)
    size = sum(path.stat().st_size for path in tmp_path.glob("layer_*"))
    experts = {k: x for i in (0, 1) for k, x in moe_of(held, i).items() if k in ("gate_up", "down")}
    assert size == 2 * sum(x.nbytes for x in jax.tree.leaves(experts))


def copied(tree):
    return {k: copied(x) for k, x in tree.items()} if isinstance(tree, dict) else tree


def moe_of(variables, i: int):
    return variables["params"]["periods"][f"layer_{i}"]["moe"]


def test_a_wrong_slot_is_noticed(made, resident):
    """What the equality above would miss if slots meant nothing."""
    paged = page(*made, Paging(0.25, has_forecast=False))
    layer = next(layer for layer in paged.layers if layer.table)
    bring = layer.bring
    layer.bring = lambda pairs: bring([((e + 1) % 8, slot) for e, slot in pairs])  # type: ignore
    assert not np.array_equal(logits_of(paged), resident[1])


def test_what_can_not_be_paged_is_refused(made):
    model, variables = made
    with pytest.raises(UserError, match="must be a share above 0"):
        Paging(0.0)
    with pytest.raises(UserError, match=r"are 1, and a token goes to 2: give 0\.25 or more"):
        page(model, variables, Paging(0.1))
    dense = dataclasses.replace(
        tiny.model(), pattern=(LayerSpec(attention=tiny.attention(), ffn=DenseConfig(d_ff=32)),)
    )
    with pytest.raises(UserError, match="no experts to page"):
        page(dataclasses.replace(model, config=dense), variables, Paging(0.5))
    paged = page(model, variables, Paging(0.25))
    for prompt, count, sentence in (
        ([], 1, "the prompt is empty"),
        ([300], 1, "outside"),
        ([1], 96, "context_length=96"),
    ):
        with pytest.raises(UserError, match=sentence):
            generate_paged(paged, prompt, max_new_tokens=count)


def test_policies_are_compared_on_what_was_recorded(made):
    """The cache that a model had is the one that is simulated."""
    recorder = page(*made, Paging(1.0))
    recorder.width = 1
    text = text_of(recorder)
    found = {(x.policy, x.share): x for x in compare_policies(recorder, [0.25, 0.5])}
    real = page(*made, Paging(0.25))
    real.width = 1
    assert text_of(real) == text
    assert found["lfu, forecast", 0.25].counts == real.counts()
    assert found["Belady", 0.25].counts == real.belady()
    for share in (0.25, 0.5):
        for policy in ("lru", "lfu", "lru, forecast", "lfu, forecast"):
            counts = found[policy, share].counts
            assert counts.hit_rate <= found["Belady", share].counts.hit_rate
            assert counts.ready_rate >= counts.hit_rate
    assert found["lru, forecast", 0.25].accuracy == real.accuracy()
    assert "Belady" in str(table_of(list(found.values()), "tiny").columns[1]._cells)
    with pytest.raises(UserError, match="no routing was recorded"):
        compare_policies(page(*made, Paging(1.0)), [0.5])


@pytest.mark.parametrize(
    "case",
    [
        "mixtral",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "deepseek_v3",
                "gpt_oss",
                "glm4_moe_biased",
                "deepseek_v32",
                "nemotron_h_latent",
            )
        ),
    ],
)
def test_public_models_keep_their_logits(case, tmp_path):
    """Those that transformers computed, to the tolerance of tests/checkpoint/test_parity.py; from a
    checkpoint whose experts go into files as they are read."""
    tokens, expected = write_case(case, tmp_path)
    source = open_source(str(tmp_path))
    share = least_share(source.config)
    paged = load_paged(source, Paging(share, directory=tmp_path / "experts"))
    state, length = paged.new_state(len(tokens)), len(tokens) - 3
    rows = []
    for begin in range(0, length, paged.width):
        piece = tokens[begin : min(begin + paged.width, length)].tolist()
        logits, state = paged.read(piece, begin, state)
        rows.append((begin + len(piece) - 1, logits))
    for place in range(length, len(tokens)):
        logits, state = paged.read([int(tokens[place])], place, state)
        rows.append((place, logits))
    for place, logits in rows:
        np.testing.assert_allclose(logits[0], expected[place], atol=1e-4)
    assert paged.counts().on_demand > 0
    assert list((tmp_path / "experts").glob("layer_*.down.0"))


def least_share(config: ModelConfig) -> float:
    kinds = [spec.ffn for spec in config.pattern if isinstance(spec.ffn, MoEConfig)]
    return max(ffn.router.top_k / ffn.num_experts for ffn in kinds)
