"""What a compiled step costs: snippets of HLO with known answers, and small programs compiled by libtpu."""

import dataclasses
import json
import textwrap

import pytest

from experiments import collectives, hlo
from experiments.compile import told_of_asides
from tests.libtpu import run_with_libtpu

# Two nested loops, of 4 and 3 times: the inner one multiplies matrices, the outer one adds up over devices and gathers.
NESTED = """\
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_matmul (p0: bf16[64,32], p1: bf16[32,16]) -> bf16[64,16] {
  %p0 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  ROOT %dot = bf16[64,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_sum (p0.1: f32[8,128]) -> f32[8] {
  %p0.1 = f32[8,128]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %reduce = f32[8]{0} reduce(%p0.1, %zero), dimensions={1}, to_apply=%add
}

%inner_condition (i: (s32[], bf16[64,32])) -> pred[] {
  %i = (s32[], bf16[64,32]{1,0}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%i), index=0
  %three = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%count, %three), direction=LT
}

%inner_body (j: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %j = (s32[], bf16[64,32]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%j), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%n, %two), backend_config={"window_config":{"estimated_cycles":"1"}}
  %x = bf16[64,32]{1,0} get-tuple-element(%j), index=1
  %w = bf16[32,16]{1,0} constant({...})
  %product = bf16[64,16]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused_matmul, backend_config={"estimated_cycles":"100"}
  ROOT %out = (s32[], bf16[64,32]{1,0}) tuple(%next, %x)
}

%outer_condition (k: (s32[], bf16[64,32])) -> pred[] {
  %k = (s32[], bf16[64,32]{1,0}) parameter(0)
  ROOT %unknown = pred[] custom-call(%k), custom_call_target="Opaque"
}

%outer_body (l: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %l = (s32[], bf16[64,32]{1,0}) parameter(0)
  %one = s32[] constant(1)
  %y = bf16[64,32]{1,0} get-tuple-element(%l), index=1
  %f = f32[8,128]{1,0} constant({...})
  %gradient = f32[8,128]{1,0} all-reduce(%f), channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%add
  %sums = f32[8]{0} fusion(%f), kind=kLoop, calls=%fused_sum, backend_config={"window_config":{"estimated_cycles":"10"}}
  %kernel.3 = bf16[64,32]{1,0} custom-call(%y), custom_call_target="tpu_custom_call", config={"body":"QQ==","flops":"500"}
  %start = (s32[], bf16[64,32]{1,0}) tuple(%one, %y)
  %inner = (s32[], bf16[64,32]{1,0}) while(%start), condition=%inner_condition, body=%inner_body
  %m = s32[] get-tuple-element(%inner), index=0
  %z = bf16[64,32]{1,0} get-tuple-element(%inner), index=1
  %z.copy = bf16[64,32]{0,1} copy(%z), backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %pair = (s32[], bf16[64,32]{1,0}) tuple(%m, %z)
}

ENTRY %main (x.1: bf16[64,32]) -> bf16[64,32] {
  %x.1 = bf16[64,32]{1,0} parameter(0)
  %nought = s32[] constant(0)
  %begin = (s32[], bf16[64,32]{1,0}) tuple(%nought, %x.1)
  %outer = (s32[], /*index=1*/bf16[64,32]{1,0}) while(%begin), condition=%outer_condition, body=%outer_body, KNOWN
  ROOT %result = bf16[64,32]{1,0} get-tuple-element(%outer), index=1
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"4"}}'


def test_cycles_and_flops_are_multiplied_by_the_trips_of_nested_loops():
    work = hlo.work(hlo.parse(NESTED.replace("KNOWN", KNOWN)))
    # The inner counter goes 1, 3, 5.
    expected = {"matmul": 4 * 3 * 100, "reduction": 4 * 10, "copy": 4 * 7, "other": 4 * 3}
    assert {name: cycles for name, cycles in work.cycles.items() if cycles} == expected
    assert work.flops == 4 * 3 * 2 * 64 * 32 * 16
    assert work.kernels == (hlo.Kernel("kernel.3", 4.0, ("bf16[64,32]{1,0}",), "QQ==", 500.0),)
    assert work.unknown_loops == ()


@pytest.mark.parametrize("trips", [1, 2.5])
def test_a_loop_of_unknown_length_is_named_and_counted_as_it_is_said_to_be(trips):
    module = hlo.parse(NESTED, trips)
    work = hlo.work(module)
    assert work.unknown_loops == ("outer",)
    assert work.cycles["matmul"] == trips * 3 * 100
    assert [one.times for one in collectives.find(module, lambda _: 1.0)] == [trips]


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("tuple(%one, %y)", "tuple(%given, %y)"),  # from a number that is not known
        ("%next = s32[] add(%n, %two)", "%next = s32[] multiply(%n, %two)"),
        ("%next = s32[] add(%n, %two)", "%next = s32[] add(%n, %n)"),
    ],
)
def test_a_counter_that_is_not_understood_is_no_guess(text, instead):
    given = "  %given = s32[] get-tuple-element(%l), index=0\n  %y = bf16"
    module = NESTED.replace("KNOWN", KNOWN).replace("  %y = bf16", given)
    assert hlo.work(hlo.parse(module)).unknown_loops == ()
    assert hlo.work(hlo.parse(module.replace(text, instead))).unknown_loops == ("inner",)


# A look-up, a collective, and a scatter that a program of the SparseCore starts in its turn.
ASIDE = """\
%fused_scatter (p: s32[35], q: s32[32]) -> s32[35] {
  %p = s32[35]{0} parameter(0)
  %q = s32[32]{0} parameter(1)
  ROOT %s = s32[35]{0} scatter(%p, %q, %q), backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
}

%scattering (p: s32[35], q: s32[32]) -> s32[35] {
  %p = s32[35]{0} parameter(0)
  %q = s32[32]{0} parameter(1)
  ROOT %f = s32[35]{0} fusion(%p, %q), kind=kCustom, calls=%fused_scatter
}

%outer (p: s32[35], q: s32[32], t: token[]) -> s32[35] {
  %p = s32[35]{0} parameter(0)
  %q = s32[32]{0} parameter(1)
  %t = token[] parameter(2)
  %s = ((s32[35], s32[32]), s32[35], u32[]) call-start(%p, %q), async_execution_thread="sparsecore", to_apply=%scattering
  ROOT %d = s32[35]{0} call-done(%s)
}

%looking_up (p: bf16[100,8], q: s32[3]) -> bf16[3,8] {
  %p = bf16[100,8]{1,0} parameter(0)
  %q = s32[3]{0} parameter(1)
  ROOT %g = bf16[3,8]{1,0} gather(%p, %q)
}

%reducing (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  ROOT %r = f32[16]{0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
}

%outer_body"""
STARTED = """\
  %look = ((bf16[100,8], s32[3]), bf16[3,8]) call-start(%a, %b), async_execution_thread="sparsecore", to_apply=%looking_up
  %looked = bf16[3,8]{1,0} call-done(%look)
  %scatter = ((s32[35], s32[32]), s32[35]) call-start(%c, %b, %t), async_execution_thread="sparsecore", to_apply=%outer
  %scattered = s32[35]{0} call-done(%scatter)
  %sum = ((f32[16]), f32[16]) call-start(%d), async_execution_thread="sparsecore", to_apply=%reducing
  %summed = f32[16]{0} call-done(%sum)
  %sums ="""


def test_what_a_sparse_core_does_beside_collectives_is_told_and_adds_no_cycles():
    text = NESTED.replace("KNOWN", KNOWN)
    assert hlo.work(hlo.parse(text)).asides == ()
    work = hlo.work(hlo.parse(text.replace("%outer_body", ASIDE, 1).replace("  %sums =", STARTED)))
    assert work.asides == (
        hlo.Aside("look", 4.0, ("gather",), 3 * 8 * 2),
        hlo.Aside("scatter", 4.0, ("scatter",), 35 * 4),
    )
    assert work.cycles == hlo.work(hlo.parse(text)).cycles
    told = told_of_asides([dataclasses.asdict(aside) for aside in work.asides])
    assert "not in the estimate: 2 programs (gather, scatter), run 8 times, 0.001 MiB" in told


def test_a_collective_has_bytes_axis_and_count():
    (found,) = collectives.find(hlo.parse(NESTED.replace("KNOWN", KNOWN)), lambda _: 7.0)
    assert found.cycles == found.exposed_cycles == 7
    assert (found.kind, found.times, found.is_async) == ("all-reduce", 4.0, False)
    assert found.operand_bytes == 8 * 128 * 4
    assert collectives.mesh_axes(found, {"data": 2, "tensor": 2}) == "data"
    # Reduce-scatter and all-gather of halves: each device receives as much as it has.
    assert found.moved_bytes(4) == 8 * 128 * 4


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("loss: 3.2")


# --- Compiled by libtpu -----------------------------------------------------------------------------------------------

COMPILED = """
import dataclasses
import json
import jax, jax.numpy as jnp
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from experiments import collectives, hlo
from experiments.compile import told_of_asides

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(mesh_utils.create_device_mesh((2, 2), devices), ("data", "tensor"))

def step(x, weights):
    def layer(x, w):
        x = jax.lax.psum(jnp.matmul(x, w), "tensor").astype(jnp.bfloat16)
        scores = jnp.einsum("htd,hsd->hts", x.reshape(256, 4, 128).swapaxes(0, 1), x.reshape(256, 4, 128).swapaxes(0, 1))
        return x + jnp.mean(scores) , None
    return jax.lax.scan(layer, x, weights)[0]

specs = dict(in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
weights = jax.ShapeDtypeStruct((5, 512, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
module = hlo.parse(jax.jit(jax.shard_map(step, mesh=mesh, **specs)).lower(x, weights).compile().as_text())
work = hlo.work(module)
found = collectives.find(module, lambda _: 1.0)
print(json.dumps({
    "flops": work.flops,
    "cycles": work.cycles,
    "unknown": work.unknown_loops,
    "collectives": [(c.kind, collectives.mesh_axes(c, mesh.shape), c.operand_bytes, c.times) for c in found],
}))
"""


def test_a_compiled_scan_counts_every_layer():
    result = json.loads(run_with_libtpu(textwrap.dedent(COMPILED)).splitlines()[-1])
    # A matmul of [256, 512] x [512, 512], and one of 4 heads of [256, 128] x [128, 256], in each of 5 layers.
    assert result["flops"] == 5 * (2 * 256 * 512 * 512 + 4 * 2 * 256 * 128 * 256)
    assert result["unknown"] == []
    # The MXUs do 131,072 FLOPs in a cycle, and the estimate is never better.
    assert result["cycles"]["matmul"] > result["flops"] / 131_072
    kinds = [tuple(one) for one in result["collectives"]]
    assert sum(times for kind, axes, size, times in kinds if (kind, axes) == ("all-reduce", "tensor")) == 5
    assert {size for _, _, size, _ in kinds} == {256 * 512 * 2}
    assert all(axes == "tensor" for _, axes, _, _ in kinds)
