"""Teaches a model one thing after the other, and says after each stage what it gave and took.

    python -m scripts.further path/to/my_experiments.py:stages

The function returns a list of runs, the stages: each begins with the weights of the one before,
whose folder its init.source names by itself where it names none, and makes its corpus with the
first one's tokenizer. After every stage the model is
measured on the held-out text of all stages; the folder (runs/NAME) has the matrix of these losses,
backward and forward transfer and forgetting in stages.json, and a page with a picture. The same
command goes on.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.base import RunConfig
from configs.checks import UserError, require
from configs.experiment_file import call_target, parse_target, read_source
from data.pipeline import prepare_corpus
from formats.atomic_folder import replace_text
from infer.run_weights import load_model
from model.transformer import Transformer, Variables, init_variables
from planning.available import require_memory
from scripts import command
from scripts.named_runs import own_loss
from scripts.sources import initial_variables
from scripts.sweep import runs_of
from scripts.train import describe, train_run
from train.continual import as_table, continual_metrics, draw_stages
from train.loop import mesh_of
from train.report import table, write_page
from train.validation import Validation


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("stages", metavar="FILE.py:NAME")
    parser.add_argument("--dir", type=Path, help="folder of the stages (runs/NAME)")
    arguments = parser.parse_args(argv)
    target = parse_target(arguments.stages)
    if target is None or target.name is None:
        raise UserError(f"{arguments.stages!r} names no stages: give FILE.py:NAME of a function")
    directory = arguments.dir or Path("runs") / target.name
    runs = stages_of(runs_of(call_target(target)), directory)
    command.use_host_devices(max(run.mesh.num_devices for run in runs))
    for run in runs:
        require_memory(run)
    directory.mkdir(parents=True, exist_ok=True)
    known = _read(directory, [run.name for run in runs])
    if known["before"] is None:
        known["before"] = scores_of(runs, *_before(runs[0]))
    for i, run in enumerate(runs):
        folder = directory / run.name
        describe(run)
        loss = own_loss(run, target.path, folder)
        code = train_run(run, folder, read_source(target), loss=loss)
        if code:
            return code
        if i >= len(known["scores"]):
            known["scores"].append(scores_of(runs, run, load_model(run, folder)[1]))
        _report(directory, runs[: i + 1], runs, known)
    return 0


def stages_of(runs: dict[str, RunConfig], directory: Path) -> list[RunConfig]:
    """The stages in their order, each beginning with the one before.

    Raises:
      UserError: stages whose models number tokens differently or have a memory.
    """
    stages: list[RunConfig] = []
    for name, run in runs.items():
        run = dataclasses.replace(run, name=name)
        if stages and run.init.source is None:
            before = str(directory / stages[-1].name)
            run = dataclasses.replace(run, init=dataclasses.replace(run.init, source=before))
        data, first = run.data, (stages or [run])[0].data
        if data.tokenizer is None and data.directory != first.directory:
            data = dataclasses.replace(data, tokenizer=first.tokenizer or first.directory)
            run = dataclasses.replace(run, data=data)
        require(run.model.memory_length is None, f"{name} has a memory, and stages have none")
        stages.append(run)
    sizes = {run.model.vocab_size for run in stages}
    require(len(sizes) == 1, f"the stages have vocabularies of {sizes} tokens: give them one")
    return stages


def _before(run: RunConfig) -> tuple[RunConfig, Variables]:
    """What the first stage begins with."""
    if run.init.source is not None:
        return run, initial_variables(run)
    return run, jax.jit(init_variables, static_argnums=(0, 1))(Transformer(run.model), run.seed)


def scores_of(runs: list[RunConfig], own: RunConfig, variables: Variables) -> list[float]:
    """Minus the nats per token of this stage's model on the held-out text of every stage."""
    scores = []
    for run in runs:
        read = dataclasses.replace(own, data=run.data)
        every = dataclasses.replace(own.validation, every=1)
        read = dataclasses.replace(read, validation=every)
        mesh, corpus = mesh_of(read), prepare_corpus(run.data, run.model.vocab_size)
        with jax.set_mesh(mesh):
            measured = Validation(read, corpus, mesh).measure_variables(variables)
        scores.append(-float(measured["validation_loss"]))
    return scores


def _read(directory: Path, names: list[str]) -> dict[str, Any]:
    path = directory / "stages.json"
    if not path.exists():
        return {"names": names, "before": None, "scores": []}
    known = json.loads(path.read_text())
    done = known["names"][: len(known["scores"])]
    require(
        names[: len(done)] == done,
        f"{directory} holds the stages {', '.join(done)}, now {', '.join(names)}: name another "
        "--dir, or add stages behind those",
    )
    width = len(names)
    if known["names"] != names and len(known["before"]) != width:
        return {"names": names, "before": None, "scores": []}  # measured again: a column is new
    return {**known, "names": names}


def _report(
    directory: Path, done: list[RunConfig], runs: list[RunConfig], known: dict[str, Any]
) -> None:
    scores, before = np.array(known["scores"])[: len(done)], np.array(known["before"])
    metrics = dataclasses.asdict(continual_metrics(scores, before))
    replace_text(directory / "stages.json", json.dumps({**known, "metrics": metrics}, indent=2))
    names = [run.name for run in runs]
    print(as_table(names, scores, before))
    shown = {n.replace("_", " "): "-" if x is None else f"{x:+.4f}" for n, x in metrics.items()}
    print("; ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
    picture = draw_stages(names, scores, before)
    write_page(directory, directory.name, [table(shown)], [picture], known)


if __name__ == "__main__":
    command.execute(main, huge_pages=True)
