"""llama.cpp with a model in one of its formats, by the functions of its own library.

python -m benchmarks.generation.llama_peer F16.gguf KIND THREADS WORK

Of the package llama-cpp-python (the extra `llama`). Keys and values are float16, its default.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation.work import ROWS, SKIPPED, Work, measures, read_work
from benchmarks.generation.worker import serve

KINDS = {"F32": 0, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3}
"""Formats of a file by llama.h's numbers. In those of 4 bits, embedding and output layer have about
8."""


def quantize(source: Path, target: Path, kind: str, threads: int) -> None:
    """A GGUF of floats in another format.

    Raises:
      RuntimeError: llama.cpp refuses.
    """
    llama_cpp = _library()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = KINDS[kind], threads
    files = (str(source).encode(), str(target).encode())
    if llama_cpp.llama_model_quantize(*files, params) != 0:
        raise RuntimeError(f"llama.cpp can't bring {source} into {kind}")


def _library() -> Any:
    import llama_cpp  # pyright: ignore[reportMissingImports]  (the extra `llama`)

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_silence(llama_cpp), None)
    return llama_cpp


def _silence(llama_cpp: Any) -> Any:
    """Kept for as long as the library may call it."""
    global _silent
    if _silent is None:
        _silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    return _silent


_silent: Any = None


class Context:
    """A number of sequences of one model, read and continued together."""

    def __init__(self, model: Any, *, rows: int, length: int, batch: int, threads: int) -> None:
        """
        Args:
          length: tokens of a sequence at most.
          batch: tokens of a call at most.
        Raises:
          RuntimeError: no memory.
        """
        self._llama = _library()
        params = self._llama.llama_context_default_params()
        params.n_seq_max, params.n_ctx = rows, rows * -(-length // 256) * 256
        params.n_batch = params.n_ubatch = batch
        params.n_threads = params.n_threads_batch = threads
        self._context = self._llama.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no room for {rows} sequences of {length} tokens")
        vocab = self._llama.llama_model_get_vocab(model)
        self._vocab_size = self._llama.llama_vocab_n_tokens(vocab)
        self._batch = self._llama.llama_batch_init(batch, 0, 1)
        self._lengths = [0] * rows

    def clear(self) -> None:
        """Forgets all sequences."""
        memory = self._llama.llama_get_memory(self._context)
        self._llama.llama_memory_clear(memory, True)
        self._lengths = [0] * len(self._lengths)

    def read(self, tokens: list[list[int]]) -> list[int]:
        """Each sequence goes on with these tokens, in one call; the most likely next one of each.

        Raises:
          RuntimeError: llama.cpp refuses.
        """
        batch, last = self._batch, []
        place = 0
        for sequence, more in enumerate(tokens):
            for token in more:
                batch.token[place], batch.pos[place] = token, self._lengths[sequence]
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = False
                self._lengths[sequence] += 1
                place += 1
            batch.logits[place - 1] = True
            last.append(place - 1)
        batch.n_tokens = place
        code = self._llama.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode failed with code {code}")
        return [int(self._logits(place).argmax()) for place in last]

    def _logits(self, place: int) -> np.ndarray:
        pointer = self._llama.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(pointer, (self._vocab_size,))


class LlamaMeasures:
    """Tokens per second of llama.cpp for each number of sequences."""

    def __init__(self, model: Any, work: Work, threads: int) -> None:
        self._work = work
        whole = len(work.long_prompt)
        batch = max(whole, max(ROWS) * len(work.prompts[0]))

        def context(rows: int, length: int) -> Context:
            return Context(model, rows=rows, length=length, batch=batch, threads=threads)

        self._decoders = {rows: context(rows, work.decoded_length) for rows in ROWS}
        self._reader = context(1, whole + 1)

    def decode(self, rows: int) -> float:
        context = self._decoders[rows]
        context.clear()
        tokens = context.read(self._work.prompts[:rows])
        for _ in range(SKIPPED):
            tokens = context.read([[token] for token in tokens])
        began = time.perf_counter()
        for _ in range(self._work.tokens):
            tokens = context.read([[token] for token in tokens])
        return rows * self._work.tokens / (time.perf_counter() - began)

    def prefill(self) -> float:
        seconds = 0.0
        for _ in range(2):
            self._reader.clear()
            began = time.perf_counter()
            self._reader.read([self._work.long_prompt])
            seconds = time.perf_counter() - began
        return len(self._work.long_prompt) / seconds


def load(path: Path) -> Any:
    """
    Raises:
      RuntimeError: llama.cpp can't read it.
    """
    llama_cpp = _library()
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp can't read {path}")
    return model


def main(source: str, kind: str, threads: str, work: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kind}.gguf"
        quantize(Path(source), path, kind, int(threads))
        model = load(path)
    made = LlamaMeasures(model, read_work(work), int(threads))
    facts = {"weight_bytes": _library().llama_model_size(model), "version": _version()}
    serve(facts, measures(made.decode, made.prefill))


def _version() -> str:
    return f"llama-cpp-python {_library().__version__}"


if __name__ == "__main__":
    main(*sys.argv[1:])
