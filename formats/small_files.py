"""Small JSON files, of strangers or our own: read whole after checks of kind and size."""

import json
import math
import stat
from pathlib import Path
from typing import Any

from configs.checks import UserError, require
from configs.serialization import from_tree

MAX_BYTES = 200_000_000
"""The largest tokenizer.json in use have 35 MB."""
UNLIMITED = math.inf
"""Of what we wrote ourselves, as long as a corpus is: a list of its documents."""
AGAIN = "download it again"


def read_small_file(path: Path, advice: str = AGAIN, max_bytes: float = MAX_BYTES) -> str:
    """The text of a plain file.

    Args:
      advice: what to do about a damaged one; ends the sentence.
    Raises:
      FileNotFoundError: it is missing: only the caller knows whether that matters.
      UserError: it is a folder, or a pipe or device, which would let us wait for ever; it is too
        large, no UTF-8, or may not be read.
    """
    try:
        state = path.stat()
        require(stat.S_ISREG(state.st_mode), f"{path} is no plain file: remove it")
        require(
            state.st_size <= max_bytes,
            f"{path} has {state.st_size} bytes, more than the {max_bytes} that are read of such a "
            f"file: {advice}",
        )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {advice}") from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error


def read_json(path: Path, advice: str = AGAIN, max_bytes: float = MAX_BYTES) -> Any:
    """What a small JSON file holds; arguments and errors are `read_small_file`'s.

    Raises:
      UserError: not JSON.
    """
    text = read_small_file(path, advice, max_bytes)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): {advice}") from error


def read_json_object(path: Path, advice: str = AGAIN) -> dict[str, Any]:
    """The JSON object that a small file holds; errors as `read_json`'s.

    Raises:
      UserError: JSON of another kind.
    """
    values = read_json(path, advice)
    if not isinstance(values, dict):
        raise UserError(f"{path} is a JSON {type(values).__name__}, expected an object: {advice}")
    return values


def read_record(cls: Any, path: Path, advice: str, max_bytes: float = MAX_BYTES) -> Any:
    """What a program of ours wrote down in a JSON file, as the annotated type.

    Args:
      cls: a dataclass, or a list, tuple or dict of such.
      advice: what to do about a damaged file; ends the sentence.
    Raises:
      FileNotFoundError: there is none.
      UserError: it is damaged, or not of this type.
    """
    tree = read_json(path, advice, max_bytes)
    try:
        return from_tree(cls, tree, str(path))
    except UserError as error:
        raise UserError(f"{error}: {advice}") from error
