# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Rules over the platform beneath Ray: names of cloud resources, the network, the nodes.

Every rule takes a cluster's variables and yields problems. It meets values of any type: what has the wrong type is
the argument specs' to report, so a rule passes it by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import image_problem
from ansible_collections.rayplane.platform.plugins.module_utils.aws.instances import gpus_of_instance
from ansible_collections.rayplane.platform.plugins.module_utils.network.addresses import plan_subnets
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import ABSENT, Problem, nearest
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.values import (
    DNS_LABEL,
    Values,
    as_label,
    bounds,
    bucket_name_problem,
    cidr_problems,
    entries_of,
    strings,
    taken_name,
    whole,
)

__all__ = ["PLATFORMS", "buckets", "gpus_of_instance", "network", "node_groups", "platform", "platform_names"]

PLATFORMS = ("aws", "gcp", "azure", "existing")
#: Those whose cloud no role builds yet: everything above Kubernetes works there on a cluster that is given.
NOT_BUILT = ("gcp", "azure")
#: What people call the platforms, too.
_PLATFORM_ALIASES = {
    "amazon": "aws",
    "eks": "aws",
    "google": "gcp",
    "gke": "gcp",
    "gcloud": "gcp",
    "microsoft": "azure",
    "aks": "azure",
    "kubernetes": "existing",
    "k8s": "existing",
    "kind": "existing",
    "k3s": "existing",
    "minikube": "existing",
    "openshift": "existing",
}

#: Days that CloudWatch Logs may keep a log group. Source: its API reference, PutRetentionPolicy.
_RETENTION = (
    *(1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653),
)

#: What nodes and pods call, by interface endpoints where there is no NAT gateway. Source: EKS user guide, "Deploy
#: private clusters with limited internet access"; Karpenter documentation, "Private Clusters".
_NODE_SERVICES = ("ec2", "ecr.api", "ecr.dkr", "eks-auth", "sts")
_AUTOSCALER_SERVICES = {"cluster_autoscaler": ("autoscaling", "eks"), "karpenter": ("eks", "sqs", "ssm")}

_REGION = re.compile(r"[a-z]{2,4}(-[a-z]+)+-\d")
_EKS_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,99}")


def platform(values: Values) -> Iterator[Problem]:
    """Each host states its platform, and it is one we know."""
    found = values.get("platform", ABSENT)
    wanted = f"set platform to one of {', '.join(PLATFORMS)} where the host stands in the inventory's hosts file"
    if found is ABSENT or found is None or found == "":
        yield Problem("platform", found, "every cluster states the platform it runs on", wanted)
    elif found not in PLATFORMS:
        word = str(found).lower()
        guess = _PLATFORM_ALIASES.get(word) or nearest(word, PLATFORMS)
        hint = f"did you mean {guess}? Else " if guess else ""
        yield Problem("platform", found, "unknown platform", f"{hint}{wanted}")
    elif found in NOT_BUILT:
        yield Problem(
            "platform",
            found,
            "no role builds this cloud's network and cluster yet",
            "create the cluster with the cloud's own tools and set platform to existing: all above deploys to it",
        )


def platform_names(values: Values) -> Iterator[Problem]:
    """Names of the cluster, its namespace and its region."""
    namespace = values.get("platform_namespace")
    if isinstance(namespace, str) and not DNS_LABEL.fullmatch(namespace):
        yield Problem(
            "platform_namespace",
            namespace,
            "a Kubernetes namespace is a DNS label: a-z, 0-9 and inner hyphens, at most 63",
            as_label(namespace),
        )
    if values.get("platform") != "aws":
        return
    name = values.get("platform_cluster_name")
    if isinstance(name, str) and not _EKS_NAME.fullmatch(name):
        yield Problem(
            "platform_cluster_name",
            name,
            "EKS takes 1 to 100 letters, digits, hyphens and underscores, the first a letter or digit",
            f"write {re.sub(r'[^0-9A-Za-z_-]+', '-', name).strip('-_')[:100] or 'a name'}",
        )
    region = values.get("platform_region")
    if isinstance(region, str) and not _REGION.fullmatch(region):
        cure = (
            "write the region alone, without the zone's letter"
            if _REGION.match(region)
            else "write a region such as us-west-2"
        )
        yield Problem("platform_region", region, "it has not the form of an AWS region", cure)
    yield from _tags(values.get("platform_tags"))


def _tags(tags: Any) -> Iterator[Problem]:
    if not isinstance(tags, Mapping):
        return
    if len(tags) > 50:
        yield Problem("platform_tags", f"{len(tags)} tags", "AWS takes at most 50 tags on a resource", "leave some out")
    for key, value in tags.items():
        where = f"platform_tags.{key}"
        if str(key).lower().startswith("aws:"):
            yield Problem(where, value, "tag keys that start with aws: belong to AWS", "choose another key")
        elif len(str(key)) > 128 or len(str(value)) > 256:
            yield Problem(
                where, value, "AWS takes tag keys of at most 128 and values of at most 256 characters", "shorten it"
            )


def buckets(values: Values) -> Iterator[Problem]:
    """Names of the buckets."""
    all_names = ("platform_models_bucket", "platform_datasets_bucket", "platform_logs_bucket")
    names = [name for name in all_names if isinstance(values.get(name), str)]
    for name in names:
        suffix = values.get("platform_bucket_suffix") or " "
        if len(values[name]) > 63 and values[name].endswith(suffix):
            yield Problem(
                name,
                values[name],
                f"with account and region ({suffix}) it has {len(values[name])} characters, and S3 takes 63",
                f"shorten platform_cluster_name by {len(values[name]) - 63}, or name the bucket here",
            )
        elif found := bucket_name_problem(values[name]):
            yield Problem(name, values[name], found[0], found[1])
        elif "." in values[name]:
            yield Problem(
                name,
                values[name],
                "a dot in a bucket's name breaks TLS for virtual-hosted addresses, and transfer acceleration",
                f"prefer {values[name].replace('.', '-')}",
                warning=True,
            )
    for number, name in enumerate(names):
        same = next((other for other in names[:number] if values[other] == values[name]), None)
        if same:
            yield Problem(
                name,
                values[name],
                f"it is the name of {same}, too, and they have different lifecycles",
                "give each bucket its own name",
            )


def network(values: Values) -> Iterator[Problem]:
    """The VPC's block holds the subnets, and every block is one."""
    if values.get("platform") != "aws":
        return
    cidr = values.get("network_vpc_cidr")
    if not isinstance(cidr, str):
        return
    zones: Any = values.get("network_availability_zones")
    yield from _zones(zones, values.get("platform_region"))
    yield from _access_and_logs(values)
    yield from _ways_to_services(values)
    private = values.get("network_private_subnet_cidrs") or []
    public = values.get("network_public_subnet_cidrs") or []
    wrong = list(cidr_problems("network_vpc_cidr", cidr))
    wrong += cidr_problems("network_private_subnet_cidrs", private)
    wrong += cidr_problems("network_public_subnet_cidrs", public)
    yield from wrong
    if service := values.get("eks_service_ipv4_cidr"):
        yield from cidr_problems("eks_service_ipv4_cidr", service)
    intra: Any = values.get("network_intra_subnet_cidrs") or []
    if wrong or not all(map(strings, (zones, private, public, intra))):
        return
    if values.get("network_existing_private_subnet_ids"):
        return  # none are made
    try:
        plan_subnets(
            cidr,
            zones,
            public=values.get("network_public_subnets") is not False,
            private_cidrs=private,
            public_cidrs=public,
            intra=values.get("network_intra_subnets") is True,
            intra_cidrs=intra,
        )
    except ValueError as error:
        reason, _, cure = str(error).partition("; ")
        yield Problem("network_vpc_cidr", cidr, reason, cure or "change the zones or the block")


def _zones(zones: Any, region: Any) -> Iterator[Problem]:
    for index, zone in enumerate(zones if strings(zones) and isinstance(region, str) else ()):
        if not zone.startswith(region) and not re.fullmatch(r"[a-z]", zone):
            yield Problem(
                f"network_availability_zones[{index}]",
                zone,
                f"the zone is not in platform_region, which is {region}",
                f"write the zone's letter alone, or change platform_region ({region})",
            )


def _access_and_logs(values: Values) -> Iterator[Problem]:
    open_to = values.get("network_bastion_allowed_cidrs")
    if values.get("network_admin_access") == "bastion" and strings(open_to) and "0.0.0.0/0" in open_to:
        yield Problem(
            "network_bastion_allowed_cidrs",
            list(open_to),
            "everybody on the internet may try the bastion's SSH",
            "name your own networks, or use network_admin_access: ssm, which opens no port",
            warning=True,
        )
    if values.get("eks_log_types"):
        yield from _retention("eks_log_retention_days", values.get("eks_log_retention_days"))
    if values.get("network_flow_logs") is not True:
        return
    bucket, own = values.get("network_flow_logs_bucket"), values.get("platform_logs_bucket")
    writers = values.get("storage_log_writers")
    to_own = values.get("network_flow_logs_destination") == "s3" and bucket and bucket == own
    if to_own and strings(writers) and "vended_logs" not in writers:
        yield Problem(
            "storage_log_writers",
            list(writers),
            "flow logs go to the logs bucket (network_flow_logs_destination), which does not admit them",
            "add vended_logs, or set network_flow_logs_destination to cloudwatch",
        )
    yield from _retention("network_flow_logs_retention_days", values.get("network_flow_logs_retention_days"))


def _ways_to_services(values: Values) -> Iterator[Problem]:
    """Without NAT gateways, nodes and controllers reach AWS by endpoints alone."""
    found, autoscaler = values.get("network_interface_endpoints"), values.get("platform_autoscaler")
    if values.get("network_nat_mode") != "none" or values.get("network_existing_private_subnet_ids"):
        return
    wanted = [*_NODE_SERVICES, *(_AUTOSCALER_SERVICES.get(autoscaler, ()) if isinstance(autoscaler, str) else ())]
    wanted += ["elasticloadbalancing"] * (values.get("eks_load_balancer_controller") is True)
    made = ("ssm",) if values.get("network_admin_access") == "ssm" else ()
    if strings(found) and (missing := [one for one in wanted if one not in (*found, *made)]):
        yield Problem(
            "network_interface_endpoints",
            list(found),
            f"without NAT gateways (network_nat_mode) nothing reaches {', '.join(missing)}",
            "add them, or set network_nat_mode to single or per_zone",
            # The owner of a VPC that exists may have endpoints there, or another way out.
            warning=bool(values.get("network_existing_vpc_id") or values.get("network_existing_vpc_tags")),
        )
    if values.get("network_s3_endpoint") is False:
        yield Problem(
            "network_s3_endpoint",
            False,
            "the layers of images come from S3, and there is no NAT gateway (network_nat_mode)",
            "set it to true, or set network_nat_mode to single or per_zone",
            warning=True,
        )


def _retention(variable: str, days: Any) -> Iterator[Problem]:
    if whole(days) and days not in _RETENTION:
        nearest_days = min(_RETENTION, key=lambda known: abs(known - days))
        yield Problem(variable, days, "CloudWatch Logs does not know this retention", f"write {nearest_days}")


def node_groups(values: Values) -> Iterator[Problem]:
    """Bounds of the node groups, and GPUs enough on one node for the model that wants most."""
    if values.get("platform") != "aws" or "eks_node_groups" not in values:
        return
    seen: dict[str, str] = {}
    most: int | None = 0
    for path, group in (*entries_of(values, "eks_node_groups"), *entries_of(values, "eks_extra_node_groups")):
        yield from bounds(path, group.get("min_size"), group.get("max_size"), ("min_size", "max_size"))
        bound: dict[str, Any] = {name: group.get(name) for name in ("min_size", "max_size", "desired_size")}
        low, high, desired = bound.values()
        in_order = not (whole(low) and whole(high) and low > high)
        if in_order and whole(desired) and ((whole(low) and desired < low) or (whole(high) and desired > high)):
            yield Problem(
                f"{path}.desired_size",
                desired,
                f"it is outside min_size to max_size, {low} to {high}",
                f"write {min(max(desired, low or 0), high or desired)}",
            )
        name = group.get("name")
        yield from taken_name(path, name, seen)
        types: Any = group.get("instance_types")
        if strings(types):
            yield from _image_and_capacity(path, group, types)
            if not types and not group.get("launch_template"):
                yield Problem(
                    f"{path}.instance_types",
                    [],
                    "no machines are named",
                    "name at least one type, or give a launch_template that has it",
                )
            # What a template names is not known here.
            most = most if types else None
        for kind in types if strings(types) else ():
            gpus = gpus_of_instance(kind)
            most = None if gpus is None or most is None else max(most, gpus)
    # Where the kubeconfig is given, the nodes are another cluster's; Karpenter starts machines by the pods.
    others = values.get("kubeconfig_source") == "given" or values.get("platform_autoscaler") == "karpenter"
    if most is not None and not others:
        yield from _gpus_fit(values, most)


def _image_and_capacity(path: str, group: Mapping[str, Any], types: Sequence[str]) -> Iterator[Problem]:
    image = group.get("ami_type", "AL2023_x86_64_STANDARD")
    if isinstance(image, str):
        reason, _, cure = image_problem(image, types).partition(". Cure: ")
        if reason:
            yield Problem(f"{path}.ami_type", image, reason, cure or "take an image that fits")
    if group.get("capacity_type") == "SPOT" and len(types) == 1:
        yield Problem(
            f"{path}.instance_types",
            list(types),
            "spot capacity of one type runs out as one",
            "name several types of the same size, the preferred first",
            warning=True,
        )


def _gpus_fit(values: Values, most: int) -> Iterator[Problem]:
    for path, entry in entries_of(values, "rayservice_models"):
        gpu = entry.get("resources", {}).get("gpu", 0) if isinstance(entry.get("resources"), Mapping) else 0
        if whole(gpu) and gpu > most:
            has = f"the largest node of eks_node_groups has {most}" if most else "no group of eks_node_groups has GPUs"
            yield Problem(
                f"{path}.resources.gpu",
                gpu,
                f"all GPUs of a pod are on one node, and {has}",
                f"add a node group of machines with {gpu} GPUs or more, or ask for fewer",
            )
