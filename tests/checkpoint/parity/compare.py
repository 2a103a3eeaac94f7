"""Prints by case the largest difference between transformers' logits on FOLDER/CASE and the
recorded ones, as JSON: needs the `parity` extra, run from another folder than the checkout's.

    python compare.py FOLDER CASE ...
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent


def difference(folder: Path, case: str) -> float:
    with np.load(HERE / f"{case}.npz") as recorded:
        tokens, expected = recorded["tokens"], recorded["logits"]
    model, report = AutoModelForCausalLM.from_pretrained(
        folder / case, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(tokens[None].astype(np.int64))).logits[0]
    return float(np.abs(logits.numpy() - expected).max())


if __name__ == "__main__":
    root, cases = Path(sys.argv[1]), sys.argv[2:]
    print(json.dumps({case: difference(root, case) for case in cases}))
