"""Progress bar for loading a model, and streaming printer for its text, shared by several verbs."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from data.tokenizers.public_tokenizer import PublicTokenizer
from data.tokenizers.text_stream import TextStream
from infer.generation import Generation
from infer.sources import Progress, Source
from parallel.distributed import is_first
from train.progress import ProgressBar

MIN_PARAMETERS = 50_000_000
"""Below this, a model is there before a bar could be seen."""


@contextlib.contextmanager
def reading(source: Source, title: str = "") -> Iterator[Progress]:
    """What `Source.load` tells its progress to; the first process shows a bar once it is told, and
    says what of the source is left out.

    Args:
      title: of another work than reading, about which nothing is said.
    """
    if source.public is not None and is_first() and not title:
        for sentence in source.public.left_out():
            print(f"note: {sentence}", file=sys.stderr, flush=True)
    if source.config.num_parameters < MIN_PARAMETERS or not is_first():
        yield lambda done, total: None
        return
    million = 1_000_000
    total = source.config.num_parameters // million
    bar: ProgressBar | None = None
    last = 0.0
    with contextlib.ExitStack() as shown:

        def update(done: int, whole: int) -> None:
            nonlocal bar, last
            if bar is None:
                bar = ProgressBar(
                    title or f"reading {source.name}", total=total, unit="M parameters"
                )
                shown.enter_context(bar)
            if done == whole or time.monotonic() - last > 0.1:
                last = time.monotonic()
                bar.update(total if done == whole else done // million)

        yield update


def length_shown(made: Generation, max_new_tokens: int) -> str:
    """The length of a text, and that it was cut off where it did not end by itself."""
    count = len(made.tokens[0])
    is_cut = count == max_new_tokens
    return f"{count} tokens" + (f", cut off at --max-new-tokens {count}" if is_cut else "")


class Printer:
    """Shows a text as it grows, the prompt with the first token: what can't be done is said before
    it.
    """

    def __init__(
        self, prompt: str, tokenizer: PublicTokenizer, prompt_ids: Sequence[int] = ()
    ) -> None:
        """
        Args:
          prompt: shown before the text.
          prompt_ids: tokens that the text goes on from; empty where it stands by itself.
        """
        self._prompt, self._stream = prompt, TextStream(tokenizer, prompt_ids)

    def show(self, token_B: np.ndarray) -> None:
        """Prints what the new token adds; a character whose bytes are incomplete waits."""
        self._write(self._prompt + self._stream.add(token_B[token_B >= 0].tolist()))
        self._prompt = ""

    def finish(self) -> None:
        """Prints what still waits when the last token has come."""
        self._write(self._stream.finish())

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
