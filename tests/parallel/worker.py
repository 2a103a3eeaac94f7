"""One of two processes that the tests start: ... -m tests.parallel.worker PORT ID FOLDER WHAT."""

import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.checks import UserError
from parallel import distributed
from parallel.mesh import make_mesh
from scripts import command


def together(folder: Path) -> None:
    """What processes ask of each other."""
    mesh = make_mesh(data=2, expert=2)
    distributed.connect(mesh)
    index = jax.process_index()

    def write() -> str:
        time.sleep(0.5)
        (folder / "made").write_text("by the first")
        return "made"

    seen = distributed.first_then_others(write, (folder / "made").read_text)
    assert seen == ("made" if index == 0 else "by the first")
    assert distributed.is_first() == (index == 0)
    assert int(distributed.largest(0)) == 0
    assert int(distributed.largest(15 * index)) == 15
    values = np.arange(12.0).reshape(4, 3)
    split = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.make_array_from_callback(values.shape, split, lambda place: values[place])
    assert not x.is_fully_addressable
    np.testing.assert_array_equal(distributed.on_host(x), values)
    assert distributed.batch_block(mesh, 8) == (index, 2)
    assert distributed.batch_block(make_mesh(data=1, expert=2, tensor=2), 8) == (index, 2)
    assert distributed.batch_block(make_mesh(data=1, expert=1, tensor=4), 8) == (0, 1)
    with pytest.raises(UserError, match="has 2 devices, and the 2 processes have 4"):
        make_mesh(expert=2)  # a process would have been left out
    print("all is well")


def refused(folder: Path) -> None:
    """One fails while the other waits for it, in an operation that nothing interrupts."""
    if jax.process_index() == int(os.environ["FAILS"]):
        raise UserError("the disk is full")
    if jax.process_index() == 0:
        distributed.largest(0).block_until_ready()
    else:
        distributed.first_then_others(lambda: None, lambda: None)


def main(argv: list[str]) -> None:
    port, index, folder, what = argv
    launch = distributed.stated_launch(f"127.0.0.1:{port}", 2, int(index))
    assert launch is not None
    distributed.start(launch, num_devices=4)
    {"together": together, "refused": refused}[what](Path(folder))


if __name__ == "__main__":
    sys.argv[0] = "worker"
    command.execute(main)
