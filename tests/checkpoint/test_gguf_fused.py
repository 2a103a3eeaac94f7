"""Tensors that newer files hold as one: experts' gate and up, the gate's rows first (llama.cpp's
build_moe_ffn: ffn_moe_gate is the view at 0, ffn_moe_up the one at n_ff), and queries, keys and
values (create_tensor_qkv)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint import gguf
from checkpoint.gguf_fused import SplitTensors
from checkpoint.weight_map import flatten
from configs.checks import UserError
from formats.gguf.reader import GGUFFile
from formats.gguf.writer import Quantization, Tensor, write_gguf
from infer.convert import Conversion, convert
from infer.sources import open_source
from tests.checkpoint.test_gguf import built, placed

GATE, UP, FUSED = "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"
QKV = ("attn_q", "attn_k", "attn_v")


def tensor(name: str, value: np.ndarray) -> Tensor:
    return name, value.shape, lambda: value


def fused(
    path: Path,
    out: Path,
    quantization: Quantization = "F16",
    *,
    parts: tuple[str, ...] = (GATE, UP),
    name: str = FUSED,
    order: tuple[int, ...] = (0, 1, 2),
) -> Path:
    """The same file with the parts as one."""
    file, tensors = GGUFFile(path), []
    for each in file.shapes:
        stem = each.split(".")[2] if each.startswith("blk.") else each
        if stem in parts[1:]:
            continue
        if stem != parts[0]:
            tensors.append(tensor(each, file.read(each)))
            continue
        values = [file.read(each.replace(f".{stem}.", f".{part}.")) for part in parts]
        values = [values[i] for i in order if i < len(values)]
        joined = np.concatenate(values, axis=1 if name == FUSED else 0)
        tensors.append(tensor(each.replace(f".{stem}.", f".{name}."), joined))
    write_gguf(out, file.metadata, tensors, quantization)
    return out


def load(path: Path, case: str) -> dict[str, Any]:
    return flatten(gguf.open_checkpoint(path).load(placed(built(case)[2])))


@pytest.mark.parametrize("quantization", ["F16", "Q8_0"])
@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "deepseek_v3", "gemma4_text moe"])
def test_one_tensor_reads_as_two(case: str, quantization: Quantization, tmp_path: Path):
    family, config, variables = built(case)
    gguf.export(tmp_path / "it.gguf", family, config, variables, None, quantization)
    path = fused(tmp_path / "it.gguf", tmp_path / "fused.gguf", quantization)
    names = GGUFFile(path).shapes
    assert not any(GATE in name or UP in name for name in names)
    before, after = load(tmp_path / "it.gguf", case), load(path, case)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    swapped = fused(tmp_path / "it.gguf", tmp_path / "x.gguf", quantization, order=(1, 0))
    moe = next(name for name in before if name.endswith("moe.gate_up"))
    assert not np.array_equal(load(swapped, case)[moe], before[moe])


@pytest.mark.parametrize("quantization", ["F16", "Q8_0"])
@pytest.mark.parametrize("case", ["llama", "llama stretched", "qwen3_moe", "olmoe", "gpt_oss"])
def test_heads_in_one_tensor_read_as_three(case: str, quantization: Quantization, tmp_path: Path):
    family, config, variables = built(case)
    gguf.export(tmp_path / "it.gguf", family, config, variables, None, quantization)
    how = {"parts": QKV, "name": "attn_qkv"}
    path = fused(tmp_path / "it.gguf", tmp_path / "fused.gguf", quantization, **how)
    assert not any(f".{part}." in name for name in GGUFFile(path).shapes for part in QKV)
    checkpoint = gguf.open_checkpoint(path)
    assert checkpoint.config == gguf.open_checkpoint(tmp_path / "it.gguf").config
    before, after = load(tmp_path / "it.gguf", case), load(path, case)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    swapped = tmp_path / "swapped.gguf"
    fused(tmp_path / "it.gguf", swapped, quantization, order=(0, 2, 1), **how)
    heads = next(name for name in before if name.endswith("attention.kv"))
    assert not np.array_equal(load(swapped, case)[heads], before[heads])


def test_a_conversion_reads_them_too(tmp_path: Path):
    family, config, variables = built("mixtral")
    gguf.export(tmp_path / "it.gguf", family, config, variables, None, "F16")
    path = fused(tmp_path / "it.gguf", tmp_path / "fused.gguf")
    for name in ("it", "fused"):
        target = tmp_path / f"{name}_back"
        convert(open_source(str(tmp_path / f"{name}.gguf")), target, Conversion(to="huggingface"))
    one, two = (tmp_path / f"{name}_back" / "model.safetensors" for name in ("it", "fused"))
    assert one.read_bytes() == two.read_bytes()
    assert path.exists()


def test_heads_that_do_not_divide_are_told(tmp_path: Path):
    family, config, variables = built("llama")
    gguf.export(tmp_path / "it.gguf", family, config, variables, None, "F16")
    how = {"parts": QKV, "name": "attn_qkv"}
    path = fused(tmp_path / "it.gguf", tmp_path / "fused.gguf", **how)
    file = GGUFFile(path)
    for change, sentence in (
        ({"llama.attention.head_count_kv": 3}, r"expected a multiple of 10 rows"),
        ({"llama.attention.head_count": 0}, r"head_count=0"),
    ):
        file.metadata |= change
        with pytest.raises(UserError, match=sentence):
            SplitTensors(file)


def test_rows_that_are_no_halves_are_told(tmp_path: Path):
    family, config, variables = built("mixtral")
    gguf.export(tmp_path / "it.gguf", family, config, variables, None, "F16")
    file = GGUFFile(tmp_path / "it.gguf")
    tensors = [tensor(name, file.read(name)) for name in file.shapes]
    extra = tensor(f"blk.0.{FUSED}.weight", file.read(f"blk.0.{GATE}.weight"))
    write_gguf(tmp_path / "both.gguf", file.metadata, [*tensors, extra], "F16")
    with pytest.raises(UserError, match=r"neither of blk\.0\.ffn_gate_exps\.weight, "):
        gguf.open_checkpoint(tmp_path / "both.gguf")
    odd = [t for t in tensors if GATE not in t[0] and UP not in t[0]]
    odd.append(tensor(f"blk.0.{FUSED}.weight", np.zeros((4, 3, 64), np.float32)))
    write_gguf(tmp_path / "odd.gguf", file.metadata, odd, "F16")
    with pytest.raises(UserError, match=r"shape \(4, 3, 64\), expected a multiple of 2 rows"):
        gguf.open_checkpoint(tmp_path / "odd.gguf")
