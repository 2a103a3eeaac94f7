"""The engine: a request's text is the same alone or among others, however its prompt is read."""

import jax
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.attention import LatentAttentionConfig
from configs.checks import UserError
from configs.feed_forward import ContextConfig, DenseConfig, RouterConfig
from infer.engine import Engine, EngineOptions, Request
from infer.generate import generate
from infer.sampling import Sampling
from model.transformer import Transformer
from tests import tiny
from tests.probes import drawn

CONTEXT = tiny.moe(
    router=RouterConfig(top_k=2, context=ContextConfig(kind="causal", window_size=9))
)
LATENT = LatentAttentionConfig(
    num_heads=2,
    query_rank=None,
    latent_rank=8,
    nope_head_dim=8,
    rope_head_dim=4,
    value_head_dim=6,
)
CONFIG = tiny.model(
    prefix=(LayerSpec(attention=LATENT, ffn=DenseConfig(d_ff=16)),),
    pattern=(
        LayerSpec(attention=tiny.attention(window_size=7), ffn=tiny.moe()),
        LayerSpec(attention=tiny.attention(window_size=None, num_sink_tokens=0), ffn=CONTEXT),
    ),
    num_layers=3,
)
MODEL, VARIABLES = Transformer(CONFIG), drawn(CONFIG, seed=3)
PROMPTS = [[0, 5, 17, 200], [0, 3], [0, *range(100, 125)], [0, 9, 9, 8], [0, *range(40, 60)]]
HOT = [Sampling(1.0, top_p=0.9, seed=i) for i in range(5)]
SHORT = [PROMPTS[i] for i in (0, 1, 3)]
"""Prompts that fit into one piece."""
NEW = 14
ROWS = 2
"""With as many rows and tokens to a piece, the tests share their programs."""


def run(prompts, sampling, **options):
    options = {"rows": ROWS} | options
    return generate(MODEL, VARIABLES, prompts, max_new_tokens=NEW, sampling=sampling, **options)


@pytest.fixture(scope="module")
def together():
    return run(PROMPTS, HOT, piece=16).tokens


@pytest.mark.parametrize("chosen", [0, 2, 4])
def test_a_text_is_the_same_alone_and_among_others_bit_for_bit(together, chosen):
    """Experts, windows, a context router and latents in it; a row idle; rows taken over from
    requests that ended."""
    alone = run(PROMPTS[chosen : chosen + 1], HOT[chosen], piece=16).tokens
    assert alone[0] == together[chosen]


def test_the_order_of_requests_changes_nothing(together):
    order = [3, 0, 4, 2, 1]
    made = run([PROMPTS[i] for i in order], [HOT[i] for i in order], piece=16).tokens
    assert made == [together[i] for i in order]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_pages": 9}, marks=pytest.mark.slow),
        {"num_pages": 3, "piece": 16},
        pytest.param({"piece": 512}, marks=pytest.mark.slow),
    ],
)
def test_pages_and_pieces_give_the_same_text(options):
    greedy = run(PROMPTS, Sampling(), piece=16).tokens
    assert run(PROMPTS, Sampling(), **options).tokens == greedy


@pytest.mark.slow  # what a step reads of them is held to a bound in tests/model/test_layer_state.py
def test_int8_keys_stay_near(together):
    """Greedy texts of random models part soon; the first tokens agree."""
    exact = run(PROMPTS, Sampling(), piece=16).tokens
    rounded = run(PROMPTS, Sampling(), piece=16, kv_dtype="int8").tokens
    same = [a == b for x, y in zip(exact, rounded, strict=True) for a, b in zip(x, y, strict=True)]
    assert np.mean(same) > 0.5


def test_requests_come_and_go():
    """One that arrives while others are under way is answered as it would be alone."""
    options = EngineOptions(max_rows=ROWS, max_length=64, piece=16)
    engine = Engine(MODEL, VARIABLES, options)
    texts: dict[int, list[int]] = {}

    def steps(count):
        for _ in range(count):
            for emitted in engine.step():
                texts.setdefault(emitted.request, []).extend(emitted.tokens)

    first = engine.add(Request(PROMPTS[0], 12))
    steps(3)
    later = [engine.add(Request(PROMPTS[i], 6)) for i in (2, 1)]
    while engine.has_work():
        steps(1)
    assert [first, *later] == [0, 1, 2]
    for number, prompt, new in ((0, 0, 12), (1, 2, 6), (2, 1, 6)):
        alone = Engine(MODEL, VARIABLES, options)
        alone.add(Request(PROMPTS[prompt], new))
        text = []
        while alone.has_work():
            text += [t for e in alone.step() for t in e.tokens]
        assert texts[number] == text


def test_static_batches_wait_for_their_longest_text():
    """A row that is free stays so until all are; the texts are the same."""
    options = EngineOptions(max_rows=ROWS, max_length=64, piece=16, batching="static")
    engine, texts, running = Engine(MODEL, VARIABLES, options), {}, []
    for i, new in ((1, 2), (0, 6), (3, 6)):
        engine.add(Request(PROMPTS[i], new))
    while engine.has_work():
        for emitted in engine.step():
            texts.setdefault(emitted.request, []).extend(emitted.tokens)
        running.append((engine.stats().running, engine.stats().waiting))
    assert running == [(1, 1)] * 4 + [(0, 1)] + [(1, 0)] * 4 + [(0, 0)]
    greedy = run([PROMPTS[i] for i in (1, 0, 3)], Sampling(), piece=16).tokens
    assert [texts[i] for i in range(3)] == [greedy[0][:2], greedy[1][:6], greedy[2][:6]]
    with pytest.raises(UserError, match="batching=eager must be continuous or static"):
        EngineOptions(batching="eager")


def test_a_long_prompt_leaves_others_their_turns():
    """A step reads `piece` tokens of prompts at most, and every other row gets its token."""
    engine = Engine(MODEL, VARIABLES, EngineOptions(max_rows=ROWS, max_length=64, piece=16))
    engine.add(Request(PROMPTS[1], 20))
    engine.step()
    engine.add(Request([0] * 40, 2))
    given = [sorted(e.request for e in engine.step()) for _ in range(3)]
    assert given == [[0], [0], [0, 1, 1]]


def test_stopped_by_what_the_text_says():
    whole = run(PROMPTS[:1], Sampling()).tokens[0]
    made = run(PROMPTS[:1], Sampling(), is_stopped=lambda text: text[-2:] == whole[3:5]).tokens[0]
    assert made == whole[:5]


def test_preferences_belong_to_their_requests():
    wanted = {"layer_0": np.zeros((1, 2, 8), np.float32)}
    wanted["layer_0"][0, 1, 3] = 50.0
    prompts = [PROMPTS[0], PROMPTS[0]]
    plain = run(prompts[:1], Sampling()).tokens[0]
    made = run(prompts, Sampling(), preference=wanted).tokens
    assert made[0] == plain != made[1]


@pytest.mark.parametrize(
    ("options", "request_of", "sentence"),
    [
        ({"max_rows": 0}, {}, "max_rows=0 must be greater than 0"),
        ({"kv_dtype": "int3"}, {}, "kv=int3 must be float32, bfloat16 or int8"),
        ({"num_pages": 1}, {}, "num_pages=1 must be at least 2"),
        (
            {"num_pages": 2, "page_size": 8},
            {"max_new_tokens": 7},
            "exceed the 2 pages of 8 .*: 2 are",
        ),
        ({"max_length": 8}, {"max_new_tokens": 7}, "2 tokens and 7 new ones exceed the engine's"),
        ({}, {"sampling": Sampling(logit_bias={300: 1.0})}, "logit_bias names token 300"),
    ],
)
def test_what_can_not_be_served_is_refused(options, request_of, sentence):
    def ask():
        engine = Engine(MODEL, VARIABLES, EngineOptions(**{"max_length": 64} | options))
        engine.add(Request(**{"prompt": PROMPTS[1], "max_new_tokens": 2} | request_of))

    with pytest.raises(UserError, match=sentence):
        ask()


@pytest.mark.parametrize(("data", "expert", "tensor"), [(1, 4, 1), (1, 2, 2), (2, 2, 1)])
@pytest.mark.thinned(2)
def test_a_mesh_generates_what_one_device_does(data, expert, tensor):
    from infer.load import abstract_on_mesh
    from parallel.mesh import make_mesh

    mesh = make_mesh(data, expert, tensor)
    abstract = abstract_on_mesh(MODEL, mesh)
    variables = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), VARIABLES, abstract)
    made = generate(MODEL, variables, SHORT, max_new_tokens=NEW, rows=ROWS, mesh=mesh)
    assert made.tokens == run(SHORT, Sampling()).tokens


def test_pages_for_layers_that_have_none_are_refused():
    model = Transformer(tiny.memory_model())
    with pytest.raises(UserError, match="can't lie in pages: relative attention"):
        Engine(model, drawn(model.config), EngineOptions(max_length=16, num_pages=4))
