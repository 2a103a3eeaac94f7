"""Tiny Llamas in Hugging Face form with a tokenizer, made for one test."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from data.tokenizers.tokenizer import train_tokenizer

TEXT = "The capital of France is Paris and hello world"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}


def byte_level(*specials: str) -> Tokenizer:
    """BPE over bytes with <|endoftext|> at 0 and the specials at the end."""
    tokenizer = train_tokenizer([TEXT] * 3, 280)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    return tokenizer


def sentencepiece(*, unk_token: str | None = "<unk>") -> Tokenizer:
    """BPE over characters, bytes for the rest, a space before each text, as Llama-2's."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Phelowrdi"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello")]
    vocab = {word: i for i, word in enumerate([*words, *("".join(merge) for merge in merges)])}
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    last = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), *last]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, **files: dict[str, Any]) -> None:
    """tokenizer.json and NAME.json for each further file."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


def write_llama(
    folder: Path, bigrams: dict[int, int] | None = None, **changes: Any
) -> dict[str, np.ndarray]:
    """config.json and random tensors; keys that are None are left out of the config.

    Args:
      bigrams: what follows a token, certainly: the layers then do nothing.
    """
    if bigrams is not None:
        changes = {"hidden_size": CONFIG["vocab_size"]} | changes
    config = {k: v for k, v in (CONFIG | changes).items() if v is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = draw(config["vocab_size"], config["hidden_size"])
    if bigrams is not None:
        plant(tensors, bigrams)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def draw(vocab: int, width: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    layers: dict[str, tuple[int, ...]] = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (16, width),
        "self_attn.k_proj": (8, width),
        "self_attn.v_proj": (8, width),
        "self_attn.o_proj": (width, 16),
        "mlp.gate_proj": (32, width),
        "mlp.up_proj": (32, width),
        "mlp.down_proj": (width, 32),
    }
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layers.items()}
    shapes |= {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    shapes["model.norm.weight"] = (width,)
    return {
        name: (random.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def plant(tensors: dict[str, np.ndarray], bigrams: dict[int, int]) -> None:
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.0.{name}.weight"][:] = 0
    tensors["model.norm.weight"][:] = 1
    tensors["model.embed_tokens.weight"][:] = np.eye(len(tensors["lm_head.weight"]))
    tensors["lm_head.weight"][:] = 0
    for before, after in bigrams.items():
        tensors["lm_head.weight"][after, before] = 1
