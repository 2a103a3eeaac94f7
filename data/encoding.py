"""Texts to tokens, on all cores: a batch is encoded while the next one is read."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tokenizers import Tokenizer

from data.corpora import Document

CHARACTERS_AT_ONCE = 1 << 18
"""Of a batch, at least one text: the library keeps a hundred bytes for each of its tokens."""


T = TypeVar("T")


def encoded(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, list[int]]]:
    """Each document and its token ids, in their order; the same as of one text at a time."""
    for batch in ahead(in_batches(documents, lambda document: len(document.text))):
        encodings = tokenizer.encode_batch_fast([document.text for document in batch])
        for document, encoding in zip(batch, encodings, strict=True):
            yield document, encoding.ids


def in_batches(
    items: Iterable[T], size: Callable[[T], int], at_once: int = CHARACTERS_AT_ONCE
) -> Iterator[list[T]]:
    """The items in lists whose sizes add up to about so much."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= at_once:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, of which the next one is made by another thread while one is in use."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, end)
        while True:
            item = coming.result()
            if item is end:
                return
            coming = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]
