"""Memory there is, from files as Linux writes them, and runs that need more."""

import re
from pathlib import Path

import pytest

from configs.checks import UserError
from configs.cli import load_run
from planning import available
from planning.available import (
    available_memory,
    distillation_memory,
    logits_bytes,
    require_memory,
    teacher_bytes,
)
from scripts import command, train

MEMINFO = """MemTotal:       24000000 kB
MemFree:          1000000 kB
MemAvailable:    20000000 kB
SwapTotal:       5000000 kB
SwapFree:        3000000 kB
HugePages_Total:       0
"""
GIB = 2**30


def host(root: Path, group: str = "/") -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    (root / "proc/self/cgroup").write_text(f"1:name=systemd:/x\n0::{group}\n")
    return root


def limit(root: Path, group: str, most: int | str, used: int, cached: int = 0) -> None:
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 0\n")


def test_a_host_without_limits(tmp_path):
    assert available_memory(host(tmp_path)) == 1024 * 23_000_000
    limit(tmp_path, "", "max", GIB)
    assert available_memory(tmp_path) == 1024 * 23_000_000


def test_the_tightest_group_counts_and_its_cache_does_not(tmp_path):
    host(tmp_path, "/job/step")
    limit(tmp_path, "job", 8 * GIB, 3 * GIB, cached=GIB)
    assert available_memory(tmp_path) == 6 * GIB
    limit(tmp_path, "job/step", 4 * GIB, GIB)
    assert available_memory(tmp_path) == 3 * GIB


def test_other_systems_say_nothing(tmp_path):
    assert available_memory(tmp_path) is None


def test_this_machine_has_some():
    if Path("/proc/meminfo").exists():
        assert 2**24 < (available_memory() or 0) < 2**50


def test_a_run_beyond_the_machine_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    """v31's 14,031M parameters take 16 bytes each for weights, gradients and Adam alone."""
    monkeypatch.setattr(command, "use_host_devices", lambda count: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"training v31 needs about .* and this machine has") as no:
        train.main(["v31"])
    state = float(re.search(r"\(([\d,.]+) for weights", str(no.value))[1].replace(",", ""))
    assert state >= 16 * load_run("v31").model.num_parameters / 1e9
    assert list(tmp_path.iterdir()) == []


def test_what_fits_is_let_through(monkeypatch):
    run = load_run("v31_nano")
    monkeypatch.setattr(available, "available_memory", lambda: 4 * 10**9)
    require_memory(run)
    monkeypatch.setattr(available, "available_memory", lambda: None)
    require_memory(run)
    monkeypatch.setattr(available, "available_memory", lambda: 10**8)
    with pytest.raises(UserError, match=r"has 0\.1 GB to give"):
        require_memory(run)


class Accelerator:
    """In the place of a GPU, of which each has its own memory."""

    platform = "gpu"

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def memory_stats(self):
        return None if self.limit is None else {"bytes_limit": self.limit}


def test_an_accelerator_has_its_own_memory(monkeypatch):
    run = load_run("v31")
    monkeypatch.setattr(available.jax, "local_devices", lambda: [Accelerator(72 * 10**9)])
    require_memory(run)
    monkeypatch.setattr(available.jax, "local_devices", lambda: [Accelerator(None)])
    require_memory(run)
    monkeypatch.setattr(available.jax, "local_devices", lambda: [Accelerator(30 * 10**9)])
    with pytest.raises(UserError, match=r"about \d\d\.\d GB .* each device of 128 has 30\.0 GB"):
        require_memory(run)


def test_a_teachers_weights_count(monkeypatch):
    """v31's alone are 56 GB in float32."""
    student = load_run("v31_nano_student")
    monkeypatch.setattr(available, "available_memory", lambda: 50 * 10**9)
    require_memory(student)
    with pytest.raises(UserError, match=r"about 56\.\d GB"):
        require_memory(student, load_run("v31").model)
    require_memory(student, load_run("v31").model, weights="int8")


def test_what_a_step_of_distillation_takes_adds_up():
    """A teacher of 4.6M parameters: 18.4 MB in float32, a quarter and its scales in int8; a quarter
    of a step's 4,096 tokens has logits over 4,096 words at once."""
    student, teacher = load_run("v31_nano_student"), load_run("v31_nano").model
    sentence = distillation_memory(student, [teacher], "float32")
    total, *parts = (float(x) for x in re.findall(r"(\d+\.\d\d)", sentence))
    assert total == pytest.approx(sum(parts), abs=0.02)
    assert teacher_bytes([teacher], "float32") == 4 * teacher.num_parameters
    assert 0.25 < teacher_bytes([teacher], "int8") / (4 * teacher.num_parameters) < 0.35
    assert logits_bytes(student, [teacher]) == 4 * 1024 * 4096
