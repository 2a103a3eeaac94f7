"""Untrusted small files (settings, tokenizers), read whole after checks of kind and size."""

import stat
from pathlib import Path

from configs.checks import UserError, require

MAX_BYTES = 200_000_000
"""The largest tokenizer.json in use have 35 MB."""


def read_small_file(path: Path) -> str:
    """The text of a plain file.

    Raises:
      FileNotFoundError: it is missing: only the caller knows whether that matters.
      UserError: it is a folder, or a pipe or device, which would let us wait for ever; it is too
        large, no UTF-8, or may not be read.
    """
    try:
        state = path.stat()
        require(stat.S_ISREG(state.st_mode), f"{path} is no plain file: remove it")
        require(
            state.st_size <= MAX_BYTES,
            f"{path} has {state.st_size} bytes, more than the {MAX_BYTES} that are read of such a "
            "file: get it again",
        )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: download it again") from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
