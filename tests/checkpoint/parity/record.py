"""Records what transformers computes on tiny models of each family: needs the `parity` extra.

    python tests/checkpoint/parity/record.py [CASE ...]

Run it from another folder than the checkout's (transformers looks for a package named `kernels`).
Each case gives CASE.json (config.json as transformers writes it, tensor names and shapes) and
CASE.npz (tokens int32 [L], logits float32 [L, V]); weights follow from their names (weights.py).
"""

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parent))
from record_cases import BASE, CASES, KNOWN_AS, WITH_IMAGES
from weights import draw

HERE = Path(__file__).parent
LENGTH = 40


def build(
    model_type: str,
    settings: dict,
    tokens: np.ndarray,
    kind: type = AutoModelForCausalLM,
    **options: Any,
) -> tuple[dict, dict[str, list[int]], np.ndarray]:
    """(config.json, tensor shapes by name, logits [L, V] of the tokens) of a model with drawn
    weights.

    Args:
      options: of from_pretrained.
    """
    config = AutoConfig.for_model(model_type, **settings)
    with tempfile.TemporaryDirectory() as folder:
        kind.from_config(config).save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        shapes = loadable(read_shapes(path))
        save_file({name: draw(name, tuple(shape)) for name, shape in shapes.items()}, path)
        options = {"attn_implementation": "eager", "dtype": torch.float32} | options
        model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
        assert not any(report.values()), report
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(tokens[None].astype(np.int64))).logits[0]
        written = json.loads((Path(folder) / "config.json").read_text())
    return written, shapes, logits.numpy()


SAVED_AS = (
    (r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),
    (r"\.attention_layer_norm\.", ".input_layernorm."),
    (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
)
"""Names that transformers writes where it reads others as well: Kimi Linear's dense layers by the
names of experts, OLMo Hybrid's norms after attention by those of the ones before feed-forward."""


def loadable(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The tensors by names that mean one thing, and each convolution with its projection's
    channels: transformers writes what it read as three in equal thirds."""
    found = {}
    for name, shape in shapes.items():
        projection = shapes.get(name.replace("_conv1d.", "_proj."), shape)
        whole = [projection[0], *shape[1:]] if "_conv1d." in name else shape
        for pattern, replacement in SAVED_AS:
            name = re.sub(pattern, replacement, name)
        found[name] = whole
    return found


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Of a safetensors file, by its header."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: value["shape"] for name, value in header.items() if name != "__metadata__"}


def tokens() -> np.ndarray:
    return np.random.RandomState(0).randint(0, BASE["vocab_size"], LENGTH).astype(np.int32)


def main(names: list[str]) -> None:
    for name in names or [*CASES, *WITH_IMAGES]:
        if name in WITH_IMAGES:
            settings, folder = WITH_IMAGES[name], HERE / "vision"
            settings = settings | {"text_config": BASE | settings["text_config"]}
            found = build(name, settings, tokens(), AutoModelForImageTextToText)
        else:
            model_type, settings = CASES[name]
            found, folder = build(model_type, BASE | settings, tokens()), HERE
        config, shapes, logits = found
        if name in KNOWN_AS:
            config["model_type"] = name
        case = {
            "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "config": config,
            "tensors": shapes,
        }
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(case, indent=1, sort_keys=True) + "\n")
        np.savez_compressed(folder / f"{name}.npz", tokens=tokens(), logits=logits)
        print(f"{name}: logits {logits.shape}, std {logits.std():.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
