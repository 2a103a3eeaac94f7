"""Passkey retrieval at 32K and 100K tokens by a hybrid nano trained at 4K at most, and its memory.

The haystack is the standard library's bytes. A needle is one symbol that says a key and a value; at
the end each key is asked for, and only the answers are learned. So one look back over the whole
text is enough, and that look is what is tested.
"""

import functools
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ablations.base import Finding, Report
from benchmarks.ablations.training import Trained, small_run, train
from configs.architecture import LayerSpec, ModelConfig
from configs.attention import AttentionConfig
from configs.base import RunConfig
from configs.feed_forward import MoEConfig, RouterConfig
from configs.rope import YarnConfig
from data.corpora import read_documents
from data.pipeline import Batch
from model.model_state import ModelState, init_state
from model.transformer import Transformer, abstract_variables, hidden_states, output_weights
from train.progress import ProgressBar
from train.report import Picture, new_figure, to_picture

BYTES, NEEDLES, VALUES = 256, 10, 32
"""Needles of a text, each with a key of its own, and the values that one may have."""
FIRST_KEY = BYTES + NEEDLES * VALUES
FIRST_ANSWER = FIRST_KEY + NEEDLES
STAGES = ((64, 64, 100), (512, 8, 100), (2048, 2, 100))
"""(tokens of a row, rows of a step, steps): short rows first, then longer ones."""
TRAINED_LENGTH = STAGES[-1][0]
LENGTHS = (2048, 32_768, 100_000)
CHUNK = 512


def model(length: int, *, hybrid: bool = True) -> ModelConfig:
    """Five local layers to a global one, which YaRN stretches to `length`; or six global ones."""
    factor = max(length / TRAINED_LENGTH, 1.0)
    yarn = YarnConfig(factor=factor, original_length=TRAINED_LENGTH) if factor > 1 else None
    everywhere = AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope_base=100_000.0,
        rope_scaling=yarn,
    )
    local = AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=32, window_size=32, num_sink_tokens=4
    )
    ffn = MoEConfig(num_experts=8, d_ff=64, router=RouterConfig(top_k=2))
    attentions = (*[local if hybrid else everywhere] * 5, everywhere)
    return ModelConfig(
        vocab_size=FIRST_ANSWER + VALUES,
        d_model=128,
        num_layers=6,
        pattern=tuple(LayerSpec(attention=a, ffn=ffn) for a in attentions),
        context_length=max(length, TRAINED_LENGTH),
    )


@functools.cache
def haystack() -> np.ndarray:
    """Bytes of the standard library, one file after the other, uint8."""
    texts = [document.text.encode() for document in read_documents("stdlib", ".py")]
    return np.frombuffer(b"".join(texts), np.uint8)


def passkey_row(random: np.random.RandomState, length: int) -> Batch:
    """A row of tokens and targets [L]: NEEDLES needles, one in each tenth of it, then every key
    in another order, each before its answer, which alone is a target.
    """
    begin = random.randint(len(haystack()) - length)
    tokens = haystack()[begin : begin + length].astype(np.int32)
    targets = np.full(length, -1, np.int32)
    keys, values = random.permutation(NEEDLES), random.randint(VALUES, size=NEEDLES)
    body = length - 2 * NEEDLES
    places = (np.arange(NEEDLES) * body) // NEEDLES + random.randint(body // NEEDLES, size=NEEDLES)
    tokens[places] = BYTES + keys * VALUES + values
    asked = random.permutation(NEEDLES)
    tokens[body::2], tokens[body + 1 :: 2] = FIRST_KEY + keys[asked], FIRST_ANSWER + values[asked]
    targets[body::2] = tokens[body + 1 :: 2]
    return {
        "tokens": tokens,
        "targets": targets,
        "positions": np.arange(length, dtype=np.int32),
    }


def passkey_batches(run: RunConfig) -> Iterator[Batch]:
    random = np.random.RandomState(run.seed)
    while True:
        rows = [passkey_row(random, run.data.seq_len) for _ in range(run.batch_size)]
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def run(seeds: int) -> Report:
    accuracy = {length: [] for length in LENGTHS}
    by_depth = {length: np.zeros(NEEDLES) for length in LENGTHS}
    for seed in range(seeds):
        trained = _train(seed)
        for length in LENGTHS:
            found = _retrieve(trained, length, seed)
            accuracy[length].append(float(found.mean()))
            by_depth[length] += found / seeds
    return Report(
        title="long_context: passkeys at 32K and 100K, trained at "
        f"{TRAINED_LENGTH:,} tokens at most",
        article="32K by sliding windows, less than 8 GB at the peak; 100K on the roadmap",
        bound="one of the six layers keeps every token, so the caches shrink to a sixth at best",
        setting=f"six layers of width 128, five with a window of 32, 8 experts; rows of "
        f"{' then '.join(f'{n:,} tokens for {steps} steps' for n, _, steps in STAGES)}; the global "
        f"layer stretched by YaRN without further training; {NEEDLES} needles at ten depths of one "
        f"text, read in chunks of {CHUNK} tokens through the cache",
        findings=[
            *(
                Finding(name=f"passkeys found at {length:,} tokens", values=tuple(values))
                for length, values in accuracy.items()
            ),
            *_memory_findings(),
        ],
        picture=_draw(by_depth),
    )


def _train(seed: int) -> Trained:
    """Rows of growing length, one stage after the other."""
    trained = None
    for length, rows, steps in STAGES:
        config = small_run(
            model(TRAINED_LENGTH), steps=steps, seed=seed, seq_len=length, batch_size=rows
        )
        state = trained.state if trained else None
        label = f"rows of {length:,}, seed {seed}"
        trained = train(config, passkey_batches(config), label, state=state)
    assert trained is not None
    return trained


def _retrieve(trained: Trained, length: int, seed: int) -> np.ndarray:
    """Which needles are found in a text of `length` tokens, by depth, [NEEDLES]."""
    stretched = Transformer(model(length), trained.run.execution)
    row = passkey_row(np.random.RandomState(3000 + seed), length)
    sizes = iter((-(-length // 4), -(-length // 2), length))
    size, cache = 0, None
    body = length - 2 * NEEDLES
    begins = range(0, body, CHUNK)
    with ProgressBar(f"reading {length:,} tokens", total=len(begins), unit="chunks") as bar:
        for i, begin in enumerate(begins):
            count = min(CHUNK, body - begin)
            if begin + count > size:
                size = next(sizes)
                empty = init_state(stretched.config, 1, size, "float32", spare=CHUNK - 1)
                cache = _enlarged(cache, empty)
            tokens, positions = np.zeros(CHUNK, np.int32), np.full(CHUNK, -1, np.int32)
            tokens[:count] = row["tokens"][begin : begin + count]
            positions[:count] = np.arange(begin, begin + count)
            _, cache = _read(stretched, trained.variables, tokens[None], positions[None], cache)
            bar.update(i + 1)
    tokens, is_found = row["tokens"], np.zeros(NEEDLES)
    for place in range(body, length, 2):
        asked = tokens[None, [place]]
        best, _ = _read(stretched, trained.variables, asked, np.array([[body]], np.int32), cache)
        is_found[tokens[place] - FIRST_KEY] = int(best) == int(row["targets"][place])
    in_text = tokens[:body][tokens[:body] >= BYTES]
    return is_found[(in_text - BYTES) // VALUES]


def _enlarged(cache: ModelState | None, empty: ModelState) -> ModelState:
    """The cache with as many slots as the empty one: a text's beginning is read in a short one."""
    if cache is None:
        return empty
    put = jax.lax.dynamic_update_slice
    return jax.tree.map(lambda new, old: put(new, old, (0,) * new.ndim), empty, cache)


@functools.partial(jax.jit, static_argnums=0)
def _read(model, variables, tokens_BL, positions_BL, cache):
    """The best token after the last one, and the cache with the tokens in it."""
    hidden_BLD, cache = hidden_states(model, variables, tokens_BL, positions_BL, cache)
    return jnp.argmax(hidden_BLD[0, -1] @ output_weights(model, variables)), cache


def _memory_findings() -> list[Finding]:
    """Peak memory of reading a chunk, as XLA plans it, over the same with full attention."""
    found = []
    for length in LENGTHS[1:]:
        peaks = [_planned_bytes(model(length, hybrid=hybrid)) for hybrid in (True, False)]
        name = f"{length:,} tokens: cache and temporaries, MB"
        found += [
            Finding(name=f"{name}, hybrid", values=(peaks[0] / 1e6,)),
            Finding(name=f"{name}, six global layers", values=(peaks[1] / 1e6,)),
        ]
    return found


def _planned_bytes(config: ModelConfig) -> int:
    """Bytes of the cache and of the temporaries of one decode step; nothing is allocated."""
    transformer = Transformer(config)
    variables, _ = abstract_variables(transformer)
    cache = jax.eval_shape(lambda: init_state(config, 1, config.context_length, "float32"))
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    compiled = cast(Any, _read).lower(transformer, variables, one, one, cache).compile()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return held + analysis.temp_size_in_bytes


def _draw(by_depth: dict[int, np.ndarray]) -> Picture:
    figure, axes = new_figure(7.5, 2.8)
    grid = np.stack(list(by_depth.values()))
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_yticks(range(len(grid)), [f"{length:,}" for length in by_depth])
    axes.set_xticks(range(NEEDLES), [f"{(i + 0.5) / NEEDLES:.0%}" for i in range(NEEDLES)])
    axes.set_ylabel("tokens")
    axes.set_xlabel("depth of the needle")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="share found")
    return to_picture(figure, "long_context", "Passkeys found by depth and length.")
