"""Training programs that a process's tests share.

A test that trains, stops and resumes would trace and load the same step three times; a run in
another folder, from another corpus of the same vocabulary, trains by the same program, too.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from configs.base import InitConfig, RunConfig
from tests import tiny
from train import loop
from train.state import TrainSetup, TrainState, init_state
from train.state import make_train_setup as _make_train_setup
from train.step import TrainStep
from train.step import make_train_step as _make_train_step


@pytest.fixture(scope="session", autouse=True)
def shared_programs() -> Iterator[None]:
    """`train.loop.fit` sets up, draws and compiles once for each kind of run and objective."""
    if loop.make_train_setup is not _make_train_setup:  # several folders ask for it
        yield
        return
    setups: dict[Any, TrainSetup] = {}
    steps: dict[Any, TrainStep] = {}
    states: dict[Any, Any] = {}

    def make_train_setup(run: RunConfig, mesh: Any, *more: Any) -> TrainSetup:
        key = (_kind(run), mesh, *more)
        if key not in setups:
            setups[key] = _make_train_setup(run, mesh, *more)
        return setups[key]

    def make_train_step(
        run: RunConfig, setup: TrainSetup, chunk_loss: Any, *more: Any
    ) -> TrainStep:
        key = (id(setup), _kind(run), _call(chunk_loss), *more)
        if key not in steps:
            steps[key] = _make_train_step(run, setup, chunk_loss, *more)
        return steps[key]

    def drawn(setup: TrainSetup, seed: int, *given: Any) -> TrainState:
        if any(x is not None for x in given):
            return init_state(setup, seed, *given)
        key = (*_begun(setup), seed)
        if key not in states:
            states[key] = jax.device_get(init_state(setup, seed))
        # A step reuses the buffers of its state: each run has its own.
        return jax.device_put(states[key], setup.shardings, may_alias=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_setup", make_train_setup)
        patch.setattr(loop, "make_train_step", make_train_step)
        patch.setattr(loop, "init_state", drawn)
        yield


def _kind(run: RunConfig) -> RunConfig:
    """The run without what its step does not depend on: names, places, what is kept and watched."""
    blank = tiny.run(Path("anywhere"))
    source = run.data.source if run.data.mixture else ""
    data = dataclasses.replace(run.data, source=source, directory="")
    names = ("name", "checkpoint", "alarms", "init", "metrics", "validation")
    others = {name: getattr(blank, name) for name in names}
    if run.keeps_initial:
        others["init"] = InitConfig(source="anywhere")
    return dataclasses.replace(run, data=data, **others)


def _begun(setup: TrainSetup) -> tuple[Any, ...]:
    """What the state is drawn for: the same model's on another mesh has the same numbers, which the
    tests of model/ prove, unless more than weights and what is zero is in it."""
    state = setup.abstract_state
    if any(x is not None for x in (state.adapters, state.projections)):
        return (id(setup),)
    leaves, tree = jax.tree.flatten(state)
    return setup.model, tree, *((x.shape, x.dtype) for x in leaves)


def _call(function: Callable[..., Any]) -> Any:
    """What a function does: partial objects of the same function and arguments do the same."""
    if not isinstance(function, functools.partial):
        return function
    return function.func, function.args, tuple(sorted(function.keywords.items()))
