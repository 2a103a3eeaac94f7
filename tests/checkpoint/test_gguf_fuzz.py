"""Random damage to GGUF files and tokenizers: equal values or a sentence, nothing else."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint.gguf_config import config_from_gguf
from configs.checks import UserError
from data.tokenizers.gguf_tokenizer import tokenizer_from_gguf
from formats.gguf.reader import GGUFFile
from tests.formats.gguf_bytes import F32, STRING, gguf, pair, small, tensor, text

WHOLE = small()
DATA = 8 * 4 + 32 * 4 + 8 * 4
"""Bytes of the tensors, at the end."""
damage = st.one_of(
    st.tuples(st.just("set"), st.integers(0, len(WHOLE) - 1), st.integers(0, 255)),
    st.tuples(st.just("cut"), st.integers(0, len(WHOLE) - 1), st.just(0)),
    st.tuples(st.just("drop"), st.integers(0, len(WHOLE) - 1), st.integers(1, 40)),
    st.tuples(st.just("double"), st.integers(0, len(WHOLE) - 1), st.integers(1, 40)),
    st.tuples(st.just("wide"), st.integers(0, len(WHOLE) - 9), st.integers(0, 2**64 - 1)),
)


def damaged(data: bytes, what: str, place: int, value: int) -> bytes:
    if what == "set":
        return data[:place] + bytes([value]) + data[place + 1 :]
    if what == "cut":
        return data[:place]
    if what == "drop":
        return data[:place] + data[place + value :]
    if what == "double":
        return data[: place + value] + data[place:]
    return data[:place] + value.to_bytes(8, "little") + data[place + 8 :]


@pytest.mark.slow
@settings(
    max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(damage, min_size=1, max_size=3))
def test_a_damaged_file_is_read_or_refused(changes: list, tmp_path: Path):
    """A file that still opens has tensors of finite values, those of untouched bytes as they were;
    memory stays near the file's size."""
    data = WHOLE
    for what, place, value in changes:
        data = damaged(data, what, min(place, max(len(data) - 9, 0)), value)
    path = tmp_path / "it.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        file = GGUFFile(path)
        values = {name: file.read(name) for name in file.shapes}
        config_from_gguf(file.metadata, file.shapes, file.read, "it")
    except UserError as error:
        assert str(path) in str(error) or str(error).startswith("it ")  # noqa: PT017
    else:
        assert all(np.isfinite(tensor).all() for tensor in values.values())
        if data[: -DATA - 32] == WHOLE[: -DATA - 32] and len(data) == len(WHOLE):
            same = np.frombuffer(data[-DATA:], "<f4")
            np.testing.assert_array_equal(values["matrix"].ravel(), same[8:40])
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 * 2**20


metadata_values = st.recursive(
    st.one_of(st.integers(-(2**40), 2**40), st.floats(), st.text(max_size=9), st.booleans()),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)
KEYS = [
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "bos_token_id",
    "eos_token_id",
    "eot_token_id",
    "add_bos_token",
    "add_space_prefix",
]
GOOD = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.scores": [0.0, 0.0, -1.0, 0.0],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(
    model=st.sampled_from(["gpt2", "llama", "gemma4"]),
    changes=st.dictionaries(st.sampled_from(KEYS), metadata_values, min_size=1, max_size=3),
    said=st.text(max_size=20),
)
def test_damaged_tokenizers_are_built_or_refused(model: str, changes: dict, said: str):
    values = GOOD | {"tokenizer.ggml.model": model}
    values |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    try:
        tokenizer = tokenizer_from_gguf(values, "it")
    except UserError as error:
        assert str(error).startswith("it ")  # noqa: PT017
    else:
        ids = tokenizer.encode(said)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.slow
@settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.dictionaries(
    st.sampled_from([
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "block_count",
        "embedding_length", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
        "expert_count", "attention.layer_norm_rms_epsilon", "rope.freq_base",
        "nextn_predict_layers", "attention.sliding_window", "attention.sliding_window_pattern",
        "feed_forward_length", "ssm.inner_size", "ssm.time_step_rank", "ssm.state_size",
        "rope.dimension_sections", "full_attention_interval", "attention.recurrent_layers",
        "attention.key_length_swa", "attention.shared_kv_layers", "final_logit_softcapping",
    ]), metadata_values, min_size=1, max_size=4),
    architecture=st.sampled_from([
        "llama", "qwen3moe", "olmoe", "gpt-oss", "deepseek2", "gemma3", "llama4", "mistral3",
        "qwen35", "granitehybrid", "nemotron_h", "lfm2", "kimi-linear", "glm-dsa", "gemma4",
    ]),
)  # fmt: skip
def test_damaged_settings_are_read_or_refused(changes: dict, architecture: str):
    metadata = {"general.architecture": architecture}
    metadata |= {f"{architecture}.{key}": value for key, value in changes.items()}
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    shapes = {"token_embd.weight": (8, 4), "rope_freqs.weight": (32,)}
    try:
        values = config_from_gguf(metadata, shapes, lambda name: factors, "it")
    except UserError as error:
        assert str(error).startswith("it ")  # noqa: PT017
    else:
        assert values["vocab_size"] == 8


def test_the_damage_reaches_what_it_should():
    """The fuzz has something to find: the valid file is one, and a test of the test's helper."""
    assert damaged(b"abcd", "set", 1, 65) == b"aAcd"
    assert damaged(b"abcd", "double", 1, 2) == b"abcbcd"
    again = gguf((pair("k", STRING, text("v")),), (tensor("t", (1,), 0, 0),), bytes(4))
    assert again.startswith(b"GGUF")
    assert F32 == 6
