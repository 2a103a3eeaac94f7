"""Experts fused in two tensors, as transformers holds them and writes them when asked: the model
that its released form is, and nothing that fits badly.
"""

import hashlib
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoint import huggingface
from configs.checks import UserError
from infer.sources import open_source
from parallel.mesh import make_mesh
from tests.checkpoint.cases import PARITY, read_case
from tests.checkpoint.parity.weights import draw

RECORDED = json.loads((PARITY / "configs" / "fused_experts.json").read_text())
EXPERT = re.compile(r"(.*\.)(mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
GATE, UP, DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")


def released(case: str) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and tensors, each expert's by itself."""
    config, shapes, _, _ = read_case(case)
    return config, {name: draw(name, tuple(shape)) for name, shape in shapes.items()}


def fuse(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gates' rows before ups', experts stacked."""
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    fused = {}
    for name, x in tensors.items():
        if match := EXPERT.fullmatch(name):
            found.setdefault((match[1], match[4]), {})[int(match[3])] = x
        else:
            fused[name.replace("block_sparse_moe.gate", "mlp.gate")] = x
    parts = {key: np.stack([x[e] for e in range(len(x))]) for key, x in found.items()}
    for layer in {layer for layer, _ in parts}:
        gate, up, down = (
            next(parts[layer, name] for name in names if (layer, name) in parts)
            for names in (GATE, UP, DOWN)
        )
        fused[f"{layer}mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"{layer}mlp.experts.down_proj"] = down
    return fused


def write(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "m.safetensors"
    )
    (folder / "m.safetensors").rename(folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("case", RECORDED)
@pytest.mark.thinned(2)
def test_the_same_model_bit_for_bit(case, tmp_path):
    config, tensors = released(case)
    fused = fuse(tensors)
    new = {name: x for name, x in fused.items() if name not in tensors}
    assert {
        name: {"shape": list(x.shape), "sha256": hashlib.sha256(x.tobytes()).hexdigest()}
        for name, x in new.items()
    } == RECORDED[case]  # as transformers wrote them, of the same weights
    _, expected = open_source(write(tmp_path / "released", config, tensors)).load()
    _, found = open_source(write(tmp_path / "fused", config, fused)).load()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_mesh_and_a_conversion_read_the_parts_they_need(tmp_path):
    """Of eight experts over four devices; exported, each is a tensor of its own again."""
    config, tensors = released("deepseek_v3")
    source = open_source(write(tmp_path / "fused", config, fuse(tensors)))
    _, expected = source.load()
    mesh = make_mesh(data=1, expert=4, tensor=2)
    _, found = source.load(mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert source.public is not None
    model, variables = source.load_or_leave(dtype="float32")
    out = tmp_path / "out"
    out.mkdir()
    huggingface.export(out, source.public.family, model, variables, dtype="float32", extra={})
    written = load_file(out / "model.safetensors")
    assert set(written) == set(tensors)
    for name, x in tensors.items():
        np.testing.assert_array_equal(written[name], x, err_msg=name)


LAYER = "model.layers.1.mlp.experts"
RELEASED = "model.layers.1.block_sparse_moe.experts"


def beside_single_experts(tensors: dict, single: dict) -> None:
    tensors[f"{RELEASED}.0.w1.weight"] = single[f"{RELEASED}.0.w1.weight"]


def one_layer_alone(tensors: dict, single: dict) -> None:
    for name in ("gate_up_proj", "down_proj"):
        del tensors[f"{LAYER}.{name}"]
    tensors |= {name: x for name, x in single.items() if name.startswith(RELEASED)}


def without_down(tensors: dict, single: dict) -> None:
    del tensors[f"{LAYER}.down_proj"]


def transposed(tensors: dict, single: dict) -> None:
    """As gpt-oss has them."""
    tensors[f"{LAYER}.gate_up_proj"] = tensors[f"{LAYER}.gate_up_proj"].swapaxes(1, 2)


def an_expert_short(tensors: dict, single: dict) -> None:
    tensors[f"{LAYER}.gate_up_proj"] = tensors[f"{LAYER}.gate_up_proj"][1:]


def not_finite(tensors: dict, single: dict) -> None:
    tensors[f"{LAYER}.gate_up_proj"][3, 5, 7] = np.nan


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (beside_single_experts, r"1 tensors .* belong to nothing .*experts\.0\.w1"),
        (one_layer_alone, r"2 tensors are missing .*; 12 tensors .* belong to nothing"),
        (without_down, r"1 tensors are missing \(model\.layers\.1\.mlp\.experts\.down_proj\)"),
        (transposed, r"has the shape \[4, 64, 96\], its config asks for \[4, 96, 64\]"),
        (an_expert_short, r"has the shape \[3, 96, 64\], its config asks for \[4, 96, 64\]"),
        (not_finite, r"gate_up_proj.* has 1 values that are NaN .* the first at \[3, 5, 7\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, sentence, tmp_path):
    config, tensors = released("mixtral")
    fused = fuse(tensors)
    change(fused, tensors)
    source = write(tmp_path / "fused", config, fused)
    with pytest.raises(UserError, match=sentence):
        open_source(source).load()


def test_a_family_without_experts_has_no_fused_ones(tmp_path):
    config, tensors = released("llama")
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = np.zeros((2, 4, 4), np.float32)
    with pytest.raises(UserError, match=r"1 tensors .* belong to nothing in the model"):
        open_source(write(tmp_path / "fused", config, tensors)).load()
