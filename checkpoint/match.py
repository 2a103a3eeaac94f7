"""Matching of a public checkpoint's tensors with a model's, by the headers alone."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from checkpoint.assemble import Tensors, pieces
from checkpoint.families.base import Copy
from checkpoint.weight_map import TOKEN_EXPERTS, Entry, by_tensor, whole_tensor
from configs.architecture import ModelConfig
from configs.checks import UserError
from configs.feed_forward import MoEConfig


def check_names(
    entries: Sequence[Entry],
    tensors: Tensors,
    copies: Sequence[tuple[str, str]],
    ignored: Sequence[str],
    where: Path,
) -> None:
    """Every tensor has a use, and every use its tensor, of the right shape: told by the headers,
    before anything is read.

    Args:
      copies: (tensor, the one it repeats); they need not be there.
      ignored: regular expressions.
    Raises:
      UserError: tensors that are missing, unknown, or of another shape.
    """
    expected = {name: whole_tensor(sharing).shape for name, sharing in by_tensor(entries).items()}
    allowed = expected.keys() | {name for name, _ in copies}
    missing = [name for name in expected if name not in tensors.shapes]
    unknown = [
        name
        for name in tensors.shapes
        if name not in allowed and not any(re.fullmatch(rule, name) for rule in ignored)
    ]
    if missing or unknown:
        raise UserError(
            f"{where} does not fit its config: {_format_mismatch(missing, unknown, tensors)}"
        )
    for name, shape in expected.items():
        found = tuple(tensors.shapes[name])
        if found != shape:
            raise UserError(
                f"{tensors.file(name)}: {name} has the shape {list(found)}, its config asks for "
                f"{list(shape)}: config and tensors are of two models"
            )


def _format_mismatch(missing: list[str], unknown: list[str], tensors: Tensors) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing ({_first_names(missing)})")
    if unknown:
        files = sorted({tensors.file(name).name for name in unknown[:100]})
        parts.append(
            f"{len(unknown)} tensors in {_first_names(files)} belong to nothing in the model "
            f"({_first_names(unknown)})"
        )
    return "; ".join(parts)


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


TIED = Copy("lm_head.weight", of="model.embed_tokens.weight")
"""The output layer of a model with tied embeddings, which its files may hold all the same."""


def expanded_copies(
    copies: Sequence[Copy], tensors: Iterable[str], *, is_tied: bool
) -> list[tuple[str, str]]:
    """The copies among these tensors, (name, the one it repeats).

    Args:
      is_tied: whether the output layer is the embedding.
    """
    if is_tied:
        copies = (*copies, TIED)
    rules = [(re.escape(copy.name).replace(r"\*", r"\d+"), copy.of) for copy in copies]
    found = [(name, of) for name in tensors for rule, of in rules if re.fullmatch(rule, name)]
    return [(name, TIED.of if is_tied and of == TIED.name else of) for name, of in found]


def check_copies(copies: Sequence[tuple[str, str]], tensors: Tensors) -> None:
    """
    Raises:
      UserError: a tensor that should repeat another one, and doesn't.
    """
    for name, of in copies:
        shape = tuple(tensors.shapes[name])
        same = of in tensors.shapes and tuple(tensors.shapes[of]) == shape
        for start, stop in pieces(shape, 0, shape[0]) if same else ():
            mine, other = (tensors.read_rows(each, start, stop) for each in (name, of))
            same = same and np.array_equal(mine, other)
        if not same:
            raise UserError(f"{tensors.file(name)}: {name} {_unlike(name, of)}")


def check_tables(entries: Sequence[Entry], tensors: Tensors, config: ModelConfig) -> None:
    """
    Raises:
      UserError: a table of each token's experts that names one which the model has not.
    """
    ffns = [spec.ffn for spec in config.layer_kinds if isinstance(spec.ffn, MoEConfig)]
    count = min((x.num_experts for x in ffns if x.router.choice == "token"), default=0)
    for name in {entry.name for entry in entries if entry.leaf.endswith(TOKEN_EXPERTS)}:
        table = tensors.read(name)
        wrong = table[(table < 0) | (table >= count) | (table % 1 != 0)]
        if wrong.size:
            raise UserError(
                f"{tensors.file(name)}: {name} names the expert {wrong[0]:g}, the model has 0 to "
                f"{count - 1}: config and tensors are of two models, or the file is damaged"
            )


def _unlike(name: str, of: str) -> str:
    if name == TIED.name:
        return (
            f"differs from {of}, and config.json ties them: set tie_word_embeddings to false there "
            "if the model has an output layer of its own, or get the files again"
        )
    return (
        f"should repeat {of} and does not: a model with an output layer of its own there is not "
        "built"
    )
