"""The top-level names are ours, and the layers hold where they are imported from."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


def test_the_house_has_its_rooms():
    assert {"checkpoint", "configs", "data", "evals", "formats", "infer"} <= set(PACKAGES)
    assert {"kernels", "model", "parallel", "scripts", "train"} <= set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_each_name_resolves_inside_the_repository(name):
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin is not None
    place = Path(found.origin).resolve()
    assert place.is_relative_to(ROOT), (
        f"`import {name}` finds {place}, not this repository: an installed package has taken the "
        "name; uninstall it or use a fresh environment"
    )


def test_importing_everything_touches_no_device():
    """No import has side effects: a script can still choose its devices afterwards."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in PACKAGES
        for path in (ROOT / name).rglob("*.py")
        if path.name not in ("__init__.py", "mixtral_torch.py")
    ]
    program = "import " + ", ".join(modules) + "\nimport jax._src.xla_bridge as b\n"
    program += "assert not b._backends, b._backends"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
