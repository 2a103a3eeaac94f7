"""cached_attention: rows of slots and pages against sums over positions, written out in numpy."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import native
from kernels.backend import INTERPRET
from kernels.cached_attention import cached_attention, pallas_triton
from kernels.cached_attention.cases import CASES, XLA_CASES, Case
from kernels.cached_attention.state import State
from kernels.paged_attention import quantize_positions

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 exponentials and sums in another order
NAN = float("nan")


class Drawn(NamedTuple):
    operands: tuple[Any, ...]
    settings: dict[str, Any]
    k: np.ndarray
    """What the state stands for, float64 [R, L, G, C] by position."""
    v: np.ndarray


def stored(case: Case, x: np.ndarray):
    """x in the state's dtype, its scales (None for floats), and what both stand for."""
    if case.dtype == "int8":
        values, scales = (np.asarray(y) for y in quantized(x, case.scale_dtype))
        wide = scales.astype(np.float64)
        return values, scales, values.astype(np.float64) * wide[..., None]
    values = x.astype(jnp.dtype(case.dtype))
    return values, None, values.astype(np.float64)


quantized = jax.jit(quantize_positions, static_argnums=1)


def draw(case: Case, seed=3) -> Drawn:
    random = np.random.RandomState(seed)
    most, rows = max(case.lengths), len(case.lengths)
    shape = (rows, most, case.num_kv_heads)
    value_width = case.value_width or case.head_dim
    k = random.standard_normal((*shape, case.head_dim)).astype(np.float32)
    v = random.standard_normal((*shape, value_width)).astype(np.float32)
    tokens = [(r, p) for r, first, n in case.tokens for p in range(first, first + n)]
    rows_T, positions_T = np.array(tokens, np.int32).T
    q = random.standard_normal((len(tokens), case.num_heads, case.head_dim)).astype(np.float32)
    place = paged_places if case.page_size else slot_places
    at, num_places, where = place(case, random)
    held = []
    for x in (k,) if case.is_latent else (k, v):
        values, scales, known = stored(case, x)
        held.append((scattered(values, at, num_places), scattered(scales, at, num_places), known))
    if case.is_latent:
        held.append((None, None, held[0][2][..., :value_width]))
    settings = where | {
        "k_scales_RSG": held[0][1],
        "v_scales_RSG": held[1][1],
        "window_size": case.window_size,
        "num_sink_tokens": case.num_sink_tokens,
        "scale": case.scale,
        "score_cap": case.score_cap,
        "chunk_size": case.chunk_size,
        "value_width": value_width if case.is_latent else None,
    }
    if case.has_sink_logits:
        logits = random.standard_normal(case.num_heads).astype(np.float32) * 2
        settings["sink_logits_H"] = np.where(np.arange(case.num_heads) == 1, -np.inf, logits)
        settings["sink_logits_H"] = settings["sink_logits_H"].astype(np.float32)
    slot_positions = settings.pop("slot_positions_RS", None)
    operands = (q, held[0][0], held[1][0], rows_T, positions_T, slot_positions)
    return Drawn(operands, settings, held[0][2], held[1][2])


def slot_places(case: Case, random):
    """Where the kept positions lie, (row, slot) by (row, position): scrambled."""
    assert case.slots is not None
    places = np.full((len(case.lengths), case.slots), -1, np.int32)
    at = {}
    for r, length in enumerate(case.lengths):
        newest = max(length - (case.slots - case.num_sink_tokens), 0)
        kept = [p for p in range(length) if p < case.num_sink_tokens or p >= newest]
        for p, slot in zip(kept, random.permutation(case.slots), strict=False):
            at[r, p], places[r, slot] = (r, slot), p
    return at, places.shape, {"slot_positions_RS": places}


def paged_places(case: Case, random):
    """Where positions lie, (page, place) by (row, position); past a row's length, tables lie."""
    assert case.page_size is not None
    size, count = case.page_size, -(-max(case.lengths) // case.page_size) + 1
    pages = 1 + random.permutation(len(case.lengths) * count).reshape(-1, count)
    at = {}
    for r, length in enumerate(case.lengths):
        at |= {(r, p): (pages[r, p // size], p % size) for p in range(length)}
        pages[r, -(-length // size) :] = 10_000_000
    return at, (1 + pages.size, size), {"tables_RN": pages.astype(np.int32)}


def scattered(x, at, shape):
    """x by (row, position) where it lies; where nothing does, what must not be looked at."""
    if x is None:
        return None
    garbage = 77 if x.dtype == np.int8 else NAN
    out = np.full((*shape, *x.shape[2:]), garbage, x.dtype)
    for (r, p), place in at.items():
        out[place] = x[r, p]
    return out


def oracle(case: Case, drawn: Drawn) -> np.ndarray:
    """Softmax over the positions that each token sees, one token and head after the other."""
    q, _, _, rows, positions, _ = drawn.operands
    sinks = drawn.settings.get("sink_logits_H")
    scale = case.scale or case.head_dim**-0.5
    out = np.zeros((*q.shape[:2], drawn.v.shape[-1]))
    for t, (r, i) in enumerate(zip(rows, positions, strict=True)):
        window = case.window_size or i + 1
        seen = [j for j in range(i + 1) if i - j < window or j < case.num_sink_tokens]
        if case.chunk_size is not None:
            seen = [j for j in seen if j // case.chunk_size == i // case.chunk_size]
        if r < 0 or case.lengths[r] == 0:
            continue
        for h in range(case.num_heads):
            g = h * case.num_kv_heads // case.num_heads
            scores = drawn.k[r, seen, g] @ q[t, h].astype(np.float64) * scale
            if case.score_cap is not None:
                scores = case.score_cap * np.tanh(scores / case.score_cap)
            top = scores.max()
            exp = np.exp(scores - top)
            sink = 0.0 if sinks is None else np.exp(np.float64(sinks[h]) - top)
            out[t, h] = exp @ drawn.v[r, seen, g] / (exp.sum() + sink)
    return out


def attended(implementation, drawn: Drawn, **changes):
    settings = drawn.settings | {"implementation": implementation} | changes
    arrays = {k: v for k, v in settings.items() if isinstance(v, np.ndarray)}
    fixed = {k: v for k, v in settings.items() if k not in arrays}
    return np.asarray(jitted(**fixed)(*drawn.operands, **arrays))


@functools.cache
def jitted(**fixed):
    return jax.jit(functools.partial(cached_attention, **fixed))


needs_library = pytest.mark.skipif(
    not native.is_available(), reason="the native library is not built: no C++ compiler"
)
IMPLEMENTATIONS = ["reference", "xla", pytest.param("cpu", marks=needs_library), "triton"]
NOT_INTERPRETED = {"decode", "chunk", "long", "ring", "multi_head", "multi_query", "int8"}
"""Cases whose likes the Triton kernel meets in others, each of which takes it seconds."""


@pytest.fixture
def gpu(monkeypatch):
    """Where a GPU would be taken, Pallas' interpreter is."""
    monkeypatch.setattr("kernels.cached_attention.api.current_target", lambda: INTERPRET)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(4)
def test_equals_sums_over_positions(name, implementation):
    check(CASES[name], implementation)


@pytest.mark.parametrize("implementation", ["xla", "auto"])
@pytest.mark.parametrize("name", XLA_CASES)
def test_bounds_and_chunks_equal_sums_over_positions(name, implementation):
    check(XLA_CASES[name], implementation)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("implementation", ["cpu", "triton"])
@pytest.mark.parametrize("name", ["capped", "chunks"])
def test_kernels_that_know_no_bounds_or_chunks_say_so(name, implementation):
    with pytest.raises(NotImplementedError, match=r"only 'xla' and 'reference' know"):
        attended(implementation, draw(XLA_CASES[name]))


@needs_library
@pytest.mark.parametrize("name", CASES)
def test_native_equals_sums_over_positions(name, isa):
    check(CASES[name], "cpu")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_INTERPRETED])
@pytest.mark.thinned(4)
def test_triton_equals_sums_over_positions(name):
    case = CASES[name]
    check(replace(case, page_size=32) if name == "odd_pages" else case, "triton")


def check(case: Case, implementation):
    drawn = draw(case)
    found = attended(implementation, drawn)
    np.testing.assert_allclose(found, oracle(case, drawn), **TOLERANCE)
    np.testing.assert_array_equal(found[drawn.operands[3] < 0], 0)


def of_tokens(drawn: Drawn, at) -> Drawn:
    q, k, v, rows, positions, slots = drawn.operands
    return drawn._replace(operands=(q[at], k, v, rows[at], positions[at], slots))


@needs_library
@pytest.mark.parametrize("name", ["mixed", "ring_sinks", "paged_int8", "latent", "sink_logits"])
def test_other_tokens_change_no_bit(name, isa):
    """One token alone, all in another order, and all of them, each in a tile of another size."""
    drawn = draw(CASES[name])
    found = attended("cpu", drawn)
    order = np.random.RandomState(0).permutation(len(found))
    np.testing.assert_array_equal(attended("cpu", of_tokens(drawn, order)), found[order])
    for t in range(0, len(found), 5):
        np.testing.assert_array_equal(attended("cpu", of_tokens(drawn, [t]))[0], found[t])


@needs_library
def test_other_rows_and_empty_slots_change_no_bit():
    drawn = draw(CASES["mixed"])
    q, k, v, rows, positions, slots = drawn.operands
    padding = ((1, 2), (0, 700))
    k, v = (np.pad(x, (*padding, (0, 0), (0, 0)), constant_values=NAN) for x in (k, v))
    slots = np.pad(slots, padding, constant_values=-1)
    rows = np.where(rows < 0, -1, rows + 1)
    more = drawn._replace(operands=(q, k, v, rows, positions, slots))
    np.testing.assert_array_equal(attended("cpu", more), attended("cpu", drawn))


@needs_library
def test_pages_have_the_bits_of_slots_in_order():
    drawn = draw(CASES["odd_pages"])
    q, k, v, rows, positions, _ = drawn.operands
    tables = drawn.settings["tables_RN"]
    slots = np.full((len(tables), tables.shape[1] * k.shape[1]), -1, np.int32)
    dense = [np.full((*slots.shape, *x.shape[2:]), NAN, np.float32) for x in (k, v)]
    for r, length in enumerate(CASES["odd_pages"].lengths):
        slots[r, :length] = np.arange(length)
        for x, pages in zip(dense, (k, v), strict=True):
            held = pages[tables[r, : -(-length // k.shape[1])]]
            x[r, :length] = held.reshape(-1, *x.shape[2:])[:length]
    in_order = Drawn((q, *dense, rows, positions, slots), {}, drawn.k, drawn.v)
    np.testing.assert_array_equal(attended("cpu", in_order), attended("cpu", drawn))


@needs_library
def test_more_work_than_there_is_room_for_at_once():
    """Partial results of 600 tokens over 1,024 slots go through memory in several waves."""
    case = Case(lengths=(1024,), tokens=((0, 424, 600),), slots=1024, num_heads=16, head_dim=64)
    drawn = draw(case)
    found = attended("cpu", drawn)
    some = [0, 250, 251, 599]
    expected = oracle(case, of_tokens(drawn, some))
    np.testing.assert_allclose(found[some], expected, **TOLERANCE)
    np.testing.assert_array_equal(attended("cpu", of_tokens(drawn, [599]))[0], found[599])


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_a_token_sees_decides_whether_its_result_is_finite(implementation):
    """Position 40 of row 1 has a value that is none, and so has position 45 a key."""
    case = CASES["mixed"]
    drawn = draw(case)
    expected = attended(implementation, drawn)
    _, k, v, rows, positions, slots = drawn.operands
    (k_slot,), (v_slot,) = (np.flatnonzero(slots[1] == p) for p in (45, 40))
    v[1, v_slot, 0, 3], k[1, k_slot] = np.inf, NAN
    found = attended(implementation, drawn)
    is_touched = (rows == 1) & (positions >= 40)
    np.testing.assert_array_equal(found[~is_touched], expected[~is_touched])
    assert not np.isfinite(found[is_touched][:, :3, 3]).any()
    assert np.isnan(found[(rows == 1) & (positions >= 45)]).all()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("name", ["decode", "latent_int8"])
def test_one_token_of_each_row_needs_no_search(name, implementation):
    drawn = draw(CASES[name])
    found = attended(implementation, drawn, one_per_row=True)
    np.testing.assert_allclose(found, oracle(CASES[name], drawn), **TOLERANCE)


def test_bfloat16_queries_are_summed_in_float32():
    case = replace(CASES["mixed"], dtype="bfloat16")
    drawn = draw(case)
    q, *rest = drawn.operands
    rounded = drawn._replace(operands=(q.astype(jnp.bfloat16), *rest))
    known = drawn._replace(operands=(q.astype(jnp.bfloat16).astype(np.float32), *rest))
    found = attended("auto", rounded)
    assert found.dtype == jnp.bfloat16
    expected = oracle(case, known)
    # Scaled queries, weights and results each lose half a unit in the eighth bit.
    np.testing.assert_allclose(found.astype(np.float64), expected, atol=0.03)


def test_versions_that_are_wrong_are_rejected():
    case = CASES["ring_sinks"]
    drawn = draw(case)
    expected = oracle(case, drawn)
    for wrong in ({"window_size": 41}, {"num_sink_tokens": 4}, {"scale": 0.2501}):
        found = attended("xla", drawn, **wrong)
        assert not np.allclose(found, expected, **TOLERANCE), wrong


def test_no_scores_of_all_tokens_are_made_at_once():
    """[T, H, S] would be 64 MB; the program keeps a tile's."""
    tokens, slots = 2048, 2048
    shapes = ((tokens, 4, 8), (1, slots, 2, 8), (1, slots, 2, 8), (tokens,), (tokens,), (1, slots))
    dtypes = (*[jnp.float32] * 3, *[jnp.int32] * 3)
    operands = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    function = jax.jit(functools.partial(cached_attention, implementation="xla"))
    memory = function.lower(*operands).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8e6


@pytest.mark.usefixtures("gpu")
def test_tokens_of_other_rows_change_no_bit_of_the_triton_kernel():
    drawn = draw(CASES["mixed"])
    q, k, v, rows, positions, slots = drawn.operands
    found, is_ours = attended("triton", drawn), rows == 1
    alone = drawn._replace(operands=(q, k, v, np.where(is_ours, rows, -1), positions, slots))
    np.testing.assert_array_equal(attended("triton", alone)[is_ours], found[is_ours])


@pytest.mark.usefixtures("gpu")
def test_one_program_sums_what_several_do(monkeypatch):
    """The seen blocks of a tile in one part, in blocks of another size."""
    parts = []
    make_plan = pallas_triton.make_plan

    def noted(*operands):
        parts.append(make_plan(*operands).parts)
        return make_plan(*operands)

    monkeypatch.setattr(pallas_triton, "make_plan", noted)
    for programs, slots in ((256, 32), (1, 16)):
        monkeypatch.setattr(pallas_triton, "PROGRAMS", programs)
        sizes = pallas_triton.INTERPRETED._replace(slots=slots)
        monkeypatch.setattr(pallas_triton, "INTERPRETED", sizes)
        jitted.cache_clear()
        check(CASES["ring_sinks"], "triton")
    assert parts[0] > 1 == parts[1]


@pytest.mark.usefixtures("gpu")
def test_auto_takes_the_triton_kernel_where_it_can():
    for name, is_taken in (("paged", True), ("odd_pages", False)):
        (q, k, v, *rest), settings, *_ = draw(CASES[name])
        attend = functools.partial(cached_attention, tables_RN=jnp.asarray(settings["tables_RN"]))
        assert ("pallas_call" in str(jax.make_jaxpr(attend)(q, k, v, *rest))) == is_taken
    attend = functools.partial(attend, implementation="triton")
    with pytest.raises(NotImplementedError, match="pages of 7 positions must be a multiple of 16"):
        attend(q, k, v, *rest)
    with pytest.raises(NotImplementedError, match="keys of float8_e4m3fn must be float32, bfl"):
        attend(q, k.astype(jnp.float8_e4m3fn), v, *rest)


def test_the_triton_kernel_says_which_addresses_it_lacks():
    """Pallas' offsets have 32 bits up to 2^32 bytes, and Triton takes the last of them as a sign.

    So an array of floats, whose elements are fewer than its bytes, always has its addresses.
    """
    q = jax.ShapeDtypeStruct((1, 8, 128), jnp.bfloat16)
    places = [jax.ShapeDtypeStruct((1, pages), jnp.int32) for pages in (2**15, 2**14, 2**16)]
    found = []
    for tables, dtype in zip((*places, places[0]), (*[jnp.int8] * 3, jnp.bfloat16), strict=True):
        pages = jax.ShapeDtypeStruct((tables.shape[1] + 1, 64, 8, 128), dtype)
        state = State(pages, pages, None, None, None, tables)
        found.append(pallas_triton.unsupported_reason(q, state))
    assert [reason is None for reason in found] == [False, True, True, True]
    assert "keys of 2147549184 bytes must be at most 2^31" in found[0]


def test_triton_without_a_gpu_is_an_error():
    with pytest.raises(NotImplementedError, match="the default device is cpu"):
        cached_attention(*draw(CASES["decode"]).operands, implementation="triton")


@needs_library
def test_places_that_are_none_are_said():
    drawn = draw(CASES["paged"])
    q, k, v, rows, positions, _ = drawn.operands
    tables = drawn.settings["tables_RN"]
    wrong_rows = np.where(rows == 1, 7, rows)
    wrong_positions = np.where(rows == 1, 5000, positions)
    wrong_tables = np.where(tables == tables[0, 0], 99, tables)
    for changed, table, message in (
        ((q, k, v, wrong_rows, positions, None), tables, "is of row 7, and there are 4"),
        ((q, k, v, rows, wrong_positions, None), tables, "the pages of a row hold 320"),
        ((q, k, v, rows, positions, None), wrong_tables, r"is not in \[0, 81\): check the tables"),
    ):
        wrong = drawn._replace(operands=changed)
        # XLA raises where the call is made, or where its result is read.
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
            attended("cpu", wrong, tables_RN=table)


@needs_library
def test_the_platform_is_chosen_when_the_program_is_lowered():
    drawn = draw(CASES["decode"])
    traced = jax.jit(cached_attention).trace(*drawn.operands)
    assert "moesaic_cached_attention" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "moesaic" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_native_kernels_say_what_they_lack():
    drawn = draw(CASES["decode"])
    q, k, *rest = drawn.operands
    with pytest.raises(NotImplementedError, match="attend in float32, q is bfloat16"):
        cached_attention(q.astype(jnp.bfloat16), k, *rest, implementation="cpu")
    with pytest.raises(NotImplementedError, match="and the state is float16"):
        cached_attention(q, k.astype(np.float16), *rest, implementation="cpu")


def test_what_does_not_fit_is_said():
    drawn = draw(CASES["multi_head"])
    q, k, v, rows, positions, slots = (np.nan_to_num(x) for x in drawn.operands)
    for operands, settings, message in (
        ((q, k, v, rows[1:], positions, slots), {}, r"must be \[T, H, C\], \[T\] and \[T\]"),
        ((q, k, v, rows, positions, None), {}, "and neither came"),
        ((q, k, v, rows, positions, slots), {"tables_RN": slots}, "and both came"),
        ((q, k, v, rows, positions, slots[:, :5]), {}, r"must be \[R, S, G, C\] and \[R, S\]"),
        ((q, k[..., :3], v, rows, positions, slots), {}, r"must be \[T, H, C\] and \[R, S, G, C\]"),
        ((q[:, :5], k, v, rows, positions, slots), {}, "5 query heads must be a multiple of 6"),
        ((q, k, v[:, :, :2], rows, positions, slots), {}, "must agree but for their widths"),
        ((q, k, v, rows, positions, slots), {"value_width": 4}, "is for a state without values"),
        ((q, k, None, rows, positions, slots), {"value_width": 4}, "needs one key head"),
        ((q, k, v, rows, positions, slots), {"sink_logits_H": q[0, 0, :4]}, "one per query head"),
        ((q, k, v, rows, positions, slots), {"one_per_row": True}, "63 tokens of 4 rows came"),
        ((q, k.astype(np.int8), v, rows, positions, slots), {}, "keys of int8 need scales"),
        ((q, k, v, rows, positions, slots), {"v_scales_RSG": k[..., 0]}, "need scales of shape No"),
        ((q, k.astype(np.int32), v, rows, positions, slots), {}, "keys are int32, and must be fl"),
    ):
        with pytest.raises(ValueError, match=message):
            cached_attention(*operands, **settings)
