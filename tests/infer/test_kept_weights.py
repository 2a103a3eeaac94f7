"""Weights that are kept in their format: what is read back is what loading makes, and never that of
another source, format or code."""

import dataclasses
import errno
import json
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.model_folder import write_model_folder
from configs.base import ExecutionConfig
from configs.checks import UserError
from configs.serialization import to_json
from infer import kept_files, kept_weights, sources
from infer.adapters import with_adapter
from infer.kept_files import FORGOTTEN_SECONDS, UNFINISHED
from infer.kept_weights import KeptWeights, made_of
from infer.sources import open_source
from kernels import native
from kernels.quantize import QTensor
from kernels.quantize.formats import QUANTIZED
from model.transformer import Transformer
from parallel.mesh import make_mesh
from scripts import model_options
from tests import tiny
from tests.checkpoint.cases import write_case
from tests.checkpoint.test_kept_variables import check_equal
from tests.checkpoint.test_peft import write as write_adapter
from tests.probes import drawn


def store(tmp_path, told=None, **changes):
    """One that keeps whatever it is given."""
    kept = KeptWeights(tmp_path / "kept", 2**30, [].append if told is None else told.append, 0.0)
    return dataclasses.replace(kept, **({"bytes_per_second": float("inf")} | changes))


def files(kept):
    return sorted(path.name for path in kept.folder.iterdir())


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    write_case("mixtral", folder)
    return folder


@pytest.fixture
def never_read(monkeypatch):
    """Called, it lets nothing read a source or trace a model's shapes from then on."""

    def refuse(*_, **__):
        raise AssertionError("the source was read")

    return lambda: monkeypatch.setattr(sources, "abstract_on_mesh", refuse)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "fp8", "int8", "int4", "int4_affine"])
def test_kept_weights_are_those_that_loading_makes(mixtral, tmp_path, never_read, weights):
    kept = store(tmp_path)
    model, made = open_source(str(mixtral)).load(weights=weights, for_decoding=True, kept=kept)
    experts = made["params"]["periods"]["layer_1"]["moe"]["gate_up"]
    assert isinstance(experts, QTensor) == (weights in QUANTIZED)
    never_read()
    again, found = open_source(str(mixtral)).load(weights=weights, for_decoding=True, kept=kept)
    assert again == model
    check_equal(found, made)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(made), strict=True):
        assert (a.sharding, a.committed) == (b.sharding, b.committed)


def test_stacked_layers_of_a_model_folder(tmp_path, never_read):
    """Apart for decoding, together for scoring: two files."""
    config, kept = tiny.model(num_layers=4), store(tmp_path)
    write_model_folder(tmp_path / "model", config, drawn(config))
    source = open_source(str(tmp_path / "model"))
    made = [source.load(for_decoding=apart, kept=kept) for apart in (True, False)]
    assert len(files(kept)) == 2
    never_read()
    for apart, (model, variables) in zip((True, False), made, strict=True):
        again, found = source.load(for_decoding=apart, kept=kept)
        assert again == model
        check_equal(found, variables)


def test_an_adapter_is_part_of_what_is_kept(mixtral, tmp_path, never_read):
    write_adapter("mixtral", tmp_path / "adapter")
    kept, base = store(tmp_path), open_source(str(mixtral))
    source = with_adapter(base, tmp_path / "adapter")
    _, plain = base.load(weights="int8", kept=kept)
    _, made = source.load(weights="int8", kept=kept)
    assert len(files(kept)) == 2
    gates = [x["params"]["periods"]["layer_1"]["moe"]["gate_up"].values for x in (plain, made)]
    assert (np.asarray(gates[0]) != np.asarray(gates[1])).any()
    seen = source.fingerprint()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    again = with_adapter(base, tmp_path / "adapter")
    assert again.fingerprint() not in (seen, None)
    assert source.fingerprint() is None
    again.load(weights="int8", kept=kept)
    never_read()
    check_equal(again.load(weights="int8", kept=kept)[1], made)


def test_on_a_mesh_or_changed_in_memory_nothing_is_kept(mixtral, tmp_path):
    kept, source = store(tmp_path), open_source(str(mixtral))
    _, variables = source.load(mesh=make_mesh(expert=2), kept=kept)
    source.with_variables(source.config, variables, "something").load(kept=kept)
    assert not kept.folder.exists()


# --- What a file is of ---------------------------------------------------------------------------


def told_apart(mixtral, tmp_path, change):
    """Whether a load after the change read the source again."""
    kept = store(tmp_path)
    open_source(str(mixtral)).load(kept=kept)
    before = {path: path.stat().st_ino for path in kept.folder.iterdir()}
    options = change(mixtral) or {}
    open_source(str(mixtral)).load(kept=kept, **options)
    return {path: path.stat().st_ino for path in kept.folder.iterdir()} != before


def nothing(folder):
    pass


def other_time(folder):
    os.utime(folder / "model.safetensors", (1, 1))


def other_settings(folder):
    path = folder / "config.json"
    path.write_text(path.read_text() + "\n")


def other_weights(folder):
    """Of the same size, and with the time that the file had."""
    path = folder / "model.safetensors"
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "is_read"),
    [
        (nothing, False),
        (other_time, True),
        (other_settings, True),
        (other_weights, True),
        (lambda _: {"dtype": "bfloat16"}, True),
        (lambda _: {"weights": "bfloat16"}, True),
    ],
)
def test_a_change_is_read_anew(tmp_path, change, is_read):
    write_case("mixtral", tmp_path / "model")
    assert told_apart(tmp_path / "model", tmp_path, change) == is_read


def test_what_weights_depend_on(monkeypatch):
    model = Transformer(tiny.model())
    settings = ("int8", None, True)
    seen = {made_of("a", model, settings), made_of("a", model, settings)}
    assert len(seen) == 1
    seen.add(made_of("b", model, settings))
    seen.add(made_of("a", model, ("int8", None, False)))
    seen.add(made_of("a", Transformer(tiny.model(norm_eps=1e-3)), settings))
    computed = ExecutionConfig(compute_dtype="bfloat16")
    seen.add(made_of("a", Transformer(model.config, computed), settings))
    assert len(seen) == 5
    for module, name, value in (
        (kept_weights, "code_hash", lambda names: "other"),
        (kept_weights, "version", lambda name: "0"),
        (native, "isa", lambda: "other"),
        (native, "is_available", lambda: False),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            seen.add(made_of("a", model, settings))
    assert len(seen) == 9 - (not native.is_available()) * 2


def test_a_run_is_told_by_its_newest_checkpoint(tmp_path):
    run = tiny.run(tmp_path)
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(to_json(run))
    newest = tmp_path / "run" / "checkpoints" / "3" / "values"
    newest.write_text("a")
    source = open_source(str(tmp_path / "run"))
    seen = [source.fingerprint()]
    (tmp_path / "run" / "log.jsonl").write_text("")  # a run that goes on
    assert source.fingerprint() == seen[0] is not None
    newest.write_text("ab")
    seen.append(source.fingerprint())
    (tmp_path / "run" / "checkpoints" / "4").mkdir()
    seen.append(source.fingerprint())
    (tmp_path / "run" / "config.json").write_text(to_json(run) + "\n")
    assert source.fingerprint() is None  # what was opened is gone
    assert len(set(seen)) == 3


def test_a_source_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    write_case("mixtral", tmp_path / "model")
    source, kept = open_source(str(tmp_path / "model")), store(tmp_path)
    read = sources.abstract_on_mesh

    def change(*arguments):
        other_settings(tmp_path / "model")
        return read(*arguments)

    monkeypatch.setattr(sources, "abstract_on_mesh", change)
    source.load(kept=kept)
    source.load(kept=kept)  # changed since it was opened
    assert not kept.folder.exists()


# --- The folder ----------------------------------------------------------------------------------


def load(kept, name="a", value=1.0, size=1000, is_unchanged=True):
    """Variables of so many bytes, and whether they were read."""
    was_read = []

    def read():
        was_read.append(True)
        return {"x": jnp.full((size // 4,), value)}

    found = kept.load(name, f"{name} of {value}", read, lambda: is_unchanged)
    np.testing.assert_array_equal(found["x"], np.full(size // 4, value, np.float32))
    return bool(was_read)


def test_one_file_of_a_name(tmp_path):
    kept = store(tmp_path)
    assert [load(kept), load(kept), load(kept, value=2.0), load(kept, value=2.0)] == [
        True,
        False,
        True,
        False,
    ]
    assert files(kept) == ["a"]


def test_what_is_read_fast_or_changed_is_not_kept(tmp_path):
    slow = store(tmp_path, least_seconds=60.0)
    bulky = store(tmp_path, bytes_per_second=1e-3)
    assert load(slow)
    assert load(bulky)
    assert load(store(tmp_path), is_unchanged=False)
    assert not slow.folder.exists()


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"x" * len(data)])
def test_a_damaged_file_is_told_and_made_anew(tmp_path, damage):
    told: list[str] = []
    kept = store(tmp_path, told)
    load(kept)
    path = kept.folder / "a"
    path.write_bytes(damage(path.read_bytes()))
    assert load(kept)
    assert len(told) == 1
    assert told[0].startswith(f"the kept weights {path} can't be read (")
    assert not load(kept)
    assert len(told) == 1


def test_a_folder_that_can_not_be_written_is_told(tmp_path):
    told: list[str] = []
    kept = store(tmp_path, told)
    kept.folder.write_text("")  # root may write anywhere else
    assert load(kept)
    assert load(kept)
    assert told == [f"weights are not kept in {kept.folder} (File exists)"] * 2


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    told: list[str] = []
    kept = store(tmp_path, told)
    load(kept, "b")

    def write(file, *_):
        file.write(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kept_weights, "write_kept", write)
    assert load(kept)
    assert told == [f"weights are not kept in {kept.folder} (No space left on device)"]
    assert files(kept) == ["b"]


def test_those_not_used_for_longest_give_way(tmp_path):
    kept = store(tmp_path, most_bytes=200_000)
    for i, name in enumerate("abc"):
        load(kept, name, size=60_000)
        os.utime(kept.folder / name, (i + 1, i + 1))
    assert not load(kept, "a", size=60_000)  # used now
    load(kept, "d", size=60_000)
    assert files(kept) == ["a", "c", "d"]
    assert load(kept, "e", size=300_000)  # has no room at all, and takes none
    assert files(kept) == ["a", "c", "d"]


def test_a_disk_that_is_nearly_full(tmp_path, monkeypatch):
    kept, disk = store(tmp_path), kept_files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(kept_files.shutil, "disk_usage", lambda _: disk._replace(free=9000))
    assert load(kept, size=1000)
    assert files(kept) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    kept = store(tmp_path)
    kept.folder.mkdir()
    for name, age in (("old", FORGOTTEN_SECONDS + 9), ("new", 0.0)):
        path = kept.folder / f"{name}{UNFINISHED}"
        path.write_text("some")
        used = time.time() - age
        os.utime(path, (used, used))
    load(kept)
    assert files(kept) == ["a", f"new{UNFINISHED}"]


def test_several_at_once(tmp_path):
    kept, barrier, failed = store(tmp_path), threading.Barrier(4), []

    def work(number):
        barrier.wait()
        try:
            for _ in range(20):
                load(kept, value=float(number), size=40_000)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert files(kept) == ["a"]


# --- Verbs ---------------------------------------------------------------------------------------


def test_where_verbs_keep_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(model_options.KEPT_GIB)
    kept = model_options.kept_weights()
    assert kept is not None
    assert (kept.folder, kept.most_bytes) == (tmp_path / "moesaic" / "weights", 8 * 2**30)
    monkeypatch.setenv(model_options.KEPT_GIB, "0.5")
    half = model_options.kept_weights()
    assert half is not None
    assert half.most_bytes == 2**29
    monkeypatch.setenv(model_options.KEPT_GIB, "0")
    assert model_options.kept_weights() is None
    for wrong in ("much", "-1", "nan"):
        monkeypatch.setenv(model_options.KEPT_GIB, wrong)
        with pytest.raises(UserError, match=f"={wrong} must be a number of GiB"):
            model_options.kept_weights()
    monkeypatch.setenv(model_options.KEPT_GIB, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", "~")
    assert model_options.kept_weights() is None


def test_a_verb_keeps_what_it_loads(mixtral, tmp_path, monkeypatch, capsys):
    from scripts import score

    kept = store(tmp_path)
    monkeypatch.setattr(model_options, "kept_weights", lambda: kept)
    (tmp_path / "tokens.json").write_text(json.dumps([1, 2, 3]))
    asked = [str(mixtral), "--tokens-file", str(tmp_path / "tokens.json")]
    for name in ("a.npy", "b.npy"):
        score.main([*asked, "--weights", "int8", "--logits", str(tmp_path / name)])
    assert len(files(kept)) == 1
    assert files(kept)[0].startswith("mixtral.int8.")
    np.testing.assert_array_equal(*(np.load(tmp_path / name) for name in ("a.npy", "b.npy")))
