"""Tiny models of each kind of layer behind servers of their own: nothing in them is scripted."""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx
import numpy as np
import openai

from configs.architecture import LayerSpec, ModelConfig, MultiTokenConfig
from configs.attention import LatentAttentionConfig
from configs.feed_forward import DenseConfig
from configs.recurrent_attention import GatedDeltaConfig
from data.tokenizers.public_tokenizer import PublicTokenizer
from infer.engine import Emitted, Engine, EngineOptions, Request
from infer.sampling import Sampling
from infer.sources import open_source
from model.transformer import Transformer
from tests import tiny
from tests.infer.server.scripted import byte_tokenizer, served
from tests.probes import drawn

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% endif %}{% endif %}{# </think> #}"
)
TOKENIZER = byte_tokenizer(TEMPLATE)
VOCAB = 264
POISON = 263
"""A token of the tiny models whose embedding is not a number; no request may choose it."""
NEVER = {POISON: -100.0}
LENGTH, ROWS = 768, 3
BASE = EngineOptions(
    max_rows=ROWS,
    max_length=LENGTH,
    piece=128,
    block=64,
    page_size=16,
    num_pages=200,
    prefix_cache=True,
    keeps_experts=True,
)


def windowed() -> ModelConfig:
    """v31_nano's form: experts, a window, an attention over everything."""
    pattern = (
        LayerSpec(attention=tiny.attention(), ffn=tiny.moe()),
        LayerSpec(attention=tiny.attention(window_size=None, num_sink_tokens=0), ffn=tiny.moe()),
    )
    return _model(pattern)


def latent() -> ModelConfig:
    """deepseek_v3_nano's form: latents, a dense layer first, a module that predicts further."""
    attention = LatentAttentionConfig(
        num_heads=2,
        query_rank=None,
        latent_rank=8,
        nope_head_dim=8,
        rope_head_dim=4,
        value_head_dim=6,
    )
    layer = LayerSpec(attention=attention, ffn=tiny.moe())
    dense = LayerSpec(attention=attention, ffn=DenseConfig(d_ff=16))
    return _model((layer,), prefix=(dense,), multi_token=MultiTokenConfig(layer=layer))


def recurrent() -> ModelConfig:
    """delta_nano's form: a gated delta net with experts, then an attention over everything."""
    delta = GatedDeltaConfig(num_heads=2, key_head_dim=8, value_head_dim=8)
    everywhere = tiny.attention(window_size=None, num_sink_tokens=0)
    return _model(tuple(LayerSpec(attention=a, ffn=tiny.moe()) for a in (delta, everywhere)))


def _model(pattern: Sequence[LayerSpec], **changes) -> ModelConfig:
    """A dense layer that is in front counts among the layers."""
    return tiny.model(
        pattern=tuple(pattern),
        num_layers=len(pattern) + len(changes.get("prefix", ())),
        vocab_size=VOCAB,
        context_length=LENGTH,
        tie_embeddings=False,
        **changes,
    )


CONFIGS = {"windowed": windowed, "latent": latent, "recurrent": recurrent}


@dataclass(eq=False)
class Kind:
    """A model, and engines of it."""

    name: str
    options: EngineOptions
    has_drafts: bool = True
    """Whether its state can go back."""
    is_tiny: bool = True
    tokenizer: PublicTokenizer = TOKENIZER

    @functools.cached_property
    def loaded(self):
        if not self.is_tiny:
            return open_source(self.name).load(for_decoding=True)
        made = drawn(CONFIGS[self.name](), seed=3)
        made["params"]["embedding"] = made["params"]["embedding"].at[POISON].set(np.nan)
        return Transformer(CONFIGS[self.name]()), made

    def engine(self, **changes) -> Engine:
        return Engine(*self.loaded, dataclasses.replace(self.options, **changes))

    @functools.cached_property
    def plain(self) -> Engine:
        """One that keeps nothing of what it reads."""
        return self.engine(prefix_cache=False)

    @property
    def vocab_size(self) -> int:
        return self.loaded[0].config.vocab_size

    @property
    def free_pages(self) -> int:
        """Of an engine that does nothing."""
        return 0 if self.options.num_pages is None else self.options.num_pages - 1

    @property
    def textless(self) -> dict[str, float]:
        """A bias against tokens that have no text."""
        ids = range(256, VOCAB) if self.is_tiny else self.tokenizer.eos_ids
        return {str(i): -100.0 for i in ids}


def kind_of(name: str, **changes) -> Kind:
    """
    Args:
      name: a key of CONFIGS, or smollm2.
      changes: of the engine's options.
    """
    options = dataclasses.replace(BASE, **changes)
    if name == "smollm2":
        tokenizer = dataclasses.replace(open_source(name).tokenizer(), chat_template=TEMPLATE)
        dense = dataclasses.replace(options, keeps_experts=False)
        return Kind(name, dense, is_tiny=False, tokenizer=tokenizer)
    return Kind(name, options, has_drafts=name != "recurrent")


class ServedKind:
    """A kind of model on a real socket."""

    def __init__(self, kind: Kind, made, client: openai.OpenAI, http: httpx.Client) -> None:
        self.kind, self.made, self.client, self.http = kind, made, client, http

    def complete(self, prompt, **settings):
        """The answer of /v1/completions; greedy unless it is said otherwise."""
        settings = {"max_tokens": 8, "temperature": 0, "logit_bias": bias()} | settings
        extra = {"ignore_eos": True} | settings.pop("extra_body", {})
        return self.client.completions.create(
            model="tiny", prompt=prompt, extra_body=extra, **settings
        )

    def stats(self) -> dict:
        return self.http.get("/stats").json()


@contextlib.contextmanager
def served_kind(kind: Kind, **settings) -> Iterator[ServedKind]:
    """Args:
    settings: of `served`.
    """
    options = kind.options
    settings = {"max_length": options.max_length, "most_waiting": 16} | settings
    settings |= {"vocab_size": kind.vocab_size, "max_rows": options.max_rows}
    with (
        served(kind.engine(), kind.tokenizer, **settings) as made,
        openai.OpenAI(base_url=f"{made.url}/v1", api_key="x", max_retries=0) as client,
        httpx.Client(base_url=made.url, timeout=60) as http,
    ):
        yield ServedKind(kind, made, client, http)


def bias(**others) -> dict[str, float]:
    """OpenAI's form of NEVER."""
    return {str(POISON): -100.0} | others


def together(function, items: Sequence) -> list:
    """What the function gives for each, all at once."""
    with concurrent.futures.ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(function, items))


def greedy(**changes) -> Sampling:
    return Sampling(logit_bias=NEVER, **changes)


def run(engine: Engine, requests: Sequence[Request], on_step=lambda step: None) -> list:
    """Each request's tokens, log-probabilities, those of its prompt, and why it ended."""
    found: dict[int, list[Emitted]] = {engine.add(request): [] for request in requests}
    step = 0
    while engine.has_work():
        for emitted in engine.step():
            found[emitted.request].append(emitted)
        step += 1
        on_step(step)
    return [Answered(each) for each in found.values()]


class Answered:
    """All that was emitted for one request."""

    def __init__(self, emitted: Sequence[Emitted]) -> None:
        self.tokens = [token for e in emitted for token in e.tokens]
        self.nats = [x.logprob for e in emitted for x in e.logprobs]
        self.prompt_logprobs = emitted[0].prompt_logprobs
        self.experts_TNK = emitted[-1].experts_TNK
        self.cached_tokens = sum(e.cached_tokens for e in emitted)
        self.reason, self.error = emitted[-1].reason, emitted[-1].error
