"""Records what transformers computes on random small models of each family: needs the `parity`
extra.

    python tests/checkpoint/parity/record_fuzz.py [FAMILY ...]

Run it from another folder than the checkout's (transformers looks for a package named `kernels`).
Each family gives fuzz/FAMILY.npz: "cases", JSON as bytes ([config.json, tensor shapes] of each
model), and "logits", float32 [models, LAST, V], of the last places of the tokens. A model's
settings are drawn from those in fuzz_settings.py, of which some are not built here: those must be
refused. What transformers itself refuses is drawn again.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_settings import SETTINGS
from record import build
from record_cases import CASES, KNOWN_AS

HERE = Path(__file__).parent / "fuzz"
MODELS, LENGTH, LAST, VOCAB = 12, 24, 4, 40

LINEAR = (
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "kimi_linear",
    "olmo_hybrid",
    "nemotron_h",
    "granitemoehybrid",
)
"""Families whose layers have recurrent states instead of windows."""
CHOICES = {
    "layer_types": ["sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "no_rope_layers": [0, 1],
}


def draw_settings(family: str, chance: random.Random) -> dict[str, Any]:
    drawn = {key: chance.choice(values) for key, values in SETTINGS[family].items()}
    drawn = json.loads(json.dumps(drawn))  # transformers writes into what it is given
    linear = {"layer_types": ["linear_attention", "full_attention"]} if family in LINEAR else {}
    if family in ("lfm2", "lfm2_moe"):
        linear = {"layer_types": ["conv", "full_attention"]}
    if family == "deepseek_v4":
        linear = {"layer_types": CASES[family][1]["layer_types"][:3]}
        linear["mlp_layer_types"] = ["hash_moe", "moe"]
    mixers = {"layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"]}
    for key, choices in (CHOICES | linear | mixers).items():
        if drawn.get(key) == "some":
            drawn[key] = [chance.choice(choices) for _ in range(drawn["num_hidden_layers"])]
    drawn = {key: value for key, value in drawn.items() if value is not None or key in NULL}
    drawn.setdefault("num_key_value_heads", drawn["num_attention_heads"])
    return {"vocab_size": VOCAB, "max_position_embeddings": 64} | drawn


NULL = (
    "q_lora_rank",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
"""Keys whose null is no default."""


def tokens() -> np.ndarray:
    return np.random.RandomState(1).randint(0, VOCAB, LENGTH)


def is_stable(model_type: str, settings: dict[str, Any], logits: np.ndarray) -> bool:
    """Whether float64 gives these logits to half of what the test allows: a recurrence may let what
    is rounded grow."""
    doubles = {"dtype": torch.float64, "experts_implementation": "eager"}
    exact = build(model_type, settings, tokens(), **doubles)[2]
    return float(np.abs(exact - logits).max()) <= 5e-6 * float(np.abs(exact).max())


def record(family: str) -> None:
    model_type = KNOWN_AS.get(family, CASES[family][0])
    chance, cases, logits, refused = random.Random(family), [], [], 0
    while len(cases) < MODELS:
        assert refused < 4 * MODELS, f"{family}: transformers takes hardly any of these settings"
        try:
            settings = draw_settings(family, chance)
            config, shapes, found = build(model_type, json.loads(json.dumps(settings)), tokens())
        except Exception as error:
            refused += 1
            print(f"{family}: transformers refuses: {type(error).__name__}: {str(error)[:200]}")
            continue
        if family in (*LINEAR, "glm_moe_dsa") and not is_stable(model_type, settings, found):
            refused += 1
            print(f"{family}: rounding changes these logits by too much to tell anything")
            continue
        if family in KNOWN_AS:
            config["model_type"] = family
        cases.append([config, shapes])
        logits.append(found[-LAST:])
    text = np.frombuffer(json.dumps(cases).encode(), np.uint8)
    np.savez_compressed(HERE / f"{family}.npz", cases=text, logits=np.stack(logits))
    print(f"{family}: {len(cases)} models, {refused} refused by transformers")


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name in sys.argv[1:] or SETTINGS:
        record(name)
