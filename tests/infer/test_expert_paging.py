"""Models of which a share of the experts is resident: texts to the bit, and what was brought."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from configs.architecture import LayerSpec, ModelConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig, MoEConfig
from configs.models import delta_nano
from infer import steps
from infer.engine import Engine, EngineOptions, Request
from infer.engine.paged import PagedPrograms
from infer.expert_cache import PagingCounts
from infer.expert_paging import PagedModel, load_paged, page
from infer.expert_store import Paging
from infer.generate import generate
from infer.load import inference_execution
from infer.mtp_draft import MtpDraft
from infer.ngram_draft import NgramDraft
from infer.paging_report import compare_policies, record, table_of
from infer.sampling import Sampling
from infer.self_speculative import Draft
from infer.sources import open_source
from infer.steps import StateSize
from infer.weights import converted, converter
from model.transformer import Transformer, abstract_variables
from model.unstacked import unstacked_config
from parallel.mesh import make_mesh
from tests import tiny
from tests.checkpoint.cases import write_case
from tests.infer.server.kinds import CONFIGS, run

PROMPT = [(7 * i * i + 3) % 300 for i in range(37)]


def drawn(config: ModelConfig):
    """A model with all its layers once, and weights of unit gain."""
    model = Transformer(unstacked_config(config), inference_execution())
    rng = np.random.default_rng(0)

    def leaf(path, x):
        if "scale" in jax.tree_util.keystr(path):
            return np.ones(x.shape, x.dtype)
        return (rng.normal(size=x.shape) * x.shape[-2] ** -0.5).astype(x.dtype)

    abstract, _ = abstract_variables(model)
    params = jax.device_put(jax.tree_util.tree_map_with_path(leaf, abstract["params"]))
    return model, {"params": params, "router_state": {}}


@pytest.fixture(scope="module")
def made():
    """Two windowed MoE layers, each before a dense one, and a MoE prefix's router bias."""
    return drawn(tiny.model(num_layers=4, context_length=96))


def texts_of(paged: PagedModel, prompts=(PROMPT,), count: int = 20, **options) -> list[list[int]]:
    programs = PagedPrograms(paged)
    given = (programs.model, programs.variables, prompts)
    return generate(*given, max_new_tokens=count, programs=programs, **options).tokens


def text_of(paged: PagedModel, **options) -> list[int]:
    return texts_of(paged, **options)[0]


@pytest.fixture(scope="module")
def resident(made):
    paged = page(*made, Paging(1.0, has_forecast=False))
    return text_of(paged), logits_of(paged)


def logits_of(paged: PagedModel, **how) -> np.ndarray:
    return np.concatenate([logits_1V for _, logits_1V in read(paged, PROMPT, **how)])


def read(paged: PagedModel, tokens, width: int = 16, single: int = 5) -> list[tuple[int, Any]]:
    """Places and their logits [1, V]: of each piece's last token, and of the last ones, which are
    read one by one."""
    model, programs, rows = paged.model, PagedPrograms(paged), []
    size = StateSize(1, len(tokens), model.execution.compute_dtype, width - 1)
    state, last = steps.empty_state(model, size), len(tokens) - single
    for begin in range(0, last, width):
        count = min(width, last - begin)
        token_BL, position_BL = np.zeros((1, width), np.int32), np.full((1, width), -1, np.int32)
        token_BL[0, :count] = tokens[begin : begin + count]
        position_BL[0, :count] = np.arange(begin, begin + count)
        places = (np.zeros(1, np.int32), np.array([begin == 0]))
        given = (token_BL, position_BL, *places, state, None, None)
        _, hidden_RD, state, _ = programs.read_rows(size, *given)
        last_1V = steps.logits_of(model, programs.variables, hidden_RD)
        rows.append((begin + count - 1, last_1V))
    for place in range(last, len(tokens)):
        at = np.array([tokens[place]], np.int32), np.array([place], np.int32)
        logits_1V, state, _ = programs.decode(*at, state, None, None)
        rows.append((place, logits_1V))
    return rows


def test_the_text_is_that_of_the_engine(made, resident):
    expected = generate(*made, [PROMPT], max_new_tokens=20).tokens[0]
    assert resident[0] == expected


@pytest.mark.parametrize(
    "paging",
    [
        Paging(0.25, records=True),
        Paging(0.25, has_forecast=False, records=True),
        pytest.param(Paging(0.5, policy="lru", records=True), marks=pytest.mark.slow),
        pytest.param(Paging(0.625, records=True), marks=pytest.mark.slow),
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
    assert (counts.accuracy is None) == (not paging.has_forecast)
    assert (counts.ahead > 0) == paging.has_forecast
    for layer in paged.layers:
        if layer.table is not None:
            held = jax.tree.leaves(layer.variables["params"]["moe"]["gate_up"])[0]
            assert len(held) == layer.table.num_slots == round(8 * paging.share)


@pytest.mark.slow
def test_recurrent_layers_begin_again_as_they_were():
    """What they have written can't be written again."""
    model, variables = drawn(delta_nano())
    whole, paged = page(model, variables, Paging(1.0)), page(model, variables, Paging(0.25))
    np.testing.assert_array_equal(logits_of(paged, width=64), logits_of(whole, width=64))
    assert paged.counts().on_demand > whole.counts().on_demand


def test_sampled_texts_are_the_same_too(made):
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=5, repetition_penalty=1.2)
    whole = text_of(page(*made, Paging(1.0)), sampling=sampling)
    assert text_of(page(*made, Paging(0.25)), sampling=sampling) == whole
    assert whole == generate(*made, [PROMPT], max_new_tokens=20, sampling=sampling).tokens[0]


PROMPTS = [PROMPT, [5], PROMPT[9:12], PROMPT[20:], PROMPT[3:24]]
HOT = [Sampling(), *(Sampling(0.9, top_p=0.9, seed=i, presence_penalty=0.5) for i in range(4))]
TOGETHER: dict[str, Any] = {"sampling": HOT, "rows": 3, "piece": 16}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("windowed", {}),
        ("windowed", {"num_pages": 9, "draft": NgramDraft()}),
        pytest.param("latent", {"num_pages": 9}, marks=pytest.mark.slow),
        pytest.param("recurrent", {"num_pages": 9}, marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x) or "rows",
)
def test_several_texts_at_once(made, kind, more):
    """Each is what it is where all experts are in one program, greedy or drawn, in rows or pages,
    with drafts or without."""
    model, variables = made
    if kind != "windowed":
        model, variables = drawn(dataclasses.replace(CONFIGS[kind](), vocab_size=300))
    expected = generate(model, variables, PROMPTS, max_new_tokens=10, **TOGETHER).tokens
    paged = page(model, variables, Paging(0.25))
    assert texts_of(paged, PROMPTS, 10, **TOGETHER, **more) == expected
    counts = paged.counts()
    assert 0 < counts.on_demand < counts.requests


def test_preferences_and_told_experts(made):
    """What a request would rather have, and the experts of each token: those of the whole model."""
    model, variables = made
    wanted = np.zeros((1, 1, 8), np.float32)
    wanted[..., 2] = 9.0
    options = EngineOptions(max_rows=2, max_length=48, piece=16, keeps_experts=True)
    asked = [
        Request(PROMPT[:5], 4, wants_experts=True),
        Request(PROMPT[:20], 4, wants_experts=True, preference={"layer_0": wanted}),
    ]
    paged = PagedPrograms(page(model, variables, Paging(0.25)))
    given = (paged.model, paged.variables, options)
    whole, own = run(Engine(*made, options), asked), run(Engine(*given, programs=paged), asked)
    for a, b in zip(whole, own, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_array_equal(a.experts_TNK, b.experts_TNK)
    assert (own[1].experts_TNK[:, 0] == 2).any(axis=1).all()
    assert not (own[0].experts_TNK[:, 0] == 2).any(axis=1).all()


def test_nothing_is_compiled_once_it_is_warm(made):
    model, variables = made
    variables = jax.device_put(copied(variables), jax.devices()[0])
    programs, compiled = PagedPrograms(page(model, variables, Paging(0.25))), []
    options = EngineOptions(max_rows=3, max_length=48, max_prompt=37, piece=16)
    engine = Engine(programs.model, programs.variables, options, programs=programs)
    engine.warm_up()
    assert engine.stats().paging == PagingCounts()  # nothing was asked for

    def listen(event, seconds, **_):
        if "compile" in event:
            compiled.append((event, seconds))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(engine, [Request(p, 8, sampling=s) for p, s in zip(PROMPTS, HOT, strict=True)])
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert programs.paged.reruns > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"exit_threshold": 0.5}, "leaves a program of all layers"),
        ({"draft": Draft(exit=1)}, "draft=Draft runs layers of the model by themselves"),
        ({"draft": MtpDraft()}, "draft=MtpDraft runs layers of the model by themselves"),
        ({"mesh": make_mesh(expert=1)}, "on one device, and there is a mesh"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_engines_that_can_not_page(made, options, sentence):
    programs = PagedPrograms(page(*made, Paging(0.25)))
    mesh = {"mesh": options.pop("mesh")} if "mesh" in options else {}
    given = (programs.model, programs.variables, EngineOptions(**options))
    with pytest.raises(UserError, match=sentence):
        Engine(*given, programs=programs, **mesh)


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
    layer.bring = lambda pairs: bring([((e + 1) % 8, slot) for e, slot in pairs])
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
        ([1], 0, "max_new_tokens=0 must be at least 1"),
        ([1], 96, "context_length=96"),
    ):
        with pytest.raises(UserError, match=sentence):
            record(paged, prompt, count)


def test_policies_are_compared_on_what_was_recorded(made):
    """The cache that a model had is the one that is simulated."""
    recorder = page(*made, Paging(1.0, records=True))
    text = record(recorder, PROMPT, 20)
    assert text == generate(*made, [PROMPT], max_new_tokens=20).tokens[0]
    found = {(x.policy, x.share): x for x in compare_policies(recorder, [0.25, 0.5])}
    real = page(*made, Paging(0.25, records=True))
    assert record(real, PROMPT, 20) == text
    assert found["lfu, forecast", 0.25].counts == real.counts()
    assert found["Belady", 0.25].counts == real.belady()
    for share in (0.25, 0.5):
        for policy in ("lru", "lfu", "lru, forecast", "lfu, forecast"):
            counts = found[policy, share].counts
            assert counts.hit_rate <= found["Belady", share].counts.hit_rate
            assert counts.ready_rate >= counts.hit_rate
    assert 0 < (found["lru, forecast", 0.25].counts.accuracy or 0) < 1
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
    for place, logits_1V in read(paged, tokens, single=3):
        np.testing.assert_allclose(logits_1V[0], expected[place], atol=1e-4)
    assert paged.counts().on_demand > 0
    assert list((tmp_path / "experts").glob("layer_*.down.0"))


def least_share(config: ModelConfig) -> float:
    kinds = [spec.ffn for spec in config.pattern if isinstance(spec.ffn, MoEConfig)]
    return max(ffn.router.top_k / ffn.num_experts for ffn in kinds)
