"""Prefixes beyond the device: texts as without them, and no file that is believed wrongly."""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from configs.checks import UserError
from infer.engine import EngineOptions
from infer.engine.tiers import MAGIC, DiskTier, HostTier
from tests.infer.test_engine_prefixes import (
    KINDS,
    PAGED,
    QUICK,
    Served,
    compressed,
    one_layer,
    prompt,
)

PROMPTS = [prompt(150, seed=1), prompt(150, seed=2)]


def whole(key: int) -> bytes:
    return bytes([key]) * 32


PAGES, ROWS, BOTH = QUICK[0], "recurrent", QUICK[1]
CACHED = {PAGES: (160, 144), ROWS: (128, 128), BOTH: (128, 128)}
"""Tokens that each of PROMPTS finds: whole pages, or a state every 64 tokens where the prompt ended
or another one parted from it."""


@pytest.fixture(scope="module", params=CACHED)
def served(request):
    return Served(*KINDS[request.param], name=request.param)


@pytest.fixture(scope="module")
def cold(served):
    return [served.texts(served.engine(prefix_cache=False), [p])[0][:2] for p in PROMPTS]


@pytest.mark.thinned(2)
def test_another_process_finds_what_this_one_wrote(served, cold, tmp_path):
    """As a new engine does: the first finds nothing, the second all but the end. Not so with other
    weights."""
    engine = served.engine(cache_dir=str(tmp_path))
    first = served.texts(engine, PROMPTS[:1])[0]
    engine._memory._tiers.flush()
    second = [served.texts(served.engine(cache_dir=str(tmp_path)), [p])[0] for p in PROMPTS]
    assert first[:2] == cold[0]
    assert [x[:2] for x in second] == cold
    assert first[2] == 0
    assert tuple(x[2] for x in second) == CACHED[served.name]
    other = Served(served.model, served.options, seed=4)
    assert other.texts(other.engine(cache_dir=str(tmp_path)), PROMPTS[:1])[0][2] == 0


def test_states_of_another_size_are_not_taken(tmp_path):
    """Entries that fill no page lie in rows, as many as a sequence may have."""
    served = Served(one_layer(compressed(rate=12), context_length=512), PAGED)
    first = served.engine(cache_dir=str(tmp_path))
    texts = served.texts(first, PROMPTS[:1])
    first._memory._tiers.flush()
    for length, cached in ((240, 128), (257, 0)):  # slots are multiples of 256
        other = served.engine(cache_dir=str(tmp_path), max_length=length)
        assert served.texts(other, PROMPTS[:1]) == [(*texts[0][:2], cached)]


def test_broken_and_foreign_files_are_ignored_with_one_warning(served, cold, tmp_path, caplog):
    engine = served.engine(cache_dir=str(tmp_path))
    served.texts(engine, PROMPTS[:1])
    engine._memory._tiers.flush()
    files = sorted(tmp_path.iterdir())
    for i, path in enumerate(files):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes([bytes(content), b"", b"of another program", content[:-1]][i % 4])
    (tmp_path / "letter.txt").write_text("not ours")
    with caplog.at_level(logging.WARNING):
        made = [served.texts(served.engine(cache_dir=str(tmp_path)), [PROMPTS[0]])[0]]
    assert made == [(*cold[0], 0)]
    assert len(caplog.records) == 1
    assert "broken or of another program: prefixes are read anew" in caplog.text
    assert (tmp_path / "letter.txt").read_text() == "not ours"


def test_pages_that_gave_way_come_back_from_the_host():
    """After two prompts that need all there are."""
    served = Served(*KINDS[PAGES])
    for host_bytes, cached in ((0, 0), (1 << 24, 160)):
        engine = served.engine(host_cache_bytes=host_bytes)
        first = served.texts(engine, PROMPTS[:1])[0]
        for seed in (8, 9):
            served.texts(engine, [prompt(0, seed=seed)])
        assert served.texts(engine, PROMPTS[:1])[0] == (*first[:2], cached)


def test_the_host_keeps_what_was_used_last():
    tier = HostTier(30)
    for key in (1, 2, 3):
        tier.put(whole(key), bytes(10))
    assert tier.get(whole(1)) is not None
    tier.put(whole(4), bytes(10))
    tier.put(whole(5), bytes(31))
    assert [key for key in (1, 2, 3, 4, 5) if tier.get(whole(key))] == [1, 3, 4]
    assert tier.num_bytes == 30


def test_the_folder_stays_within_its_bound(tmp_path):
    """Over a restart, too; what one wrote another process reads."""
    size = 100 + len(MAGIC) + 64
    tier = DiskTier(str(tmp_path), 3 * size)
    for key in (1, 2, 3, 4):
        tier.put(whole(key), bytes(100))
        tier.flush()
        time.sleep(0.01)
    assert tier.get(whole(1)) is None
    assert tier.get(whole(2)) == bytes(100)
    other = DiskTier(str(tmp_path), 2 * size)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == other.num_bytes == 2 * size
    assert other.get(whole(2)) == bytes(100)


def test_a_disk_that_is_full_costs_prefixes_alone(tmp_path, caplog, monkeypatch):
    tier = DiskTier(str(tmp_path), 1 << 20)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskTier, "_make_room", full)
    with caplog.at_level(logging.WARNING):
        for key in (1, 2):
            tier.put(whole(key), bytes(100))
            tier.flush()
    assert caplog.text.count("No space left") == 1
    assert tier.get(whole(1)) is None


WRITER = """
import sys
from infer.engine.tiers import DiskTier
tier = DiskTier(sys.argv[1], 1 << 30)
print("ready", flush=True)
for i in range(10**6):
    tier.put(i.to_bytes(32, "little"), bytes([i % 256]) * 300_000)
    tier.flush()
"""


def test_a_process_killed_while_it_writes_leaves_nothing_that_is_wrong(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    time.sleep(0.3)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    tier = DiskTier(str(tmp_path), 1 << 30)
    names = [path.stem for path in tmp_path.glob("*.prefix")]
    assert names
    for name in names:
        key = bytes.fromhex(name)
        assert tier.get(key) == bytes([int.from_bytes(key, "little") % 256]) * 300_000


def test_what_would_be_ignored_is_refused(tmp_path):
    with pytest.raises(UserError, match="no effect without prefix_cache=True"):
        EngineOptions(cache_dir=str(tmp_path))
    served = Served(*KINDS[ROWS])
    with pytest.raises(UserError, match="is for pages, which this engine has none of"):
        served.engine(host_cache_bytes=10)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be used"):
        served.engine(cache_dir=str(tmp_path / "file"))
    assert dataclasses.replace(served.options, cache_dir=str(tmp_path)).cache_dir == str(tmp_path)
