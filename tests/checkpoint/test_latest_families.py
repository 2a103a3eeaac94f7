"""Families of 2025 and 2026 beyond their logits: files that hold an encoder for images, names that
transformers writes, projections that several parameters share, on a mesh and in few bits.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoint import huggingface
from checkpoint.public import export_family
from configs.checks import UserError
from infer.logits import full_logits
from infer.sources import open_source
from kernels.quantize import QTensor, dequantize
from parallel.mesh import make_mesh
from tests.checkpoint.cases import PARITY, read_case, write_case
from tests.checkpoint.parity.weights import draw
from tests.checkpoint.test_parity import TOLERANCE, loaded
from tests.exact_rows import exact_rows

__all__ = ["exact_rows"]  # a fixture

WITH_IMAGES = sorted(path.stem for path in (PARITY / "vision").glob("*.json"))


def write(folder: Path, config: dict, shapes: dict) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if "moe" in c else c for c in WITH_IMAGES]
)
def test_the_text_model_of_files_with_an_encoder_for_images(case, tmp_path):
    """Logits of text as the whole model's class has them; what is left out is said."""
    recorded = json.loads((PARITY / "vision" / f"{case}.json").read_text())
    with np.load(PARITY / "vision" / f"{case}.npz") as arrays:
        tokens, expected = arrays["tokens"], arrays["logits"]
    shapes = recorded["tensors"] | {"mtp.fc.weight": [64, 128]}
    source = open_source(write(tmp_path, recorded["config"], shapes))
    model, variables = source.load()
    found = full_logits(model, variables, tokens.tolist())
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert source.public is not None
    images, modules = source.public.left_out()
    count = sum(".visual." in name for name in shapes)
    assert f"an encoder for images in {count} tensors, which are left out" in images
    assert "multi-token modules in 1 tensors" in modules
    family = export_family(source.config, own=source.public.family)
    assert family.model_type == f"{case}_text"
    with pytest.raises(UserError, match=f"write {case}_text, the text model alone"):
        export_family(source.config, wanted=case)


def test_ties_that_contradict_each_other_are_refused(tmp_path):
    recorded = json.loads((PARITY / "vision" / "qwen3_5.json").read_text())
    config = recorded["config"] | {"tie_word_embeddings": False}
    with pytest.raises(UserError, match="tie_word_embeddings=False, and True in its text_config"):
        open_source(write(tmp_path, config, recorded["tensors"]))


def test_positions_of_images_leave_those_of_text_alone(tmp_path):
    """Interleaved M-RoPE, as released: the same model as without its keys."""
    config, shapes, _, _ = read_case("qwen3_5_text")
    rope = config["rope_parameters"]
    rope |= {"mrope_section": [2, 0, 0], "mrope_interleaved": True}
    assert open_source(write(tmp_path, config, shapes)).config == loaded("qwen3_5_text")[0].config


OTHER_NAMES = {
    "qwen3_5_text": ("model.layers.", "model.language_model.layers."),
    "kimi_linear": (".0.mlp.", ".0.block_sparse_moe."),
    "nemotron_h": ("backbone.", "model."),
    "olmo_hybrid": (".input_layernorm.", ".attention_layer_norm."),
}


@pytest.mark.parametrize("case", OTHER_NAMES)
def test_names_that_others_write_are_read(case, tmp_path):
    ours, theirs = OTHER_NAMES[case]
    write_case(case, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace(ours, theirs): x for name, x in tensors.items()}
    assert set(renamed) != set(tensors)
    save_file(renamed, tmp_path / "model.safetensors")
    _, variables = open_source(str(tmp_path)).load()
    jax.tree.map(np.testing.assert_array_equal, variables, loaded(case)[1])
    twice = renamed | {name: x for name, x in tensors.items() if name not in renamed}
    save_file(twice, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="the same tensor by another name"):
        open_source(str(tmp_path))


def test_lists_of_layers_count_from_one(tmp_path):
    """linear_attn_config, as Kimi Linear was released."""
    config, shapes, _, _ = read_case("kimi_linear")
    own = {"head_dim": "linear_head_dim", "num_heads": "linear_num_heads"}
    own |= {"short_conv_kernel_size": "linear_conv_kernel_dim"}
    lists = {"kda_layers": [1, 2], "full_attn_layers": [3]}
    inner = lists | {theirs: config.pop(ours) for theirs, ours in own.items()}
    released = {k: v for k, v in config.items() if k not in ("layer_types", "mlp_layer_types")}
    released |= {"linear_attn_config": inner}
    assert open_source(write(tmp_path, released, shapes)).config == loaded("kimi_linear")[0].config
    inner["kda_layers"] = [0, 1]
    with pytest.raises(UserError, match="expected each of the layers 1 to 3 in one of them"):
        open_source(write(tmp_path, released, shapes))


@pytest.mark.parametrize(
    "layers",
    [
        {"hybrid_override_pattern": "MEM*-ME", "num_hidden_layers": 7},
        {"layers_block_type": ["mamba", "moe", "mamba", "attention", "mlp", "mamba", "moe"]},
    ],
)
def test_layers_by_letters_or_older_names(layers, tmp_path):
    """As Nemotron-H was released."""
    config, shapes, _, _ = read_case("nemotron_h")
    del config["layers_block_type"]
    found = open_source(write(tmp_path, config | layers, shapes)).config
    assert found == loaded("nemotron_h")[0].config


def test_granite_with_older_names_and_a_bound_that_ends(tmp_path):
    """layer_types as released; a bound of steps from above is not built."""
    config, shapes, _, _ = read_case("granitemoehybrid")
    older = {"layer_types": ["mamba", "attention", "mamba"], "mamba_d_head": "auto"}
    older |= {"time_step_limit": [0.6, float("inf")], "position_embedding_type": "nope"}
    found = open_source(write(tmp_path, config | older, shapes)).config
    assert found == loaded("granitemoehybrid")[0].config
    for change, sentence in (
        ({"time_step_limit": [0.0, 0.1]}, r"time_step_limit=\[0.0, 0.1\], expected a number and"),
        ({"mamba_d_head": 12}, "mamba_n_heads=8 of width 12, expected mamba_expand x hidden_size"),
        ({"layer_types": ["mamba", "x", "mamba"]}, "'x'.* expected 'linear_attention' or"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_source(write(tmp_path, config | change, shapes))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hybrid_override_pattern": "MX", "layers_block_type": None}, r"has layers \['X'\] in"),
        ({"mlp_bias": True}, "mlp_bias=True beside experts"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True, expected False"),
        ({"sliding_window": 8}, "sliding_window=8, expected None"),
    ],
)
def test_what_nemotron_has_beyond_is_refused_by_name(change, sentence, tmp_path):
    config, shapes, _, _ = read_case("nemotron_h")
    with pytest.raises(UserError, match=sentence):
        open_source(write(tmp_path, config | change, shapes))


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("qwen3_next", (1, 2, 2)),
        ("nemotron_h_latent", (1, 2, 2)),
        pytest.param("granitemoehybrid", (1, 4, 2), marks=pytest.mark.slow),
        pytest.param("nemotron_h", (1, 4, 1), marks=pytest.mark.slow),
        pytest.param("glm_moe_dsa", (1, 4, 2), marks=pytest.mark.slow),
        pytest.param("glm_moe_dsa_shared", (1, 2, 2), marks=pytest.mark.slow),
        pytest.param("qwen3_5_moe_text", (1, 4, 1), marks=pytest.mark.slow),
        pytest.param("kimi_linear", (1, 4, 2), marks=pytest.mark.slow),
        pytest.param("deepseek_v4", (1, 2, 1), marks=pytest.mark.slow),
        pytest.param("deepseek_v4", (1, 4, 2), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_reads_the_parts_it_needs(case, sizes, tmp_path):
    """Experts over 2 and 4 devices, shared projections cut along heads; and what is exported from
    there is the files again."""
    model, expected, checkpoint, tokens, logits = loaded(case)
    source, mesh = open_source(str(checkpoint.path)), make_mesh(*sizes)
    _, found = source.load(mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with jax.set_mesh(mesh):
        made = full_logits(model, found, tokens)
    np.testing.assert_allclose(made, logits, atol=TOLERANCE)
    config, lazy = source.load_or_leave(dtype="float32")
    folder = tmp_path / "out"
    folder.mkdir()
    huggingface.export(folder, checkpoint.family, config, lazy, dtype="float32", extra={})
    written, tensors = (load_file(f / "model.safetensors") for f in (folder, checkpoint.path))
    assert set(written) == set(tensors)
    for name, x in tensors.items():
        assert written[name].dtype == x.dtype, name
        np.testing.assert_array_equal(written[name], x, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "qwen3_next",
        "nemotron_h",
        "nemotron_h_latent",
        "granitemoehybrid",
        "glm_moe_dsa",
        "glm_moe_dsa_shared",
        "kimi_linear",
    ],
)
@pytest.mark.usefixtures("exact_rows")
def test_int8_computes_what_its_weights_say(case):
    _, _, checkpoint, tokens, logits = loaded(case)
    model, held = open_source(str(checkpoint.path)).load(weights="int8")

    def is_rounded(x):
        return isinstance(x, QTensor)

    leaves = jax.tree.leaves(held, is_leaf=is_rounded)
    assert sum(map(is_rounded, leaves)) > 5
    floats = jax.tree.map(lambda x: dequantize(x) if is_rounded(x) else x, held, is_leaf=is_rounded)
    found, expected = (full_logits(model, v, tokens) for v in (held, floats))
    # Kernels hold x to 2^-23 of its block's largest, and a query nearly at right angles to all keys
    # lets that grow: 4e-4 of deviation 2 were measured. What int8 itself changes is
    # hundreds of times that.
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(expected - logits).max() > 0.2
