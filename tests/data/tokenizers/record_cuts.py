"""Records how llama.cpp tokenises hard texts with a tiny vocabulary under each of its pre kinds.

    python tests/data/tokenizers/record_cuts.py tests/data/tokenizers/cuts.json

It needs llama-cpp-python, gguf and tokenizers. The vocabularies learn merges from the very texts,
uncut, so that tokens reach over the places where a wrong cut would be.
"""

import json
import sys
import tempfile
from pathlib import Path

from record_smollm2 import TEXTS

KINDS = ["gpt-2", "smollm", "olmo", "llama-bpe", "qwen2", "gpt-4o", "deepseek-llm", "deepseek-v3"]
"""Of equal ones one."""
EXTRA = ["HTTPServer camelCase XMLHttpRequest iPhone's ABCdef", "the then there banana aaa aaaaaa"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def main(out: Path) -> None:
    texts = [*TEXTS, *EXTRA]
    teaching = [text for text in texts if "<|" not in text]
    byte_tokens, merges = byte_vocabulary(teaching)
    tokens = [*SPECIALS, *byte_tokens]
    types = [3] * len(SPECIALS) + [1] * len(byte_tokens)
    bytes_ = {"tokens": tokens, "token_type": types, "merges": merges}
    record = {"texts": texts, "bytes": bytes_, "ids": {}, "pieces": {}}
    for kind in KINDS:
        record["ids"][kind] = tokenized(bytes_ | {"model": "gpt2", "pre": kind}, texts)
    pieces = sentencepiece_vocabulary(teaching)
    record["pieces"] = pieces
    for prefix in (True, False):
        values = pieces | {"model": "llama", "add_space_prefix": prefix}
        record["ids"][f"llama {prefix}"] = tokenized(values, texts)
    record["lines"] = lines_vocabulary(teaching)
    record["ids"]["gemma4"] = tokenized(record["lines"] | {"model": "gemma4"}, texts)
    out.write_text(json.dumps(record) + "\n")


def byte_vocabulary(texts: list[str]) -> tuple[list[str], list[str]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [*texts, *texts], trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet)
    )
    model = json.loads(tokenizer.to_str())["model"]
    return list(model["vocab"]), [" ".join(merge) for merge in model["merges"]]


def sentencepiece_vocabulary(texts: list[str]) -> dict[str, list]:
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    spaced = [text.replace(" ", "▁") for text in texts if text.isascii()]
    tokenizer.train_from_iterator([*spaced, *spaced], trainers.BpeTrainer(vocab_size=400))
    order = tokenizer.get_vocab()
    longer = sorted((t for t in order if len(t) > 1), key=lambda token: order[token])
    letters = sorted(t for t in order if len(t) == 1)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *longer, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(longer) + len(letters))]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(longer) + len(letters))
    return {"tokens": [*tokens, "<repo_name>"], "scores": [*scores, 0.0], "token_type": [*types, 4]}


def lines_vocabulary(texts: list[str]) -> dict[str, list]:
    """Of Gemma 4's kind: merges inside lines alone."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    lines = [
        line.replace(" ", "▁") for text in texts if text.isascii() for line in text.split("\n")
    ]
    tokenizer.train_from_iterator([*lines, *lines], trainers.BpeTrainer(vocab_size=400))
    model = json.loads(tokenizer.to_str())["model"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *model["vocab"], "\n", "<repo_name>"]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(model["vocab"]) + 1) + [4]
    merges = [" ".join(merge) for merge in model["merges"]]
    return {"tokens": tokens, "token_type": types, "merges": merges}


def tokenized(values: dict, texts: list[str]) -> list[list[list[int]]]:
    """[text as it is] of each, and [specials read] where it may have some."""
    from gguf import GGUFWriter
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        writer = GGUFWriter(path, "llama")
        for key, value in values.items():
            adds = {list: writer.add_array, bool: writer.add_bool, str: writer.add_string}
            adds[type(value)](f"tokenizer.ggml.{key}", value)
        for key, token_id in {"bos": 1, "eos": 2, "unknown": 0}.items():
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token_id)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        llama = Llama(model_path=str(path), vocab_only=True, verbose=False)
        return [
            [llama.tokenize(text.encode(), add_bos=True, special=s) for s in specials(text)]
            for text in texts
        ]


def specials(text: str) -> tuple[bool, ...]:
    return (False, True) if "<" in text else (False,)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
