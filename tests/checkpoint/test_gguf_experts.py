"""Experts whose gate and up lie in one tensor, the gate's rows first (llama.cpp's build_moe_ffn:
ffn_moe_gate is the view at 0, ffn_moe_up the one at n_ff)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint import gguf
from checkpoint.gguf_files import GGUFFile
from checkpoint.gguf_write import Quantization, Tensor, write_gguf
from checkpoint.tables import flatten
from configs.checks import UserError
from infer.convert import Conversion, convert
from infer.sources import open_source
from tests.checkpoint.test_gguf import built, placed

GATE, UP, FUSED = "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"


def tensor(name: str, value: np.ndarray) -> Tensor:
    return name, value.shape, lambda: value


def fused(path: Path, out: Path, quantization: Quantization = "F16", *, order: Any = (GATE, UP)):
    """The same file with gate and up side by side."""
    file, tensors = GGUFFile(path), []
    for name in file.shapes:
        if UP in name:
            continue
        if GATE in name:
            parts = [file.read(name.replace(GATE, part)) for part in order]
            tensors.append(tensor(name.replace(GATE, FUSED), np.concatenate(parts, axis=1)))
        else:
            tensors.append(tensor(name, file.read(name)))
    write_gguf(out, file.metadata, tensors, quantization)
    return out


def load(path: Path, case: str) -> dict[str, Any]:
    return flatten(gguf.open_checkpoint(path).load(placed(built(case)[2])))


@pytest.mark.parametrize("quantization", ["F16", "Q8_0"])
@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_one_tensor_reads_as_two(case: str, quantization: Quantization, tmp_path: Path):
    family, config, variables = built(case)
    gguf.export(tmp_path / "it.gguf", family, config, variables, None, quantization)
    path = fused(tmp_path / "it.gguf", tmp_path / "fused.gguf", quantization)
    names = GGUFFile(path).shapes
    assert not any(GATE in name or UP in name for name in names)
    before, after = load(tmp_path / "it.gguf", case), load(path, case)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    swapped = fused(tmp_path / "it.gguf", tmp_path / "x.gguf", quantization, order=(UP, GATE))
    moe = next(name for name in before if name.endswith("moe.gate_up"))
    assert not np.array_equal(load(swapped, case)[moe], before[moe])


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


def test_rows_that_are_no_halves_are_told(tmp_path: Path):
    family, config, variables = built("mixtral")
    gguf.export(tmp_path / "it.gguf", family, config, variables, None, "F16")
    file = GGUFFile(tmp_path / "it.gguf")
    tensors = [tensor(name, file.read(name)) for name in file.shapes]
    extra = tensor(f"blk.0.{FUSED}.weight", file.read(f"blk.0.{GATE}.weight"))
    write_gguf(tmp_path / "both.gguf", file.metadata, [*tensors, extra], "F16")
    with pytest.raises(UserError, match=r"neither blk\.0\.ffn_gate_exps\.weight nor"):
        gguf.open_checkpoint(tmp_path / "both.gguf")
    odd = [t for t in tensors if GATE not in t[0] and UP not in t[0]]
    odd.append(tensor(f"blk.0.{FUSED}.weight", np.zeros((4, 3, 64), np.float32)))
    write_gguf(tmp_path / "odd.gguf", file.metadata, odd, "F16")
    with pytest.raises(UserError, match=r"shape \(4, 3, 64\), expected \[experts, 2 d_ff"):
        gguf.open_checkpoint(tmp_path / "odd.gguf")
