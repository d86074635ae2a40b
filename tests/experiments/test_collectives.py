"""Collectives of compiled steps: snippets of HLO with known answers."""

import itertools

import numpy as np
import pytest

from experiments import collectives, hlo
from model.chips import topology_of

# --- Overlap ----------------------------------------------------------------------------------------------------------


def chained(steps: int) -> str:
    """An all-gather begun by one fusion, carried on beside `steps` others of 50 cycles, and ended by another."""
    gather = "all-gather(%p), channel_id=9, replica_groups=[2,2]<=[4], dimensions={0}, use_global_device_ids=true"
    fusions = "\n".join(
        f'  %step.{i} = (bf16[4], bf16[8]) fusion(%x, %begun), calls=%step_{i}, backend_config={{"estimated_cycles":"50"}}'
        for i in range(steps)
    )
    computations = "\n\n".join(
        f"%step_{i} (p: bf16[4]) -> (bf16[4], bf16[8]) {{\n  %p = bf16[4]{{0}} parameter(0)\n  %g = bf16[8]{{0}} {gather}\n"
        "  ROOT %t = (bf16[4], bf16[8]) tuple(%p, %g)\n}}"
        for i in range(steps)
    ).replace("}}", "}")
    return f"""\
HloModule chain, is_scheduled=true

%start_of (p: bf16[4]) -> (bf16[4], bf16[8]) {{
  %p = bf16[4]{{0}} parameter(0)
  %g = bf16[8]{{0}} {gather}
  ROOT %c = (bf16[4], bf16[8]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

{computations}

%end_of (p: bf16[4]) -> bf16[8] {{
  %p = bf16[4]{{0}} parameter(0)
  %g = bf16[8]{{0}} {gather}
  ROOT %c = bf16[8]{{0}} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (x: bf16[4]) -> bf16[8] {{
  %x = bf16[4]{{0}} parameter(0)
  %begun = (bf16[4], bf16[8]) fusion(%x), kind=kCustom, calls=%start_of
  %copied = bf16[4]{{0}} copy(%x), backend_config={{"estimated_cycles":"1000"}}
{fusions}
  ROOT %ended = bf16[8]{{0}} fusion(%x, %begun), kind=kCustom, calls=%end_of
}}
"""


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_chain_of_fusions_is_one_collective_covered_by_its_steps(steps):
    """The copy between does not carry it on."""
    (found,) = collectives.find(hlo.parse(chained(steps)), lambda _: 120.0)
    assert found.is_async
    assert found.cycles == 120
    assert found.exposed_cycles == max(0, 120 - 50 * steps)
    assert found.groups == [(0, 1), (2, 3)]
    assert found.operand_bytes == 8
    assert found.moved_bytes(4) == 8


def test_a_chain_whose_start_is_not_recognised_counts_too_much():
    """The fusion that began it, its step and its end each count whole."""
    found = collectives.find(hlo.parse(chained(1).replace("AsyncCollectiveStart", "Other")), lambda _: 120.0)
    assert [(one.is_async, one.exposed_cycles) for one in found] == [(False, 120)] * 3


def test_a_chain_without_an_end_is_told():
    with pytest.raises(ValueError, match="without an end"):
        collectives.find(hlo.parse(chained(1).replace("AsyncCollectiveDone", "Other")), lambda _: 1.0)


PAIRS = """\
HloModule pairs, is_scheduled=true

%wrapped (q: f32[16]) -> f32[16] {
  %q = f32[16]{0} parameter(0)
  ROOT %a2a = f32[16]{0} all-to-all(%q), channel_id=4, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %permute = (f32[16], f32[16]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %gather = (f32[16], f32[64]) all-gather-start(%x), channel_id=5, replica_groups={}, dimensions={0}
  %work.1 = f32[16]{0} copy(%x), backend_config={"estimated_cycles":"30"}
  %permuted = f32[16]{0} collective-permute-done(%permute)
  %begun = ((f32[16]), f32[16], u32[]) async-start(%x), calls=%wrapped
  %work.2 = f32[16]{0} copy(%x), backend_config={"estimated_cycles":"12"}
  %exchanged = f32[16]{0} async-done(%begun)
  %gathered = f32[64]{0} all-gather-done(%gather)
  ROOT %root = f32[16]{0} add(%permuted, %exchanged)
}
"""


def test_pairs_are_read_with_their_groups_and_bytes():
    found = {one.kind: one for one in collectives.find(hlo.parse(PAIRS), lambda _: 1.0)}
    assert all(one.is_async for one in found.values())
    mesh = {"data": 2, "context": 2}
    axes = {kind: collectives.mesh_axes(one, mesh) for kind, one in found.items()}
    assert axes == {"collective-permute": "context", "all-to-all": "data+context", "all-gather": "data+context"}
    assert found["all-gather"].moved_bytes(4) == 3 * 64
    assert found["all-to-all"].moved_bytes(4) == 48
    assert found["collective-permute"].moved_bytes(4) == 64


@pytest.mark.parametrize(
    ("cycles", "exposed"),
    [
        # The permutation begins first and is done after 30 cycles of work; what they leave goes to the gather, and so on.
        ({"collective-permute": 30, "all-gather": 12, "all-to-all": 0}, {}),
        ({"collective-permute": 20, "all-gather": 10, "all-to-all": 12}, {}),
        ({"collective-permute": 20, "all-gather": 15, "all-to-all": 12}, {"all-to-all": 5}),
        ({"collective-permute": 31, "all-gather": 12, "all-to-all": 0}, {"collective-permute": 1}),
        ({"collective-permute": 30, "all-gather": 30, "all-to-all": 30}, {"all-gather": 18, "all-to-all": 30}),
    ],
)
def test_work_covers_one_collective_at_a_time(cycles, exposed):
    found = collectives.find(hlo.parse(PAIRS), lambda one: cycles[one.kind])
    assert {one.kind: one.exposed_cycles for one in found if one.exposed_cycles} == exposed


def test_what_a_sparse_core_does_beside_is_found():
    """As on tpu7x, where some calls hold a collective, and others copies or look-ups."""
    text = PAIRS.replace(
        "async-start(%x), calls=%wrapped", 'call-start(%x), async_execution_thread="sparsecore", to_apply=%wrapped'
    )
    text = text.replace("async-done(", "call-done(")
    found = [(one.kind, one.exposed_cycles) for one in collectives.find(hlo.parse(text), lambda _: 15.0)]
    assert found == [(one.kind, one.exposed_cycles) for one in collectives.find(hlo.parse(PAIRS), lambda _: 15.0)]
    without = text.replace("all-to-all(", "copy(")
    assert {one.kind for one in collectives.find(hlo.parse(without), lambda _: 15.0)} == {"collective-permute", "all-gather"}
    # A program there may start others.
    outer = """\
%wrapping (r: f32[16]) -> f32[16] {
  %r = f32[16]{0} parameter(0)
  %first = ((f32[16]), f32[16], u32[]) call-start(%r), async_execution_thread="sparsecore", to_apply=%wrapped
  ROOT %last = f32[16]{0} call-done(%first)
}

ENTRY"""
    nested = text.replace("to_apply=%wrapped", "to_apply=%wrapping").replace("ENTRY", outer)
    assert [(one.kind, one.exposed_cycles) for one in collectives.find(hlo.parse(nested), lambda _: 15.0)] == found


def test_a_kernel_covers_what_it_stands_beside():
    text = PAIRS.replace('%work.1 = f32[16]{0} copy(%x), backend_config={"estimated_cycles":"30"}', (
        '%work.1 = f32[16]{0} custom-call(%x), custom_call_target="tpu_custom_call"'
    ))  # fmt: skip
    for kernels, exposed in (({}, 30), ({"work.1": 25.0}, 5), ({"work.1": 30.0}, 0)):
        found = collectives.find(hlo.parse(text), lambda one: 30.0 * (one.kind == "collective-permute"), kernels)
        assert [one.exposed_cycles for one in found if one.kind == "collective-permute"] == [exposed]


def test_the_table_adds_up_what_is_exposed():
    """64 bytes over one link of a pair at 50 GB/s take 1.28 ns, which 30 cycles of 1.5 GHz cover."""
    topology, places = topology_of("v5e:2x2"), [(0, 0), (0, 1), (1, 0), (1, 1)]
    mesh = {"data": 2, "context": 2}

    def traffic(text):
        found = collectives.find(hlo.parse(text), lambda one: collectives.seconds(one, topology, places) * topology.chip.clock)
        return collectives.traffic(found, mesh, topology)

    assert all(row.exposed_seconds == 0 and row.asynchronous == row.covered == 1 for row in traffic(PAIRS))
    (row,) = (row for row in traffic(PAIRS.replace('"30"', '"0"')) if row.kind == "collective-permute")
    assert (row.asynchronous, row.covered) == (1, 0)
    assert row.exposed_seconds == row.seconds == pytest.approx(64 / 50e9)


def test_a_ragged_all_to_all_moves_rows_and_not_the_room_for_them():
    text = """\
HloModule ragged, is_scheduled=true

ENTRY %main (x: bf16[8,4]) -> bf16[32,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %room = bf16[32,4]{1,0} broadcast(%x)
  %ids = s32[4]{0} constant({0,0,0,0})
  %there = bf16[32,4]{1,0} ragged-all-to-all(%x, %room, %ids, %ids, %ids, %ids), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %back = bf16[8,4]{1,0} ragged-all-to-all(%there, %x, %ids, %ids, %ids, %ids), channel_id=2, replica_groups={{0,1,2,3}}
}
"""
    assert [one.operand_bytes for one in collectives.find(hlo.parse(text), lambda _: 1.0)] == [64, 64]


# --- Gathers by all-reduce --------------------------------------------------------------------------------------------

REDUCED = """\
HloModule reduced, is_scheduled=true

%written (p: bf16[8], q: bf16[2], i: s32[]) -> bf16[8] {
  %p = bf16[8]{0} parameter(0)
  %q = bf16[2]{0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %update = bf16[8]{0} dynamic-update-slice(%p, %q, %i)
}

%start_of (p: bf16[8]) -> (bf16[8], bf16[8]) {
  %p = bf16[8]{0} parameter(0)
  %sum = bf16[8]{0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3}}
  ROOT %c = (bf16[8], bf16[8]) custom-call(%sum), custom_call_target="AsyncCollectiveStart"
}

%end_of (p: bf16[8]) -> bf16[8] {
  %p = bf16[8]{0} parameter(0)
  %sum = bf16[8]{0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3}}
  ROOT %c = bf16[8]{0} custom-call(%sum), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (shard: bf16[2], whole: bf16[8], i: s32[]) -> bf16[8] {
  %shard = bf16[2]{0} parameter(0)
  %whole = bf16[8]{0} parameter(1)
  %i = s32[] parameter(2)
  %zero = bf16[] constant(0)
  %zeros = bf16[8]{0} broadcast(%zero), dimensions={}
  PADDED
  REDUCED
}
"""
WRITTEN = {
    "in_place": "%padded = bf16[8]{0} dynamic-update-slice(BASE, %shard, %i)",
    "by_a_fusion": "%padded = bf16[8]{0} fusion(BASE, %shard, %i), kind=kLoop, calls=%written",
    "and_copied": """%update = bf16[8]{0} dynamic-update-slice(BASE, %shard, %i)
  %begun = (bf16[8], bf16[8]) copy-start(%update)
  %padded = bf16[8]{0} copy-done(%begun)""",
}
SUMMED = {
    "at_once": "ROOT %out = bf16[8]{0} all-reduce(%padded), channel_id=9, replica_groups={{0,1,2,3}}",
    "by_a_chain": """%begin = (bf16[8], bf16[8]) fusion(%padded), kind=kCustom, calls=%start_of
  ROOT %out = bf16[8]{0} fusion(%padded), kind=kCustom, calls=%end_of""",
}


@pytest.mark.parametrize("summed", SUMMED)
@pytest.mark.parametrize("written", WRITTEN)
def test_a_sum_of_shards_in_zeros_is_a_gather_at_twice_the_bytes(written, summed):
    def only(base):
        text = REDUCED.replace("PADDED", WRITTEN[written].replace("BASE", base)).replace("REDUCED", SUMMED[summed])
        (one,) = collectives.find(hlo.parse(text), lambda _: 5.0)
        return one

    gather, total = only("%zeros"), only("%whole")
    assert (gather.kind, total.kind) == (collectives.GATHER_BY_ALL_REDUCE, "all-reduce")
    # Of four shards of 4 bytes a device lacks three.
    assert gather.moved_bytes(4) == total.moved_bytes(4) == 2 * 3 * 4


# --- Groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [(0, 1), (2, 3)]),
        ("replica_groups={}", []),
        ("replica_groups=[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [(0, 2), (1, 3)]),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
    ],
)
def test_every_notation_of_groups_is_read(text, groups):
    assert sorted(map(tuple, collectives.replica_groups(f", channel_id=1, {text}, dimensions={{0}}"))) == sorted(groups)


def test_groups_are_attributed_to_the_axes_along_which_they_lie():
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    positions = np.arange(16).reshape(tuple(mesh.values()))
    for size in range(1, 4):
        for axes in itertools.combinations(range(3), size):
            others = [axis for axis in range(3) if axis not in axes]
            members = int(np.prod([positions.shape[axis] for axis in axes]))
            groups = [tuple(g) for g in positions.transpose([*others, *axes]).reshape(-1, members).tolist()]
            one = collectives.Collective("all-gather", "x", 1, groups, 1)
            assert collectives.mesh_axes(one, mesh) == "+".join(list(mesh)[axis] for axis in axes)
    half = collectives.Collective("all-gather", "x", 1, [(0, 2), (4, 6), (8, 10), (12, 14)], 1)
    assert collectives.mesh_axes(half, mesh) == "part of fsdp"


@pytest.mark.parametrize(
    ("kind", "topology", "members", "links"),
    [
        ("all-gather", "v5e:16x16", [(i, 0) for i in range(16)], 2),  # a ring
        ("all-gather", "v5e:16x16", [(i, 0) for i in range(8)], 1),  # half of it: a line
        ("all-gather", "v5e:8x8", [(i, 0) for i in range(8)], 1),  # no slice of its own closes a ring
        ("all-gather", "v5p:4x4x4", [(i, j, 0) for i in range(4) for j in range(4)], 4),
        ("all-gather", "v5p:2x2x2", [(i, j, 0) for i in range(2) for j in range(2)], 2),
    ],
)
def test_seconds_follow_from_the_links_along_which_a_group_lies(kind, topology, members, links):
    n = len(members)
    one = collectives.Collective(kind, "x", 1000, [tuple(range(n))], 1)
    topology = topology_of(topology)
    assert collectives.seconds(one, topology, members) == pytest.approx((n - 1) * 1000 / (links * topology.chip.link_bandwidth))
