"""The progress bar of a model being read."""

import contextlib
import time
from collections.abc import Iterator

from infer.sources import Progress, Source
from train.progress import ProgressBar

MIN_PARAMETERS = 50_000_000
"""Below this, a model is there before a bar could be seen."""


@contextlib.contextmanager
def reading(source: Source, title: str = "") -> Iterator[Progress]:
    """What `Source.load` tells its progress to."""
    if source.config.num_parameters < MIN_PARAMETERS:
        yield lambda done, total: None
        return
    with ProgressBar(title or f"reading {source.name}", total=0, unit="M parameters") as bar:
        last = 0.0

        def update(done: int, total: int) -> None:
            nonlocal last
            if done == total or time.monotonic() - last > 0.1:
                last = time.monotonic()
                bar.total = total // 1_000_000
                bar.update(done // 1_000_000)

        yield update
