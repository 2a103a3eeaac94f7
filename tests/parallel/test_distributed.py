"""Several processes: how a launch is found, what they say to each other, how they end."""

import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.checks import UserError
from parallel import distributed
from parallel.distributed import Launch, detected_launch, stated_launch
from parallel.mesh import make_mesh

ROOT = Path(__file__).resolve().parents[2]
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-010],other1",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "4",
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def end_of(processes: list[subprocess.Popen], seconds: float) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; they must end in time."""
    ends = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=seconds)
            ends.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return ends


def start_workers(folder: Path, what: str, **environment: str) -> list[subprocess.Popen]:
    port = str(free_port())
    words = [sys.executable, "-m", "tests.parallel.worker", port]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return [
        subprocess.Popen([*words, i, str(folder), what], env=os.environ | environment, **pipes)
        for i in ("0", "1")
    ]


def test_two_processes_speak_to_each_other(tmp_path):
    for code, out, err in end_of(start_workers(tmp_path, "together"), 120):
        assert code == 0, err
        assert "all is well" in out


@pytest.mark.parametrize("fails", ["0", "1"])
def test_a_failure_ends_the_other_too(tmp_path, fails):
    began = time.monotonic()
    ends = end_of(start_workers(tmp_path, "refused", FAILS=fails), 120)
    assert time.monotonic() - began < 100
    code, _, err = ends.pop(int(fails))
    assert code == 2
    assert "error: the disk is full" in err.splitlines()
    code, _, err = ends.pop()
    assert code == 1
    named = f"stopped: process {fails} has ended: error: the disk is full"
    lost = "stopped: another process of this run has ended"  # gloo may notice it first
    assert any(line.startswith((named, lost)) for line in err.splitlines()), err


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (("host:1234", None, None), "address came without --num-processes and --process-id: give"),
        ((None, 2, 0), "--num-processes and --process-id came without --coordinator-address: give"),
        (("host", 2, 0), "'host' must be the first process's HOST:PORT"),
        ((":1234", 2, 0), "must be the first process's HOST:PORT"),
        (("host:99999", 2, 0), "must be the first process's HOST:PORT"),
        (("host:1234", 0, 0), "--num-processes 0 must be at least 1"),
        (("host:1234", 2, 2), "--process-id 2 must be one of 0 to 1, as --num-processes is 2"),
        (("host:1234", 2, -1), "--process-id -1 must be one of 0 to 1"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(values, sentence):
    with pytest.raises(UserError, match=sentence):
        stated_launch(*values)


def test_a_stated_launch():
    assert stated_launch(None, None, None) is None
    assert stated_launch("[::1]:80", 2, 1) == Launch("[::1]:80", 2, 1)


def test_slurm_is_found(monkeypatch):
    """As srun sets it: one accelerator for each process, or all where the mesh has more."""
    assert detected_launch(8) is None
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    address = f"node007:{4097 % 2**12 + 2**16 - 2**12}"
    assert detected_launch(8) == Launch(address, 8, 5, local_device_ids=(1,))
    assert detected_launch(32) == Launch(address, 8, 5)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert detected_launch(8) is None


def test_a_pod_that_is_no_part_of_an_indexed_job_stands_alone(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert detected_launch(8) is None


def test_devices_that_processes_do_not_divide_are_refused():
    with pytest.raises(UserError, match="has 3 devices, which must be divisible by the 2 proc"):
        distributed.start(Launch("host:1", 2, 0), num_devices=3)


def test_a_port_that_another_program_has_is_refused():
    with socket.create_server(("", 0)) as other:
        address = f"localhost:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"can't listen at {address} \(Address already in use"):
            distributed.start(Launch(address, 2, 0), num_devices=2)


def test_a_process_alone_needs_nobody():
    assert distributed.is_first()
    assert not distributed.is_started()
    assert distributed.first_then_others(lambda: "made", lambda: "seen") == "made"
    assert distributed.lost_process(ValueError("Gloo all-reduce failed")) is None
    distributed.announce_failure("nobody hears")
    distributed.leave()
    mesh = make_mesh(data=2, expert=2, tensor=2)
    assert distributed.batch_block(mesh, 8) == (0, 1)
    distributed.connect(mesh)
    np.testing.assert_array_equal(distributed.on_host(jax.numpy.arange(3)), [0, 1, 2])


def test_processes_that_do_not_come_together_say_so(tmp_path):
    """The first waits for a second that is never started."""
    program = (
        "from parallel import distributed\n"
        "distributed.START_SECONDS = 2\n"
        f"launch = distributed.Launch('127.0.0.1:{free_port()}', 2, 0)\n"
        "distributed.start(launch, 2)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    ((code, _, err),) = end_of([subprocess.Popen([sys.executable, "-c", program], **pipes)], 60)
    assert code == 2
    assert "error: the 2 processes did not come together at 127.0.0.1:" in err
    assert "(this is process 0)" in err
