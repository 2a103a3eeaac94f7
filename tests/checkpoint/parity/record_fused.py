"""Records how transformers writes experts as it holds them, fused: needs the `parity` extra.

    python tests/checkpoint/parity/record_fused.py [CASE ...]

Run it from another folder than the checkout's (transformers looks for a package named `kernels`).
It gives configs/fused_experts.json: by case, for each tensor that the released form of the same
model has not, its shape and the SHA-256 of its float32 values. The model is the case's with the
weights of weights.py; loaded from this form, its logits are the recorded ones (asserted).
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from weights import draw

HERE = Path(__file__).parent
CASES = ("mixtral", "qwen3_moe", "qwen3_moe_mixed", "olmoe", "deepseek_v2", "deepseek_v3")
CASES += ("deepseek_v32", "qwen2_moe", "glm4_moe", "dots1", "flex_olmo")
CASES += ("qwen3_next", "qwen3_5_moe_text")


def load(folder: Path) -> torch.nn.Module:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def fused(name: str) -> dict[str, dict]:
    case = json.loads((HERE / f"{name}.json").read_text())
    tensors = {tensor: draw(tensor, tuple(shape)) for tensor, shape in case["tensors"].items()}
    recorded = np.load(HERE / f"{name}.npz")
    with tempfile.TemporaryDirectory() as released, tempfile.TemporaryDirectory() as live:
        # Versions differ in what they call DeepSeek-V3.2's kind of layer.
        config = {key: x for key, x in case["config"].items() if x != ["indexed_attention"] * 2}
        (Path(released) / "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(released) / "model.safetensors", metadata={"format": "pt"})
        load(Path(released)).save_pretrained(live, save_original_format=False)
        written = load_file(Path(live) / "model.safetensors")
        tokens = torch.from_numpy(recorded["tokens"][None].astype(np.int64))
        with torch.no_grad():
            logits = load(Path(live))(tokens).logits[0].numpy()
    np.testing.assert_allclose(logits, recorded["logits"], atol=1e-5)
    return {
        tensor: {"shape": list(x.shape), "sha256": hashlib.sha256(x.tobytes()).hexdigest()}
        for tensor, x in sorted(written.items())
        if tensor not in tensors
    }


if __name__ == "__main__":
    path = HERE / "configs" / "fused_experts.json"
    before = json.loads(path.read_text()) if sys.argv[1:] else {}
    found = before | {name: fused(name) for name in sys.argv[1:] or CASES}
    path.write_text(json.dumps(found, indent=1) + "\n")
