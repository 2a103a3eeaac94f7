"""The top-level names are ours, and the layers hold where they are imported from."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic
from tests.test_jax_names import REACHING, module_name

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


def test_importing_everything_touches_no_device_and_no_verb_reaches_into_jax():
    """No import has side effects: a script can still choose its devices afterwards. A release of
    jax that moves its private modules breaks fp8 on a GPU and nothing else.
    """
    verbs = [f"scripts.{name}" for name in moesaic.find_verbs(ROOT)]
    reaching = [module_name(path) for path in REACHING]
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in PACKAGES
        for path in (ROOT / name).rglob("*.py")
        if path.name not in ("__init__.py", "mixtral_torch.py")
    ]
    program = f"""
import importlib, sys
for verb in {verbs}:
    importlib.import_module(verb)
assert not set({reaching}) & set(sys.modules), "a verb imports a module that reaches into jax"
for name in {modules}:
    importlib.import_module(name)
import jax._src.xla_bridge as b
assert not b._backends, b._backends
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
