"""HLO text to collectives: every form that a compiler writes, by hand; real programs in test_preflight.py."""

import numpy as np
import pytest

from jaxlm.preflight.collectives import BETWEEN, Collective, schedule, traffic
from jaxlm.preflight.hlo import device_groups, elements, nbytes, parse


def found(text, devices=8):
    header = f"HloModule m, is_scheduled=true, num_partitions={devices}\n\n"
    return schedule(parse(header + text))


def entry(*lines):
    return "ENTRY %main (p: f32[8]) -> f32[8] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def sent(each, slices=(0,) * 8):
    return traffic(each, np.asarray(slices))


# ------------------------------------------------------------------------------------------------------ types


def test_bytes_of_types():
    assert nbytes("bf16[1,512,4,128]{1,3,2,0:T(8,128)(2,1)S(1)}") == 2 * 512 * 4 * 128
    assert nbytes("(f32[2]{0}, /*index=1*/(s32[], pred[3]{0}), f8e4m3fn[5]{0}, token[])") == 8 + 4 + 3 + 5
    assert nbytes("f32[<=16,2]{1,0}") == 128  # a bounded dynamic dimension
    assert elements("(f32[2]{0:T(8,128)}, /*index=1*/(s32[], u32[]))") == [
        "f32[2]{0:T(8,128)}",
        "(s32[], u32[])",
    ]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups={}, x=1", [[0, 1, 2, 3]]),
        ("channel_id=1", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4,'b'=1] {'b','a'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}, x=1", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([4]) {'b'}", [[0, 1], [2, 3]]),
    ],
)
def test_device_groups(text, groups):
    assert sorted(map(sorted, device_groups(text, 4).tolist())) == groups


def test_groups_that_are_not_understood_are_refused():
    with pytest.raises(ValueError, match="unknown form"):
        device_groups("replica_groups=<new>", 4)
    with pytest.raises(ValueError, match="different sizes"):
        device_groups("replica_groups={{0,1},{2}}", 3)


# -------------------------------------------------------------------------------------------- kinds and bytes


def test_bytes_of_every_kind():
    text = entry(
        "%p = f32[8]{0} parameter(0)",
        "%ag = f32[32]{0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}",
        "%rs = f32[2]{0} reduce-scatter(%p), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add",
        "%ar = (f32[8]{0}, bf16[4]{0}) all-reduce(%p, %q), channel_id=3, replica_groups=[2,4]<=[8]",
        "%aa = (f32[2]{0}, f32[2]{0}) all-to-all(%x, %y), channel_id=4, replica_groups=[4,2]<=[8]",
        "%cp = f32[8]{0} collective-permute(%p), channel_id=5, source_target_pairs={{0,1},{1,0}}",
        "%alone = f32[8]{0} all-reduce(%p), channel_id=6, replica_groups=[8,1]<=[8], to_apply=%add",
        "%still = f32[8]{0} collective-permute(%p), channel_id=7, source_target_pairs={{0,0},{1,1}}",
        'ROOT %r = f32[8]{0} add(%p, %cp), metadata={op_name="a/b"}',
    )
    by_kind = {each.kind: each for each in found(text).collectives}
    assert {kind: each.nbytes for kind, each in by_kind.items()} == {
        "all-gather": 128,
        "reduce-scatter": 32,
        "all-reduce": 40,
        "all-to-all": 16,
        "collective-permute": 32,
    }
    links = {kind: sent(each).ici for kind, each in by_kind.items()}
    assert links == {
        "all-gather": 96,
        "reduce-scatter": 24,
        "all-reduce": 60,
        "all-to-all": 8,
        "collective-permute": 32,
    }


def test_a_computation_of_another_thread_ends_where_it_ends():
    text = (
        "HloModule m, num_partitions=8\n\n"
        "%other (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
        '  ROOT %n = f32[8]{0} negate(%p)\n}, execution_thread="sparsecore"\n\n'
        "%next (q: f32[8]) -> f32[8] {\n  ROOT %q = f32[8]{0} parameter(0)\n}\n\n"
    ) + entry("%p = f32[8]{0} parameter(0)", "ROOT %c = f32[8]{0} copy(%p)")
    assert set(parse(text).computations) == {"other", "next", "main"}


def test_asynchronous_pairs_count_once():
    text = entry(
        "%p = f32[8]{0} parameter(0)",
        "%s = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}",
        "%d = f32[32]{0} all-gather-done(%s)",
        "%a = (f32[8]{0}, f32[4]{0}) all-reduce-start(%p, %q), replica_groups=[2,4]<=[8], to_apply=%add",
        "%b = (f32[8]{0}, f32[4]{0}) all-reduce-done(%a)",
        "%c = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}",
        "ROOT %e = f32[8]{0} collective-permute-done(%c)",
    )
    assert [(each.kind, each.nbytes) for each in found(text).collectives] == [
        ("all-gather", 128),
        ("all-reduce", 48),
        ("collective-permute", 32),
    ]


def test_collectives_inside_fusions():
    """A TPU's reduce-scatter; a gather spread over two fusions; equal channels outside of fusions."""
    text = """
%scatter (a: f32[32]) -> f32[8] {
  %a = f32[32]{0} parameter(0)
  %ar = f32[32]{0} all-reduce(%a), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %ds = f32[8]{0} dynamic-slice(%ar, %i), dynamic_slice_sizes={8}
}

%part.1 (a: f32[8]) -> (f32[8], f32[32]) {
  %a = f32[8]{0} parameter(0)
  ROOT %ag = f32[32]{0} all-gather(%a), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}
}

%part.2 (a: f32[8]) -> (f32[8], f32[32]) {
  %a = f32[8]{0} parameter(0)
  ROOT %ag.2 = f32[32]{0} all-gather(%a), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}
}

""" + entry(
        "%p = f32[8]{0} parameter(0)",
        "%x = f32[8]{0} fusion(%p), kind=kCustom, calls=%scatter",
        "%y = (f32[8]{0}, f32[32]{0}) fusion(%p), kind=kCustom, calls=%part.1",
        "%z = f32[32]{0} fusion(%y), kind=kCustom, calls=%part.2",
        "%s = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add",
        "ROOT %t = f32[8]{0} all-reduce(%s), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add",
    )
    kinds = [(each.kind, each.nbytes) for each in found(text).collectives]
    assert kinds == [("reduce-scatter", 128), ("all-gather", 128), ("all-reduce", 32), ("all-reduce", 32)]


# ---------------------------------------------------------------------------------------------------- loops

LOOPS = """
%inner_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %cp = f32[8]{0} collective-permute(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %r = (s32[], f32[8]{0}) tuple(%next, %cp)
}

%inner_condition (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%compared (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction=LT
}

%outer_body (t: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %t = (s32[], f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %n = s32[] get-tuple-element(%t), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%one, %i)
  %init = (s32[], f32[8]{0}) tuple(%one, %x)
  %while.1 = (s32[], f32[8]{0}) while(%init), condition=%inner_condition, body=%inner_body
  %y = f32[8]{0} get-tuple-element(%while.1), index=1
  %f = f32[8]{0} fusion(%y), kind=kLoop, calls=%compared, backend_config={"estimated_cycles":"10"}
  %g = f32[8]{0} fusion(%y), calls=%compared, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %r = (s32[], f32[8]{0}, s32[]) tuple(%next, %f, %n)
}

%outer_condition (t: (s32[], f32[8], s32[])) -> pred[] {
  %t = (s32[], f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=2
  ROOT %lt = pred[] fusion(%i, %n), kind=kLoop, calls=%compared
}

"""


def nested(limit="constant(5)"):
    return LOOPS + entry(
        "%p = f32[8]{0} parameter(0)",
        "%zero = s32[] constant(0)",
        f"%five = s32[] {limit}",
        "%init = (s32[], f32[8]{0}, s32[]) tuple(%zero, %p, %five)",
        "%while.2 = (s32[], f32[8]{0}, s32[]) while(%init), condition=%outer_condition, body=%outer_body",
        "ROOT %r = f32[8]{0} get-tuple-element(%while.2), index=1",
    )


def test_nested_loops_multiply():
    """The inner loop runs from 1 to 7 by 2, three times; the outer one's limit travels in its tuple."""
    result = found(nested())
    (each,) = result.collectives
    assert (each.trips, result.cycles, result.unknown_loops) == (15, 50, 0)


def test_kernels_are_named_and_count_as_often_as_their_loops_run():
    """Pallas kernels by their instruction, calls of a library by target; the rest is the compiler's own."""
    call = '  %{name} = f32[8]{{0}} custom-call(%x), custom_call_target="{target}"\n'
    names = {"kernel.3.remat2": "tpu_custom_call", "kernel.4": "tpu_custom_call", "a": "AllocateBuffer"}
    names["custom-call.2"] = "__cudnn$fmhaSoftmax"
    calls = "".join(call.format(name=name, target=target) for name, target in names.items())
    at = "%inner_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {\n"
    text = nested()
    assert at in text
    assert found(text.replace(at, at + calls)).kernels == {"kernel": 30, "__cudnn$fmhaSoftmax": 15}
    assert found(text).kernels == {}


def test_a_loop_of_unknown_length_is_reported():
    result = found(nested("copy(%elsewhere)"))
    assert ([each.trips for each in result.collectives], result.unknown_loops) == ([3], 1)


def test_the_compilers_own_trip_count_comes_first():
    config = 'backend_config={"known_trip_count":{"n":"11"},"known_init_step":{"init":"0","step":"1"}}'
    text = nested().replace("body=%outer_body", f"body=%outer_body, {config}")
    assert [each.trips for each in found(text).collectives] == [33]


BRANCH = """
%NAME (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %r = f32[SIZE]{0} all-reduce(%p), to_apply=%add
}
"""


def test_a_conditional_counts_its_dearer_branch():
    sizes = {"a": "8", "b": "64"}
    text = "".join(BRANCH.replace("NAME", name).replace("SIZE", size) for name, size in sizes.items())
    branches = "branch_computations={%a, %b}"
    text += entry("%p = f32[8]{0} parameter(0)", f"ROOT %c = f32[8]{{0}} conditional(%i, %p, %p), {branches}")
    assert [each.nbytes for each in found(text).collectives] == [256]


def test_a_ragged_exchange_sends_a_balanced_load_and_not_the_room_for_more():
    """There 16 rows go into a buffer of 64, and back."""
    sizes = {"p": 16, "b": 64, "o": 8, "n": 8}
    operands = [f"%{name} = f32[{size}]{{0}} parameter({i})" for i, (name, size) in enumerate(sizes.items())]
    there = "%t = f32[64]{0} ragged-all-to-all(%p, %b, %o, %n, %o, %n), replica_groups={}"
    back = "ROOT %r = f32[16]{0} ragged-all-to-all(%t, %p, %o, %n, %o, %n), replica_groups={}"
    both = found(entry(*operands, there, back)).collectives
    assert [each.nbytes for each in both] == [64, 64]
    assert sent(both[0]).ici == 64 * 7 / 8


def test_newlines_inside_an_instruction():
    text = entry(
        "%p = f32[8]{0} parameter(0)",
        '%k = f32[8]{0} custom-call(%p), frontend_attributes={kernel_metadata={\n "a": 1\n}}',
        "ROOT %r = f32[8]{0} all-reduce(%k), replica_groups={}, to_apply=%add",
    )
    assert [each.size for each in found(text).collectives] == [8]


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("module @jit_step {}")


# --------------------------------------------------------------------------------------------------- slices


def test_two_slices_share_a_collective_in_two_levels():
    groups, slices = np.arange(8)[None], [0] * 4 + [1] * 4
    gather = Collective("all-gather", 800, groups, 1, "")
    both = sent(gather, slices)
    assert (both.ici, both.dcn) == (600, 100)
    assert both.ici + both.dcn == sent(gather).ici == 700
    reduce = sent(Collective("all-reduce", 800, groups, 1, ""), slices)
    assert (reduce.ici, reduce.dcn) == (1200, 200)
    exchange = sent(Collective("all-to-all", 800, groups, 1, ""), slices)
    assert (exchange.ici, exchange.dcn) == (300, 400)
    inside = Collective("all-gather", 800, np.arange(8).reshape(2, 4), 1, "")
    assert sent(inside, slices).dcn == 0
    across = Collective("collective-permute", 800, np.asarray([[0, 4], [4, 0]]), 1, "")
    assert (sent(across, slices).ici, sent(across, slices).dcn) == (0, 800)


def test_a_transfer_that_the_compiler_took_out_of_a_collective():
    attributes = (
        '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"'
    )
    text = entry(
        "%p = f32[8]{0} parameter(0)",
        f"%s = (f32[8]{{0}}, u32[], token[]) send(%p, %t), frontend_attributes={{{attributes}}}",
        f"%r = (f32[8]{{0}}, u32[], token[]) recv(%t), channel_id=1, frontend_attributes={{{attributes}}}",
        "ROOT %d = token[] send-done(%s), channel_id=2",
    )
    (each,) = found(text, devices=4).collectives
    assert (each.kind, each.nbytes) == (BETWEEN + "all-reduce", 32)
    assert sent(each, [0, 0, 0, 0, 1, 1, 1, 1]).dcn == 32
