"""Checkpoints of a run: saved in the background, kept few, restored onto any device mesh.

A checkpoint of step s is the folder `s`; it holds the training state and the data iterator after s
steps. It appears under that name only when it is whole, so a run that is killed while saving goes
on from the one before.

Orbax is imported where it works: it takes 0.15 s, which who reads other files need not wait for.
"""

import asyncio
import contextlib
import functools
import json
import logging
import sys
import threading
import traceback
from collections.abc import Awaitable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from configs.checks import UserError
from parallel.distributed import lost_process

STATE, DATA = "state", "data"


class CheckpointStore:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last save."""

    def __init__(
        self, directory: Path, *, keep: int, metadata: dict[str, Any] | None = None
    ) -> None:
        """Opens the folder, making it if needed, and removes what an interrupted save left.

        Args:
          keep: newest checkpoints that stay.
          metadata: JSON kept inside each checkpoint saved: the run's config.
        """
        from orbax.checkpoint import v1 as ocp

        self.directory, self._metadata = directory.absolute(), metadata
        training: Any = ocp.training  # its policies are typed as a protocol they don't declare
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quiet())  # until the last background save has ended
        self._checkpointer = training.Checkpointer(
            self.directory,
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(
        self, error_type: type | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None and lost_process(error):
            return  # a save at work would wait for that process
        with self._quiet:
            if error_type is None:
                self.wait()
            # After an error, a failing background save must not hide it.
            with contextlib.suppress(Exception) if error_type else contextlib.nullcontext():
                self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, data_iterator: Any) -> None:
        """Copies the state and writes it in the background, after the save before has ended.

        Raises:
          UserError: this save, or the one before it, could not be written (disk full, no right).
        """
        if self.latest_step == step:
            return
        parts = {STATE: state, DATA: _DataPosition(data_iterator)}
        with self._explain_failed_save():
            self._checkpointer.save_checkpointables_async(
                step, parts, custom_metadata=self._metadata
            )

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          UserError: the last save could not be written.
        """
        with self._explain_failed_save():
            self._checkpointer.wait()

    def restore(self, abstract_state: Any, data_iterator: Any) -> Any:
        """The newest state, laid out as `abstract_state`'s shardings ask; sets the iterator too.

        Args:
          abstract_state: tree of ShapeDtypeStruct with shardings; device count and mesh may differ
            from those that saved it.
        Raises:
          UserError: a checkpoint that is damaged or has other shapes.
        """
        step = self.latest_step
        assert step is not None, "there is no checkpoint to restore"
        with _explain_failed_load(self.directory / str(step)):
            wanted = {STATE: abstract_state, DATA: _DataPosition(data_iterator)}
            return self._checkpointer.load_checkpointables(step, wanted)[STATE]

    @contextlib.contextmanager
    def _explain_failed_save(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tensorstore and Orbax raise many types for one cause
            raise UserError(
                f"a checkpoint could not be written to {self.directory}: {_cause(error)}. "
                "Checkpoints on "
                "disk are whole; make room or choose another --run-dir, then start the same "
                "command again"
            ) from error


class _DataPosition:
    """A data iterator as Orbax saves it, in the file that Grain itself writes with one process.

    The position is a count of steps, the same on every process: the first one writes it, and any
    number of them go on from it.
    """

    FILE = "process_0-of-1.json"

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator

    async def save(self, directory: Any) -> Awaitable[None]:
        """The position as it is now, to be written in the background."""
        return self._write(directory, json.dumps(self._iterator.get_state(), indent=4))

    async def load(self, directory: Any) -> Awaitable[None]:
        """Sets the iterator, in the background."""
        return self._read(directory)

    async def _write(self, directory: Any, text: str) -> None:
        folder = await directory.await_creation()
        if jax.process_index() == 0:
            await asyncio.to_thread((folder / self.FILE).write_text, text)

    async def _read(self, directory: Any) -> None:
        text = await asyncio.to_thread((directory / self.FILE).read_text)
        self._iterator.set_state(json.loads(text))


def latest_step(directory: Path) -> int | None:
    """The newest whole checkpoint in a folder that a training run may be writing to."""
    if not directory.is_dir():
        return None
    steps = [int(p.name) for p in directory.iterdir() if p.name.isdigit() and p.is_dir()]
    return max(steps, default=None)


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON kept inside a checkpoint; empty where there is none.

    Raises:
      UserError: it can't be read.
    """
    from orbax.checkpoint import v1 as ocp

    with _explain_failed_load(path):
        kept = ocp.checkpointables_metadata(str(path.absolute())).custom_metadata
    return kept if isinstance(kept, dict) else {}


def restore_variables(directory: Path, abstract_variables: dict[str, Any]) -> tuple[Any, int]:
    """The newest checkpoint's variables alone, and its step; optimiser state is not read.

    Args:
      abstract_variables: parts of the state by name; empty ones are given back as they are.

    Raises:
      UserError: no checkpoint, a damaged one, or other shapes.
    """
    from orbax.checkpoint import v1 as ocp

    step = latest_step(directory)
    if step is None:
        raise UserError(
            f"{directory} holds no checkpoint: train the run first, or give another folder"
        )
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with _explain_failed_load(directory / str(step)), context:
        wanted = {STATE: {name: part for name, part in abstract_variables.items() if part}}
        loaded = ocp.load_checkpointables(str((directory / str(step)).absolute()), wanted)
    return abstract_variables | loaded[STATE], step


@contextlib.contextmanager
def _explain_failed_load(path: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except Exception as error:  # see _explain_failed_save
        older = [p.name for p in path.parent.iterdir() if p.name.isdigit() and p.name != path.name]
        advice = (
            f"the one before is at step {max(older, key=int)}" if older else "there is no other"
        )
        raise UserError(
            f"the checkpoint {path} can't be read: {_cause(error)}. It is damaged or belongs to "
            "another "
            f"config; move it away to go on without it ({advice})"
        ) from error


def _cause(error: BaseException) -> str:
    """The first line of the innermost exception that says something, without its long details."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    texts = [str(e).strip().splitlines()[0] for e in chain if str(e).strip()]
    text = texts[-1] if texts else type(error).__name__
    return text.split(" [tensorstore_spec")[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from logging, and its worker threads from printing, what it raises anyway."""
    _silence_workers()
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "orbax")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@functools.cache
def _silence_workers() -> None:
    """From now on, Orbax's worker threads print no exceptions: the caller gets them.

    For good, as reads under way when one has failed end later, in an event loop that is closed.
    """
    plain_hook, thread_hook, unraisable_hook = (
        sys.excepthook,
        threading.excepthook,
        sys.unraisablehook,
    )

    def in_foreign_thread(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """What C++ calls for its threads; Python calls it for the main one."""
        is_main = threading.current_thread() is threading.main_thread()
        if is_main or not _comes_from_orbax(trace):
            plain_hook(kind, error, trace)

    def in_thread(failure: threading.ExceptHookArgs) -> None:
        if not _comes_from_orbax(failure.exc_traceback):
            thread_hook(failure)

    def unraisable(failure: Any) -> None:
        if not _comes_from_orbax(failure.exc_traceback):
            unraisable_hook(failure)

    sys.excepthook, threading.excepthook = in_foreign_thread, in_thread
    sys.unraisablehook = unraisable


def _comes_from_orbax(trace: TracebackType | None) -> bool:
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(trace)]
    folders = {folder for file in files for folder in file.parent.parts}
    return not folders.isdisjoint(("orbax", "tensorstore", "uvloop"))


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree with these shardings: what `restore` asks for."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )
