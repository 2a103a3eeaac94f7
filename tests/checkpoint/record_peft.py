"""Records what PEFT computes with adapters that checkpoint/peft.py wrote: peft_logits.npz.

python -m tests.checkpoint.record_peft write FOLDER       in this environment
python tests/checkpoint/record_peft.py logits FOLDER      in one with torch, transformers, peft
"""

import sys
from pathlib import Path
from typing import Any

CASES = ("llama", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "glm4_moe")
WITHOUT_DENSE = ("deepseek_v3", "glm4_moe")
"""Models with dense layers beside experts: PEFT 0.21 takes gate_proj for the experts' alone there
and leaves the dense layers' adapters out, so these have none."""


def write(folder: Path) -> None:
    """Base models and adapters."""
    from checkpoint.peft import write_peft
    from infer.adapters import model_entries, model_forms
    from infer.sources import open_source
    from model.transformer import Transformer
    from tests.checkpoint.cases import write_case
    from tests.checkpoint.drawn_adapters import ALPHA, RANK

    for case in CASES:
        write_case(case, folder / case)
        source = open_source(str(folder / case))
        assert source.public is not None
        entries = model_entries(source.config, source.public.family.rows)
        drawn = drawn_for_peft(case, Transformer(source.config))
        forms = model_forms(source.config)
        target = folder / f"{case}_adapter"
        write_peft(target, entries, forms, drawn, rank=RANK, alpha=ALPHA, base=str(folder / case))


def drawn_for_peft(case: str, model: Any) -> dict[str, Any]:
    """The case's adapters, of matrices that PEFT puts them on."""
    from model.adapters import target_of
    from tests.checkpoint.drawn_adapters import draw_adapters

    left_out = "dense" if case in WITHOUT_DENSE else None
    drawn = draw_adapters(model)
    return {name: x for name, x in drawn.items() if target_of(tuple(name.split("."))) != left_out}


def record(folder: Path) -> None:
    """Logits of the recorded tokens."""
    import numpy as np
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    here, made = Path(__file__).parent, {}
    for case in CASES:
        with np.load(here / "parity" / f"{case}.npz") as recorded:
            tokens, logits = recorded["tokens"], recorded["logits"]
        base = AutoModelForCausalLM.from_pretrained(
            folder / case, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        ids = torch.tensor(tokens.reshape(1, -1))
        with torch.no_grad():
            plain = base(ids).logits[0].numpy()
            adapted = PeftModel.from_pretrained(base, folder / f"{case}_adapter").eval()
            made[case] = adapted(ids).logits[0].numpy()
        print(case, abs(plain - logits).max(), abs(made[case] - plain).max())
    np.savez_compressed(here / "peft_logits.npz", **made)


if __name__ == "__main__":
    {"write": write, "logits": record}[sys.argv[1]](Path(sys.argv[2]))
