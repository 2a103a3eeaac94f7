"""config.json and tokenizer.json from strangers: a model or a sentence, at once and in little
memory, whatever they say."""

import contextlib
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.checks import UserError
from data.tokenizers.public_tokenizer import read_public_tokenizer
from data.tokenizers.tokenizer import train_tokenizer
from infer.sources import Source, open_source
from model.transformer import Transformer, abstract_variables
from tests.checkpoint.cases import CASES, read_case, write_case

MAX_BYTES = 50_000_000
ROPE = {
    "type": "yarn",
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "beta_fast": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "attention_factor": 1.2,
    "original_max_position_embeddings": 64,
}
OTHERS = {
    "rope_theta": 1e4,
    "rope_scaling": ROPE,
    "rope_parameters": ROPE,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"},
    "torch_dtype": "float32",
    "num_experts": 8,
    "mlp_only_layers": [0],
    "layer_types": ["full_attention"],
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "partial_rotary_factor": 1.0,
    "index_topk": 8,
}
"""Keys that some family reads, and transformers did not write for every case."""

WORDS = ["", "silu", "yarn", "llama3", "default", "fp8", "mxfp4", "llama", "deepseek_v3", "gpt_oss"]
EDGES = [0, 1, -1, 2, 3, 63, 65, 2**16, 2**31 - 1, 2**31, 2**63, 10**400, -(10**400)]
FRACTIONS = [0.0, -0.0, 0.5, 1e-320, 1e38, 1e308, -1e308, 64.0, float("inf"), float("nan")]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(EDGES),
    st.integers(-5, 300),
    st.sampled_from(FRACTIONS),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=5),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(list(ROPE)), st.text(max_size=3)), inner),
    ),
    max_leaves=8,
)
FUZZ = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def changed(data: st.DataObject, config: dict) -> dict:
    """A config with some keys gone, of another value, or of one changed inside."""
    config = json.loads(json.dumps(config))
    keys = st.sampled_from(sorted({*config, *OTHERS}))
    for key in data.draw(st.lists(keys, min_size=1, max_size=4)):
        inside = config.get(key, OTHERS.get(key))
        how = data.draw(st.sampled_from(["value", "inside", "gone", "whole"]))
        if how == "gone":
            config.pop(key, None)
        elif how == "whole":
            config[key] = inside
        elif how == "inside" and isinstance(inside, dict) and inside:
            config[key] = {**inside, data.draw(st.sampled_from(sorted(inside))): data.draw(values)}
        else:
            config[key] = data.draw(values)
    return config


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cases")
    for case in CASES:
        write_case(case, root / case)
    return root


def check(folder: Path, text: str) -> None:
    """What opens can also be laid out: its parameters' shapes, and a table line for each tensor."""
    (folder / "config.json").write_text(text)
    source = None
    tracemalloc.start()
    try:
        source = open_source(str(folder))
    except UserError as error:
        assert len(str(error)) < 2000  # noqa: PT017
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_BYTES
    if source is not None:
        lay_out(source)


def lay_out(source: Source) -> None:
    assert source.public is not None
    with contextlib.suppress(UserError):
        source.public.unread(abstract_variables(Transformer(source.config))[0])


@pytest.mark.slow
@settings(FUZZ, max_examples=400)
@given(data=st.data())
def test_any_config_is_a_model_or_a_sentence(folders: Path, data: st.DataObject):
    case = data.draw(st.sampled_from(CASES))
    config, _, _, _ = read_case(case)
    check(folders / case, json.dumps(changed(data, config)))


FAR = [
    ("llama", {"num_hidden_layers": 2**31 - 1}, r"num_hidden_layers=2147483647.* from 1 to 4096"),
    ("gpt_oss", {"num_hidden_layers": 2**31 - 1}, r"num_hidden_layers=2147483647"),
    ("llama", {"vocab_size": 2**31 - 1}, r"a model of 274,.* parameters, and its files hold"),
    ("mixtral", {"num_local_experts": 2**30}, r"two models"),
    ("deepseek_v3", {"n_routed_experts": 2**30, "n_group": 1, "topk_group": 1}, r"two models"),
    ("llama", {"rms_norm_eps": 10**400}, r"rms_norm_eps=1000.*expected a number"),
]
"""What would build two billion layers, or lines of a table; and an integer that is no float."""


@pytest.mark.parametrize(("case", "changes", "sentence"), FAR)
def test_sizes_far_from_the_files_are_refused_at_once(case, changes, sentence, folders):
    config, _, _, _ = read_case(case)
    (folders / case / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=sentence):
        open_source(str(folders / case))


def a_tokenizer() -> bytes:
    tokenizer = train_tokenizer(["to be or not to be"] * 3, 260)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer.to_str().encode()


TOKENIZER = a_tokenizer()
DAMAGE = [
    ("empty", b""),
    ("cut", TOKENIZER[: len(TOKENIZER) // 2]),
    ("a number", b"3"),
    ("no model", b'{"version": "1.0"}'),
    ("latin", b'{"a": "\xff"}'),
    ("deep", b"[" * 100_000),
    ("an id beyond", TOKENIZER.replace(b'"<s>"', b'"<x>"', 1)[:-3]),
]


@pytest.mark.parametrize(("_what", "data"), DAMAGE, ids=[what for what, _ in DAMAGE])
def test_a_damaged_tokenizer_is_refused(_what, data, folders):
    config, _, _, _ = read_case("llama")
    (folders / "llama" / "config.json").write_text(json.dumps(config))
    (folders / "llama" / "tokenizer.json").write_bytes(data)
    source = open_source(str(folders / "llama"))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        source.tokenizer()


def replaced(data: st.DataObject, value: object, depth: int = 0) -> object:
    """The JSON value with one thing inside it, or itself, another."""
    if depth < 6 and value and isinstance(value, dict | list) and data.draw(st.integers(0, 7)):
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = data.draw(st.sampled_from(list(keys)))
        changed: dict | list = value.copy()
        changed[key] = replaced(data, value[key], depth + 1)  # pyright: ignore[reportArgumentType]
        return changed
    return data.draw(values)


@pytest.mark.slow
@settings(FUZZ, max_examples=1500)
@given(data=st.data())
def test_any_tokenizer_reads_or_is_refused(tmp_path: Path, data: st.DataObject):
    made = json.loads(TOKENIZER)
    for _ in range(data.draw(st.integers(1, 3))):
        made = replaced(data, made)
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    said = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ bos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(replaced(data, said)))
    (tmp_path / "generation_config.json").write_text(
        json.dumps(replaced(data, {"eos_token_id": [260, 261]}))
    )
    try:
        read_public_tokenizer(tmp_path)
    except UserError as error:
        assert len(str(error)) < 2000  # noqa: PT017
