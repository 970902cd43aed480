#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: an EKS control plane."""

from __future__ import annotations

DOCUMENTATION = r"""
module: eks_cluster
short_description: Reconcile an EKS control plane
description:
  - Creates, changes, upgrades or deletes an EKS cluster (with its node groups), with a comparison property by
    property and a true check mode.
  - Upgrades go one minor version at a time, as EKS demands; downgrades are refused.
  - A cluster that does not bear the tag C(rayplane.io/cluster) with its own name was made by something else. It is
    neither changed nor deleted.
options:
  name:
    description: Name of the cluster.
    type: str
    required: true
  state:
    description: >-
      Whether the cluster exists. V(deletable) changes nothing and fails where V(absent) would refuse, with one call, so
      that it can be asked before anything else of the platform is deleted.
    type: str
    choices: [present, absent, deletable]
    default: present
  version:
    description: Kubernetes version, major and minor. Empty takes what EKS offers as its default, and never upgrades.
    type: str
    default: ""
  role_arn:
    description: IAM role of the control plane. Required to create a cluster.
    type: str
    default: ""
  subnet_ids:
    description: >-
      Subnets for the control plane's network interfaces, in at least two zones. Required to create a cluster.
    type: list
    elements: str
    default: []
  security_group_ids:
    description: Further security groups of the control plane's network interfaces.
    type: list
    elements: str
    default: []
  endpoint_public_access:
    description: Whether the API server is reached from the internet.
    type: bool
    default: true
  endpoint_private_access:
    description: Whether nodes and peers reach the API server inside the VPC.
    type: bool
    default: true
  public_access_cidrs:
    description: Who reaches the public endpoint. Without any, a public endpoint is refused; EKS would open it to all.
    type: list
    elements: str
    default: []
  private_access_cidrs:
    description: >-
      Networks beside the nodes' that reach the private endpoint - rules for port 443 in the security group that EKS
      made. Rules of others stay.
    type: list
    elements: str
    default: []
  private_access_vpc:
    description: Whether the cluster's own VPC reaches the private endpoint, too, whatever its addresses.
    type: bool
    default: false
  service_ipv4_cidr:
    description: Addresses of Kubernetes services, set when the cluster is made. Empty lets EKS choose.
    type: str
    default: ""
  log_types:
    description: Control plane logs to send to CloudWatch.
    type: list
    elements: str
    choices: [api, audit, authenticator, controllerManager, scheduler]
    default: []
  log_retention_days:
    description: >-
      Days that the log group of the control plane keeps what it is sent. The group is made before the cluster, which
      would make one that keeps everything for ever without a key; one that is there is taken over.
    type: int
    default: 90
  log_kms_key_arn:
    description: KMS key that encrypts the log group; empty takes AWS's own key.
    type: str
    default: ""
  encryption_key_arn:
    description: KMS key that encrypts Kubernetes Secrets. It can be set once and never changed.
    type: str
    default: ""
  authentication_mode:
    description: Where access is looked up. It can only move from C(CONFIG_MAP) over C(API_AND_CONFIG_MAP) to C(API).
    type: str
    choices: [CONFIG_MAP, API_AND_CONFIG_MAP, API]
    default: API
  creator_is_admin:
    description: Whether who creates the cluster becomes its administrator; counts when the cluster is made.
    type: bool
    default: true
  support_type:
    description: Whether AWS upgrades the cluster when standard support of its version ends. Empty leaves EKS's default.
    type: str
    choices: ["", STANDARD, EXTENDED]
    default: ""
  deletion_protection:
    description: >-
      Whether EKS refuses to delete the cluster. Deleting then takes a run that turns it off first.
    type: bool
    default: false
  zonal_shift:
    description: Whether AWS may take traffic away from a zone that fails.
    type: bool
    default: false
  security_group_tags:
    description: Tags of the security group that EKS makes for nodes and control plane, by which Karpenter finds it.
    type: dict
    default: {}
  tags:
    description: Tags of the cluster.
    type: dict
    default: {}
  wait_timeout:
    description: Longest wait for one step (creation, one update, deletion), in seconds.
    type: int
    default: 2400
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep a control plane
  rayplane.platform.eks_cluster:
    name: ray-llm-cluster
    version: "1.36"
    role_arn: arn:aws:iam::123456789012:role/ray-llm-cluster-control-plane
    subnet_ids: [subnet-1, subnet-2]
    public_access_cidrs: [203.0.113.7/32]
    log_types: [api, audit]
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
foreign:
  description: Networks that others admitted to the security group that EKS made; their rules stay.
  returned: there are any
  type: list
  elements: dict
cluster:
  description: Facts of the cluster; empty when it does not exist, as in check mode before the first run.
  returned: always
  type: dict
  contains:
    arn: {description: ARN of the cluster., type: str}
    certificate_authority: {description: "CA of the API server, in base64.", type: str}
    endpoint: {description: Address of the API server., type: str}
    irsa: {description: "Whether service accounts were ever given roles by the cluster's OIDC issuer.", type: bool}
    oidc_issuer: {description: Issuer of service account tokens., type: str}
    security_group_id: {description: Security group that EKS made for nodes and control plane., type: str}
    status: {description: Status of the cluster., type: str}
    version: {description: Kubernetes version., type: str}
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    Api,
    Changes,
    PlatformError,
    only_given,
    run,
    sync_tags,
    tag_dict,
    tag_list,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import (
    ABSENT,
    concurrently,
    find_cluster,
    minor,
    retag,
    wait_for,
    wait_for_update,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.log_group import LogGroup
from ansible_collections.rayplane.platform.plugins.module_utils.network.core import blocks_of
from ansible_collections.rayplane.platform.plugins.module_utils.network.endpoints import rule_text

# Nodes may be at most this many minor versions behind the control plane (Kubernetes version skew policy).
MAX_SKEW = 3
# On clusters whose service accounts get roles by the OIDC issuer, so that what is no longer wanted is looked for.
IRSA_TAG = "rayplane.io/irsa"
# By which our rules in the security group that EKS made are known.
CLIENT_RULE = "rayplane: reaches the API server"
MODES = ["CONFIG_MAP", "API_AND_CONFIG_MAP", "API"]
LOG_TYPES = ["api", "audit", "authenticator", "controllerManager", "scheduler"]


class Cluster:
    """One control plane: what is there, what is wanted, and the calls between the two."""

    def __init__(self, params: dict[str, Any], api: Api, changes: Changes, service: Callable[[str], Api]) -> None:
        self.params = params
        self.api = api
        self.changes = changes
        # Asked for only where it is needed: a client costs a tenth of a second.
        self.service = service
        self.name: str = params["name"]
        self.resource = f"cluster {self.name}"
        self.tags = {str(key): str(value) for key, value in params["tags"].items()} | {OWNER_TAG: self.name}

    def present(self) -> dict[str, Any]:
        """Bring the cluster to its description and return its facts."""
        now = self._find_ours()
        if now is not None and now["status"] == "DELETING":
            self._wait_for_cluster(gone=True)
            now = None
        if now is None:
            self._create()
        else:
            if now["status"] != "ACTIVE" and not self.changes.check_mode:
                self._wait_for_cluster()
                now = find_cluster(self.api, self.name) or now
            self._reconcile(now)
        # What was read says all, unless something was changed since.
        if now is None or (self.changes.actions and not self.changes.check_mode):
            now = find_cluster(self.api, self.name)
        self._keep_security_group(now)
        return {"cluster": facts(now)}

    def absent(self) -> dict[str, Any]:
        """Delete the cluster, its node groups first."""
        now = self._find_deletable()
        if now is not None:
            self._delete_node_groups()
            self.changes.delete(self.resource, {"version": now["version"], "endpoint": now.get("endpoint")})
            if now["status"] != "DELETING":
                self.api.write("delete_cluster", self.resource, busy=self.params["wait_timeout"], name=self.name)
            self._wait_for_cluster(gone=True)
        return {"cluster": {}}

    def deletable(self) -> dict[str, Any]:
        """Refuse what ``absent`` refuses; otherwise return the cluster's facts."""
        return {"cluster": facts(self._find_deletable())}

    def _find_ours(self) -> dict[str, Any] | None:
        """Return the description of the cluster, or None where there is none; refuse one that is not ours."""
        now: dict[str, Any] | None = find_cluster(self.api, self.name)
        owner = ((now or {}).get("tags") or {}).get(OWNER_TAG)
        if now is not None and owner != self.name:
            whose = f"it bears the tag {OWNER_TAG}={owner}" if owner else f"it does not bear the tag {OWNER_TAG}"
            raise PlatformError(
                f"{self.resource} is there and was not made by this platform ({whose}): it is neither changed nor"
                " deleted. Choose another platform_cluster_name or, to have it managed (and once destroyed) here,"
                f" aws eks tag-resource --resource-arn {now['arn']} --tags {OWNER_TAG}={self.name}"
            )
        return now

    def _find_deletable(self) -> dict[str, Any] | None:
        now = self._find_ours()
        if now is not None and now.get("deletionProtection"):
            raise PlatformError(
                f"{self.resource} is protected against deletion, nothing was deleted: set eks_deletion_protection"
                " to false, run deploy.yml --tags eks, then destroy"
            )
        return now

    def _delete_node_groups(self) -> None:
        names = self._node_groups()
        for name in names:
            resource = f"node group {name}"
            self.changes.delete(resource)
            # One that is being deleted already answers that it is in use.
            group = self._node_group(name)
            if group and group["status"] != "DELETING":
                self.api.write(
                    "delete_nodegroup",
                    resource,
                    busy=self.params["wait_timeout"],
                    clusterName=self.name,
                    nodegroupName=name,
                )

        self._wait_for("node group", names, self._node_group, gone=True)

    def _node_groups(self) -> list[str]:
        names: list[str] = self.api.pages("list_nodegroups", "nodegroups", self.resource, clusterName=self.name)
        return names

    def _node_group(self, name: str) -> dict[str, Any] | None:
        answer = self.api.read(
            "describe_nodegroup", f"node group {name}", absent=ABSENT, clusterName=self.name, nodegroupName=name
        )
        found: dict[str, Any] | None = answer["nodegroup"] if answer else None
        return found

    def _keep_log_group(self) -> None:
        params = self.params
        if params["log_types"]:
            name = f"/aws/eks/{self.name}/cluster"
            group = LogGroup(lambda: self.service("logs"), self.changes, name, self.name)
            group.keep(group.read(), params["log_retention_days"], params["log_kms_key_arn"], params["tags"])

    def _create(self) -> None:
        params = self.params
        missing = [name for name in ("role_arn", "subnet_ids") if not params[name]]
        if missing:
            raise PlatformError(f"{self.resource} does not exist; to create it give {' and '.join(missing)}")
        if params["version"]:
            minor(params["version"])
        wanted = {
            "version": params["version"],
            "roleArn": params["role_arn"],
            "resourcesVpcConfig": {
                "subnetIds": params["subnet_ids"],
                "securityGroupIds": params["security_group_ids"],
                **self._endpoint_access(),
            },
            "logging": {"clusterLogging": [{"types": params["log_types"], "enabled": True}]}
            if params["log_types"]
            else None,
            "encryptionConfig": self._encryption() if params["encryption_key_arn"] else None,
            "kubernetesNetworkConfig": only_given({"serviceIpv4Cidr": params["service_ipv4_cidr"]}),
            "accessConfig": {
                "authenticationMode": params["authentication_mode"],
                "bootstrapClusterCreatorAdminPermissions": params["creator_is_admin"],
            },
            "upgradePolicy": only_given({"supportType": params["support_type"]}),
            "zonalShiftConfig": {"enabled": True} if params["zonal_shift"] else None,
            "deletionProtection": True if params["deletion_protection"] else None,
            "tags": self.tags,
        }
        wanted = only_given(wanted)
        self._keep_log_group()
        self.changes.create(self.resource, wanted)
        self.api.write("create_cluster", self.resource, settle=90, name=self.name, **wanted)
        self._wait_for_cluster()

    def _reconcile(self, now: dict[str, Any]) -> None:
        self._refuse_the_impossible(now)
        self._update_network(now)
        self._update_access_mode(now)
        self._keep_log_group()
        self._update_logging(now)
        self._update_encryption(now)
        self._update_support(now)
        self._update_protection(now)
        retag(self.api, self.changes, self.resource, now["arn"], have=now.get("tags", {}), want=self.tags)
        self._upgrade(now["version"])

    def _refuse_the_impossible(self, now: dict[str, Any]) -> None:
        params = self.params
        # Looked at before anything is changed: a run that must fail leaves the cluster as it was.
        if params["version"] and minor(params["version"]) < minor(now["version"]):
            raise PlatformError(
                f"{self.resource} runs Kubernetes {now['version']}, eks_kubernetes_version asks for"
                f" {params['version']}: only upgrades are made here;"
                f' set it to "{now["version"]}" or later, or use EKS\'s version rollback within 7 days of an upgrade'
            )
        if params["version"] and params["version"] != now["version"]:
            self._refuse_skew(now["version"], params["version"])
        if params["role_arn"] and not params["role_arn"].startswith("<") and now["roleArn"] != params["role_arn"]:
            raise PlatformError(
                f"{self.resource} runs with the role {now['roleArn']}, asked for is {params['role_arn']}: EKS cannot"
                " change it; keep the role"
            )
        have = _mode(now)
        if MODES.index(params["authentication_mode"]) < MODES.index(have):
            raise PlatformError(
                f"{self.resource} has the authentication mode {have}: EKS cannot go back to"
                f" {params['authentication_mode']}"
            )
        key = _key(now)
        if key and params["encryption_key_arn"] not in ("", key):
            raise PlatformError(
                f"{self.resource} encrypts secrets with {key}: EKS cannot change the key to"
                f" {params['encryption_key_arn']}"
            )

    def _refuse_skew(self, have: str, want: str) -> None:
        """Refuse an upgrade that leaves nodes more than ``MAX_SKEW`` minor versions behind."""
        groups = [group for group in concurrently(self._node_group, self._node_groups()) if group]
        versions = {group["nodegroupName"]: group["version"] for group in groups if group.get("version")}
        oldest = min([minor(have), *(minor(version) for version in versions.values())])
        if minor(want) - oldest > MAX_SKEW:
            behind = ", ".join(f"node group {name} {versions[name]}" for name in sorted(versions))
            raise PlatformError(
                f"{self.resource} runs Kubernetes {have} ({behind or 'no node groups'}), eks_kubernetes_version asks"
                f" for {want}: nodes may be at most {MAX_SKEW} versions behind;"
                f' deploy "1.{max(oldest + MAX_SKEW, minor(have))}" first, nodes included'
            )

    def _endpoint_access(self) -> dict[str, Any]:
        access: dict[str, Any] = {
            "endpointPublicAccess": self.params["endpoint_public_access"],
            "endpointPrivateAccess": self.params["endpoint_private_access"],
        }
        if self.params["endpoint_public_access"]:
            # EKS takes an empty list for 0.0.0.0/0.
            if not self.params["public_access_cidrs"]:
                raise PlatformError(
                    f"{self.resource}: eks_endpoint_public_cidrs is empty and eks_endpoint_public_access is true, so"
                    " EKS would open the API server to the whole internet; nothing was changed: name the networks of"
                    " those who deploy, such as 203.0.113.7/32, or set eks_endpoint_public_access to false"
                )
            access["publicAccessCidrs"] = sorted(self.params["public_access_cidrs"])
        return access

    def _encryption(self) -> list[dict[str, Any]]:
        return [{"resources": ["secrets"], "provider": {"keyArn": self.params["encryption_key_arn"]}}]

    def _update_network(self, now: dict[str, Any]) -> None:
        have = now["resourcesVpcConfig"]
        access = self._endpoint_access()
        was = {**have, "publicAccessCidrs": sorted(have.get("publicAccessCidrs", []))}
        if self.changes.update(self.resource, was, access):
            self._update_config(resourcesVpcConfig=access)
        placed = {
            "subnetIds": sorted(self.params["subnet_ids"]),
            "securityGroupIds": sorted(self.params["security_group_ids"]),
        }
        placed = only_given(placed)
        was = {key: sorted(have.get(key, [])) for key in placed}
        if self.changes.update(self.resource, was, placed):
            # EKS takes endpoint access and placement in separate updates, and both lists together.
            self._update_config(
                resourcesVpcConfig={
                    **{key: sorted(have.get(key, [])) for key in ("subnetIds", "securityGroupIds")},
                    **placed,
                }
            )

    def _update_access_mode(self, now: dict[str, Any]) -> None:
        have, want = _mode(now), self.params["authentication_mode"]
        if self.changes.update(self.resource, {"authenticationMode": have}, {"authenticationMode": want}):
            for step in MODES[MODES.index(have) + 1 : MODES.index(want) + 1]:
                self._update_config(accessConfig={"authenticationMode": step})

    def _update_logging(self, now: dict[str, Any]) -> None:
        setups = now.get("logging", {}).get("clusterLogging", [])
        have = sorted({kind for setup in setups if setup.get("enabled") for kind in setup.get("types", [])})
        want = sorted(set(self.params["log_types"]))
        if self.changes.update(self.resource, {"logging": have}, {"logging": want}):
            setup = [
                {"types": want, "enabled": True},
                {"types": sorted(set(LOG_TYPES) - set(want)), "enabled": False},
            ]
            self._update_config(logging={"clusterLogging": [one for one in setup if one["types"]]})

    def _update_encryption(self, now: dict[str, Any]) -> None:
        want = self.params["encryption_key_arn"]
        if want and self.changes.update(self.resource, {"encryption_key": _key(now) or None}, {"encryption_key": want}):
            update = self.api.write(
                "associate_encryption_config", self.resource, clusterName=self.name, encryptionConfig=self._encryption()
            )
            wait_for_update(self.api, self.resource, update, self.params["wait_timeout"], name=self.name)

    def _update_support(self, now: dict[str, Any]) -> None:
        want = self.params["support_type"]
        have = now.get("upgradePolicy", {}).get("supportType")
        if want and self.changes.update(self.resource, {"support_type": have}, {"support_type": want}):
            self._update_config(upgradePolicy={"supportType": want})

    def _update_protection(self, now: dict[str, Any]) -> None:
        want = self.params["zonal_shift"]
        have = bool((now.get("zonalShiftConfig") or {}).get("enabled"))
        if self.changes.update(self.resource, {"zonal_shift": have}, {"zonal_shift": want}):
            self._update_config(zonalShiftConfig={"enabled": want})
        want, have = self.params["deletion_protection"], bool(now.get("deletionProtection"))
        if self.changes.update(self.resource, {"deletion_protection": have}, {"deletion_protection": want}):
            self._update_config(deletionProtection=want)

    def _keep_security_group(self, now: dict[str, Any] | None) -> None:
        """Tag the security group that EKS made, and open it to those who reach the private endpoint."""
        tags = {str(key): str(value) for key, value in self.params["security_group_tags"].items()}
        cidrs = {*self.params["private_access_cidrs"], *self._vpc_cidrs(now)}
        resource = f"security group of {self.resource}"
        group = (now or {}).get("resourcesVpcConfig", {}).get("clusterSecurityGroupId")
        if not group:
            # In check mode before the first run it is part of the new cluster.
            sync_tags(self.changes, resource, {}, tags)
            self._note_clients(resource, set(), cidrs)
            return
        ec2 = self.service("ec2")
        (found,) = ec2.read("describe_security_groups", resource, GroupIds=[group])["SecurityGroups"]
        lacking = sync_tags(self.changes, resource, tag_dict(found.get("Tags")), tags)
        if lacking:
            ec2.write("create_tags", resource, Resources=[group], Tags=tag_list(lacking))
        self._note_foreign(resource, found.get("IpPermissions", ()), cidrs)
        rules = {
            one["CidrIp"]: one.get("Description", "")
            for permission in found.get("IpPermissions", ())
            if (permission["IpProtocol"], permission.get("FromPort"), permission.get("ToPort")) == ("tcp", 443, 443)
            for one in permission.get("IpRanges", ())
        }
        ours = {cidr for cidr, description in rules.items() if description == CLIENT_RULE}
        missing, dropped = cidrs - set(rules), ours - cidrs
        if missing or dropped:
            self._note_clients(resource, ours, (ours | missing) - dropped)
        for operation, some in (
            ("authorize_security_group_ingress", missing),
            ("revoke_security_group_ingress", dropped),
        ):
            if some:
                ranges = [{"CidrIp": cidr, "Description": CLIENT_RULE} for cidr in sorted(some)]
                permission = {"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443, "IpRanges": ranges}
                ec2.write(operation, resource, GroupId=group, IpPermissions=[permission])

    def _vpc_cidrs(self, now: dict[str, Any] | None) -> list[str]:
        if not self.params["private_access_vpc"]:
            return []
        ec2, resource = self.service("ec2"), f"VPC of {self.resource}"
        vpc = (now or {}).get("resourcesVpcConfig", {}).get("vpcId")
        if not vpc:
            (subnet, *_) = ec2.read("describe_subnets", resource, SubnetIds=self.params["subnet_ids"])["Subnets"]
            vpc = subnet["VpcId"]
        blocks: list[str] = blocks_of(ec2.read("describe_vpcs", resource, VpcIds=[vpc])["Vpcs"][0])
        return blocks

    def _note_foreign(self, resource: str, permissions: Sequence[dict[str, Any]], wanted: set[str]) -> None:
        """Record networks that others admitted; they stay. Load balancers' rules tell by their description."""
        made = (CLIENT_RULE, "kubernetes.io/", "elbv2.k8s.aws/")
        for one in permissions:
            for source in (*one.get("IpRanges", ()), *one.get("Ipv6Ranges", ()), *one.get("PrefixListIds", ())):
                network = source.get("CidrIp") or source.get("CidrIpv6") or source["PrefixListId"]
                rule = (one["IpProtocol"], one.get("FromPort"), one.get("ToPort"), network)
                ours = rule[:3] == ("tcp", 443, 443) and network in wanted
                if not ours and not source.get("Description", "").startswith(made):
                    self.changes.foreign(resource, f"ingress {rule_text(rule)}", "allowed")

    def _note_clients(self, resource: str, have: set[str], want: set[str]) -> None:
        before, after = ({"clients": sorted(cidrs) or None} for cidrs in (have, want))
        self.changes.update(resource, before, after)

    def _update_config(self, **config: Any) -> None:
        update = self.api.write(
            "update_cluster_config", self.resource, busy=self.params["wait_timeout"], name=self.name, **config
        )
        wait_for_update(self.api, self.resource, update, self.params["wait_timeout"], name=self.name)

    def _upgrade(self, have: str) -> None:
        want = self.params["version"]
        if not want:
            return
        for step in range(minor(have) + 1, minor(want) + 1):
            self.changes.update(self.resource, {"version": f"1.{step - 1}"}, {"version": f"1.{step}"})
            update = self.api.write("update_cluster_version", self.resource, name=self.name, version=f"1.{step}")
            wait_for_update(self.api, self.resource, update, self.params["wait_timeout"], name=self.name)
            self._wait_for_cluster()

    def _wait_for_cluster(self, *, gone: bool = False) -> None:
        self._wait_for("cluster", [self.name], lambda name: find_cluster(self.api, name), gone=gone)

    def _wait_for(
        self, kind: str, names: list[str], describe: Callable[[str], dict[str, Any] | None], *, gone: bool = False
    ) -> None:
        if not self.changes.check_mode:
            wait_for(kind, names, describe, owner=self.name, timeout=self.params["wait_timeout"], gone=gone)


def _mode(cluster: dict[str, Any]) -> str:
    return str(cluster.get("accessConfig", {}).get("authenticationMode") or "CONFIG_MAP")


def _key(cluster: dict[str, Any]) -> str:
    configs = cluster.get("encryptionConfig") or []
    return str(configs[0].get("provider", {}).get("keyArn", "")) if configs else ""


def facts(cluster: dict[str, Any] | None) -> dict[str, Any]:
    """Return what other tasks need of a cluster's description; empty where there is none."""
    if cluster is None:
        return {}
    return {
        "arn": cluster["arn"],
        "certificate_authority": cluster.get("certificateAuthority", {}).get("data", ""),
        "endpoint": cluster.get("endpoint", ""),
        "irsa": cluster.get("tags", {}).get(IRSA_TAG) == "true",
        "oidc_issuer": cluster.get("identity", {}).get("oidc", {}).get("issuer", ""),
        "security_group_id": cluster.get("resourcesVpcConfig", {}).get("clusterSecurityGroupId", ""),
        "status": cluster["status"],
        "version": cluster["version"],
    }


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    eks = Api(module.client("eks"), changes)
    cluster = Cluster(module.params, eks, changes, cache(lambda name: Api(module.client(name), changes)))
    states = {"present": cluster.present, "absent": cluster.absent, "deletable": cluster.deletable}
    return states[module.params["state"]]()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
