"""Programs that are compiled before what they work on is there."""

import ctypes
import sys
from typing import Any


def compile_ahead(function: Any, *arguments: Any) -> None:
    """Compiles a jitted function for such arrays, on these devices; called with them, it runs.

    Compiling takes hundreds of megabytes. Linux gets them back here: glibc keeps what is freed, and
    arrays as large as a model's find no place in it.

    Args:
      arguments: trees of arrays, or of ShapeDtypeStructs with shardings.
    """
    function.lower(*arguments).compile()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
