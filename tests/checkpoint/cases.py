"""The tiny public models whose logits transformers computed: see parity/record.py."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.checkpoint.parity.weights import draw

PARITY = Path(__file__).parent / "parity"
CASES = sorted(path.stem for path in PARITY.glob("*.json"))


def read_case(name: str) -> tuple[dict, dict[str, list[int]], np.ndarray, np.ndarray]:
    """(config.json, tensor shapes, tokens [L], transformers' logits [L, V])."""
    case = json.loads((PARITY / f"{name}.json").read_text())
    with np.load(PARITY / f"{name}.npz") as recorded:
        return case["config"], case["tensors"], recorded["tokens"], recorded["logits"]


def write_case(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writes the checkpoint as transformers would have; its tokens and logits."""
    config, shapes, tokens, logits = read_case(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {tensor: draw(tensor, tuple(shape)) for tensor, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return tokens, logits
