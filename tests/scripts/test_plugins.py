"""A plugin of JAX that can't start, as CUDA's on a machine without a GPU: a line, no more."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = '''
def initialize():
    raise RuntimeError("""Unable to load CUDA. Is it installed?
----------------
and many lines more""")
'''
JAX = "import jax; print(jax.devices()[0].platform)"
OURS = """
import jax
from scripts import command
command.execute(lambda argv: print(jax.devices()[0].platform))
"""


def test_a_plugin_without_its_device_is_told_in_one_line(tmp_path):
    """The log of JAX itself: without the filter its traceback is there."""
    folder = tmp_path / "jax_plugins" / "xla_cuda13"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PLUGIN)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    shown = {}
    for name, program in {"ours": OURS, "jax": JAX}.items():
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, "cpu\n"), done.stderr
        shown[name] = done.stderr
    assert "Traceback" in shown["jax"]
    assert shown["ours"].count("\n") == 1, shown["ours"]
    assert "plugin jax_plugins.xla_cuda13 is installed and can't start" in shown["ours"]
    assert "Unable to load CUDA. Is it installed? (pip uninstall" in shown["ours"]
