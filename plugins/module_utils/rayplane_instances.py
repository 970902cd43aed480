# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What EC2 machines have, and what a Kubernetes node made of one has left for pods.

vCPUs and memory follow from family and size; the exceptions are listed. Source: "Amazon EC2 instance types"; the
kubelet's reserve is what the nodes' images set ("Reserve compute resources" of the EKS user guide).
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Machine", "Room", "machine", "room"]

_SIZES = {"medium": 1, "large": 2, "xlarge": 4}
#: GiB of memory for a vCPU, by family; else by its first letter.
_RATIOS = {"g5g": 2.0, "g6e": 8.0, "gr6": 8.0, "p3": 7.625, "p3dn": 8.0, "p4d": 12.0, "p4de": 12.0, "p5": 2048 / 192}
_RATIOS |= {"p5e": 2048 / 192, "p5en": 2048 / 192, "p6-b200": 2048 / 192, "inf2": 4.0, "trn1": 4.0, "trn1n": 4.0}
_LETTERS = {"c": 2.0, "m": 4.0, "r": 8.0, "g": 4.0}
#: vCPUs and GiB of machines that follow no rule.
_EXCEPTIONS = {"t2.large": (2, 8.0), "t3.medium": (2, 4.0), "t3a.medium": (2, 4.0), "t4g.medium": (2, 4.0)}
_EXCEPTIONS |= {f"{family}.{size}": (vcpus, memory)
                for family in ("t3", "t3a", "t4g")
                for size, vcpus, memory in (("large", 2, 8.0), ("xlarge", 4, 16.0), ("2xlarge", 8, 32.0))}  # fmt: skip
_EXCEPTIONS |= {"inf2.24xlarge": (96, 384.0), "p5.4xlarge": (16, 256.0)}
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
    if instance_type in _EXCEPTIONS:
        vcpus, memory = _EXCEPTIONS[instance_type]
        return Machine(vcpus, memory * _GIB)
    ratio = _RATIOS.get(family)
    if ratio is None and (letter := re.fullmatch(r"([cmrg])\d+[a-z-]*", family)):
        ratio = _LETTERS[letter[1]]
    multiple = re.fullmatch(r"(\d+)xlarge", size)
    count = 4 * int(multiple[1]) if multiple else _SIZES.get(size)
    if ratio is None or count is None:
        return None
    return Machine(count, count * ratio * _GIB)


def room(found: Machine) -> Room:
    """What a node made of the machine has for pods of ours, less the kubelet's reserve and each node's own pods."""
    reserve = (
        0.06 + 0.01 * (found.vcpus > 1) + 0.005 * min(2, max(0, found.vcpus - 2)) + 0.0025 * max(0, found.vcpus - 4)
    )
    kept = (255 + 11 * _PODS + 100) * _MIB
    return Room(found.vcpus - reserve - _DAEMONS_CPU, found.memory * (1 - _UNSEEN) - kept - _DAEMONS_MEMORY)
