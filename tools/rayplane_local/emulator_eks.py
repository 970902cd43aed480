"""The EKS updates that MiniStack 1.5 lacks, added to it in its own process: ``install()`` before it serves.

UpdateClusterConfig, UpdateClusterVersion, UpdateNodegroupConfig, UpdateNodegroupVersion, DescribeUpdate and
DescribeAddonVersions answer like EKS: an update is in progress when it is asked for and successful when it is looked
at; a version moves one minor at a time. Tags set later show in descriptions. A cluster has a security group of its own
and may be protected against deletion. Node groups keep launch template, update limits and repair; with a template EKS
takes no disk size, and a group stays with the template it was made with; one that needs more than the account's quota
fails. Nodes get the access entry that EKS makes for them. The pod identity associations of add-ons exist, and are named
by ARN. Lists come in pages. Systems Manager knows the newest release of every node image.
The log group of a deleted cluster is written again once after it was deleted.
"""

import json
import re
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from emulator_rules import judge, seen_from_outside, zone_refusal  # type: ignore[import-not-found,unused-ignore]
from ministack.services import cloudwatch_logs, ec2, eks, ssm  # type: ignore[import-not-found,unused-ignore]

Answer = tuple[int, dict[str, str], bytes]

updates: dict[str, dict[str, Any]] = {}
#: Account and log group of deleted clusters whose last events have not come yet.
still_writing: set[tuple[str, str]] = set()
CLUSTER = r"/clusters/(?P<cluster>[\w-]+)"
GROUP = CLUSTER + r"/node-groups/(?P<group>[\w-]+)"
ADDON = CLUSTER + r"/addons/(?P<addon>[\w-]+)"
TAGS = r"/tags/(?P<arn>.+)"


@dataclass
class Request:
    """A request, and MiniStack's own way to answer it."""

    inner: Callable[..., Answer]
    method: str
    path: str
    headers: Any
    content: bytes
    query: dict[str, Any]

    @property
    def body(self) -> dict[str, Any]:
        """The members that stand in the body."""
        members: dict[str, Any] = json.loads(self.content or b"{}")
        return members

    def asked(self, name: str) -> str:
        """Return a parameter of the query; empty where it is not given."""
        value = self.query.get(name) or ""
        return str(value[0] if isinstance(value, list) else value)

    def pass_on(self, content: bytes | None = None, query: dict[str, Any] | None = None) -> Answer:
        """Let MiniStack answer, this or a changed request."""
        changed = (self.content if content is None else content, self.query if query is None else query)
        answer: Answer = self.inner(self.method, self.path, self.headers, *changed)
        return answer


def answer_with(**members: Any) -> Answer:
    """Answer what was asked for."""
    answer: Answer = eks._json_resp(200, members)
    return answer


def begin(kind: str) -> Answer:
    """Remember a new update and answer it."""
    update = {
        "id": eks.new_uuid(),
        "type": kind,
        "status": "InProgress",
        "params": [],
        "errors": [],
        "createdAt": eks._now(),
    }
    updates[update["id"]] = update
    return answer_with(update=update)


def remember_update(request: Request, **_: str) -> Answer:
    """AssociateEncryptionConfig and UpdateAddon: MiniStack forgets the updates that it answers."""
    answer = request.pass_on()
    if answer[0] == 200:
        update = json.loads(answer[2])["update"]
        updates[update["id"]] = update
    return answer


def refuse(code: str, message: str) -> Answer:
    """Answer an error of EKS."""
    answer: Answer = eks._error(404 if code == "ResourceNotFoundException" else 400, code, message)
    return answer


def update_cluster_config(request: Request, cluster: str) -> Answer:
    """UpdateClusterConfig: one kind of change a call, as EKS has it."""
    body = request.body
    kinds = [
        key
        for key in (
            "resourcesVpcConfig",
            "logging",
            "accessConfig",
            "upgradePolicy",
            "deletionProtection",
            "zonalShiftConfig",
        )
        if key in body
    ]
    if len(kinds) != 1:
        return refuse("InvalidParameterException", f"Exactly one type of update may be given, not {kinds}.")
    record = eks._clusters[cluster]
    if kinds[0] in ("resourcesVpcConfig", "accessConfig"):
        record[kinds[0]] = {**record.get(kinds[0], {}), **body[kinds[0]]}
    else:
        record[kinds[0]] = body[kinds[0]]
    return begin("ConfigUpdate")


def update_cluster_version(request: Request, cluster: str) -> Answer:
    """UpdateClusterVersion: the next minor version and no other."""
    body, record = request.body, eks._clusters[cluster]
    have, want = (int(version.split(".")[1]) for version in (record["version"], body["version"]))
    if want != have + 1:
        return refuse(
            "InvalidParameterException", f"Unsupported Kubernetes minor version update from 1.{have} to 1.{want}"
        )
    record["version"] = body["version"]
    return begin("VersionUpdate")


def update_nodegroup_config(request: Request, cluster: str, group: str) -> Answer:
    """UpdateNodegroupConfig."""
    body, record = request.body, eks._nodegroups[f"{cluster}/{group}"]
    record["scalingConfig"] = {**record["scalingConfig"], **body.get("scalingConfig", {})}
    record["updateConfig"] = body.get("updateConfig") or record.get("updateConfig", {"maxUnavailable": 1})
    record["nodeRepairConfig"] = {**record.get("nodeRepairConfig", {}), **body.get("nodeRepairConfig", {})}
    labels = body.get("labels", {})
    record["labels"] = {**record.get("labels", {}), **labels.get("addOrUpdateLabels", {})}
    for key in labels.get("removeLabels", []):
        record["labels"].pop(key, None)
    taints = body.get("taints", {})
    changed = {(taint["key"], taint["effect"]) for one in taints.values() for taint in one}
    kept = [taint for taint in record.get("taints", []) if (taint["key"], taint["effect"]) not in changed]
    record["taints"] = kept + taints.get("addOrUpdateTaints", [])
    judge(record)
    return begin("ConfigUpdate")


def update_nodegroup_version(request: Request, cluster: str, group: str) -> Answer:
    """UpdateNodegroupVersion: to the cluster's version unless another is named, and to a version of its template."""
    body, record = request.body, eks._nodegroups[f"{cluster}/{group}"]
    have, ahead = record["version"], eks._clusters[cluster]["version"]
    template = None
    if "launchTemplate" in body:
        template = find_template(body["launchTemplate"])
        if template is None:
            return refuse("InvalidParameterException", "The specified launch template or version does not exist.")
        if record.get("launchTemplate", {}).get("id") != template["id"]:
            return refuse(
                "InvalidParameterException",
                "You cannot specify a launch template other than the one that the node group was deployed with.",
            )
    want = body.get("version") or (have if template else ahead)
    if not _number(have) <= _number(want) <= _number(ahead):
        return refuse("InvalidParameterException", f"Requested Nodegroup Kubernetes version {want} is invalid.")
    record["version"] = want
    record["releaseVersion"] = body.get("releaseVersion") or record["releaseVersion"]
    if template:
        record["launchTemplate"] = template
    return begin("VersionUpdate")


def _number(version: str) -> int:
    return int(version.split(".")[1])


def newest_release(version: str) -> str:
    """Return the newest release of all node images for a Kubernetes version."""
    return f"{version}.0-20261101"


def public_parameter(inner: Callable[[str], dict[str, Any] | None], name: str) -> dict[str, Any] | None:
    """GetParameters: the releases of node images are public, as AWS's other images are."""
    match = re.fullmatch(r"/aws/service/(eks/optimized-ami/|bottlerocket/aws-k8s-)(\d+\.\d+)\D.*_version", name)
    if match is None:
        return inner(name)
    like: dict[str, Any] = inner("/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64") or {}
    arn = like["ARN"].replace(like["Name"], name)
    return {**like, "Name": name, "Value": newest_release(match[2]), "ARN": arn}


def find_template(given: dict[str, str]) -> dict[str, str] | None:
    """Return the launch template and the number of its version that a specification names, or None."""
    for template in ec2._launch_templates.values():
        if given.get("id", template["LaunchTemplateId"]) != template["LaunchTemplateId"]:
            continue
        if given.get("name", template["LaunchTemplateName"]) != template["LaunchTemplateName"]:
            continue
        fixed = {"$Default": template["DefaultVersionNumber"], "$Latest": template["LatestVersionNumber"]}
        version = str(fixed.get(given.get("version", "$Default"), given.get("version")))
        if any(str(one["VersionNumber"]) == version for one in template["Versions"]):
            return {
                "id": template["LaunchTemplateId"],
                "name": template["LaunchTemplateName"],
                "version": version,
            }
    return None


def template_settings(found: dict[str, str]) -> dict[str, Any]:
    """Return the data of a version of a launch template."""
    versions = ec2._launch_templates[found["id"]]["Versions"]
    return next(one["LaunchTemplateData"] for one in versions if str(one["VersionNumber"]) == found["version"])


def create_cluster(request: Request) -> Answer:
    """CreateCluster: with the settings that MiniStack drops, and a security group in the subnets' VPC."""
    body = request.body
    answer = zone_refusal(body["name"], body["resourcesVpcConfig"].get("subnetIds", [])) or request.pass_on()
    if answer[0] != 200:
        return answer
    record = eks._clusters[body["name"]]
    for key in ("upgradePolicy", "deletionProtection", "zonalShiftConfig"):
        if key in body:
            record[key] = body[key]
    network = record["resourcesVpcConfig"]
    vpcs = {ec2._subnets[one]["VpcId"] for one in network["subnetIds"] if one in ec2._subnets}
    if vpcs:
        network["vpcId"] = vpcs.pop()
        group = network["clusterSecurityGroupId"]
        name = f"eks-cluster-sg-{body['name']}"
        ec2._security_groups[group] = {
            "GroupId": group,
            "GroupName": name,
            "Description": "EKS created security group applied to ENI that is attached to EKS Control Plane",
            "VpcId": network["vpcId"],
            "OwnerId": eks.get_account_id(),
            "IpPermissions": [],
            "IpPermissionsEgress": [],
        }
        tags = {"Name": name, f"kubernetes.io/cluster/{body['name']}": "owned", "aws:eks:cluster-name": body["name"]}
        ec2._tags[group] = [{"Key": key, "Value": value} for key, value in tags.items()]
    return answer_with(cluster=seen_from_outside(eks._sanitize(record)))


def describe_cluster(_: Request, cluster: str) -> Answer:
    """DescribeCluster: with the address of the API server as the caller reaches it."""
    return answer_with(cluster=seen_from_outside(eks._sanitize(eks._clusters[cluster])))


def delete_cluster(request: Request, cluster: str) -> Answer:
    """DeleteCluster: refused while node groups hold it or it is protected; its security group goes with it."""
    record = eks._clusters[cluster]
    if record.get("deletionProtection"):
        return refuse("InvalidRequestException", f"Cluster {cluster} has deletion protection enabled.")
    if any(key.startswith(f"{cluster}/") for key in eks._nodegroups):
        return refuse("ResourceInUseException", "Cluster has nodegroups attached")
    for key in [key for key in eks._addons if key.startswith(f"{cluster}/")]:
        eks._addons.pop(key)
    group = record["resourcesVpcConfig"]["clusterSecurityGroupId"]
    ec2._security_groups.pop(group, None)
    ec2._tags.pop(group, None)
    if any(one.get("enabled") for one in record.get("logging", {}).get("clusterLogging", [])):
        still_writing.add((eks.get_account_id(), f"/aws/eks/{cluster}/cluster"))
    return request.pass_on()


def delete_log_group(inner: Callable[[dict[str, Any]], Answer], data: dict[str, Any]) -> Answer:
    """DeleteLogGroup: EKS goes on writing for a while, and makes the group of a deleted cluster anew."""
    answer = inner(data)
    group = (eks.get_account_id(), data.get("logGroupName", ""))
    if answer[0] == 200 and group in still_writing:
        still_writing.remove(group)
        cloudwatch_logs._create_log_group({"logGroupName": group[1]})
    return answer


def create_nodegroup(request: Request, cluster: str) -> Answer:
    """CreateNodegroup: checked and kept as EKS does, with an access entry for its role."""
    body = request.body
    if len(body.get("nodegroupName", "")) > 63:
        return refuse("InvalidParameterException", "The node group name can't be longer than 63 characters.")
    template, settings = None, {}
    if "launchTemplate" in body:
        template = find_template(body["launchTemplate"])
        if template is None:
            return refuse("InvalidParameterException", "The specified launch template or version does not exist.")
        settings = template_settings(template)
        if "diskSize" in body:
            return refuse("InvalidParameterException", "Disk size must be specified within the launch template.")
        if "InstanceType" in settings and "instanceTypes" in body:
            return refuse(
                "InvalidParameterException",
                "You cannot specify instance types in both the launch template and API request.",
            )
    if body.get("capacityType") == "CAPACITY_BLOCK":
        market = settings.get("InstanceMarketOptions", {}).get("MarketType")
        if market != "capacity-block" or "InstanceType" not in settings:
            return refuse(
                "InvalidParameterException",
                "A launch template with market type capacity-block and an instance type is required.",
            )
    if body.get("amiType") == "CUSTOM":
        return refuse("InvalidParameterException", "CUSTOM is set by EKS for templates that name an image.")
    answer = request.pass_on()
    if answer[0] != 200:
        return answer
    record = eks._nodegroups[f"{cluster}/{body['nodegroupName']}"]
    record["updateConfig"] = body.get("updateConfig", {"maxUnavailable": 1})
    record["nodeRepairConfig"] = body.get("nodeRepairConfig", {"enabled": False})
    record["releaseVersion"] = record["releaseVersion"] or newest_release(record["version"])
    if template:
        record["launchTemplate"] = template
        record.pop("diskSize", None)
        if "InstanceType" in settings:
            record.pop("instanceTypes", None)
        if "ImageId" in settings:
            record["amiType"] = "CUSTOM"
    role = body.get("nodeRole", "")
    if role and eks._ae_key(cluster, role) not in eks._access_entries:
        entry = eks._build_access_entry(cluster, role, {"type": "EC2_LINUX"})
        entry["username"] = "system:node:{{EC2PrivateDNSName}}"
        entry["kubernetesGroups"] = ["system:nodes"]
        eks._access_entries[eks._ae_key(cluster, role)] = entry
    judge(record)
    if record["status"] == "ACTIVE":
        return answer_with(nodegroup=record)
    begun = {**record, "status": "CREATING", "health": {"issues": []}}
    record["status"] = "CREATE_FAILED"
    return answer_with(nodegroup=begun)


def create_addon(request: Request, cluster: str) -> Answer:
    """CreateAddon: of the default version, with pod identity associations of its own."""
    body = request.body
    body.setdefault("addonVersion", default_version(eks._clusters[cluster]["version"]))
    answer = request.pass_on(json.dumps(body).encode())
    if answer[0] != 200:
        return answer
    own_associations(cluster, body["addonName"])
    # What MiniStack answers was written before: it holds the associations as they were asked for.
    return answer_with(addon=eks._addons[f"{cluster}/{body['addonName']}"])


def describe_addon(request: Request, cluster: str, addon: str) -> Answer:
    """DescribeAddon: one that an emulator without associations has made gets them now."""
    own_associations(cluster, addon)
    return request.pass_on()


def update_addon(request: Request, cluster: str, addon: str) -> Answer:
    """UpdateAddon: with its associations."""
    answer = remember_update(request)
    own_associations(cluster, addon)
    return answer


def delete_addon(request: Request, cluster: str, addon: str) -> Answer:
    """DeleteAddon: with its associations."""
    answer = request.pass_on()
    own_associations(cluster, addon)
    return answer


def own_associations(cluster: str, name: str) -> None:
    """Make the pod identity associations that an add-on asks for, and remove those that it asks for no longer.

    MiniStack keeps what the request said; EKS owns an association for each, and answers their ARNs.
    """
    arn, namespace = eks._addon_arn(cluster, name), "kube-system"
    addon = eks._addons.get(f"{cluster}/{name}", {"addonArn": arn, "podIdentityAssociations": []})
    asked = addon["podIdentityAssociations"]
    # An ARN ends with a number of its own, which is not known any more once the add-on is gone.
    owner = arn.rpartition("/")[0] + "/"
    owned = {
        one["serviceAccount"]: one
        for one in eks._pod_identity_associations.values()
        if str(one.get("ownerArn")).startswith(owner)
    }
    if not all(isinstance(one, str) for one in asked):
        for one in asked:
            if one["serviceAccount"] not in owned:
                status, _, body = eks._create_pod_identity_association(cluster, {**one, "namespace": namespace})
                if status != 200:
                    continue
                key = eks._pia_key(cluster, json.loads(body)["association"]["associationId"])
                owned[one["serviceAccount"]] = eks._pod_identity_associations[key]
            owned[one["serviceAccount"]].update(roleArn=one["roleArn"], ownerArn=addon["addonArn"])
        wanted = [one["serviceAccount"] for one in asked if one["serviceAccount"] in owned]
        addon["podIdentityAssociations"] = [owned[account]["associationArn"] for account in wanted]
    for one in owned.values():
        if one["associationArn"] not in addon["podIdentityAssociations"]:
            eks._pod_identity_associations.pop(eks._pia_key(cluster, one["associationId"]), None)


def in_pages(key: str, request: Request, **_: str) -> Answer:
    """Answer one page of a list: maxResults items (100 where none is asked for) after nextToken."""
    size, start = int(request.asked("maxResults") or 100), int(request.asked("nextToken") or 0)
    rest = {name: value for name, value in request.query.items() if name not in ("maxResults", "nextToken")}
    answer = request.pass_on(query={**rest, "maxResults": ["1000000"]})
    if answer[0] != 200:
        return answer
    items = json.loads(answer[2])[key]
    page: dict[str, Any] = {key: items[start : start + size]}
    if start + size < len(items):
        page["nextToken"] = str(start + size)
    return answer_with(**page)


def describe_update(_: Request, update: str, **__: str) -> Answer:
    """DescribeUpdate."""
    if update not in updates:
        return refuse("ResourceNotFoundException", f"No update found for ID: {update}")
    updates[update]["status"] = "Successful"
    return answer_with(update=updates[update])


def default_version(kubernetes: str) -> str:
    """Return the version of an add-on that is the default for a Kubernetes version."""
    return f"v{kubernetes}.0-eksbuild.1"


def describe_addon_versions(request: Request) -> Answer:
    """DescribeAddonVersions: one version an add-on and Kubernetes version, which is also the default."""
    name, kubernetes = request.asked("addonName"), request.asked("kubernetesVersion")
    compatible = [{"clusterVersion": kubernetes, "defaultVersion": True, "platformVersions": ["*"]}]
    versions = [{"addonVersion": default_version(kubernetes), "architecture": ["amd64"], "compatibilities": compatible}]
    return answer_with(addons=[{"addonName": name, "addonVersions": versions}])


def tag(request: Request, arn: str) -> Answer:
    """TagResource and UntagResource: also of pod identity associations, and shown in descriptions."""
    arn = urllib.parse.unquote(arn)
    if "podidentityassociation" in arn and request.method == "POST":
        for record in eks._pod_identity_associations.values():
            if record["associationArn"] == arn:
                record["tags"] = {**record["tags"], **request.body["tags"]}
                return answer_with()
        return refuse("ResourceNotFoundException", f"No resource found for ARN: {arn}")
    answer = request.pass_on()
    for store in (eks._clusters, eks._nodegroups, eks._addons, eks._access_entries) if answer[0] == 200 else ():
        for record in store.values():
            if arn in [record.get(key) for key in ("arn", "nodegroupArn", "addonArn", "accessEntryArn")]:
                record["tags"] = dict(eks._tags.get(arn, {}))
    return answer


#: What is put in front of MiniStack's own: operation -> method, path, function of the request and the path's parts.
OPERATIONS: dict[str, tuple[str, str, Callable[..., Answer]]] = {
    "CreateCluster": ("POST", "/clusters", create_cluster),
    "DescribeCluster": ("GET", CLUSTER, describe_cluster),
    "DeleteCluster": ("DELETE", CLUSTER, delete_cluster),
    "UpdateClusterConfig": ("POST", CLUSTER + "/update-config", update_cluster_config),
    "UpdateClusterVersion": ("POST", CLUSTER + "/updates", update_cluster_version),
    "AssociateEncryptionConfig": ("POST", CLUSTER + "/encryption-config/associate", remember_update),
    "DescribeUpdate": ("GET", CLUSTER + r"/updates/(?P<update>[\w-]+)", describe_update),
    "CreateNodegroup": ("POST", CLUSTER + "/node-groups", create_nodegroup),
    "UpdateNodegroupConfig": ("POST", GROUP + "/update-config", update_nodegroup_config),
    "UpdateNodegroupVersion": ("POST", GROUP + "/update-version", update_nodegroup_version),
    "CreateAddon": ("POST", CLUSTER + "/addons", create_addon),
    "DescribeAddon": ("GET", ADDON, describe_addon),
    "UpdateAddon": ("POST", ADDON + "/update", update_addon),
    "DeleteAddon": ("DELETE", ADDON, delete_addon),
    "DescribeAddonVersions": ("GET", "/addons/supported-versions", describe_addon_versions),
    "TagResource": ("POST", TAGS, tag),
    "UntagResource": ("DELETE", TAGS, tag),
    "ListClusters": ("GET", "/clusters", partial(in_pages, "clusters")),
    "ListNodegroups": ("GET", CLUSTER + "/node-groups", partial(in_pages, "nodegroups")),
    "ListAddons": ("GET", CLUSTER + "/addons", partial(in_pages, "addons")),
    "ListAccessEntries": ("GET", CLUSTER + "/access-entries", partial(in_pages, "accessEntries")),
    "ListAssociatedAccessPolicies": (
        "GET",
        CLUSTER + "/access-entries/.+/access-policies",
        partial(in_pages, "associatedAccessPolicies"),
    ),
    "ListPodIdentityAssociations": (
        "GET",
        CLUSTER + "/pod-identity-associations",
        partial(in_pages, "associations"),
    ),
}


def operations() -> dict[str, list[str]]:
    """Return what is patched here, by service."""
    return {"eks": list(OPERATIONS), "ssm": ["GetParameters"], "logs": ["DeleteLogGroup"]}


def install() -> None:
    """Put these operations in front of MiniStack's own."""
    cloudwatch_logs._delete_log_group = partial(delete_log_group, cloudwatch_logs._delete_log_group)
    ssm._public_parameter = partial(public_parameter, ssm._public_parameter)
    inner = eks._handle_request_sync
    routes = [(method, re.compile(path), operation) for method, path, operation in OPERATIONS.values()]

    def handle(method: str, path: str, headers: Any, content: bytes, query: dict[str, Any]) -> Answer:
        request = Request(inner, method, path, headers, content, query)
        for verb, pattern, operation in routes:
            match = pattern.fullmatch(path)
            if method != verb or match is None:
                continue
            names = match.groupdict()
            if "cluster" in names and names["cluster"] not in eks._clusters:
                return refuse("ResourceNotFoundException", f"No cluster found for name: {names['cluster']}.")
            if "group" in names and f"{names['cluster']}/{names['group']}" not in eks._nodegroups:
                return refuse("ResourceNotFoundException", f"No node group found for name: {names['group']}.")
            return operation(request, **names)
        return request.pass_on()

    eks._handle_request_sync = handle
