"""Meshes: what fits, what is refused, and what is proposed instead; where activations live in a compiled step."""

import itertools
import math
import re

import jax
import pytest

from model.params import dimensions, param_specs
from model.presets import preset
from model.sharding import (
    MESH_AXES,
    TRAIN_RULES,
    Dimensions,
    check_mesh,
    factorizations,
    make_mesh,
    mesh_problem,
    partition,
    propose_mesh,
    resolve_sizes,
)
from model.transformer import activations

ONE = dict.fromkeys(MESH_AXES, 1)
ARRAYS = dimensions(param_specs(preset("tiny-llama"))) + activations(16, 64)  # 4 heads, 2 of keys and values, 64 wide


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (ONE | {"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 1, 1, 2)),
        (ONE | {"data": 8}, (8, 1, 1, 1, 1)),
        (ONE | {"context": 4, "expert": -1}, (1, 1, 2, 4, 1)),
    ],
)
def test_mesh_takes_all_devices(sizes, expected):
    mesh = make_mesh(sizes, jax.devices()[:8])
    assert mesh.axis_names == ("data", "fsdp", "expert", "context", "tensor")
    assert mesh.devices.shape == expected
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize(
    ("sizes", "proposal"),
    [
        (ONE | {"data": 3}, "data=8"),
        (ONE | {"data": -1, "fsdp": 3}, "data=2 x fsdp=4"),
        (ONE | {"data": -1, "fsdp": 16}, "fsdp=8"),
        (ONE | {"fsdp": 64}, "fsdp=8"),
    ],
)
def test_mesh_of_another_number_of_devices_is_an_error_that_names_the_nearest(sizes, proposal):
    with pytest.raises(ValueError, match=rf"does not fit 8 devices.*for example {proposal} and 1 for the others"):
        make_mesh(sizes, jax.devices()[:8])


@pytest.mark.parametrize(
    ("sizes", "hosts_of_cpus", "proposal"),
    [
        (ONE | {"tensor": 2}, 1, r", or set cpu_devices to 2$"),
        (ONE | {"data": -1, "tensor": 6}, 2, r", or set cpu_devices to 3$"),
        (ONE | {"tensor": 5}, 2, r"1 for the others$"),  # two hosts cannot have five devices
        (ONE | {"tensor": 2}, 0, r"1 for the others$"),  # nobody can buy a chip with an option
    ],
)
def test_a_cpu_may_be_split_into_as_many_devices_as_the_mesh_has(sizes, hosts_of_cpus, proposal):
    with pytest.raises(ValueError, match=proposal):
        resolve_sizes(sizes, 1, hosts_of_cpus)


def test_the_mesh_of_a_run_on_a_cpu_names_the_option():
    with pytest.raises(ValueError, match="or set cpu_devices to 2"):
        make_mesh(ONE | {"tensor": 2}, jax.devices()[:1])


def test_a_logical_axis_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"a matrix: logical axis 'width' has no rule"):
        partition(Dimensions("a matrix", (4,), ("width",)), TRAIN_RULES)


@pytest.mark.parametrize("embed", [("tensor",), ("fsdp", "tensor")])
def test_two_dimensions_on_one_mesh_axis_are_an_error(embed):
    with pytest.raises(ValueError, match=r"a matrix: axes .*'heads'.* one of them twice"):
        partition(Dimensions("a matrix", (4, 4), ("embed", "heads")), TRAIN_RULES | {"embed": embed})


@pytest.mark.parametrize(
    ("sizes", "problem", "proposal"),
    [
        ({"tensor": 4}, r"parameter blocks/0/attention/key: kv_heads = 2 does not divide over tensor=4", "data=2 x tensor=2"),
        ({"fsdp": 32}, r"rows of a micro-batch: batch = 16 does not divide over fsdp=32", "fsdp=16 x tensor=2"),
        ({"context": 64}, r"half the tokens of a row: sequence = 32 does not divide over context=64", "context=32 x tensor=2"),
        ({"data": 2, "expert": 2}, r"expert=2 has nothing to split", "data=4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_and_the_nearest_proposed(sizes, problem, proposal):
    with pytest.raises(ValueError, match=problem) as error:
        check_mesh(ARRAYS, TRAIN_RULES, ONE | sizes)
    text = str(error.value)
    assert "would do" in text
    proposed = ONE | {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", text[text.rindex("Mesh ") :])}
    assert math.prod(proposed.values()) == math.prod(sizes.values())
    check_mesh(ARRAYS, TRAIN_RULES, proposed)
    wanted = ONE | {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", proposal)}

    def distance(mesh):
        return sum(abs(math.log2(mesh[name] / (ONE | sizes)[name])) for name in MESH_AXES)

    assert distance(proposed) <= distance(wanted)


def test_where_no_mesh_fits_the_error_says_so():
    with pytest.raises(ValueError, match="No mesh of as many devices would do: use fewer"):
        check_mesh(ARRAYS, TRAIN_RULES, ONE | {"data": 7})


def test_a_proposal_is_the_nearest_of_all_meshes():
    sizes = ONE | {"data": 1, "tensor": 8}
    proposed = propose_mesh(ARRAYS, TRAIN_RULES, sizes)
    assert proposed is not None
    every = [
        dict(zip(MESH_AXES, shape, strict=True))
        for shape in itertools.product((1, 2, 4, 8), repeat=5)
        if math.prod(shape) == 8 and not mesh_problem(ARRAYS, TRAIN_RULES, dict(zip(MESH_AXES, shape, strict=True)))
    ]
    nearest = min(sum(abs(math.log2(mesh[name] / sizes[name])) for name in MESH_AXES) for mesh in every)
    assert sum(abs(math.log2(proposed[name] / sizes[name])) for name in MESH_AXES) == nearest


@pytest.mark.parametrize("num_devices", [1, 6, 8])
def test_factorizations_are_all_meshes_once(num_devices):
    found = [tuple(mesh[name] for name in MESH_AXES) for mesh in factorizations(num_devices)]
    assert len(found) == len(set(found))
    divisors = range(1, num_devices + 1)
    assert set(found) == {shape for shape in itertools.product(divisors, repeat=5) if math.prod(shape) == num_devices}


@pytest.mark.parametrize("slices", [2, 3])
@pytest.mark.parametrize("asked", [{"fsdp": 8}, {"fsdp": 12}, {"data": 1, "fsdp": 3, "tensor": 4}, {"data": -1, "tensor": 6}])
def test_the_mesh_that_is_proposed_for_several_slices_is_one(asked, slices):
    """Of 12 devices; the rows of a batch and heads that only some axes divide are asked for too."""
    arrays = [Dimensions("rows", (24, 8), ("batch", None)), Dimensions("heads", (4, 8), ("heads", None))]
    sizes = dict.fromkeys(MESH_AXES, 1) | asked

    def resolved(sizes):
        found = resolve_sizes(sizes, 12, slices=slices)
        check_mesh(arrays, TRAIN_RULES, found, slices)
        return found

    for _ in range(3):
        try:
            found = resolved(sizes)
            break
        except ValueError as error:
            proposed = re.search(r"(?:for example|Mesh) ((?:\w+=\d+(?: x )?)+)", str(error))
            sizes = dict.fromkeys(MESH_AXES, 1) | {axis: int(size) for axis, size in re.findall(r"(\w+)=(\d+)", proposed[1])}
    assert found["data"] % slices == 0
    assert math.prod(found.values()) == 12
