"""Whether this machine can start a sandbox, asked once."""

import platform
import shutil

import pytest

from configs.checks import UserError
from evals import seccomp
from evals.sandbox import run_program


def unsupported_reason() -> str | None:
    """Why no sandbox can start here."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    try:
        run_program("pass")
    except UserError as error:
        return str(error)
    return None


REASON = unsupported_reason()
needs_sandbox = pytest.mark.skipif(REASON is not None, reason=str(REASON))
needs_filter = pytest.mark.skipif(
    platform.machine() not in seccomp.MACHINES, reason="no filter of system calls for this machine"
)
