"""Programs that are kept: the same numbers as without, and nothing that is damaged or of other code
is taken up."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.architecture import LayerSpec
from configs.feed_forward import DenseConfig
from infer import kept_programs
from infer.engine import Engine, EngineOptions, Request
from infer.engine.programs import WholeModel
from infer.kept_programs import KeptPrograms, keep_in
from model.transformer import Transformer
from tests import tiny
from tests.probes import drawn


class Counted:
    """A jitted function that counts how often it is lowered."""

    def __init__(self):
        self.num_lowered, self.__qualname__ = 0, "scaled"

    def __call__(self, *arguments):
        return _scaled(*arguments)

    def lower(self, *arguments):
        self.num_lowered += 1
        return _scaled.lower(*arguments)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _scaled(factor, w, given, state, shift=0):
    return w["w"] @ given * factor + shift, state + 1


W, GIVEN = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, np.ones(3, np.float32)


@pytest.fixture
def folder(tmp_path):
    keep_in(tmp_path)
    yield tmp_path
    keep_in(None)


def run(function, factor=2.0, given=GIVEN):
    """In a process that knows nothing yet."""
    kept = KeptPrograms(jax.tree.map(jnp.asarray, W))
    made = kept.run(function, given, jnp.zeros(2), before=(factor,))[0]
    np.testing.assert_array_equal(made, W["w"] @ given * factor)
    return kept


def test_a_kept_program_is_not_lowered_again(folder):
    function = Counted()
    kept = run(function)
    kept.run(function, 3 * GIVEN, jnp.zeros(2), before=(2.0,))
    run(function)
    assert function.num_lowered == 1
    assert len(list(folder.glob("*.program"))) == 1


def test_other_settings_shapes_and_dtypes_are_other_programs(folder):
    function = Counted()
    run(function)
    run(function, factor=3.0)
    run(function, given=np.ones((3, 2), np.float32))
    run(function, given=GIVEN.astype(np.int32))
    assert function.num_lowered == 4


def test_other_code_is_traced_and_the_same_text_not_compiled(folder, monkeypatch):
    function = Counted()
    run(function)
    monkeypatch.setattr(kept_programs, "code_hash", lambda names: "of a later version")
    run(function)
    assert function.num_lowered == 2
    assert len(list(folder.glob("*.key"))) == 2
    assert len(list(folder.glob("*.program"))) == 1


def _flip(path):
    stored = bytearray(path.read_bytes())
    stored[len(stored) // 2] ^= 1
    path.write_bytes(stored)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: [x.write_bytes(b"\xff\xfe") for x in path.parent.glob("*.key")],
    ],
    ids=["flipped", "cut", "empty", "gone", "no text"],
)
def test_what_is_damaged_is_made_anew(folder, damage):
    function = Counted()
    run(function)
    (path,) = folder.glob("*.program")
    whole = path.read_bytes()
    damage(path)
    run(function)
    assert function.num_lowered == 2
    run(function)
    assert function.num_lowered == 2
    assert len(path.read_bytes()) == len(whole)


def test_a_folder_that_is_gone_costs_nothing_but_time(tmp_path):
    keep_in(tmp_path / "not there")
    function = Counted()
    run(function)
    run(function)
    keep_in(None)
    assert function.num_lowered == 2


def test_what_was_used_longest_ago_gives_way(folder, monkeypatch):
    function = Counted()
    run(function, factor=2.0)
    size = sum(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(kept_programs, "MOST_BYTES", size * 5 // 2)
    for factor in (3.0, 4.0):
        run(function, factor=factor)
    run(function, factor=4.0)
    assert function.num_lowered == 3
    run(function, factor=2.0)
    assert function.num_lowered == 4
    assert sum(path.stat().st_size for path in folder.iterdir()) <= size * 5 // 2


def test_arrays_on_a_mesh_are_left_to_jax(folder):
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2])
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))
    kept = KeptPrograms({"w": jax.device_put(W["w"], spread)})
    kept.run(Counted(), GIVEN, jnp.zeros(2), before=(2.0,))
    assert not list(folder.iterdir())


def test_an_engine_with_kept_programs_traces_nothing_and_says_the_same(folder):
    """Two engines as a process has them at its start; the third is given no folder. Its vocabulary
    is no other test's: what JAX has read from a file can't be written down."""
    pattern = (LayerSpec(attention=tiny.attention(), ffn=DenseConfig(d_ff=16)),)
    config = tiny.model(pattern=pattern, num_layers=1, vocab_size=302)
    model, variables = Transformer(config), drawn(config, seed=3)
    options = EngineOptions(max_rows=2, max_length=32, piece=16, num_pages=2)
    requests = [Request([0, 5, 17], 6), Request([0, *range(40, 60)], 6, num_logprobs=2)]
    begun: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: begun.append(name))

    def texts():
        engine = Engine(model, variables, options, programs=WholeModel(model, variables))
        begun.clear()
        engine.warm_up()
        num_traced = sum("trace_duration" in name for name in begun)
        for request in requests:
            engine.add(request)
        found: dict[int, list[int]] = {}
        while engine.has_work():
            for emitted in engine.step():
                found.setdefault(emitted.request, []).extend(emitted.tokens)
        return num_traced, found

    num_traced, first = texts()
    assert num_traced > 0
    assert texts() == (0, first)
    keep_in(None)
    assert texts()[1] == first
