"""Prefixes: a text is the same bit for bit whether its prompt's beginning was found or read."""

import dataclasses

import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.attention import LocalSparseAttentionConfig
from configs.compressed_attention import (
    CompressedAttentionConfig,
    CompressionConfig,
    EntryIndexerConfig,
)
from configs.feed_forward import DenseConfig
from configs.recurrent_attention import GatedDeltaConfig
from infer.engine import Engine, EngineOptions, Request
from infer.sampling import Sampling
from model.transformer import Transformer
from tests import tiny
from tests.infer import test_engine
from tests.probes import drawn

RANDOM = np.random.RandomState(0)
SHARED = RANDOM.randint(1, 300, 150).tolist()
OPTIONS = EngineOptions(max_rows=2, max_length=200, piece=64, block=64, prefix_cache=True)
PAGED = dataclasses.replace(OPTIONS, num_pages=20, page_size=16)


def prompt(begins: int, *, seed: int, length: int = 170) -> list[int]:
    """The first tokens of SHARED, and others."""
    rest = np.random.RandomState(seed).randint(1, 300, length - begins)
    return [*SHARED[:begins], *rest.tolist()]


def one_layer(attention, context_length=256) -> Transformer:
    """With a window layer beside it, whose state is a ring."""
    pattern = (
        LayerSpec(attention=attention, ffn=DenseConfig(d_ff=24)),
        LayerSpec(attention=tiny.attention(window_size=9), ffn=DenseConfig(d_ff=24)),
    )
    return Transformer(tiny.model(pattern=pattern, context_length=context_length))


MIXED = Transformer(dataclasses.replace(test_engine.CONFIG, context_length=256))
RECURRENT = one_layer(GatedDeltaConfig(num_heads=2, key_head_dim=8, value_head_dim=8))


def compressed(rate: int) -> CompressedAttentionConfig:
    return CompressedAttentionConfig(
        num_heads=4,
        query_rank=12,
        head_dim=8,
        rotary_dim=4,
        window_size=8,
        compression=CompressionConfig(
            rate=rate,
            overlaps=True,
            indexer=EntryIndexerConfig(num_heads=4, head_dim=6, top_k=4),
        ),
        num_output_groups=2,
        output_rank=6,
    )


COMPRESSED = one_layer(compressed(rate=4))
KINDS = {
    "pages of a mixture with windows and latents": (MIXED, PAGED),
    "rows of it": (MIXED, OPTIONS),
    "recurrent": (RECURRENT, OPTIONS),
    "recurrent beside pages": (RECURRENT, PAGED),
    "summaries": (
        one_layer(
            LocalSparseAttentionConfig(
                num_heads=4,
                num_kv_heads=2,
                head_dim=8,
                window_size=8,
                far="summaries",
                block_size=4,
                num_sink_tokens=0,
            )
        ),
        OPTIONS,
    ),
    "compressed": (COMPRESSED, OPTIONS),
    "compressed in pages": (COMPRESSED, PAGED),
    "relative": (
        Transformer(tiny.memory_model(context_length=256)),
        OPTIONS,
    ),
}


class Served:
    """Engines of one model, and texts with the log-probabilities that show every bit."""

    def __init__(self, model, options, seed=3, name=""):
        self.model, self.options, self.name = model, options, name
        self.variables = drawn(model.config, seed)

    def engine(self, **changes):
        return Engine(self.model, self.variables, dataclasses.replace(self.options, **changes))

    def texts(self, engine, prompts, new=6, **asked):
        """Each one's tokens, log-probabilities and tokens from the cache, asked all at once."""
        numbers = [
            engine.add(Request(p, new, sampling=Sampling(1.0, seed=i), num_logprobs=0, **asked))
            for i, p in enumerate(prompts)
        ]
        found = {n: ([], [], 0) for n in numbers}
        while engine.has_work():
            for emitted in engine.step():
                tokens, nats, cached = found[emitted.request]
                nats += [x.logprob for x in emitted.logprobs]
                cached += emitted.cached_tokens
                found[emitted.request] = (tokens + emitted.tokens, nats, cached)
        return [found[n] for n in numbers]


QUICK = ("pages of a mixture with windows and latents", "recurrent beside pages")


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
@pytest.mark.thinned(2)
def test_a_text_is_the_same_whether_its_prefix_was_found_or_read(kind):
    """Found whole, in part where another one parted from it, or by two that came at once."""
    served = Served(*KINDS[kind])
    prompts = [prompt(150, seed=1), prompt(150, seed=1), prompt(150, seed=2), prompt(140, seed=3)]
    cold = [served.texts(served.engine(prefix_cache=False), [p])[0] for p in prompts]
    engine = served.engine()
    warm = [served.texts(engine, [p])[0] for p in prompts] + served.texts(engine, prompts)
    assert [x[2] for x in cold] == [0] * 4
    assert warm[0][2] == 0 < warm[1][2]
    assert min(x[2] for x in warm[3:]) >= 128
    assert [x[:2] for x in warm[:4]] == [x[:2] for x in cold]
    texts = [served.texts(engine, [p])[0][:2] for p in prompts]
    assert texts == [x[:2] for x in cold]


def test_those_that_begin_alike_and_come_at_once_are_read_once():
    """Also where the one that reads is cancelled while the others wait for it."""
    served = Served(MIXED, PAGED)
    prompts = [prompt(150, seed=seed) for seed in range(4)]
    together = served.texts(served.engine(), prompts)
    assert [x[2] for x in together] == [0, 144, 144, 144]
    engine = served.engine()
    first, *others = [engine.add(Request(p, 6)) for p in prompts]
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (1, 3)
    engine.cancel(first)
    ended = []
    while engine.has_work():
        ended += [e.request for e in engine.step() if e.reason == "length"]
    assert sorted(ended) == others
    assert engine.stats().prefix_hits >= 2 * 144


def test_salts_share_nothing():
    served = Served(MIXED, PAGED)
    engine = served.engine()
    found = [
        served.texts(engine, [prompt(60, seed=1, length=80)], cache_salt=s)[0][2] for s in "aba"
    ]
    assert found == [0, 0, 64]
    assert engine.stats().prefix_hits == 64
    assert engine.stats().prefix_queries == 3 * 80
