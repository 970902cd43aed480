# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPUs of EC2's machines: what they are called, how much memory they have, which nodes bear which label."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "GPUS",
    "GPU_LABEL",
    "KARPENTER_LABEL",
    "LABEL_OF_FAMILY",
    "Gpu",
    "gpu_of_instance",
    "gpus_named",
    "label_value",
    "ray_name",
]

#: The label by which the cluster autoscaler knows that a node is going to have a GPU: until the device plugin says so,
#: it takes the node for one that is still coming up, and adds no other in its place. Source: kubernetes/autoscaler,
#: cloudprovider/aws/README.md, "Special note on GPU instances".
GPU_LABEL = "k8s.amazonaws.com/accelerator"
#: Karpenter's label of the kind of GPU.
KARPENTER_LABEL = "karpenter.k8s.aws/instance-gpu-name"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    #: GiB that CUDA calls the total (PyTorch's "total capacity"), of which vLLM takes its share. nvidia-smi shows up to
    #: 0.6 GiB more: what the driver keeps.
    memory: float
    #: CUDA's compute capability.
    capability: float
    #: EC2 instance families that have it.
    families: tuple[str, ...]
    #: Value of ``GPU_LABEL``: upstream's where it has one (aws_cloud_provider.go, availableGPUTypes), or in its manner.
    label: str

    @property
    def title(self) -> str:
        """The name as people write it: ``A100 40GB``."""
        return self.name.replace("-", " ").upper()


#: In the order of their memory.
GPUS = (
    Gpu("m60", 7.4, 5.2, ("g3", "g3s"), "nvidia-tesla-m60"),
    Gpu("k80", 11.1, 3.7, ("p2",), "nvidia-tesla-k80"),
    Gpu("t4", 14.6, 7.5, ("g4dn",), "nvidia-tesla-t4"),
    Gpu("t4g", 14.6, 7.5, ("g5g",), "nvidia-t4g"),
    Gpu("v100", 15.7, 7.0, ("p3",), "nvidia-tesla-v100"),
    Gpu("l4", 22.0, 8.9, ("g6", "gr6"), "nvidia-l4"),
    Gpu("a10g", 22.0, 8.6, ("g5",), "nvidia-a10g"),
    Gpu("v100-32gb", 31.7, 7.0, ("p3dn",), "nvidia-tesla-v100"),
    Gpu("a100-40gb", 39.4, 8.0, ("p4d",), "nvidia-tesla-a100"),
    Gpu("l40s", 44.4, 8.9, ("g6e",), "nvidia-l40s"),
    Gpu("a100-80gb", 79.1, 8.0, ("p4de",), "nvidia-tesla-a100"),
    Gpu("h100", 79.1, 9.0, ("p5",), "nvidia-h100"),
    Gpu("h200", 139.7, 9.0, ("p5e", "p5en"), "nvidia-h200"),
    Gpu("b200", 178.3, 10.0, ("p6-b200",), "nvidia-b200"),
    Gpu("gb200", 184.0, 10.0, ("p6e-gb200",), "nvidia-gb200"),
    Gpu("b300", 267.0, 10.3, ("p6-b300",), "nvidia-b300"),
)
#: Families whose machines have a part of a GPU: they bear the label, and their memory goes by their size.
_PARTS = {"g6f": "nvidia-l4", "gr6f": "nvidia-l4"}
_BY_FAMILY = {family: gpu for gpu in GPUS for family in gpu.families}
#: Values of ``GPU_LABEL`` by instance family.
LABEL_OF_FAMILY = {**{family: gpu.label for family, gpu in _BY_FAMILY.items()}, **_PARTS}


def gpu_of_instance(instance_type: str) -> Gpu | None:
    """The kind of GPU of an EC2 machine; None where it has none, or a part of one, or one that is not known here."""
    return _BY_FAMILY.get(instance_type.partition(".")[0])


def gpus_named(accelerator: str) -> Sequence[Gpu]:
    """The kinds that a name means, in any cloud's spelling, NVIDIA's and Ray's: ``nvidia-tesla-t4``, ``Tesla-T4``,
    ``NVIDIA-H100-80GB-HBM3``, ``A100-80G``.

    ``nvidia-a100`` and ``nvidia-tesla-v100`` mean both sizes of memory; an unknown name means none.
    """
    name = re.sub(r"[^a-z0-9]+", "-", accelerator.lower()).strip("-")
    name = re.sub(r"^(nvidia-)?(tesla-)?", "", name)
    name = re.sub(r"-(sxm\d?|pcie|nvl|hbm\d\w?|mega)\b", "", name)
    name = re.sub(r"-(\d+)g$", r"-\1gb", name)
    name = re.sub(r"^a10\b", "a10g", name)  # as Ray Serve LLM has it
    exact = [gpu for gpu in GPUS if gpu.name == name]
    sizes = [gpu for gpu in GPUS if re.fullmatch(rf"{re.escape(name.partition('-')[0])}-\d+gb", gpu.name)]
    if re.fullmatch(r"[a-z0-9]+", name):
        return [*exact, *sizes]
    # One of several sizes, or the size of a kind that has one: h100-80gb.
    return exact or ([gpu for gpu in GPUS if gpu.name == name.partition("-")[0]] if not sizes else [])


def ray_name(accelerator: str) -> str:
    """Ray's name of an accelerator (ray.util.accelerators): ``nvidia-tesla-t4`` is ``T4``."""
    known = gpus_named(accelerator)
    if len(known) == 1 and known[0].name.startswith("a100-"):
        return known[0].name.upper().removesuffix("B")
    if known:
        return known[0].name.partition("-")[0].upper()
    other = accelerator.removeprefix("nvidia-")
    return other if other == accelerator else other.upper()


def label_value(accelerator: str, label: str) -> str:
    """What a label of nodes says where they have this accelerator; empty for an accelerator that is not known here."""
    known = gpus_named(accelerator)
    if not known:
        return ""
    return known[0].name.partition("-")[0] if label == KARPENTER_LABEL else known[0].label
