"""A run of several processes, as they are started by hand: the same run as one process's."""

import dataclasses
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from checkpoint.orbax_store import latest_step
from configs.base import DistillConfig
from configs.checks import UserError
from scripts import distill, train
from tests import tiny
from tests.parallel.test_distributed import end_of, free_port
from tests.scripts.test_scripts import lines, run, settings, start
from train import loop

STEPS = 20
SECONDS_TO_END = 90
"""In which a process must end when another has; jax takes a minute where nothing else tells."""
PATIENCE = 300
"""Seconds for a run that nothing disturbs."""
SUMS = 1e-6  # relative: float32 sums of two processes may be rounded otherwise


def start_two(tmp_path: Path, run_dir: Path, *more: str, second: tuple[str, ...] = ()) -> list:
    """Two processes with a device each; `second` are arguments that only the second gets."""
    arguments = ["v31_nano", "--run-dir", str(run_dir), *settings(tmp_path), "--mesh.expert", "2"]
    arguments += ["--steps", str(STEPS), *more, "--num-processes", "2"]
    arguments += ["--coordinator-address", f"127.0.0.1:{free_port()}", "--process-id"]
    return [
        start(tmp_path, "train", *arguments, "0"),
        start(tmp_path, "train", *arguments, "1", *second),
    ]


def train_two(tmp_path: Path, run_dir: Path, *more: str) -> list[tuple[str, str]]:
    """(stdout, stderr) of two processes that must end well."""
    ends = end_of(start_two(tmp_path, run_dir, *more), PATIENCE)
    assert [code for code, _, _ in ends] == [0, 0], ends
    return [(out, err) for _, out, err in ends]


def losses(run_dir: Path) -> list[float]:
    assert [x["step"] for x in lines(run_dir)] == list(range(1, STEPS + 1))
    return [x["loss"] for x in lines(run_dir)]


def signal_after(
    processes: list[subprocess.Popen], run_dir: Path, count: int, one: int, number: int
) -> list[tuple[int, str, str]]:
    """Ends of the processes, one of which gets the signal when the run has logged some steps."""
    log, deadline = run_dir / "metrics.jsonl", time.monotonic() + PATIENCE
    try:
        while not log.exists() or len(log.read_text().splitlines()) < count:
            assert time.monotonic() < deadline, "the run logged too little"
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.01)
        processes[one].send_signal(number)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    return end_of(processes, SECONDS_TO_END)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An unbroken run of two processes, with experts on both."""
    tmp_path = tmp_path_factory.mktemp("processes")
    tiny.write_sources(tmp_path)
    outputs = train_two(tmp_path, tmp_path / "two")
    return tmp_path, outputs


@pytest.mark.slow
def test_it_is_the_run_of_one_process_with_two_devices(trained):
    tmp_path, _ = trained
    arguments = [*settings(tmp_path), "--mesh.expert", "2", "--steps", str(STEPS)]
    run(tmp_path, "train", "v31_nano", "--run-dir", str(tmp_path / "one"), *arguments)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=SUMS)
    for ours, theirs in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("validation_loss", "validation_bits_per_byte"):
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=SUMS)
    names = [{p.name for p in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_only_the_first_speaks_and_writes(trained):
    tmp_path, ((first, _), (second, _)) = trained
    assert "parameters, " in first
    assert f"trained {STEPS} steps" in first
    assert not [text for text in second.splitlines() if "[Gloo]" not in text]
    assert not list((tmp_path / "two").rglob("*process_1-of*"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_ends_and_they_resume_bit_for_bit(trained, victim):
    tmp_path, _ = trained
    run_dir, step = tmp_path / f"killed {victim}", random.Random().randrange(1, STEPS - 5)
    print("killing after step", step)
    processes = start_two(tmp_path, run_dir)
    ends = signal_after(processes, run_dir, step, victim, signal.SIGKILL)
    assert ends.pop(victim)[0] == -signal.SIGKILL
    code, _, err = ends.pop()
    assert code != 0
    assert "Traceback" not in err
    ours = "has ended, and its own output says why: start all of them again with the same command"
    jaxs = "Terminating process because the JAX distributed service detected fatal errors"
    # The first takes the service with it, for which jax aborts the other within a moment.
    assert ours in err or (victim == 0 and jaxs in err), err
    if victim == 1:
        train_two(tmp_path, run_dir)
        assert losses(run_dir) == losses(tmp_path / "two")


@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_the_same_step(trained):
    tmp_path, _ = trained
    run_dir = tmp_path / "stopped"
    processes = start_two(tmp_path, run_dir, "--steps", "4000", "--checkpoint.every", "4000")
    ends = signal_after(processes, run_dir, 3, 1, signal.SIGTERM)
    assert [code for code, _, _ in ends] == [128 + signal.SIGTERM] * 2, ends
    stopped = latest_step(run_dir / "checkpoints")
    assert f"stopped at step {stopped} of 4000, saved" in ends[0][1]
    assert [x["step"] for x in lines(run_dir)] == list(range(1, stopped + 1))


@pytest.mark.slow
def test_processes_started_otherwise_are_refused(trained):
    tmp_path, _ = trained
    ends = end_of(start_two(tmp_path, tmp_path / "other", second=("--seed", "3")), PATIENCE)
    assert ends[1][0] == 2
    assert (
        "process 1 was started with other settings than the first (seed was 0, now 3)" in ends[1][2]
    )
    assert ends[0][0] == 1
    assert "stopped: " in ends[0][2]


@pytest.mark.slow
def test_a_run_begins_with_a_trained_model_and_learns_from_one(trained):
    """On two processes as on one: init.source, and a teacher."""
    tmp_path, _ = trained
    teacher = str(tmp_path / "two")
    found = {}
    for name, options in (("one", None), ("two", ["--num-processes", "2"])):
        begun = ["train", "v31_nano", "--init.source", teacher]
        taught = ["distill", "v31_nano_student", "--teacher", teacher]
        for verb, *words in (begun, taught):
            words += ["--run-dir", str(tmp_path / f"{verb} {name}"), *settings(tmp_path)]
            words += ["--mesh.expert", "2", "--steps", "3"]
            if options is None:
                run(tmp_path, verb, *words)
            else:
                words += [*options, "--coordinator-address", f"127.0.0.1:{free_port()}"]
                both = [start(tmp_path, verb, *words, "--process-id", i) for i in "01"]
                assert [code for code, _, _ in end_of(both, PATIENCE)] == [0, 0]
            found[verb, name] = [x["loss"] for x in lines(tmp_path / f"{verb} {name}")]
    for verb in ("train", "distill"):
        np.testing.assert_allclose(found[verb, "two"], found[verb, "one"], rtol=SUMS)
        made = [(tmp_path / f"{verb} {n}" / "provenance.json").read_text() for n in ("one", "two")]
        assert made[0] == made[1]
    assert found["train", "one"][0] < lines(tmp_path / "two")[0]["loss"] - 1


@pytest.mark.parametrize("verb", [train, distill])
def test_half_a_launch_is_refused(verb):
    run_name = "v31_nano" if verb is train else "v31_nano_student"
    more = [] if verb is train else ["--teacher", "runs/none"]
    with pytest.raises(UserError, match="--num-processes came without --coordinator-address"):
        verb.main([run_name, *more, "--num-processes", "2"])


def test_a_teachers_cache_needs_one_process(tmp_path, monkeypatch):
    from train import distill as objective

    monkeypatch.setattr(objective, "is_started", lambda: True)
    student = dataclasses.replace(tiny.run(tmp_path), distill=DistillConfig(top_k=4, cache=True))
    with pytest.raises(UserError, match=r"distill\.cache=True keeps .* several processes"):
        objective.distill(student, tmp_path / "run", student.model, lambda mesh: None, None)


def test_a_folder_that_a_process_does_not_see_is_named(tmp_path):
    with pytest.raises(UserError, match=r"process 0 does not see .*none, which the first one"):
        loop._require_seen(tmp_path / "none")
