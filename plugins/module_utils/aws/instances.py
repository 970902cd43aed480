# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What EC2 machines have, and what a Kubernetes node made of one has left for pods.

vCPUs, memory and GPUs follow from family and size; the exceptions are listed. Source: "Amazon EC2 instance types"; the
kubelet's reserve is what the nodes' images set ("Reserve compute resources" of the EKS user guide).
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Machine", "Room", "gpus_of_instance", "machine", "room", "vcpus_of"]

_SIZES = {"nano": 2, "micro": 2, "small": 2, "medium": 1, "large": 2, "xlarge": 4}
#: GiB of memory for a vCPU, by family; else by its first letter.
_RATIOS = {"g5g": 2.0, "g6e": 8.0, "gr6": 8.0, "p3": 7.625, "p3dn": 8.0, "p4d": 12.0, "p4de": 12.0, "p5": 2048 / 192}
_RATIOS |= {"p5e": 2048 / 192, "p5en": 2048 / 192, "p6-b200": 2048 / 192, "inf2": 4.0, "trn1": 4.0, "trn1n": 4.0}
_LETTERS = {"c": 2.0, "m": 4.0, "r": 8.0, "g": 4.0, "t": 4.0}
#: GiB of machines that follow no rule, and of the small sizes of the t families.
_EXCEPTIONS = {"inf2.24xlarge": 384.0, "p5.4xlarge": 256.0}
_SMALL = {"nano": 0.5, "micro": 1.0, "small": 2.0, "medium": 4.0}
#: GPUs by family and size. Sizes of a g family, and of p3, that are not named have one.
_GPUS: dict[str, dict[str, int]] = {
    "g4dn": {"12xlarge": 4, "metal": 8},
    "g5g": {"16xlarge": 2, "metal": 2},
    "gr6": {},
    "p3": {"8xlarge": 4, "16xlarge": 8},
    "p5": {"4xlarge": 1, "48xlarge": 8},
    **{family: {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8} for family in ("g5", "g6", "g6e")},
    **{family: {"24xlarge": 8} for family in ("p3dn", "p4d", "p4de")},
    **{family: {"48xlarge": 8} for family in ("p5e", "p5en", "p6-b200", "p6-b300")},
}
#: Kernel and firmware keep a share of the memory that the kubelet never sees: 4 % of an m5.2xlarge.
_UNSEEN = 0.04
_PODS = 58
_GIB = 2.0**30
_MIB = 2.0**20
#: What the pods of every node ask for: vpc-cni, kube-proxy, EBS CSI, pod identity agent.
_DAEMONS_CPU = 0.23
_DAEMONS_MEMORY = 160 * _MIB


class Machine(NamedTuple):
    """An EC2 instance type: ``memory`` in bytes."""

    vcpus: int
    memory: float


class Room(NamedTuple):
    """What is left for pods on a node, besides those that run on every node: cores and bytes."""

    cpu: float
    memory: float


def machine(instance_type: str) -> Machine | None:
    """The machine of an instance type such as ``g4dn.xlarge``; None for one that we do not know."""
    family, _, size = instance_type.partition(".")
    ratio = _RATIOS.get(family)
    if ratio is None and (letter := re.fullmatch(r"([cmrgt])\d+[a-z-]*", family)):
        ratio = _LETTERS[letter[1]]
    count = vcpus_of(instance_type)
    if ratio is None or count is None:
        return None
    own = _SMALL.get(size) if family.startswith("t") else _EXCEPTIONS.get(instance_type)
    return Machine(count, (own or count * ratio) * _GIB)


def vcpus_of(instance_type: str) -> int | None:
    """vCPUs of one machine by the name of its size; None for bare metal and names of another form."""
    family, _, size = instance_type.partition(".")
    if match := re.fullmatch(r"(?:metal-)?(\d+)xl(?:arge)?", size):
        return 4 * int(match[1])
    if size in ("micro", "nano", "small") and family == "t2":
        return 1
    if size == "medium" and family.startswith("t"):
        return 2
    return _SIZES.get(size)


def gpus_of_instance(instance_type: str) -> int | None:
    """GPUs of one machine: 0 for a type without, None for a GPU family whose size we do not know."""
    family, _, size = instance_type.partition(".")
    if family in _GPUS:
        return _GPUS[family].get(size, 1 if family.startswith("g") or family == "p3" else None)
    return None if family.startswith(("g", "p")) else 0


def room(found: Machine) -> Room:
    """What a node made of the machine has for pods of ours, less the kubelet's reserve and each node's own pods."""
    reserve = (
        0.06 + 0.01 * (found.vcpus > 1) + 0.005 * min(2, max(0, found.vcpus - 2)) + 0.0025 * max(0, found.vcpus - 4)
    )
    kept = (255 + 11 * _PODS + 100) * _MIB
    return Room(found.vcpus - reserve - _DAEMONS_CPU, found.memory * (1 - _UNSEEN) - kept - _DAEMONS_MEMORY)
