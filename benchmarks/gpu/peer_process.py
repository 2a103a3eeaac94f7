"""transformers' peer (transformers_peer.py) in a process of its own."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PEER = Path(__file__).with_name("transformers_peer.py")
DEFAULTS = {"device": "cuda", "implementation": "grouped_mm"}


def run_peer(settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The peer's figures, or why there are none ("failure")."""
    # Neither its folder's modules (-P) nor the repository's (elsewhere) may hide those it imports.
    command = [sys.executable, "-P", str(PEER), json.dumps(DEFAULTS | settings)]
    with tempfile.TemporaryDirectory() as elsewhere:
        try:
            done = subprocess.run(
                command, cwd=elsewhere, capture_output=True, text=True, timeout=max(1.0, seconds)
            )
        except subprocess.TimeoutExpired:
            return {"failure": f"stopped after {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()[-1:]  # a traceback has the machine's folders
        return {"failure": f"exit code {done.returncode}: {''.join(said)[:800]}"}
    return json.loads(lines[-1])
