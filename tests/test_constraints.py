"""constraints.txt pins what the documented installations bring."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = ("dev", "data", "serve", "parity", "evaluation", "deviceless")
"""Extras that are other readings or tools: those for GPUs are the machine's to choose."""


def name(requirement: str) -> str:
    """As packages are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", requirement)[0]).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {name(line): line for line in lines}


@pytest.mark.parametrize("extra", [None, *PINNED])
def test_every_package_is_pinned(extra: str | None):
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] if extra is None else extras[extra]
    missing = [requirement for requirement in wanted if name(requirement) not in pins()]
    assert not missing
    assert all("==" in line for line in pins().values())
