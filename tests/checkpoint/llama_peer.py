"""llama.cpp's answer about a GGUF file, in a process of its own.

python llama_peer.py FILE.gguf OUT.npy logits 3 1 4      all logits of these tokens, [L, V]
python llama_peer.py FILE.gguf OUT.npy greedy 32 3 1 4   the next 32 tokens
"""

import sys

import numpy as np

FLOAT32 = 0
"""ggml's number of it, for the caches of keys and values."""


def main(path: str, out: str, what: str, *numbers: str) -> None:
    from llama_cpp import Llama

    settings = {"n_threads": 1, "n_threads_batch": 1, "verbose": False, "flash_attn": False}
    if what == "logits":
        settings |= {"type_k": FLOAT32, "type_v": FLOAT32}
    llama = Llama(model_path=path, n_ctx=256, logits_all=True, **settings)
    tokens = [int(number) for number in numbers]
    if what == "logits":
        llama.eval(tokens)
        np.save(out, llama.scores[: len(tokens)])
        return
    count, said = tokens[0], tokens[1:]
    llama.eval(said)
    for _ in range(count):
        said.append(int(llama.scores[len(said) - 1].argmax()))
        llama.eval(said[-1:])
    np.save(out, said[-count:])


if __name__ == "__main__":
    main(*sys.argv[1:])
