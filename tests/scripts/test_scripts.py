"""The verbs as a user types them: the whole road, kill -9, and bad input in one sentence."""

import importlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.checks import UserError
from evals.results import read_results
from scripts import command
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


def settings(tmp_path: Path) -> list[str]:
    """Overrides that make v31_nano and its student tiny."""
    return [
        *("--data.source", str(tmp_path / "sources"), "--data.holdout-fraction", "0.3"),
        *("--data.directory", str(tmp_path / "corpus"), "--data.seq-len", "32"),
        *("--model.vocab-size", "300", "--model.d-model", "32", "--model.num-layers", "2"),
        *("--batch-size", "8", "--optimizer.warmup-steps", "2", "--execution.logits-chunks", "2"),
        *("--checkpoint.every", "3", "--steps", str(STEPS), "--validation.every", "6"),
    ]


def environment(tmp_path: Path) -> dict[str, str]:
    """Processes of a test share compiled programs; malloc is set as verbs that train set it, which
    would otherwise import everything again."""
    return os.environ | {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "COLUMNS": "200",
    }


def start(tmp_path: Path, verb: str, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", f"scripts.{verb}", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(tmp_path), text=True, **pipes, **options
    )


def run(tmp_path: Path, verb: str, *arguments: str, code: int = 0, **options) -> tuple[str, str]:
    """(stdout, stderr) of a verb that must end with this code."""
    process = start(tmp_path, verb, *arguments, **options)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, out + err
    return out, err


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An unbroken run on four expert shards."""
    tmp_path = tmp_path_factory.mktemp("scripts")
    tiny.write_sources(tmp_path)
    arguments = [*settings(tmp_path), "--mesh.expert", "4"]
    out, _ = run(tmp_path, "train", "v31_nano", "--run-dir", str(tmp_path / "run"), *arguments)
    assert "trained 12 steps" in out
    return tmp_path


def test_training_leaves_what_it_promises(trained):
    names = {path.name for path in (trained / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "loss.png", "load.png"} <= names
    assert "report.html" in names
    logged = lines(trained / "run")
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    assert {"loss", "tokens_per_second", "learning_rate", "load_cv"} <= set(logged[0])
    assert not list((trained / "run").rglob("*tmp*"))


@pytest.mark.slow
def test_killed_at_a_random_step_it_resumes_bit_for_bit(trained):
    victim, step = trained / "killed", random.Random().randrange(1, STEPS)
    print("killing after step", step)
    arguments = ["v31_nano", "--run-dir", str(victim), *settings(trained), "--mesh.expert", "4"]
    process = start(trained, "train", *arguments)
    log = victim / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < step:
        assert time.monotonic() < deadline, "the run logged too little to be killed"
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    run(trained, "train", *arguments)
    assert [x["loss"] for x in lines(victim)] == [x["loss"] for x in lines(trained / "run")]


@pytest.mark.slow
def test_distil_evaluate_and_generate(trained):
    student, teacher = trained / "student", trained / "run"
    arguments = ["--teacher", str(teacher), "--run-dir", str(student), *settings(trained)]
    run(trained, "distill", "v31_nano_student", *arguments)
    assert {"kl", "cross_entropy"} <= set(lines(student)[-1])
    out, _ = run(trained, "evaluate", str(student), "--output", str(student / "scores"))
    assert "gzip_bpb" in out
    results = {r.task: r for r in read_results(student / "evals.json")}
    assert 0 < results["stdlib_bpb"].value < 16
    assert results["line_completion"].count > 0
    out, _ = run(trained, "generate", str(student), "--prompt", "def f(", "--max-new-tokens", "8")
    assert out.startswith("def f(")
    assert "tokens/s" in out


@pytest.mark.slow
def test_a_grown_run_starts_near_where_its_parent_ended(trained):
    run(trained, "grow", str(trained / "run"), "--operator", "split", "--steps", "3")
    config = json.loads((trained / "run_grown" / "config.json").read_text())
    assert config["model"]["pattern"][0]["ffn"]["num_experts"] == 32
    before, after = lines(trained / "run"), lines(trained / "run_grown")
    assert after[0]["loss"] < (before[0]["loss"] + before[-1]["loss"]) / 2


def damage_checkpoint(folder: Path) -> None:
    newest = max((folder / "checkpoints").iterdir(), key=lambda p: int(p.name))
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)


EMPTY = ["--data.source", "{empty}", "--data.directory", "{tmp}/none"]
BAD = {
    "unknown run": (["train", "v31_nanoo"], "unknown run 'v31_nanoo': did you mean 'v31_nano'"),
    "no run": (["train"], "name a run"),
    "wrong type": (["train", "v31_nano", "--run-dir", "{tmp}/new", "--steps", "many"], "--steps"),
    "mesh that does not divide": (
        ["train", "v31_nano", "--run-dir", "{tmp}/new", "--mesh.expert", "3"],
        "must be divisible by",
    ),
    "mesh that does not divide the heads": (
        ["train", "v31_nano", "--run-dir", "{tmp}/new", "--mesh.tensor", "3"],
        "must be divisible by the mesh axes",
    ),
    "no text": (
        ["train", "v31_nano", "--run-dir", "{tmp}/new", *EMPTY],
        "holds no UTF-8 text",
    ),
    "no such folder": (["evaluate", "{tmp}/nowhere"], "is no folder and no file"),
    "unknown task": (["evaluate", "{run}", "--tasks", "mmlo"], "there is no task 'mmlo'"),
    "no teacher": (["distill", "v31_nano_student"], "--teacher"),
    "vocabulary": (
        ["distill", "v31_nano_student", "--teacher", "{run}", "--run-dir", "{tmp}/other"],
        "the student's vocabulary has 4096 entries, the teacher's 300",
    ),
    "another config": (
        ["train", "v31_nano", "--run-dir", "{run}", "{settings}", "--seed", "7"],
        "(seed was 0, now 7)",
    ),
    "context": (
        ["generate", "{run}", "--prompt", "x", "--max-new-tokens", "9999"],
        "exceed the model's context_length",
    ),
    "experts without labels": (
        ["generate", "{run}", "--prompt", "x", "--expert-preference", "markup"],
        "python -m scripts.label_experts",
    ),
    "domains of another corpus": (["label_experts", "{run}"], "change their names' beginnings"),
    "a factor that is no integer": (
        ["grow", "{run}", "--steps", "3", "--factor", "2.5"],
        "invalid int value: '2.5'",
    ),
    "a factor of one": (
        ["grow", "{run}", "--steps", "3", "--factor", "1"],
        "it must be an integer of at least 2",
    ),
    "upcycling random weights": (["upcycle", "v1_nano"], "upcycling needs trained ones"),
    "unknown option": (["generate", "{run}", "--promt", "x"], "--prompt"),
}


AS_A_USER = ("unknown option", "context")
"""Tried in processes of their own, whose exit code and output are looked at; a process takes four
seconds to start, so the other sentences are those of `main`."""


@pytest.fixture
def places(trained):
    """What stands in braces in BAD; the run there must not change."""
    (trained / "empty").mkdir(exist_ok=True)
    before = (trained / "run" / "metrics.jsonl").read_bytes()
    yield {"tmp": trained, "run": trained / "run", "empty": trained / "empty"}
    assert (trained / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", AS_A_USER)
def test_bad_input_ends_in_one_sentence(places, name):
    arguments, sentence = BAD[name]
    _, err = run(places["tmp"], *(a.format(**places) for a in arguments), code=2)
    assert sentence in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err


@pytest.mark.parametrize("name", sorted(set(BAD) - set(AS_A_USER)))
def test_bad_input_is_refused(places, name, monkeypatch):
    (verb, *arguments), sentence = BAD[name]
    monkeypatch.setattr(command, "use_host_devices", lambda count: None)  # they are there
    given = [[a.format(**places)] if a != "{settings}" else trained_with(places) for a in arguments]
    with pytest.raises(UserError, match=re.escape(sentence)) as refused:
        main_of(verb)([argument for part in given for argument in part])
    assert "\n" not in str(refused.value)


def trained_with(places: dict[str, Path]) -> list[str]:
    return [*settings(places["tmp"]), "--mesh.expert", "4"]


def main_of(verb: str) -> command.Main:
    return importlib.import_module(f"scripts.{verb}").main


@pytest.mark.slow
def test_an_upcycled_run_begins_where_its_dense_source_ended(trained):
    """On expert shards; its bits per byte before the first step are the source's."""
    dense, upcycled = trained / "dense", trained / "upcycled"
    small = [*settings(trained), "--data.tokenizer", "None", "--execution.logits-chunks", "2"]
    arguments = ["smollm2_code", "--run-dir", str(dense), "--init.source", "None", *small]
    run(trained, "train", *arguments)
    own = ["smollm2_code", "--run-dir", str(upcycled), "--init.source", str(dense)]
    run(trained, "upcycle", *own, "--experts", "4", "--every", "2", *small)
    config = json.loads((upcycled / "config.json").read_text())
    assert [x["ffn"]["kind"] for x in config["model"]["pattern"]] == ["dense", "moe"]
    bits = []
    for folder, options in ((dense, []), (upcycled, ["--initial"])):
        output = ["--output", str(folder / "evaluation" / "".join(options))]
        run(trained, "evaluate", str(folder), "--tasks", "stdlib_bpb", *options, *output)
        name = "evals_initial.json" if options else "evals.json"
        bits.append(read_results(folder / name)[0].value)
    assert bits[1] == pytest.approx(bits[0], abs=1e-5)


@pytest.mark.slow
def test_a_truncated_checkpoint_is_named_and_the_one_before_still_works(trained):
    folder = trained / "damaged"
    subprocess.run(["cp", "-r", trained / "run", folder], check=True)
    damage_checkpoint(folder)
    arguments = ["v31_nano", "--run-dir", str(folder), *settings(trained), "--mesh.expert", "4"]
    _, err = run(trained, "train", *arguments, code=2)
    assert "checkpoints/12 can't be read" in err
    assert "the one before is at step 9" in err
    assert "Traceback" not in err
    _, err = run(trained, "generate", str(folder), "--prompt", "x", code=2)
    assert "can't be read" in err
    subprocess.run(["rm", "-r", folder / "checkpoints" / "12"], check=True)
    run(trained, "train", *arguments)
    assert [x["loss"] for x in lines(folder)] == [x["loss"] for x in lines(trained / "run")]


def fill_disk(command: list[str], folder: Path) -> list[str]:
    """The command inside a namespace where the folder is a disk of 2 MiB."""
    script = 'mount -t tmpfs -o size=2m none "$0" && exec "$@"'
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(folder), *command]


@pytest.mark.slow
def test_a_full_disk_ends_in_one_sentence(trained):
    disk = trained / "disk"
    disk.mkdir()
    if subprocess.run(fill_disk(["true"], disk), capture_output=True, check=False).returncode:
        pytest.skip("this machine gives no mount namespace to make a small disk in")
    arguments = ["--run-dir", str(disk / "run"), *settings(trained), "--steps", "60"]
    verb = [sys.executable, "-m", "scripts.train", "v31_nano", *arguments]
    done = subprocess.run(
        fill_disk(verb, disk), cwd=ROOT, env=environment(trained), text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "could not be written" in done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_files_that_may_not_grow_end_in_one_sentence_and_the_run_goes_on(trained):
    """The same failure where no small disk can be made: a limit on the size of files."""
    folder = trained / "limited"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    arguments = ["v31_nano", "--run-dir", str(folder), *settings(trained), "--mesh.expert", "4"]
    _, err = run(trained, "train", *arguments, code=2, preexec_fn=limit)
    assert "can't be written" in err or "could not be written" in err
    assert "Traceback" not in err
    run(trained, "train", *arguments)
    assert [x["loss"] for x in lines(folder)] == [x["loss"] for x in lines(trained / "run")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(trained, number):
    folder = trained / f"signal {number}"
    arguments = ["v31_nano", "--run-dir", str(folder), *settings(trained), "--steps", "5000"]
    process = start(trained, "train", *arguments)
    log = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or not log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, out + err
    assert "the same command goes on from there" in out
    done = lines(folder)[-1]["step"]
    assert (folder / "checkpoints" / str(done)).is_dir()


VERBS = sorted(
    path.stem
    for path in (ROOT / "scripts").glob("*.py")
    if "command.execute(main" in path.read_text()
)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main_of(verb)(["--help"])
    assert ended.value.code == 0
    first_line = (sys.modules[f"scripts.{verb}"].__doc__ or "none").splitlines()[0]
    assert first_line in capsys.readouterr().out
