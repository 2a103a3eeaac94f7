"""Public families against what transformers computes on tiny models with random weights.

Recorded by parity/record.py; every norm, bias, sink and router bias is random. Tolerance 1e-4 on
logits of deviation 1, float32 both: what is left is the order of sums (measured: below 1e-5).
"""

import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint import huggingface
from checkpoint.public import PublicCheckpoint, export_family, write_model
from configs.checks import UserError
from formats.safetensors.reader import open_tensors
from infer.logits import cached_logits, full_logits
from infer.sources import open_source
from infer.steps import logits_of
from model.model_state import init_state
from model.step import make_step
from model.transformer import forward
from tests.checkpoint.cases import CASES, read_case, write_case
from tests.checkpoint.parity.weights import draw

TOLERANCE = 1e-4
PAGE = 4


@functools.cache
def loaded(case: str):
    """(model, variables, checkpoint, tokens, transformers' logits)."""
    folder = Path(tempfile.mkdtemp()) / case
    tokens, logits = write_case(case, folder)
    source = open_source(str(folder))
    model, variables = source.load()
    return model, variables, source.public, tokens.tolist(), logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(4)
def test_logits_equal_those_of_transformers(case):
    model, variables, _, tokens, expected = loaded(case)
    assert expected.std() > 0.5
    np.testing.assert_allclose(full_logits(model, variables, tokens), expected, atol=TOLERANCE)


UNCACHED = (
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v32",
    "llama",
    "llama_stretched",
    "llama3_biased",
    "qwen3_moe",
    "kimi_k2",
    "mistral",
    "qwen3",
    "gemma",
    "glm_moe_dsa_shared",
    "gemma3",
    "gemma4_dense",
    "gemma4_e4b",
    "ministral3",
    "lfm2",
)
"""What the other cases have too: tried in the slow tests."""


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in UNCACHED else c for c in CASES]
)
@pytest.mark.thinned(6)
def test_token_by_token_through_the_cache_too(case):
    model, variables, _, tokens, expected = loaded(case)
    np.testing.assert_allclose(cached_logits(model, variables, tokens), expected, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES)
def test_in_pieces_through_pages_too(case):
    model, variables, _, tokens, expected = loaded(case)
    np.testing.assert_allclose(paged_logits(model, variables, tokens), expected, atol=TOLERANCE)


def paged_logits(model, variables, tokens) -> np.ndarray:
    """Pieces of 7 tokens and of 1 in turn, from pages in another order than the text's."""
    num_pages = -(-len(tokens) // PAGE)
    tables = 1 + np.random.RandomState(0).permutation(num_pages)[None].astype(np.int32)
    sizes = {"spare": 6, "num_pages": num_pages + 1, "page_size": PAGE}
    state = init_state(model.config, 1, len(tokens), "float32", **sizes)

    @jax.jit
    def read(piece, places, state):
        step = make_step(piece, places, tables_RN=jnp.asarray(tables))
        hidden_BLD, state = forward(model, variables, step, state)
        return logits_of(model, variables, hidden_BLD[0]), state

    made: list[np.ndarray] = []
    while len(made) < len(tokens):
        count = min(1 if len(made) % 8 == 7 else 7, len(tokens) - len(made))
        places = np.where(np.arange(7) < count, len(made) + np.arange(7), -1)[None]
        piece = np.asarray(tokens, np.int32)[places.clip(0)]
        logits, state = read(piece, places.astype(np.int32), state)
        made += list(np.asarray(logits)[:count])
    return np.stack(made)


def test_a_table_with_gate_and_up_exchanged_would_fail():
    model, variables, _, tokens, expected = loaded("llama")

    def exchange(path, x):
        return x[..., ::-1, :] if jax.tree_util.keystr(path).endswith("['gate_up']") else x

    wrong = jax.tree_util.tree_map_with_path(exchange, variables)
    assert np.abs(full_logits(model, wrong, tokens) - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(3)
def test_export_gives_the_same_tensors_back(case, tmp_path):
    _, variables, checkpoint, _, _ = loaded(case)
    export(checkpoint, variables, tmp_path)
    before, after = open_tensors(checkpoint.path), open_tensors(tmp_path)
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        np.testing.assert_array_equal(before.read(name), after.read(name), err_msg=name)
    assert huggingface.open_checkpoint(tmp_path).config == checkpoint.config


def export(checkpoint: PublicCheckpoint, variables, folder: Path) -> None:
    huggingface.export(
        folder,
        export_family(checkpoint.config, own=checkpoint.family),
        checkpoint.config,
        variables,
        dtype="float32",
        extra={},
        max_shard_bytes=200_000,
    )


@pytest.mark.parametrize("case", CASES)
def test_an_exported_config_has_what_transformers_wrote(case):
    """Whatever both write is equal, and the keys that other engines route on are there."""
    config, _, _, _ = read_case(case)
    checkpoint = loaded(case)[2]
    ours = write_model(checkpoint.family, checkpoint.config)
    free = {"rope_parameters", "num_nextn_predict_layers", "partial_rotary_factor"}
    free.add("pad_token_id")  # null, where a class has one beyond small vocabularies
    if "deepseek" not in case and case != "qwen3_moe_mixed" and "moe_intermediate_size" in config:
        free.add("intermediate_size")  # of dense layers, and there are none
    if case == "qwen2_moe":
        free.add("sliding_window")  # 0, where others have null
    if case == "lfm2":  # the width itself is written, not what it is worked out of
        free |= {"intermediate_size", "block_auto_adjust_ff_dim"}
    for key in set(ours) & set(config) - free:
        assert config[key] is None or ours[key] == config[key], key
    if case not in WITHOUT_ROPE:
        wanted = config["rope_parameters"]
        assert same_keys(ours["rope_parameters"], wanted) == wanted
        if case != "deepseek_v4":  # whose class has a base beside them, too
            assert ours.get("rope_theta") == wanted.get("rope_theta")
    if config["model_type"].startswith("deepseek_v3"):
        assert (ours["topk_method"], ours["scoring_func"]) == ("noaux_tc", "sigmoid")


def same_keys(found: dict, wanted: dict) -> dict:
    """What is found of the keys that are wanted, in objects inside too."""
    return {
        key: same_keys(found[key], value) if isinstance(value, dict) else found.get(key)
        for key, value in wanted.items()
    }


WITHOUT_ROPE = ("kimi_linear", "olmo_hybrid", "nemotron_h", "nemotron_h_latent", "granitemoehybrid")
OLD_KEYS = {"num_local_experts": "num_experts", "dtype": "torch_dtype"}


NESTED = (
    *("olmo3", "gemma3", "gemma4", "gemma4_dense", "gemma4_e2b", "gemma4_e4b"),
    "deepseek_v4",
)
"""RoPE by kind of layer."""


def test_gemma3_with_the_older_keys_means_the_same(tmp_path):
    """As its released files have them."""
    config, _, _, _ = read_case("gemma3")
    rope = config.pop("rope_parameters")
    whole = rope["full_attention"]
    older = {"rope_theta": whole.pop("rope_theta"), "rope_scaling": whole}
    older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    del config["layer_types"]
    write_case("gemma3", tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(config | older | {"sliding_window_pattern": 3})
    )
    assert huggingface.open_checkpoint(tmp_path).config == loaded("gemma3")[2].config


@pytest.mark.parametrize("case", [c for c in CASES if c not in (*NESTED, *WITHOUT_ROPE)])
def test_configs_with_the_older_keys_mean_the_same(case, tmp_path):
    config, _, _, _ = read_case(case)
    rope = config.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    old = {OLD_KEYS.get(key, key): value for key, value in config.items()}
    old |= {"rope_theta": theta}
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    old |= {"rope_scaling": None if kind == "default" else rope | {"type": kind}}
    write_case(case, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert huggingface.open_checkpoint(tmp_path).config == loaded(case)[2].config


@pytest.mark.parametrize("case", ["deepseek_v3", "glm4_moe"])
def test_multi_token_modules_are_read_and_written(case, tmp_path):
    """As DeepSeek and GLM release it: a layer more, whose embedding and head are copies."""
    _, shapes, _, _ = read_case(case)
    model, _, _, tokens, expected = loaded(case)
    write_case(case, tmp_path / "public")
    width, vocab = model.config.d_model, model.config.vocab_size
    module = "model.layers.2."
    names = {name.replace("layers.1.", "layers.2."): name for name in shapes if "layers.1." in name}
    tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
    tensors |= {name: draw(name, tuple(shapes[old])) for name, old in names.items()}
    tensors |= {
        f"{module}{norm}.weight": draw(norm, (width,))
        for norm in ("enorm", "hnorm", "shared_head.norm")
    }
    both = draw("eh_proj", (width, 2 * width))
    tensors[f"{module}eh_proj.weight"] = both
    tensors[f"{module}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[f"{module}shared_head.head.weight"] = tensors["lm_head.weight"]
    assert tensors["lm_head.weight"].shape == (vocab, width)
    save_file(tensors, tmp_path / "public" / "model.safetensors")

    source = open_source(str(tmp_path / "public"))
    model, variables = source.load()
    assert model.config.multi_token is not None
    np.testing.assert_allclose(full_logits(model, variables, tokens), expected, atol=TOLERANCE)
    projection = variables["params"]["multi_token_0"]["projection"]
    # Theirs multiplies [embedding; hidden], ours [hidden; embedding].
    np.testing.assert_array_equal(
        projection[:width], draw("eh_proj", (width, 2 * width))[:, width:].T
    )
    assert source.public is not None
    export(source.public, variables, tmp_path / "exported")
    after = open_tensors(tmp_path / "exported")
    assert set(after.tensors) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(after.read(name), tensor, err_msg=name)
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 1

    tensors[f"{module}embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "public" / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.2\.embed_tokens\.weight should repeat"):
        open_source(str(tmp_path / "public")).load()


@pytest.mark.parametrize(
    ("case", "prefix"),
    [
        ("gemma3", "language_model.model."),
        ("llama4", "language_model.model."),
        ("gemma4", "model.language_model."),
    ],
)
def test_a_text_model_beside_encoders_is_read(case, prefix, tmp_path):
    """By the names that files have where an encoder for images lies beside it."""
    text, shapes, tokens, expected = read_case(case)
    tensors = {
        name.replace("model.", prefix, 1)
        if name.startswith("model.")
        else f"language_model.{name}": draw(name, tuple(shape))
        for name, shape in shapes.items()
    }
    tensors["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": case, "text_config": text}))
    source = open_source(str(tmp_path))
    model, variables = source.load()
    np.testing.assert_allclose(
        full_logits(model, variables, tokens.tolist()), expected, atol=TOLERANCE
    )
    assert source.public is not None
    assert "an encoder for images" in " ".join(source.public.left_out())
    with pytest.raises(UserError, match=rf"write {case}_text, the text model alone"):
        export_family(source.config, case)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vocab_size_per_layer_input": 64}, "vocab_size_per_layer_input=64, expected 128"),
        ({"num_kv_shared_layers": 5}, "a layer of each kind that these have must come before them"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ({"per_layer_config": {"0": {"sliding_window": 4}}}, "sliding_window for layer 0"),
    ],
)
def test_what_gemma4_has_beyond_is_refused_by_name(change, sentence, tmp_path):
    config, _, _, _ = read_case("gemma4_e2b")
    write_case("gemma4_e2b", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=sentence):
        open_source(str(tmp_path))


def test_keys_that_no_layer_of_gemma4_reads_are_left_out(tmp_path):
    """As released E models hold them for the layers that read another's, and no other layer."""
    write_case("gemma4_e2b", tmp_path)
    _, shapes, tokens, expected = read_case("gemma4_e2b")
    tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
    for name in ("k_proj", "v_proj", "k_norm"):
        source = tensors[f"model.layers.0.self_attn.{name}.weight"]
        tensors[f"model.layers.4.self_attn.{name}.weight"] = source + 1
    save_file(tensors, tmp_path / "model.safetensors")
    model, variables = open_source(str(tmp_path)).load()
    found = full_logits(model, variables, tokens.tolist())
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    tensors["model.layers.1.self_attn.k_bias.weight"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="belong to nothing in the model"):
        open_source(str(tmp_path)).load()


def test_gemma4_with_heads_told_for_all_whole_layers_means_the_same(tmp_path):
    """As its released files have them."""
    config, _, _, _ = read_case("gemma4")
    del config["per_layer_config"]
    write_case("gemma4", tmp_path)
    told = {"global_head_dim": 32, "num_global_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | told))
    assert huggingface.open_checkpoint(tmp_path).config == loaded("gemma4")[2].config


@pytest.mark.parametrize(
    "change",
    [
        {"indexer_types": None, "index_topk_pattern": "FSSFSS"},
        {"indexer_types": None, "index_topk_freq": 3, "index_skip_topk_offset": 1},
    ],
)
def test_who_shares_an_indexer_is_said_in_several_ways(change, tmp_path):
    """And indexers of layers that share another's are left out, as of a GLM-5 read with a
    frequency."""
    config, shapes, _, _ = read_case("glm_moe_dsa_shared")
    expected = loaded("glm_moe_dsa_shared")[1]
    tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
    own = [name for name in tensors if name.startswith("model.layers.0.self_attn.indexer.")]
    assert len(own) == 5
    tensors |= {name.replace(".0.", ".1."): tensors[name] + 1 for name in own}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    _, found = open_source(str(tmp_path)).load()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"indexer_types": ["shared"] * 6}, "it must be 'full'"),
        ({"indexer_types": ["full"] * 5}, "for each of num_hidden_layers=6"),
        ({"indexer_types": ["full"] * 5 + ["half"]}, "expected 'full' or 'shared' for each"),
    ],
)
def test_indexers_that_can_not_be_meant_are_refused(change, sentence, tmp_path):
    config, _, _, _ = read_case("glm_moe_dsa_shared")
    write_case("glm_moe_dsa_shared", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=sentence):
        open_source(str(tmp_path))


SCRIPT = Path(__file__).parent / "parity" / "compare.py"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is missing: pip install -c constraints.txt '.[parity]'",
)
def test_transformers_gives_the_same_logits_on_what_was_exported(tmp_path):
    for case in CASES:
        _, variables, checkpoint, _, _ = loaded(case)
        export(checkpoint, variables, tmp_path / case)
    done = subprocess.run(
        [sys.executable, SCRIPT, str(tmp_path), *CASES],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    assert set(differences) == set(CASES)
    assert max(differences.values()) < TOLERANCE, differences
