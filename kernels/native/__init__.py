"""C++ kernels for the CPU, called by XLA on its own threads.

library.py finds and loads what setup.py built from src/; each operation's own folder calls it.
"""

from kernels.native.library import FLOATS, call, is_available, is_used_for, isa, use_isa
from kernels.native.measured import takes_bfloat16

__all__ = ["FLOATS", "call", "is_available", "is_used_for", "isa", "takes_bfloat16", "use_isa"]
