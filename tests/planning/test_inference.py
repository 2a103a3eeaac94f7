"""Plans of how to serve: laws of memory and time, bytes as they are in a loaded model."""

import dataclasses

import jax
import pytest

from configs.accelerators import DATA_SHEETS, UNKNOWN
from configs.base import ExecutionConfig
from configs.checks import UserError
from infer.engine import EngineOptions
from infer.engine.new_memory import new_memory, state_size
from infer.hardware import Hardware, Measured, Rates, from_sheet, this_machine
from infer.load import inference_model
from infer.weights import FORMATS, converted, converter
from planning.inference import (
    InferencePlan,
    Wanted,
    candidates,
    choose_page_size,
    make_inference_plan,
    remedies,
)
from planning.inference_cost import Costs
from planning.inference_report import as_tree, choices
from planning.memory import USABLE
from tests import tiny
from tests.probes import drawn

WANTED = Wanted(context=64, clients=8)
MODEL = tiny.model(vocab_size=1024, d_model=64)


def costs(hardware: Hardware, context: int = 64, **changes) -> Costs:
    execution = ExecutionConfig(**changes)
    return Costs(MODEL, execution, hardware, context)


def plan(name: str = "h100", wanted: Wanted = WANTED, **sheet) -> InferencePlan:
    hardware = from_sheet(name)
    hardware = dataclasses.replace(hardware, sheet=dataclasses.replace(hardware.sheet, **sheet))
    return make_inference_plan(costs(hardware, wanted.context), wanted)


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_of_weights_are_those_of_a_loaded_model(format, tmp_path):
    run = tiny.run(tmp_path, model=MODEL)
    model = inference_model(run)
    variables = drawn(MODEL)
    held = converted(dict(variables), converter(model, format))
    counted = sum(x.nbytes for x in jax.tree.leaves(held["params"]))
    assert costs(from_sheet("cpu")).weights(format).total == counted


def test_bytes_of_the_state_are_those_of_an_engine():
    counted = costs(from_sheet("cpu")).state_bytes("int8", 3, 16)
    model = costs(from_sheet("cpu"))._model
    options = EngineOptions(max_rows=3, max_length=64, num_pages=13, page_size=16, kv_dtype="int8")
    memory = new_memory(model, options, state_size(model, options))
    assert counted == sum(x.nbytes for x in jax.tree.leaves(memory.state))


def test_a_step_of_one_row_takes_its_bytes_over_the_bandwidth():
    """Counted by hand: two of eight experts are read, the embedding only where it is tied."""
    found = costs(from_sheet("h100"))
    d, v = 64, 1024
    attention = 2 * (2 * d * 32 + 2 * d * 16)
    moe = d * 8 + 3 * d * 16 + 2 * 3 * d * 16
    norms = 5 * d
    output = d * v
    read = 4 * (attention + moe + 3 * d * 48 + norms + output)
    sheet = DATA_SHEETS["h100"]
    assert not MODEL.tie_embeddings
    assert found.decode_seconds("float32", 1, 0) == pytest.approx(read / sheet.memory_bandwidth)
    more = found.decode_seconds("float32", 1, 1e6) - found.decode_seconds("float32", 1, 0)
    assert more == pytest.approx(1e6 / sheet.memory_bandwidth)


def test_rows_meet_experts_as_balanced_routing_has_it():
    """Of 8 experts two a token, drawn: the mean of distinct ones among 3 tokens."""
    weights = costs(from_sheet("h100")).weights("float32")
    (share, held), *_ = weights.experts
    read = (weights.read(3)["float32"] - weights.always["float32"]) / held["float32"]
    keys = jax.random.split(jax.random.key(0), 4000 * 3)
    drawn = jax.vmap(lambda key: jax.random.permutation(key, 8)[:2])(keys).reshape(4000, 6)
    distinct = jax.nn.one_hot(drawn, 8).any(axis=1).sum(axis=1).mean() / 8
    assert share == 0.25
    assert read == pytest.approx(float(distinct), abs=0.01)
    assert weights.read(10**6)["float32"] == pytest.approx(
        weights.always["float32"] + held["float32"]
    )


def test_a_plan_never_takes_more_than_the_memory_and_more_is_never_worse():
    before = 0.0
    for memory in (2e5, 4e5, 6e5, 8e5, 1e6, 1.4e6, 2e6, 4e6, 1e9):
        found = plan(memory=memory)
        if found.chosen is None:
            assert before == 0.0
            continue
        assert found.chosen.memory <= USABLE * memory
        assert found.chosen.tokens_per_second >= before
        before = found.chosen.tokens_per_second
    assert before > 0


def test_a_latency_and_a_budget_hold():
    free = plan(wanted=Wanted(context=64, clients=8, budget=1.0))
    assert free.chosen is not None
    tight = plan(wanted=dataclasses.replace(WANTED, budget=0.0))
    assert tight.chosen is not None
    assert (tight.chosen.weights, tight.chosen.kv) == ("float32", "float32")
    assert tight.chosen.tokens_per_second < free.chosen.tokens_per_second
    least = min(c.step_seconds for c in candidates(free.costs, WANTED))
    quick = plan(wanted=dataclasses.replace(WANTED, latency=1.2 * least))
    assert quick.chosen is not None
    assert quick.chosen.step_seconds <= 1.2 * least
    none = plan(wanted=dataclasses.replace(WANTED, latency=least / 2))
    assert none.chosen is None
    assert "a latency of" in remedies(none)[0]


def test_what_does_not_fit_says_what_would():
    found = plan(memory=1e5)
    assert found.chosen is None
    assert all("too much" in (found.unfit_reason(one) or "") for one in found.best)
    needed = min(c.memory for c in found.best if c.nats <= WANTED.budget)
    clauses = remedies(found)
    assert any("h200" in clause for clause in clauses)
    assert any(f"at least {-(-needed // 9e4):.0f} devices" in clause for clause in clauses)


def test_a_context_that_is_said_to_fit_does():
    """And twice of it does not."""
    wanted = Wanted(context=64, clients=1)
    roomy = plan(wanted=wanted)
    least = min(c.memory for c in roomy.best if c.nats <= wanted.budget)
    some = plan(memory=(least - 2000) / USABLE, wanted=wanted)
    (clause,) = [c for c in remedies(some) if c.startswith("a context of")]
    context = int(clause.split()[3].replace(",", ""))
    for tokens, fits in ((context, True), (2 * context, False)):
        again = dataclasses.replace(wanted, context=tokens)
        made = make_inference_plan(costs(some.hardware, tokens), again)
        assert (made.chosen is not None) == fits


def test_an_unknown_device_is_promised_least():
    unknown = plan("unknown").chosen
    assert unknown is not None
    assert unknown.weights in ("float32", "bfloat16")  # which no kernel is needed for
    for name, sheet in DATA_SHEETS.items():
        assert UNKNOWN.memory <= sheet.memory
        assert UNKNOWN.memory_bandwidth <= sheet.memory_bandwidth
        assert UNKNOWN.flops_32 <= sheet.flops_32
        found = plan(name).chosen
        assert found is not None
        assert unknown.tokens_per_second <= found.tokens_per_second


def test_what_is_measured_goes_before_the_sheet():
    """A machine whose int8 kernels are slow keeps bfloat16, whatever its bandwidth says."""
    rates = {name: Rates(weight_bytes=1e9, flops=1e12) for name in FORMATS}
    slow = rates | {name: Rates(weight_bytes=1e7, flops=1e12) for name in ("int8", "fp8", "int4")}
    hardware = from_sheet("cpu")
    for held, expected in ((rates, "int8"), (slow, "bfloat16")):
        measured = dataclasses.replace(hardware, measured=Measured(1e9, held))
        found = make_inference_plan(costs(measured), WANTED)
        assert found.chosen is not None
        assert found.chosen.weights == expected


def test_four_bits_of_a_file_are_taken_as_they_are():
    """What lies in four bits loses next to nothing with offsets; what does not, as much as int4."""
    wanted = Wanted(context=64, clients=1)
    for is_in_four_bits, expected in ((False, "int8"), (True, "int4_affine")):
        of_file = dataclasses.replace(wanted, is_in_four_bits=is_in_four_bits)
        found = make_inference_plan(costs(from_sheet("cpu")), of_file).chosen
        assert found is not None
        assert found.weights == expected
        assert found.nats <= wanted.budget
    of_file = dataclasses.replace(wanted, is_in_four_bits=True)  # whose blocks a GPU's hold four of
    found = make_inference_plan(costs(from_sheet("h100")), of_file).chosen
    assert found is not None
    assert found.weights == "int8"


def test_kernels_are_told_with_the_measurement():
    found = plan()
    assert found.chosen is not None
    told = {what: (value, why) for what, value, why in choices(found, found.chosen)}
    assert told["kernels of products"][0] == "Triton"
    assert "computes in float32" in told["kernels of products"][1]
    hardware = from_sheet("h100")
    halves = make_inference_plan(costs(hardware, compute_dtype="bfloat16"), WANTED)
    assert halves.chosen is not None
    assert halves.chosen.weights == "int8"
    assert as_tree(halves, "tiny")["kernels"]["products"] == (
        "Mosaic: Mosaic takes 0.68 of Triton's time, measured in 5 cases"
    )


def test_pages_waste_little():
    for context in (16, 64, 256, 512, 4096, 32768):
        size = choose_page_size(context)
        assert size == 16 or size / 2 <= context / 16


def test_a_measurement_is_kept_and_a_damaged_file_replaced(tmp_path, monkeypatch):
    from infer import hardware

    monkeypatch.setattr(hardware, "SIDE", 64)
    monkeypatch.setattr(hardware, "COPIED", 4096)
    cache, told = tmp_path / "new" / "hardware.json", []
    first = this_machine(1e9, cache, lambda done, total: told.append((done, total)))
    assert told[-1] == (len(FORMATS), len(FORMATS))
    assert first.sheet.memory == 1e9
    again = this_machine(1e9, cache, lambda done, total: pytest.fail("measured again"))
    assert again.measured == first.measured
    cache.write_text('{"x": 3')
    assert this_machine(1e9, cache).measured is not None
    assert hardware._kept(cache) is not None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"context": 1}, "context=1 must be at least 2"),
        ({"clients": 0}, "clients=0 must be at least 1"),
        ({"latency": -1.0}, "latency=-1.0 must be greater than 0"),
        ({"budget": -0.1}, "budget -0.1 must not be negative"),
        ({"rows": 0}, "rows=0 must be at least 1"),
    ],
)
def test_impossible_wishes_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        Wanted(**{"context": 64, **changes})


def test_formats_that_no_kernel_reads_are_refused():
    with pytest.raises(UserError, match="no kernel of unknown reads weights in int8"):
        plan("unknown", dataclasses.replace(WANTED, weights="int8"))
    with pytest.raises(UserError, match="has no data sheet"):
        from_sheet("b200")
