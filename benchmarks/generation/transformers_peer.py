"""transformers on PyTorch, in float32 on the CPU.

Runs as a program from another folder than the repository's: transformers takes a package named
`kernels` for its own. Usage: python transformers_peer.py FOLDER THREADS WORK, with a model in
Hugging Face form.
"""

import sys
import time
from typing import Any

try:
    from benchmarks.generation.work import SKIPPED, measures, read_work
    from benchmarks.generation.worker import serve
except ImportError:  # run by another Python, as a file of its own
    from work import SKIPPED, measures, read_work  # pyright: ignore[reportMissingImports]
    from worker import serve  # pyright: ignore[reportMissingImports]


def main(folder: str, threads: str, work_text: str) -> None:
    import torch  # pyright: ignore[reportMissingImports]  (the `parity` extra)
    import transformers  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(int(threads))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    work = read_work(work_text)

    @torch.inference_mode()
    def step(tokens: Any, cache: Any) -> tuple[Any, Any]:
        """The most likely token after each row, [B, 1], and the cache."""
        made = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return made.logits[:, -1:].argmax(dim=-1), made.past_key_values

    def decode(rows: int) -> float:
        token, cache = step(torch.tensor(work.prompts[:rows]), None)
        for _ in range(SKIPPED):
            token, cache = step(token, cache)
        began = time.perf_counter()
        for _ in range(work.tokens):
            token, cache = step(token, cache)
        return rows * work.tokens / (time.perf_counter() - began)

    def prefill() -> float:
        seconds = 0.0
        for _ in range(2):
            began = time.perf_counter()
            step(torch.tensor([work.long_prompt]), None)
            seconds = time.perf_counter() - began
        return len(work.long_prompt) / seconds

    facts = {
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "version": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    serve(facts, measures(decode, prefill))


if __name__ == "__main__":
    main(*sys.argv[1:])
