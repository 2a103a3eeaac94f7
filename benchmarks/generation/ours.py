"""Our side: the engine with a model in one format of weights.

python -m benchmarks.generation.ours SRC WEIGHTS WORK
"""

import sys
import time

import jax

from benchmarks.generation.work import ROWS, SKIPPED, Work, measures, read_work
from benchmarks.generation.worker import serve
from infer.engine import Engine, EngineOptions, Request
from infer.sources import open_source
from infer.weights import check_format, num_bytes
from model.transformer import Transformer, Variables


class EngineMeasures:
    """Tokens per second of an engine for each number of sequences."""

    def __init__(self, model: Transformer, variables: Variables, work: Work) -> None:
        self._work = work

        def engine(rows: int, length: int) -> Engine:
            return Engine(model, variables, EngineOptions(max_rows=rows, max_length=length))

        self._decoders = {rows: engine(rows, work.decoded_length) for rows in ROWS}
        self._reader = engine(1, len(work.long_prompt) + 1)

    def decode(self, rows: int) -> float:
        """Of all sequences together, once their prompts are read and the first steps done."""
        work, engine = self._work, self._decoders[rows]
        new = 1 + SKIPPED + work.tokens
        counts = {engine.add(Request(prompt, new)): 0 for prompt in work.prompts[:rows]}

        def step() -> int:
            emitted = engine.step()
            for one in emitted:
                counts[one.request] += len(one.tokens)
            return sum(len(one.tokens) for one in emitted)

        while min(counts.values()) < 1 + SKIPPED:
            step()
        began, given = time.perf_counter(), 0
        while engine.has_work():
            given += step()
        return given / (time.perf_counter() - began)

    def prefill(self) -> float:
        """Of the long prompt, up to the first token after it; the second of two readings."""
        seconds = 0.0
        for _ in range(2):
            self._reader.add(Request(self._work.long_prompt, 1))
            began = time.perf_counter()
            while self._reader.has_work():
                self._reader.step()
            seconds = time.perf_counter() - began
        return len(self._work.long_prompt) / seconds


def main(source: str, weights: str, work: str) -> None:
    opened = open_source(source)
    model, variables = opened.load(weights=check_format(weights), for_decoding=True)
    jax.block_until_ready(variables)
    made = EngineMeasures(model, variables, read_work(work))
    facts = {"weight_bytes": num_bytes(variables), "version": f"jax {jax.__version__}"}
    serve(facts, measures(made.decode, made.prefill))


if __name__ == "__main__":
    main(*sys.argv[1:])
