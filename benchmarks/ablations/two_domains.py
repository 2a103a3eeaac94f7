"""Python's library as two domains that share no text: its documentation, and its code without it.

N rows, L tokens of a row.
"""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.ablations.training import VOCAB, spread_rows
from configs.checks import UserError
from configs.data import DataConfig, MixturePart
from data.corpora import Document, read_documents
from data.mixture_rows import rows_of_sources
from data.pipeline import Batch, Corpus, prepare_corpus

FOLDER = Path("runs/corpora/prose_and_code")
DOMAINS = ("prose", "code")
HELD_OUT = 0.1
"""Share of the modules: of documentation there is little."""
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTATION = "pydoc_data"
"""The package whose module is the text of the help."""


def prose_and_code() -> Corpus:
    """Both domains as the parts of one corpus, in this order; made when missing."""
    tokens = FOLDER / "tokens"
    if not tokens.exists():
        for domain, documents in zip(DOMAINS, (_prose(), _code()), strict=True):
            _write(FOLDER / domain, documents)
    parts = [MixturePart(source=str(FOLDER / x), suffix=".txt", weight=1.0) for x in DOMAINS]
    data = DataConfig(mixture=tuple(parts), directory=str(tokens), holdout_fraction=HELD_OUT)
    return prepare_corpus(data, VOCAB)


def held_out_of(corpus: Corpus, num_tokens: int, seq_len: int) -> dict[str, Batch]:
    """Rows of each domain's held-out documents, [N, L], num_tokens in all."""
    parts = rows_of_sources(corpus.held_out(), seq_len)
    return {
        domain: spread_rows(rows, num_tokens // seq_len)
        for domain, rows in zip(DOMAINS, parts, strict=True)
    }


def without_documentation(source: str) -> tuple[str, str]:
    """A module's docstrings, and its code without them and without comments."""
    tree, texts = ast.parse(source), []
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if isinstance(node, DOCUMENTED) and text is not None:
            texts.append(text)
            rest: list[Any] = node.body[1:]
            node.body = rest or [ast.Pass()]
    return "\n\n".join(texts), ast.unparse(tree)


def _modules() -> Iterator[Document]:
    documents = read_documents("stdlib", ".py")
    return (document for document in documents if not document.name.startswith(DOCUMENTATION))


def _prose() -> Iterator[Document]:
    """Docstrings by module, and the topics of the help."""
    for name, text in _modules():
        yield Document(name, without_documentation(text)[0])
    try:
        topics = importlib.import_module(f"{DOCUMENTATION}.topics").topics
    except ImportError as error:
        raise UserError(
            f"this Python has no documentation ({DOCUMENTATION}.topics): some systems have it in a "
            "package of its own, as Debian's libpython3-stdlib"
        ) from error
    yield from (Document(f"topic {name}", text) for name, text in topics.items())


def _code() -> Iterator[Document]:
    return (Document(name, without_documentation(text)[1]) for name, text in _modules())


def _write(folder: Path, documents: Iterator[Document]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in documents:
        if text.strip():
            (folder / f"{name}.txt").write_text(text, encoding="utf-8", errors="replace")
