"""The stream of batches: seeded, complete, resumable, the same for any number of processes."""

import numpy as np
import pytest

from configs.checks import UserError
from data.packing import PackedRows
from data.pipeline import batches, prepare_corpus
from data.tokenizers.tokenizer import END_OF_TEXT_ID
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


@pytest.mark.parametrize("rows_before", [0, 3])
def test_processes_have_blocks_of_the_global_batch(file, rows_before):
    """In its order, over the end of an epoch, from the state that another number of them saved."""
    one = stream(file, rows_before=rows_before)
    take(one, 30)
    halves = [
        stream(file, process_index=i, process_count=2, rows_before=rows_before) for i in range(2)
    ]
    for half in halves:
        half.set_state(one.get_state())
    for whole, *parts in zip(take(one, 30), *(take(half, 30) for half in halves), strict=True):
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])


def test_a_batch_that_processes_do_not_divide_is_refused(file):
    with pytest.raises(UserError, match="batch_size=4 must be divisible by the 3 processes"):
        stream(file, process_count=3)


@pytest.mark.parametrize("order", ["shuffled", "streams"])
@pytest.mark.parametrize("process_count", [1, 2])
def test_rows_before_are_left_out(file, order, process_count):
    for index in range(process_count):
        options = {"order": order, "process_index": index, "process_count": process_count}
        whole = take(stream(file, **options), 4)
        rest = take(stream(file, **options, rows_before=2 * 4), 2)
        for ours, theirs in zip(rest, whole[2:], strict=True):
            for name in theirs:
                np.testing.assert_array_equal(ours[name], theirs[name])


# --- Streams ------------------------------------------------------------------------------------

STREAM_ROWS = 40  # 161 rows of 32 tokens in 4 streams


def streams(file, **processes):
    return batches(file, seq_len=32, batch_size=4, seed=0, order="streams", **processes)


@pytest.fixture(scope="module")
def epoch(file):
    """One epoch of streams and two steps of the next, each figure [B, steps, ...]."""
    taken = take(streams(file), STREAM_ROWS + 2)
    return {name: np.stack([batch[name] for batch in taken], axis=1) for name in taken[0]}


def test_each_row_goes_on_where_the_one_of_the_step_before_ended(file, epoch):
    for b in range(4):
        tokens = epoch["tokens"][b, :STREAM_ROWS].reshape(-1)
        begin = b * len(tokens)
        np.testing.assert_array_equal(tokens, file.tokens[begin : begin + len(tokens)])
        targets = epoch["targets"][b, :STREAM_ROWS].reshape(-1)
        np.testing.assert_array_equal(targets[:-1], tokens[1:])
    rows = epoch["row"][:, :STREAM_ROWS]
    np.testing.assert_array_equal(np.sort(rows.reshape(-1)), np.arange(4 * STREAM_ROWS))


def test_positions_go_on_from_row_to_row_and_restart_at_documents(epoch):
    """Token by token: a stream that begins inside a document counts from its own beginning."""
    for b in range(4):
        position = -1
        tokens = epoch["tokens"][b, :STREAM_ROWS].reshape(-1)
        for token, found in zip(
            tokens, epoch["positions"][b, :STREAM_ROWS].reshape(-1), strict=True
        ):
            position = 0 if token == END_OF_TEXT_ID else position + 1
            assert found == position
    assert epoch["positions"].max() > 500  # a whole file, longer than many rows
    assert (epoch["tokens"][1:, 0, 0] != END_OF_TEXT_ID).any()


def test_the_next_epoch_begins_every_stream_again(epoch):
    """Position 0 after any other is a new document, so the memory of the end is cut off."""
    for name, values in epoch.items():
        np.testing.assert_array_equal(values[:, STREAM_ROWS:], values[:, :2], err_msg=name)
    assert (epoch["positions"][:, STREAM_ROWS, 0] == 0).all()


def test_restored_streams_go_on(file):
    iterator = streams(file)
    take(iterator, STREAM_ROWS - 2)
    state = iterator.get_state()
    expected = take(iterator, 4)  # over the epoch's end
    fresh = streams(file)
    fresh.set_state(state)
    for ours, theirs in zip(take(fresh, 4), expected, strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_processes_have_blocks_of_the_streams(file):
    """The same global batch in the same order, so that a memory finds its stream again; and a
    state saved by one process serves two.
    """
    one = streams(file)
    take(one, 3)
    state = one.get_state()
    halves = [streams(file, process_index=i, process_count=2) for i in range(2)]
    for half in halves:
        half.set_state(state)
    for whole, *parts in zip(take(one, 3), *(take(half, 3) for half in halves), strict=True):
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])


def test_more_streams_than_rows_are_refused(file):
    with pytest.raises(UserError, match=r"has 161 rows .* too few for batch_size=200 streams"):
        batches(file, seq_len=32, batch_size=200, seed=0, order="streams")
