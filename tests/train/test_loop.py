"""The loop: learns, stops when asked, goes on as if it had not stopped, and raises alarms."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.run_directory import read_run, sole_writer
from configs.base import AlarmConfig, CheckpointConfig, ExecutionConfig, MeshConfig
from configs.checks import UserError
from configs.feed_forward import ContextConfig, RouterConfig
from configs.monitoring import MetricsConfig
from configs.optimizer import OptimizerConfig
from infer.run_weights import load_model
from model.growth import grow, grown_config
from tests import tiny
from train import loop
from train.loop import fit
from train.losses import cross_entropy
from train.metrics import Alarms, MetricsLog, TrainingAlarm, logged_num_experts, read_lines
from train.pending import PendingMetrics
from train.report import write_report

STEPS, STOP = 8, 4
SUMS = 1e-5  # relative: float32 sums over devices in another order


def losses(run_dir: Path) -> list[float]:
    lines = read_lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def stop_after(steps: int, number: signal.Signals):
    """A hook that signals this process while it is in the given step."""

    def make_transform(_mesh):
        seen = 0

        def extend(batch, *_):
            nonlocal seen
            seen += 1
            if seen == steps:
                signal.raise_signal(number)
            return batch

        return extend

    return make_transform


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """An unbroken run on four expert shards, and the same run stopped half way."""
    tmp_path = tmp_path_factory.mktemp("loop")
    tiny.write_sources(tmp_path)
    run = tiny.run(tmp_path, steps=STEPS, mesh=MeshConfig(expert=4))
    result = fit(run, tmp_path / "unbroken")
    assert (result.steps, result.interrupted) == (STEPS, None)
    result = fit(run, tmp_path / "stopped", make_transform=stop_after(STOP, signal.SIGTERM))
    assert (result.steps, result.interrupted) == (STOP, signal.SIGTERM)
    return run, tmp_path


def test_of_several_processes_one_told_of_a_signal_may_still_get_its_own(monkeypatch):
    """A cluster signals all, not all at once; only a second signal of its own interrupts."""
    monkeypatch.setattr(loop, "is_started", lambda: True)
    monkeypatch.setattr(loop, "largest", lambda own: jnp.int32(max(own, signal.SIGTERM)))
    with loop._stop_signals() as stop:
        assert [stop.is_asked(), stop.is_asked()] == [False, True]
        signal.raise_signal(signal.SIGTERM)
        assert (stop.received, stop.agreed) == (signal.SIGTERM, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def resume(story, name: str, mesh: MeshConfig) -> list[float]:
    run, tmp_path = story
    shutil.copytree(tmp_path / "stopped", tmp_path / name)
    fit(dataclasses.replace(run, mesh=mesh), tmp_path / name)
    return losses(tmp_path / name)


def test_it_learns_and_logs(story):
    run, tmp_path = story
    lines = read_lines(tmp_path / "unbroken" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert lines[0]["cross_entropy"] == pytest.approx(np.log(300), rel=0.3)
    for line in lines:
        assert line["tokens_per_second"] > 0
        assert 0 <= line["data_wait"] <= line["seconds"]
        assert "mfu" not in line  # of a CPU there is no data sheet
        assert len(line["load_cv"]) == len(line["router_entropy"]) == 1  # one MoE layer of two
        assert line["mean_k"] == [2.0]
        assert np.asarray(line["expert_load"]).shape == (1, 8)
        np.testing.assert_allclose(np.mean(line["expert_load"], axis=1), 1.0, atol=1e-3)
        tokens = run.batch_size * run.data.seq_len
        floor = np.sqrt((8 - 2) / (tokens * 2))
        np.testing.assert_allclose(line["load_cv_floor"], floor, rtol=1e-3)
    assert read_run(tmp_path / "unbroken") == run


def test_resumed_on_the_same_mesh_is_bit_for_bit(story):
    _, tmp_path = story
    assert resume(story, "same", MeshConfig(expert=4)) == losses(tmp_path / "unbroken")


@pytest.mark.parametrize(
    "mesh", [pytest.param(MeshConfig(expert=2), marks=pytest.mark.slow), MeshConfig()], ids=str
)
def test_resumed_on_another_mesh_stays_within_rounding(story, mesh):
    _, tmp_path = story
    name = f"mesh {mesh.data} {mesh.expert}"
    np.testing.assert_allclose(resume(story, name, mesh), losses(tmp_path / "unbroken"), rtol=SUMS)


def test_a_finished_run_has_nothing_left_to_do(story):
    run, tmp_path = story
    before = (tmp_path / "unbroken" / "metrics.jsonl").read_text()
    assert fit(run, tmp_path / "unbroken").steps == STEPS
    assert (tmp_path / "unbroken" / "metrics.jsonl").read_text() == before


def test_lines_after_the_checkpoint_are_dropped_on_resume(story):
    """A run killed between checkpoints has logged steps that it will do again."""
    run, tmp_path = story
    shutil.copytree(tmp_path / "stopped", tmp_path / "killed")
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 99.0}\n{"step": 6, "lo')
    fit(run, tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")


def test_a_run_goes_on_without_its_log_and_says_so(story, capsys):
    run, tmp_path = story
    shutil.copytree(tmp_path / "stopped", tmp_path / "no log")
    (tmp_path / "no log" / "metrics.jsonl").unlink()
    assert fit(run, tmp_path / "no log").steps == STEPS
    assert "is missing: it begins again after step 4" in capsys.readouterr().out
    lines = read_lines(tmp_path / "no log" / "metrics.jsonl")
    assert [x["step"] for x in lines] == list(range(STOP + 1, STEPS + 1))
    assert [x["loss"] for x in lines] == losses(tmp_path / "unbroken")[STOP:]
    (tmp_path / "no log" / "metrics.jsonl").unlink()
    fit(run, tmp_path / "no log")  # nothing is left to do, and nothing to log
    write_report(tmp_path / "no log")
    assert "none are in the log" in (tmp_path / "no log" / "report.html").read_text()


def test_another_experiment_in_the_folder_is_refused(story):
    run, tmp_path = story
    other = dataclasses.replace(run, seed=5)
    with pytest.raises(UserError, match="seed was 0, now 5"):
        fit(other, tmp_path / "stopped")


def test_a_folder_in_which_another_trains_is_refused(story):
    run, tmp_path = story
    with sole_writer(tmp_path / "stopped"), pytest.raises(UserError, match="another process"):
        fit(run, tmp_path / "stopped")


def test_the_report_has_every_picture(story):
    _, tmp_path = story
    write_report(tmp_path / "unbroken")
    for name in ("loss.png", "load.png"):
        assert (tmp_path / "unbroken" / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "unbroken" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_metrics_fetched_together_are_those_fetched_one_by_one(story, monkeypatch, platform):
    """Stopped and resumed, too: with what an accelerator leaves in flight when it is asked."""
    run, tmp_path = story
    run = dataclasses.replace(run, mesh=MeshConfig(), steps=7)
    if not (tmp_path / "each").exists():
        fit(run, tmp_path / "each")
    together = dataclasses.replace(
        run, metrics=MetricsConfig(fetch_every=3), checkpoint=CheckpointConfig(every=5, keep=2)
    )
    monkeypatch.setattr(loop, "PendingMetrics", lambda n, _: PendingMetrics(n, platform))
    folder, seen = tmp_path / f"together {platform}", []
    hooks = [lambda step, line: seen.append((step, line["loss"]))]
    fit(together, folder, make_transform=stop_after(STOP, signal.SIGTERM), hooks=hooks)
    assert [step for step, _ in seen] == list(range(1, STOP + 1))
    fit(together, folder, hooks=hooks)
    assert losses(folder) == losses(tmp_path / "each")
    assert seen == [(x["step"], x["loss"]) for x in read_lines(folder / "metrics.jsonl")]


def fit_variant(tmp_path, name, **changes):
    tiny.write_sources(tmp_path)
    run = tiny.run(tmp_path, steps=3, **changes)
    fit(run, tmp_path / name)
    return losses(tmp_path / name)


@pytest.mark.slow
def test_what_routers_learn_without_gradients_is_saved_and_resumed(tmp_path):
    tiny.write_sources(tmp_path)
    router = RouterConfig(
        top_k=3,
        num_null_experts=2,
        target_k=1.5,
        balance="quantile",
        bias_rate=1.0,
        context=ContextConfig(kind="causal", window_size=8, num_heads=2, head_dim=8),
        entropy_weight=1e-2,
        sequence_weight=1e-4,
    )
    windowed, dense = tiny.model().pattern
    pattern = (dataclasses.replace(windowed, ffn=tiny.moe(router=router)), dense)
    run = tiny.run(
        tmp_path, model=tiny.model(pattern=pattern), mesh=MeshConfig(expert=2), accumulation=2
    )
    fit(run, tmp_path / "unbroken")
    fit(run, tmp_path / "stopped", make_transform=stop_after(3, signal.SIGTERM))
    fit(run, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")
    _, variables = load_model(run, tmp_path / "stopped")
    state = variables["router_state"]["periods"]["layer_0"]["moe"]["state"]
    assert np.abs(state.bias_E).max() > 1e-4
    mean_k = [line["mean_k"][0] for line in read_lines(tmp_path / "stopped" / "metrics.jsonl")]
    assert min(mean_k) >= 1.0
    assert abs(mean_k[-1] - 1.5) < abs(mean_k[0] - 1.5)
    assert state.null_logit[0] != 0


@pytest.mark.slow
def test_a_grown_run_begins_with_its_parents_loss(story):
    """The first step on the first batch: a fresh run whose weights are the grown parent's."""
    run, tmp_path = story
    fit(dataclasses.replace(run, steps=3), tmp_path / "parent")
    _, variables = load_model(run, tmp_path / "parent")
    same = dataclasses.replace(run, steps=3, seed=1)
    fit(same, tmp_path / "again", variables=variables)
    grown = dataclasses.replace(same, model=grown_config(run.model, "split"))
    fit(grown, tmp_path / "grown", variables=grow(variables, run.model, "split"))
    logs = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("again", "grown")]
    first, second = (log[0]["cross_entropy"] for log in logs)
    assert second == pytest.approx(first, rel=SUMS)
    assert first < read_lines(tmp_path / "parent" / "metrics.jsonl")[0]["cross_entropy"] - 0.1


@pytest.mark.slow
def test_resumed_with_all_to_all_stays_within_rounding(story):
    run, tmp_path = story
    shutil.copytree(tmp_path / "stopped", tmp_path / "exchange")
    execution = ExecutionConfig(logits_chunks=2, transport="all_to_all", capacity_factor=1.0)
    fit(dataclasses.replace(run, execution=execution), tmp_path / "exchange")
    unbroken = losses(tmp_path / "unbroken")
    np.testing.assert_allclose(losses(tmp_path / "exchange"), unbroken, rtol=SUMS)
    lines = read_lines(tmp_path / "exchange" / "metrics.jsonl")[STOP:]
    # Room for the balanced load only: the replay was exercised.
    assert np.sum([line["overflow_rows"] for line in lines]) > 0


def without_balance(config):
    """Balance is judged on what is known of the batch, so micro-batches would change it."""
    spec = config.pattern[0]
    router = dataclasses.replace(spec.ffn.router, load_balance_weight=0.0, z_loss_weight=0.0)
    spec = dataclasses.replace(spec, ffn=dataclasses.replace(spec.ffn, router=router))
    return dataclasses.replace(config, pattern=(spec, config.pattern[1]))


@pytest.mark.slow
def test_accumulation_is_the_whole_batch(tmp_path):
    model = without_balance(tiny.model())
    whole = fit_variant(tmp_path, "whole", model=model)
    parts = fit_variant(tmp_path, "parts", model=model, accumulation=4, mesh=MeshConfig(data=2))
    np.testing.assert_allclose(parts, whole, rtol=SUMS)
    lines = [read_lines(tmp_path / n / "metrics.jsonl")[0] for n in ("whole", "parts")]
    for name in ("grad_norm", "load_cv", "mean_k", "router_entropy"):
        np.testing.assert_allclose(lines[0][name], lines[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_muon_and_bfloat16_train(tmp_path):
    muon = OptimizerConfig(kind="muon", momentum=0.95, learning_rate=3e-3, warmup_steps=1)
    execution = ExecutionConfig(logits_chunks=2, compute_dtype="bfloat16", remat="full")
    values = fit_variant(tmp_path, "muon", optimizer=muon, execution=execution)
    assert values[-1] < values[0]


@pytest.mark.parametrize(("fetch_every", "every", "good"), [(None, 1, 3), (3, 2, 2)])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_good_checkpoint(
    tmp_path, fetch_every, every, good
):
    """Fetched with others or alone, the fault comes before the checkpoint of its step."""
    tiny.write_sources(tmp_path)
    checkpoint = CheckpointConfig(every=every, keep=2)
    run = tiny.run(tmp_path, checkpoint=checkpoint, metrics=MetricsConfig(fetch_every=fetch_every))

    def explode(logits, inputs, shared):
        loss, sums = cross_entropy(logits, inputs)
        return loss * jnp.where(inputs["poison"].max() > 0, jnp.nan, 1.0), sums

    def make_transform(_mesh):
        seen = 0

        def extend(batch, *_):
            nonlocal seen
            seen += 1
            return {**batch, "poison": jnp.full(batch["tokens"].shape, float(seen == 4))}

        return extend

    with pytest.raises(
        TrainingAlarm, match=rf"at step 4: .*checkpoint before it is at step {good}"
    ):
        fit(run, tmp_path / "run", chunk_loss=explode, make_transform=make_transform)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [str(step) for step in (2, 3) if step % every == 0]
    texts = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(text, parse_constant=no_json) for text in texts]
    assert [line["loss"] is None for line in logged] == [False] * 3 + [True]
    read = read_lines(tmp_path / "run" / "metrics.jsonl")[3]
    assert np.isnan(read["loss"])


def no_json(constant: str):
    """For what Python's parser takes beyond the standard."""
    raise AssertionError(f"{constant} is not JSON")


def line(step: int, **metrics):
    usual = {"loss": 1.0, "grad_norm": 1.0, "dead_experts": [0.0, 0.0], "peak_load": [0.2, 0.3]}
    return {"step": step, **usual, **metrics}


@pytest.mark.slow
def test_layers_of_unequal_experts_are_logged_drawn_and_watched(tmp_path):
    """In the order of the layers, over two periods of the pattern."""
    tiny.write_sources(tmp_path)
    spec = tiny.model().pattern[0]
    pattern = tuple(dataclasses.replace(spec, ffn=tiny.moe(num_experts=n)) for n in (8, 4))
    run = tiny.run(tmp_path, steps=3, model=tiny.model(pattern=pattern, num_layers=4))
    fit(run, tmp_path / "run")
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert tuple(map(len, last["expert_load"])) == logged_num_experts(run.model) == (8, 4, 8, 4)
    write_report(tmp_path / "run")
    assert (tmp_path / "run" / "load.png").read_bytes().startswith(b"\x89PNG")


def test_dead_experts_are_a_share_of_their_own_layers():
    config = AlarmConfig(grace_steps=0, patience=1, dead_fraction=0.5)
    alarms = Alarms(config, num_experts=(32, 8))
    alarms.check(line(1, dead_experts=[15.0, 3.0]))
    with pytest.raises(TrainingAlarm, match="4 of 8 experts of a layer"):
        alarms.check(line(2, dead_experts=[15.0, 4.0]))
    with pytest.raises(TrainingAlarm, match="16 of 32 experts of a layer"):
        alarms.check(line(3, dead_experts=[16.0, 3.0]))


def test_load_alarms_need_patience_and_grace():
    config = AlarmConfig(grace_steps=3, patience=2, dead_fraction=0.5, collapse_fraction=0.9)
    dead, collapsed = {"dead_experts": [0.0, 4.0]}, {"peak_load": [0.95, 0.1]}
    alarms = Alarms(config, num_experts=(8, 8))
    for step in (1, 2, 3):
        alarms.check(line(step, **dead))  # grace
    alarms.check(line(4, **dead))
    alarms.check(line(5))  # recovered
    alarms.check(line(6, **dead))
    with pytest.raises(TrainingAlarm, match="4 of 8 experts of a layer"):
        alarms.check(line(7, **dead))
    alarms = Alarms(config, num_experts=(8, 8))
    alarms.check(line(4, **collapsed))
    with pytest.raises(TrainingAlarm, match="one expert has been chosen by 95% of all tokens"):
        alarms.check(line(5, **collapsed))


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_alarms_on_what_is_not_finite(name, value):
    with pytest.raises(TrainingAlarm, match=f"{name} is .* at step 1"):
        Alarms(AlarmConfig(), num_experts=(8, 8)).check(line(1, **{name: value}))


def test_a_damaged_log_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_lines(path)
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_lines(path) == [{"step": 1}]
    MetricsLog(path, resume_step=0).close()
    assert path.read_text() == ""
    path.write_text('{"step": 1}\n{"step": 2, "validation_loss": "low"}\n')
    with pytest.raises(UserError, match="line 2 has validation_loss='low', expected a number"):
        read_lines(path, optional=("validation_loss",))
    with pytest.raises(UserError, match="is missing"):
        read_lines(tmp_path / "nowhere.jsonl")
