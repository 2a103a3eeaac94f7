"""The stream of batches: seeded, complete, resumable, the same for any number of processes."""

import numpy as np
import pytest

from configs.checks import UserError
from data.packing import PackedRows
from data.pipeline import batches, prepare_corpus
from tests import tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("pipeline")
    tiny.write_sources(tmp_path)
    return prepare_corpus(tiny.run(tmp_path).data, 300).training()


def stream(file, seed=0, **processes):
    return batches(file, seq_len=32, batch_size=4, seed=seed, **processes)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_an_epoch_has_every_row_once_and_the_next_another_order(file):
    num_rows = len(PackedRows(file, 32))
    rows = np.concatenate(
        [b["row"] for b in take(batches(file, seq_len=32, batch_size=1, seed=0), 2 * num_rows)]
    )
    first, second = rows[:num_rows], rows[num_rows:]
    assert sorted(first) == sorted(second) == list(range(num_rows))
    assert not np.array_equal(first, second)


def test_a_seed_decides_the_order(file):
    a, b, c = (np.stack([x["row"] for x in take(stream(file, s), 5)]) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_restored_iterator_gives_the_batches_that_were_to_come(file):
    iterator = stream(file)
    take(iterator, 3)
    state = iterator.get_state()
    expected = take(iterator, 4)
    fresh = stream(file)
    fresh.set_state(state)
    for ours, theirs in zip(take(fresh, 4), expected, strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_processes_share_the_global_batch(file):
    whole = take(stream(file), 4)
    halves = [take(stream(file, process_index=i, process_count=2), 4) for i in range(2)]
    for step, batch in enumerate(whole):
        together = np.stack([half[step]["row"] for half in halves], axis=1).reshape(-1)
        np.testing.assert_array_equal(together, batch["row"])


def test_a_batch_that_processes_do_not_divide_is_refused(file):
    with pytest.raises(UserError, match="batch_size=4 must be divisible by the 3 processes"):
        stream(file, process_count=3)
