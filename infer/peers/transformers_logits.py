"""Logits by transformers: python transformers_logits.py CHECKPOINT TOKENS_JSON OUT.npy

A program, not a module: it runs in another folder than the checkout's. Where transformers leaves
something of the checkpoint out (it reads GGUF of some architectures, and of these neither biases
nor rotary scaling), it ends with a sentence instead.
"""

import json
import sys
from pathlib import Path

import numpy as np


def main(checkpoint: Path, tokens: list[int], out: Path) -> None:
    import torch  # pyright: ignore[reportMissingImports]  (the `parity` extra)
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    where = {"pretrained_model_name_or_path": checkpoint}
    if checkpoint.is_file():
        where = {"pretrained_model_name_or_path": checkpoint.parent, "gguf_file": checkpoint.name}
    model, report = AutoModelForCausalLM.from_pretrained(
        **where, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"]:
        sys.exit(f"it finds no values for {', '.join(sorted(report['missing_keys'])[:3])}")
    if checkpoint.is_file() and (left_out := what_is_left_out(checkpoint, model)):
        sys.exit(left_out)
    # What stands beside packed weights stays bfloat16 there, whatever dtype was asked for; and
    # transformers refuses to cast a model that was read from packed ones as a whole.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens])).logits[0]
    np.save(out, logits.float().numpy())


def what_is_left_out(checkpoint: Path, model) -> str | None:
    """A sentence on what of a GGUF the model does not have."""
    from gguf import GGUFReader

    reader = GGUFReader(checkpoint)
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    factors = sizes.pop("rope_freqs.weight", 0)
    kinds = [field for key, field in reader.fields.items() if key.endswith(".rope.scaling.type")]
    is_scaled = factors or any(field.contents() != "none" for field in kinds)
    if is_scaled and model.config.rope_parameters["rope_type"] == "default":
        return "it reads no rotary scaling from this file"
    held = sum(parameter.numel() for parameter in model.parameters())
    if held != sum(sizes.values()):
        return f"it reads {held} values of the file's {sum(sizes.values())}"
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
