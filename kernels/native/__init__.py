"""C++ kernels for the CPU, called by XLA on its own threads.

library.py finds and loads what setup.py built from src/; each operation's own folder calls it.
"""

from kernels.native.library import call, is_available, is_used_for, isa, use_isa

__all__ = ["call", "is_available", "is_used_for", "isa", "use_isa"]
