"""Logits by transformers: python transformers_logits.py CHECKPOINT TOKENS_JSON OUT.npy

A program, not a module: it runs in another folder than the checkout's.
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
    model = AutoModelForCausalLM.from_pretrained(
        **where, attn_implementation="eager", dtype=torch.float32
    )
    # What stands beside packed weights stays bfloat16 there, whatever dtype was asked for; and
    # transformers refuses to cast a model that was read from packed ones as a whole.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens])).logits[0]
    np.save(out, logits.float().numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
