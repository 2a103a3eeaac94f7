"""Records what transformers' config classes make of keys that a config.json leaves out, and of
RoPE's keys in every spelling: needs the `parity` extra.

    python tests/checkpoint/parity/record_configs.py

Run it from another folder than the checkout's (transformers looks for a package named `kernels`).
It gives configs/defaults.json ({model_type: {key: default}}: the classes' fields as they are, None
where one is worked out of others) and configs/rope.json (lines of model_type, the keys given, and
the rope_parameters made of them, with max_position_embeddings of 256).
"""

import dataclasses
import json
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig

HERE = Path(__file__).parent / "configs"
FAMILIES = (
    "llama",
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "qwen2",
    "qwen3",
    "mistral",
    "ministral",
    "kimi_k2",
    "dots1",
    "hy_v3",
    "ernie4_5_moe",
    "qwen2_moe",
    "glm4_moe",
    "minimax_m2",
    "smollm3",
    "olmo2",
    "olmo3",
    "flex_olmo",
    "granite",
    "granitemoe",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "ministral3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "llama4_text",
    "llama4",
    "gemma4_text",
    "lfm2",
    "lfm2_moe",
    "gemma4",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5",
    "qwen3_5_moe_text",
    "qwen3_5_moe",
    "kimi_linear",
    "olmo_hybrid",
    "nemotron_h",
    "granitemoehybrid",
    "glm_moe_dsa",
)
KNOWN_AS = {"kimi_k2": "deepseek_v3"}
"""Families that transformers knows by another name alone."""
ROPE_FAMILIES = ("llama", "mixtral", "gpt_oss", "deepseek_v3")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"type": "linear", "factor": 4.0}
BASE, OTHER = {"rope_theta": 500_000.0}, {"rope_theta": 2_000.0}
PLAIN = {"rope_type": "default"}
ROPE: list[dict] = [
    {},
    BASE,
    {"rope_scaling": None},
    {"rope_scaling": None, "rope_parameters": None},
    {"rope_scaling": None} | BASE,
    {"rope_scaling": PLAIN | BASE},
    {"rope_scaling": PLAIN | BASE} | OTHER,
    {"rope_scaling": BASE},
    {"rope_scaling": LINEAR | BASE},
    {"rope_scaling": LINEAR} | OTHER,
    {"rope_scaling": YARN | BASE},
    {"rope_scaling": LLAMA3 | BASE} | OTHER,
    {"rope_parameters": PLAIN | BASE},
    {"rope_parameters": PLAIN | BASE} | OTHER,
    {"rope_parameters": PLAIN} | OTHER,
    {"rope_parameters": YARN} | BASE,
    {"rope_parameters": LINEAR},
    {"rope_scaling": YARN, "rope_parameters": PLAIN | BASE},
    {"rope_scaling": YARN, "rope_parameters": PLAIN | BASE} | OTHER,
    {"rope_scaling": LINEAR | OTHER, "rope_parameters": YARN | BASE},
    {"rope_scaling": None, "rope_parameters": YARN | BASE},
    {"rope_scaling": {}, "rope_parameters": LINEAR | BASE},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
    {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}},
]


def main() -> None:
    HERE.mkdir(exist_ok=True)
    fields = {family: _defaults(family) for family in FAMILIES}
    lines = [_line(family, values) for family, values in fields.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (HERE / "defaults.json").write_text(text)
    rope = [[family, given, _rope(family, given)] for family in ROPE_FAMILIES for given in ROPE]
    (HERE / "rope.json").write_text("[\n" + ",\n".join(map(json.dumps, rope)) + "\n]\n")
    print(f"made with transformers {transformers.__version__}")


def _line(family: str, values: dict) -> str:
    return f"{json.dumps(family)}: {json.dumps(values, sort_keys=True)}"


def _defaults(family: str) -> dict:
    """The class's fields but for those of every model."""
    kind = type(AutoConfig.for_model(KNOWN_AS.get(family, family)))
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    general -= {"tie_word_embeddings"}
    fields = (field for field in dataclasses.fields(kind) if field.name not in general)
    return {field.name: field.default for field in fields if _is_json(field.default)}


def _rope(family: str, given: dict) -> dict:
    keys = json.loads(json.dumps(given))
    made = AutoConfig.for_model(family, max_position_embeddings=256, **keys)
    return made.to_dict()["rope_parameters"]


def _is_json(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


if __name__ == "__main__":
    main()
