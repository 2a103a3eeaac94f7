"""The card, its driver, and the versions that a report was made with."""

import datetime
import importlib.metadata
import shutil
import subprocess

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "triton", "transformers", "tokamax")
WANTED = ("flax", "optax", "orbax-checkpoint", "rich", "matplotlib", "numpy")
"""What the report needs beside jax; without torch and transformers it has no peers."""


def missing_packages() -> list[str]:
    """Names of packages that the report can't do without and that are not installed."""
    return [name for name in WANTED if _version(name) is None]


def environment() -> dict[str, object]:
    """The card's name, driver and memory, the versions, and the day."""
    device = jax.devices()[0]
    found = {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "card": device.device_kind,
        "driver": _driver(),
        "versions": found,
        "date": datetime.date.today().isoformat(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    """As the driver's own tool says it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
