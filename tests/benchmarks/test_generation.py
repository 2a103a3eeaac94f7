"""scripts.bench_generation: turns alternate, figures are those of the work, absences are told."""

import dataclasses
import importlib.util
import os
import sys

import numpy as np
import pytest

from benchmarks import machine
from benchmarks.generation import llama_peer, memory, ours, peaks, programs, quality, report, speed
from benchmarks.generation.programs import Programs, llama_name, our_name
from benchmarks.generation.work import MEASURES, make_work, read_work
from benchmarks.generation.worker import Program, WorkerFailure, started
from configs.architecture import LayerSpec
from configs.checks import UserError
from configs.feed_forward import DenseConfig
from infer.logits import full_logits
from infer.sources import open_source
from model.transformer import Transformer
from scripts import bench_generation
from tests import tiny
from tests.checkpoint.tiny_folder import write_llama

FAKE = """
import sys
from benchmarks.generation.worker import serve
name, log, speed = sys.argv[1:]
def measure(what):
    with open(log, "a") as file:
        file.write(f"{name} {what}\\n")
    return float(speed)
measures = {w: (lambda w=w: measure(w)) for w in ("decode 1", "decode 8", "prefill")}
print("a library's own line")
serve({"weight_bytes": 4_000_000, "version": "1"}, measures)
"""
BROKEN = "import sys; sys.exit('no such library')"

DENSE = DenseConfig(d_ff=48)


def program(name: str, code: str, *arguments: str, is_peer: bool = True) -> Program:
    command = (sys.executable, "-c", code, *arguments)
    return Program(name, command, programs.ROOT, os.environ, is_peer=is_peer)


@pytest.fixture(autouse=True)
def no_rests(monkeypatch):
    monkeypatch.setattr(speed, "RESTS", 0.0)


def test_programs_take_turns_in_each_measure(tmp_path):
    log = str(tmp_path / "log")
    names = (our_name("int8"), llama_name("Q8_0"))
    found = [program(name, FAKE, name, log, rate) for name, rate in zip(names, "31", strict=True)]
    broken = program(llama_name("Q4_0"), BROKEN)
    speeds, left_out = speed.alternate(Programs([*found, broken], {"transformers": "none"}), 2)
    warmed = [f"{name} {measure}" for name in names for measure in MEASURES]
    a_round = [f"{name} {measure}" for measure in MEASURES for name in names]
    assert (tmp_path / "log").read_text().splitlines() == [*warmed, *a_round, *a_round]
    assert speeds[0].tokens_per_second == {measure: [3.0, 3.0] for measure in MEASURES}
    assert left_out == {
        "transformers": "none",
        llama_name("Q4_0"): f"{llama_name('Q4_0')} ended: no such library",
    }


def test_what_fails_of_ours_is_an_error():
    with pytest.raises(WorkerFailure, match="no such library"):
        speed.alternate(Programs([program("moesaic int8", BROKEN, is_peer=False)], {}), 1)


def test_a_worker_that_dies_at_work_says_why():
    dying = "from benchmarks.generation.worker import serve; serve({}, {})"
    with started(program("it", dying)) as worker, pytest.raises(WorkerFailure, match="KeyError"):
        worker.take("prefill")


def test_a_ratio_is_taken_within_a_round_and_at_equal_bits(capsys):
    rates = {our_name("int8"): [4.0, 2.0, 9.0], llama_name("Q8_0"): [2.0, 2.0, 3.0]}
    rates[llama_name("Q4_0")] = [1.0, 1.0, 1.0]
    speeds = [
        speed.Speeds(name, 10**6, "1", dict.fromkeys(MEASURES, r)) for name, r in rates.items()
    ]
    found = speed.ratios(speeds)
    assert [(r.ours, r.peer) for r in found] == [(our_name("int8"), llama_name("Q8_0"))] * 3
    assert {(r.median, r.least, r.most) for r in found} == {(2.0, 1.0, 3.0)}
    settings = speed.Settings(rounds=3)
    speed.print_speeds(speeds, {"transformers": "no torch"}, settings)
    out = capsys.readouterr().out
    assert "without transformers: no torch" in out
    assert all(name in out for name in rates)
    assert speed.as_json(speeds, {}, settings)["ratios"][0]["median"] == 2.0


def test_a_speed_stands_beside_what_reading_the_weights_allows(capsys):
    rates = {name: [90.0, 100.0, 120.0] for name in MEASURES}
    speed.print_reading([speed.Speeds("ours", 10**8, "1", rates)], 20.0)
    row = capsys.readouterr().out.splitlines()[-2].split("│")[1:-1]
    assert [cell.strip() for cell in row] == ["ours", "10.0", "200", "50%"]


def dense_model(length: int) -> Transformer:
    """One dense layer: quick to compile."""
    layer = LayerSpec(attention=tiny.attention(window_size=None, num_sink_tokens=0), ffn=DENSE)
    return Transformer(tiny.model(pattern=(layer,), num_layers=1, context_length=length))


def test_decoding_counts_the_timed_steps_alone(monkeypatch):
    """A clock that moves by a second whenever it is asked: tokens per second are tokens."""
    model = dense_model(256)
    work = make_work(model.config.vocab_size, prompt=5, tokens=4, long_prompt=30)
    assert read_work(work.to_json()) == work
    made = ours.EngineMeasures(model, peaks.random_variables(model), work)
    clock = iter(range(100))
    monkeypatch.setattr(ours.time, "perf_counter", lambda: float(next(clock)))
    assert made.decode(1) == 4
    assert made.decode(8) == 4 * 8
    assert made.decode(8) == 4 * 8  # again, with what the turn before has left
    assert made.prefill() == 30


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason='llama.cpp is not there: pip install ".[llama]" builds it in ten minutes',
)
@pytest.mark.parametrize("kind", llama_peer.KINDS)
def test_llama_cpp_continues_each_sequence(kind, tmp_path):
    """A model of bigrams says what follows; each sequence goes on by itself."""
    write_llama(tmp_path / "model", {i: i + 1 for i in range(3, 60)}, vocab_size=288)
    path, reason = programs.llama_file(open_source(str(tmp_path / "model")), tmp_path)
    assert path is not None, reason
    target = tmp_path / f"{kind}.gguf"
    llama_peer.quantize(path, target, kind, threads=2)
    model = llama_peer.load(target)
    context = llama_peer.Context(model, rows=2, length=20, batch=16, threads=2)
    for _ in range(2):
        context.clear()
        assert context.read([[3, 4, 5], [9]]) == [6, 10]
        assert context.read([[6], [10]]) == [7, 11]


def test_quality_is_that_of_the_logits():
    model = dense_model(64)
    variables = peaks.random_variables(model, stddev=0.3)
    other = peaks.random_variables(model, stddev=0.29)
    tokens = np.random.RandomState(0).randint(0, 300, 40).astype(np.int32)
    formats = [quality.Rounded(n, model, v, 1) for n, v in (("a", variables), ("b", other))]
    settings = quality.Settings(tokens=40, window=16)
    first, second = quality.qualities(formats, "prose", tokens, settings)
    assert (first.divergence, first.agreement) == (0.0, 1.0)
    whole = quality.Settings(tokens=40, window=40)
    first, second = quality.qualities(formats, "prose", tokens, whole)
    logp, other_logp = (
        (x := full_logits(model, v, tokens.tolist()).astype(np.float64))
        - np.log(np.exp(x).sum(1, keepdims=True))
        for v in (variables, other)
    )
    nats = -logp[np.arange(39), tokens[1:]].mean()
    assert first.nats == pytest.approx(nats, rel=1e-5)
    divergence = (np.exp(logp) * (logp - other_logp)).sum(1).mean()
    assert second.divergence == pytest.approx(divergence, rel=1e-3)
    assert second.divergence > 1e-4
    assert second.agreement == (logp.argmax(1) == other_logp.argmax(1)).mean() < 1


def test_the_texts_are_there():
    for files in quality.TEXTS.values():
        assert all((programs.ROOT / file).is_file() for file in files)


def test_a_state_is_keys_and_values():
    model = Transformer(dataclasses.replace(tiny.model(), context_length=2048))
    more = peaks.state_bytes(model, 2048) - peaks.state_bytes(model, 1024)
    # The windowed layer's does not grow; the other has keys and values of two heads of 8, and
    # each slot's position.
    assert more == 1024 * (2 * 2 * 8 * 4 + 4)


def test_memory_of_a_token_is_the_difference():
    rows = [{"length": 1000.0, "peak": 5e6}, {"length": 3000.0, "peak": 9e6}]
    assert memory.slope(*rows) == 2000.0


def test_the_checkpoint_that_is_loaded_is_the_model(tmp_path):
    config = memory.large_model()
    assert 4 * config.num_parameters > 10**9
    small = dataclasses.replace(config, vocab_size=64, d_model=32, num_layers=1)
    memory.write_checkpoint(tmp_path / "it", small, shard_bytes=10**6)
    source = open_source(str(tmp_path / "it"))
    assert source.config == small
    assert len(list((tmp_path / "it").glob("*.safetensors"))) > 1


def test_every_part_has_an_option():
    for part in list(report.PARTS)[1:]:
        assert getattr(bench_generation._parser().parse_args([f"--{part}"]), part)


def test_rounds_must_be_some():
    with pytest.raises(UserError, match="rounds=0"):
        bench_generation.main(["smollm2", "--rounds", "0"])


def test_a_missing_peer_has_a_reason(tmp_path):
    reason = programs.missing(sys.executable, os.environ, "json", "no_such_library")
    assert reason == "ModuleNotFoundError: No module named 'no_such_library'"
    assert programs.missing(sys.executable, os.environ, "json") == ""
    assert "can't be run" in programs.missing(str(tmp_path / "python"), os.environ, "json")


def test_the_machine_has_a_name_and_cores():
    assert machine.description().startswith(machine.processor())
    assert f"{machine.cores()} cores" in machine.description()
