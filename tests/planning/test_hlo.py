"""Reading a program's text: a module as a GPU's compiler writes it, counted by hand."""

import pytest

from planning.hlo import parse
from planning.kernels import Assumed
from planning.work import executed, flops, traffic, unknown_calls

NOTHING = Assumed(0.0, lambda *_: 0.0)

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=4

%fused_slice (param_0.1: bf16[6,16,32], param_1.1: s32[]) -> bf16[16,32] {
  %param_0.1 = bf16[6,16,32]{2,1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one_layer = bf16[1,16,32]{2,1,0} dynamic-slice(%param_0.1, %param_1.1, %zero, %zero), dynamic_slice_sizes={1,16,32}
  ROOT %flat = bf16[16,32]{1,0} bitcast(%one_layer)
}

%fused_update (param_0.2: f32[6,8], param_1.2: f32[8], param_2.2: s32[]) -> f32[6,8] {
  %param_0.2 = f32[6,8]{1,0} parameter(0)
  %param_1.2 = f32[8]{0} parameter(1)
  %param_2.2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  %row = f32[1,8]{1,0} bitcast(%param_1.2)
  ROOT %update = f32[6,8]{1,0} dynamic-update-slice(%param_0.2, %row, %param_2.2, %zero.2)
}

%body (state: (s32[], f32[6,8])) -> (s32[], f32[6,8]) {
  %state = (s32[], f32[6,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %sums = f32[6,8]{1,0} get-tuple-element(%state), index=1
  %weights = bf16[6,16,32]{2,1,0} constant({...})
  %layer = bf16[16,32]{1,0} fusion(%weights, %i), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(step)/jvp(Transformer)/while/body/layer_0/moe/shared/dynamic_slice"}
  %x = bf16[8,16]{1,0} broadcast(%i), dimensions={}
  %gemm = (bf16[8,32]{1,0}, s8[4096]{0}) custom-call(%x, %layer), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %product = bf16[8,32]{1,0} get-tuple-element(%gemm), index=0
  %exchange = ((bf16[8,32]{1,0}), (bf16[8,32]{1,0})) all-to-all-start(%product), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
  %exchanged = bf16[8,32]{1,0} all-to-all-done(%exchange)
  %kernel = f32[8]{0} custom-call(%exchanged), custom_call_target="somebody's kernel"
  %next = f32[6,8]{1,0} fusion(%sums, %kernel, %i), kind=kLoop, calls=%fused_update
  ROOT %out = (s32[], f32[6,8]{1,0}) tuple(%i, %next)
}

%condition (state.1: (s32[], f32[6,8])) -> pred[] {
  %state.1 = (s32[], f32[6,8]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%tile (state.2: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %state.2 = (s32[], f32[4,4]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %a = f32[4,4]{1,0} get-tuple-element(%state.2), index=1
  %square = f32[4,4]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out.2 = (s32[], f32[4,4]{1,0}) tuple(%i.2, %square)
}

%more (state.3: (s32[], f32[4,4])) -> pred[] {
  %state.3 = (s32[], f32[4,4]{1,0}) parameter(0)
  ROOT %true.3 = pred[] constant(true)
}

ENTRY %main (first: f32[6,8], second: f32[4,4]) -> (f32[6,8], f32[4,4]) {
  %first = f32[6,8]{1,0} parameter(0)
  %second = f32[4,4]{1,0} parameter(1)
  %zero.1 = s32[] constant(0)
  %begin = (s32[], f32[6,8]{1,0}) tuple(%zero.1, %first)
  %loop = (s32[], f32[6,8]{1,0}) while(%begin), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"},"known_init_step":{"init":"0","step":"1"}}
  %begin.1 = (s32[], f32[4,4]{1,0}) tuple(%zero.1, %second)
  %tiles = (s32[], f32[4,4]{1,0}) while(%begin.1), condition=%more, body=%tile
  %sums.1 = f32[6,8]{1,0} get-tuple-element(%loop), index=1
  %squares = f32[4,4]{1,0} get-tuple-element(%tiles), index=1
  ROOT %result = (f32[6,8]{1,0}, /*index=1*/f32[4,4]{1,0}) tuple(%sums.1, %squares)
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def program():
    return executed(parse(TEXT), lambda _: 2.5)


def by_name(program):
    return {x.instruction.name: x for x in program}


def test_loops_multiply_and_unknown_ones_follow_the_rule(program):
    times = {name: x.times for name, x in by_name(program).items()}
    inside = ("layer", "x", "gemm", "exchange", "kernel", "next")
    assert times == dict.fromkeys(inside, 6) | {"square": 2.5}


def test_flops_of_library_calls_and_of_products(program):
    found = {name: flops(x, NOTHING) for name, x in by_name(program).items()}
    assert found["gemm"] == 2 * 8 * 32 * 16
    assert found["square"] == 2 * 4 * 4 * 4
    assert sum(found.values()) == found["gemm"] + found["square"]


def test_traffic_counts_slices_and_updates_in_place(program):
    found = {name: traffic(x, NOTHING) for name, x in by_name(program).items()}
    layer = 16 * 32 * 2
    assert found["layer"] == layer + layer + 4  # a layer of the stack, its copy, the index
    assert found["next"] == 8 * 4 + 8 * 4 + 4  # a row read, the same row written, the index
    assert found["gemm"] == 2 * (8 * 16 + 16 * 32 + 8 * 32)  # not the library's working space
    assert found["exchange"] == 0


def test_kernels_that_hide_their_work_are_named(program):
    assert unknown_calls(program) == {"somebody's kernel": 6}


def test_of_a_conditional_the_branch_that_exchanges_rows_counts():
    text = """HloModule m

%replay (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  ROOT %dear = f32[4,4]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fits (b: f32[4,4]) -> f32[4,4] {
  %b = f32[4,4]{1,0} parameter(0)
  ROOT %cheap = f32[4,4]{1,0} all-to-all(%b), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (p: s32[], x: f32[4,4]) -> f32[4,4] {
  %p = s32[] parameter(0)
  %x = f32[4,4]{1,0} parameter(1)
  ROOT %choice = f32[4,4]{1,0} conditional(%p, %x, %x), branch_computations={%replay, %fits}
}
"""
    found = by_name(executed(parse(text), lambda _: 1.0))
    assert {name: x.times for name, x in found.items()} == {"dear": 0, "cheap": 1}


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("HloModule empty\n")
