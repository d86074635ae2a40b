"""What launching on a TPU slice needs beside its chips: virtual machines, and the names that GKE and gcloud have for it.

Facts: https://cloud.google.com/tpu/docs/v5p (and v4, v5e, v6e, tpu7x, runtimes),
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
"""

from __future__ import annotations

import dataclasses
import math

from model.chips import Topology, shapes
from model.config import check


@dataclasses.dataclass(frozen=True)
class Generation:
    """Attributes:
    gke_accelerator: node label `cloud.google.com/gke-tpu-accelerator`.
    accelerator_type: what precedes the count in gcloud's name of a slice; empty where there are no Cloud TPU VMs of it.
    counted_per_chip: what that name counts: chips, or the two TensorCores of each.
    runtime_version: software of a Cloud TPU VM.
    """

    gke_accelerator: str
    accelerator_type: str = ""
    counted_per_chip: int = 1
    runtime_version: str = ""


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": Generation("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Generation("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Generation("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": Generation("tpu7x"),
}


def num_vms(topology: Topology) -> int:
    """A virtual machine of GKE has four of a slice's chips, except that a slice of one chip has one with one."""
    return -(-topology.num_chips // 4)


def accelerator_type(topology: Topology) -> str:
    """gcloud's name of a slice, which counts chips (v5e, v6e) or TensorCores and stands for the most cubic shape of that count.

    Raises:
      ValueError: the name would mean another shape, or the generation has no Cloud TPU VMs.
    """
    generation = topology.chip.name
    facts = GENERATIONS[generation]
    check(bool(facts.accelerator_type), f"{generation} comes through GKE only: launch it with --on=jobset or --on=xpk")
    name = f"{facts.accelerator_type}-{topology.num_chips * facts.counted_per_chip}"
    default = min((shape for shape in shapes(topology.chip) if math.prod(shape) == topology.num_chips), key=sum)
    check(
        topology.shape == default,
        f"topology {topology.name} has no name outside of GKE, where {name} means "
        f"{Topology(topology.chip, default).name}: choose that one, or --on=jobset or --on=xpk",
    )
    return name
