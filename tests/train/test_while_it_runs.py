"""What a run tells and keeps as it goes: losses of each source, the best weights, averages, skipped
spikes, samples, other logs.
"""

import dataclasses
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.orbax_store import latest_step
from configs.base import CheckpointConfig
from configs.checks import UserError
from configs.data import MixturePart
from configs.monitoring import MetricsConfig, SamplesConfig, ValidationConfig
from data.mixture_rows import MixtureRows
from data.pipeline import batches, prepare_corpus
from infer.run_weights import load_model
from infer.sources import open_source
from scripts.samples import sampler
from tests import tiny
from train.best import BestCheckpoint
from train.loggers import logger_hooks, numbers
from train.loop import fit
from train.metrics import read_lines
from train.profile import Profile, longest_parts, parse_profile
from train.spikes import FIRST_STEPS, RunningMeans, is_spike, no_means, updated_means

PROMPT = "def function_1_"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run on two sources, of which one is easy, with all that it can tell."""
    tmp_path = tmp_path_factory.mktemp("mixed")
    tiny.write_sources(tmp_path)
    easy = [{"text": "a b a b " * 30} for _ in range(40)]
    (tmp_path / "easy.jsonl").write_text("".join(json.dumps(x) + "\n" for x in easy))
    base = tiny.run(tmp_path, model=tiny.model(pattern=tiny.model().pattern[:1], num_layers=1))
    parts = (
        MixturePart(source=str(tmp_path / "sources"), weight=0.5),
        MixturePart(source=str(tmp_path / "easy.jsonl"), weight=0.5),
    )
    data = dataclasses.replace(
        base.data, source="stdlib", mixture=parts, directory=str(tmp_path / "mixture")
    )
    run = dataclasses.replace(
        base,
        data=data,
        accumulation=2,
        validation=ValidationConfig(every=2, max_rows=16),
        checkpoint=CheckpointConfig(every=3, keep=1, best=True),
        samples=SamplesConfig(every=4, prompts=(PROMPT, "import"), max_new_tokens=5),
        optimizer=dataclasses.replace(base.optimizer, average=0.5, skip_above=50.0),
    )
    folder = tmp_path / "run"
    fit(run, folder, sample=sampler(run, folder), profile=Profile(2, 3))
    return run, tmp_path, folder


@pytest.mark.slow
def test_losses_of_each_source_add_up_to_the_whole(mixed):
    run, _, folder = mixed
    file = prepare_corpus(run.data, 300).training()
    rows = MixtureRows(run.data, file)
    read = batches(file, seq_len=32, batch_size=8, seed=0, phases=run.data.phases)
    names = [part.source for part in run.data.mixture]
    for line in read_lines(folder / "metrics.jsonl", ("loss", "cross_entropy", "skipped")):
        source_B = rows.of(next(read)["row"])
        weights = {name: (source_B == i).mean() for i, name in enumerate(names)}
        losses = line["source_losses"]
        total = sum(weights[name] * loss for name, loss in losses.items())
        assert total == pytest.approx(line["cross_entropy"], abs=2e-5)
        assert len(line["z_loss"]) == 1
    assert losses[names[1]] < losses[names[0]]
    held_out = read_lines(folder / "metrics.jsonl")[-1]["validation_source_losses"]
    assert set(held_out) == set(names)
    assert held_out[names[1]] < held_out[names[0]]


@pytest.mark.slow
def test_each_rows_source_is_where_its_tokens_lie(mixed):
    run, _, _ = mixed
    file = prepare_corpus(run.data, 300).training()
    rows = MixtureRows(run.data, file)
    parts = file.sidecar.parts
    own = [row for part in range(2) for row in (parts[part].first_token // 32 + 1,)]
    assert rows.of(np.array(own)).tolist() == [0, 1]
    assert rows.of(np.array([-1])).tolist() == [-1]
    assert not MixtureRows(dataclasses.replace(run.data, mixture=()), file)


def test_the_best_weights_are_a_source_and_the_average_is_what_is_read(mixed):
    run, _, folder = mixed
    lines = read_lines(folder / "metrics.jsonl")
    measured = {x["step"]: x["validation_loss"] for x in lines if "validation_loss" in x}
    best = json.loads((folder / "best.json").read_text())
    assert best["step"] == min(measured, key=lambda step: measured[step])
    assert best["validation_loss"] == pytest.approx(min(measured.values()))
    assert latest_step(folder / "best") == best["step"]
    source = open_source(f"{folder}@best")
    assert source.tokenizer().tokenizer.get_vocab_size() > 0
    _, variables = source.load()
    _, newest = load_model(run, folder)
    newest_step = latest_step(folder / "checkpoints")
    same = np.array_equal(variables["params"]["embedding"], newest["params"]["embedding"])
    assert same == (best["step"] == newest_step)
    plain = dataclasses.replace(run.optimizer, average=None)
    _, last = load_model(dataclasses.replace(run, optimizer=plain), folder)
    assert np.abs(last["params"]["embedding"] - newest["params"]["embedding"]).max() > 1e-4
    with BestCheckpoint(folder, {}, is_kept=True) as again:
        again.offer(9, jnp.float32(best["validation_loss"] + 1), None, None)  # type: ignore[arg-type]
    assert latest_step(folder / "best") == best["step"]
    with pytest.raises(UserError, match=r"best=True needs validation\.every"):
        dataclasses.replace(run, validation=ValidationConfig(every=None))


def test_samples_are_written_and_a_trace_is_read(mixed):
    run, _, folder = mixed
    lines = [json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(x["step"], x["prompt"]) for x in lines] == [(4, PROMPT), (4, "import")]
    assert all(x["text"] for x in lines)
    assert sum(longest_parts(folder / "profile").values()) > 0
    for text in ("0:2", "3:2", "x"):
        with pytest.raises(UserError, match=r"must be FIRST:LAST"):
            parse_profile(text)
    assert parse_profile("5:7") == Profile(5, 7)
    with pytest.raises(UserError, match=r"go with samples\.every and only with it"):
        SamplesConfig(every=3)
    assert sampler(dataclasses.replace(run, samples=SamplesConfig()), folder) is None
    long = dataclasses.replace(run.samples, max_new_tokens=64)
    with pytest.raises(UserError, match=r"max_new_tokens=64 exceed model\.context_length=64"):
        sampler(dataclasses.replace(run, samples=long), folder)  # not at the first sample
    with pytest.raises(UserError, match=r"samples\.every=4 needs what writes them"):
        fit(run, folder)


def test_spikes_change_nothing_and_are_counted_out_of_the_means():
    means = no_means()
    assert not is_spike(means, jnp.float32(9), jnp.float32(9), 2.0)  # of nothing yet
    assert is_spike(means, jnp.float32(np.nan), jnp.float32(1), 2.0)
    rng, seen = np.random.default_rng(0), []
    for _ in range(FIRST_STEPS):
        seen.append(rng.uniform(1, 2))
        means = updated_means(means, jnp.float32(seen[-1]), jnp.float32(0.5))
    assert float(means.loss) == pytest.approx(np.mean(seen), rel=1e-5)
    mean = float(means.loss)
    assert is_spike(means, jnp.float32(2.1 * mean), jnp.float32(0.5), 2.0)
    assert is_spike(means, jnp.float32(mean), jnp.float32(1.1), 2.0)
    assert not is_spike(means, jnp.float32(1.9 * mean), jnp.float32(0.9), 2.0)
    assert isinstance(means, RunningMeans)


def test_other_logs_get_every_number(tmp_path, monkeypatch):
    tiny.write_sources(tmp_path)
    run = tiny.run(tmp_path, metrics=MetricsConfig(loggers=("tensorboard", "wandb")))
    told = []

    class Writer:
        def __init__(self, folder: str) -> None:
            told.append(("folder", folder))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def close(self) -> None:
            told.append("closed")

    wandb = types.SimpleNamespace(
        init=lambda **given: types.SimpleNamespace(
            log=lambda values, step: told.append((values, step, given["mode"])),
            finish=lambda: told.append("finished"),
        )
    )
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    line = {"step": 3, "loss": 2.5, "load_cv": [0.1, 0.2], "source_losses": {"a": 1.0}}
    expected = {"loss": 2.5, "load_cv/layer_0": 0.1, "load_cv/layer_1": 0.2, "source_losses/a": 1.0}
    assert numbers(line) == expected
    with logger_hooks(run, tmp_path) as hooks:
        for hook in hooks:
            hook(3, line)
    assert ("loss", 2.5, 3) in told
    assert (expected, 3, "offline") in told
    assert told[-2:] == ["finished", "closed"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    sentence = "wandb is not installed: pip install wandb"
    with pytest.raises(UserError, match=sentence), logger_hooks(run, tmp_path):
        pass
    with pytest.raises(UserError, match="must be some of"):
        MetricsConfig(loggers=("mlflow",))  # type: ignore[arg-type]
