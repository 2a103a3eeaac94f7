"""Drafting with the first layers against plain greedy decoding: the same text, in fewer steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec, MixtureOfDepthsConfig
from configs.attention import LocalSparseAttentionConfig
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from infer.generate import generate
from infer.sampling import Sampling
from infer.self_speculative import Draft, draft_and_verify
from model.model_state import init_state, rewind
from model.transformer import Transformer, hidden_states
from model.unstacked import unstack, unstacked_config
from tests import tiny
from tests.probes import drawn

LOCAL = tiny.attention(window_size=5, num_sink_tokens=2)
DENSE = DenseConfig(d_ff=16)
CONFIG = tiny.model(
    prefix=(LayerSpec(attention=tiny.attention(window_size=None, num_sink_tokens=0), ffn=DENSE),),
    pattern=(LayerSpec(attention=LOCAL, ffn=tiny.moe()),),
    num_layers=4,
    context_length=128,
)
MODEL = Transformer(CONFIG)
FLAT = Transformer(unstacked_config(CONFIG))
PROMPTS = [[0, 5, 17, 200, 31, 8, 2], [0, 3]]


@pytest.fixture(scope="module")
def variables():
    """Later layers add little, so that drafts are right at times and wrong at times."""
    made = drawn(CONFIG, seed=2)
    made["params"]["periods"] = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0.4 if path[-1].key in ("o", "down") else x, made["params"]["periods"]
    )
    return made


@pytest.mark.slow  # the fast one is below: a text of drafts that a stop token ends
@pytest.mark.parametrize("draft", [Draft(), Draft(exit=2, length=3), Draft(length=1)])
def test_the_text_is_the_whole_models(variables, draft):
    """Windows of 5 with drafts of 4: slots of a ring are written and taken back all the time."""
    expected = generate(MODEL, variables, PROMPTS, max_new_tokens=40)
    made = generate(MODEL, variables, PROMPTS, max_new_tokens=40, draft=draft)
    assert made.tokens == expected.tokens
    accepted = made.mean_accepted
    assert accepted is not None
    if draft.length == 1:
        assert accepted == 1
    else:
        assert 1 < accepted < draft.length, "drafts should be right at times and wrong at times"


@pytest.mark.slow
def test_an_unstacked_model_drafts_the_same(variables):
    expected = generate(MODEL, variables, PROMPTS, max_new_tokens=40, draft=Draft())
    made = generate(*unstack(MODEL, variables), PROMPTS, max_new_tokens=40, draft=Draft())
    assert (made.tokens, made.mean_accepted) == (expected.tokens, expected.mean_accepted)


def test_stop_tokens_end_a_row_in_mid_draft(variables):
    whole = generate(MODEL, variables, PROMPTS, max_new_tokens=40).tokens
    stop = whole[0][6]
    shown = []
    made = generate(
        MODEL,
        variables,
        PROMPTS,
        max_new_tokens=40,
        draft=Draft(),
        stop_ids=frozenset({stop}),
        on_tokens=shown.append,
    )
    for tokens, expected in zip(made.tokens, whole, strict=True):
        end = expected.index(stop) if stop in expected else len(expected)
        assert tokens == expected[:end]
    told = [[int(t) for t in row if t >= 0] for row in np.array(shown).T]
    assert told == made.tokens


@pytest.mark.slow
def test_without_spare_slots_the_window_would_be_lost(variables):
    """A ring with too few spare slots would lose keys that a rejected draft wrote over: refused."""
    tokens = np.random.RandomState(1).randint(0, 300, (1, 12)).astype(np.int32)
    positions = np.arange(14, dtype=np.int32)[None]

    @jax.jit
    def kept_one(variables, cache):
        """The state of token 9 at place 13, after drafts from place 12 of which one was kept."""
        first = (tokens, positions[:, :12], cache)
        _, cache = hidden_states(FLAT, variables, *first, is_whole=True)
        assert cache is not None
        at = positions[0, 12:13]
        made = draft_and_verify(FLAT, variables, jnp.array([7]), jnp.asarray(at), cache, Draft())
        cache = rewind(made.state, jnp.asarray(at + 1))
        return hidden_states(FLAT, variables, np.array([[9]]), positions[:, 13:], cache)[0]

    _, flat = unstack(MODEL, variables)

    def found(spare):
        return kept_one(flat, init_state(FLAT.config, 1, 32, "float32", spare))[0, 0]

    whole = np.concatenate([tokens, [[7, 9]]], axis=1).astype(np.int32)
    expected, _ = jax.jit(lambda v: hidden_states(MODEL, v, whole, positions))(variables)
    # One token of a draft is always kept: so many slots are enough, less one.
    for spare in (Draft().length, Draft().length - 1):
        # float32 sums over cached keys in another order; a lost key shows a hundred times as much.
        np.testing.assert_allclose(found(spare), expected[0, -1], atol=1e-4)
    with pytest.raises(ValueError, match="a step of 4 tokens would write over keys that it still"):
        found(Draft().length - 2)


def test_what_can_not_be_drafted_is_refused(variables):
    def ask(model=MODEL, draft=Draft(), **options):
        generate(model, variables, PROMPTS, max_new_tokens=2, draft=draft, **options)

    with pytest.raises(UserError, match=r"draft\.exit=3 is no exit before the model's end"):
        ask(draft=Draft(exit=3))
    with pytest.raises(UserError, match=r"draft gives the greedy text, got temperature=1\.0"):
        ask(sampling=Sampling(temperature=1.0))
    with pytest.raises(UserError, match="exit_threshold and draft can't go together"):
        ask(exit_threshold=0.5)
    with pytest.raises(UserError, match="length=0 must be greater than 0"):
        Draft(length=0)
    sparse = LocalSparseAttentionConfig(
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        window_size=4,
        far="summaries",
        block_size=4,
        num_sink_tokens=0,
    )
    depth = MixtureOfDepthsConfig(capacity=0.5)
    for spec, sentence in (
        (LayerSpec(attention=sparse, ffn=DENSE), "a summary holds tokens that would leave"),
        (LayerSpec(attention=LOCAL, ffn=DENSE, depth=depth), r"with_threshold_selection gives"),
    ):
        with pytest.raises(UserError, match=sentence):
            ask(Transformer(tiny.model(pattern=(spec,), num_layers=2)))
