"""The EKS updates that MiniStack 1.5 lacks, added to it in its own process: ``install()`` before it serves.

UpdateClusterConfig, UpdateClusterVersion, UpdateNodegroupConfig, UpdateNodegroupVersion, DescribeUpdate and
DescribeAddonVersions answer like EKS: an update is in progress when it is asked for and successful when it is looked
at; a version moves one minor at a time. Tags set later show in descriptions. A cluster has a security group of its own
and may be protected against deletion. Node groups keep launch template, update limits and repair; with a template EKS
takes no disk size, and a group stays with the template it was made with. Nodes get the access entry that EKS makes for
them. The pod identity associations of add-ons exist, and descriptions name them by ARN. Lists come in pages. Launch
templates keep the placement, reservations and keys that MiniStack drops.
"""

import json
import re
import urllib.parse
from collections.abc import Callable
from typing import Any

from ministack.services import ec2, eks  # type: ignore[import-not-found,unused-ignore]

Answer = tuple[int, dict[str, str], bytes]

updates: dict[str, dict[str, Any]] = {}
CLUSTER = r"/clusters/(?P<cluster>[\w-]+)"
GROUP = CLUSTER + r"/node-groups/(?P<group>[\w-]+)"
ADDON = CLUSTER + r"/addons/(?P<addon>[\w-]+)(/update)?"


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
    answer: Answer = eks._json_resp(200, {"update": update})
    return answer


def refuse(code: str, message: str) -> Answer:
    """Answer an error of EKS."""
    answer: Answer = eks._error(404 if code == "ResourceNotFoundException" else 400, code, message)
    return answer


def update_cluster_config(body: dict[str, Any], cluster: str) -> Answer:
    """UpdateClusterConfig: one kind of change a call, as EKS has it."""
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


def update_cluster_version(body: dict[str, Any], cluster: str) -> Answer:
    """UpdateClusterVersion: the next minor version and no other."""
    record = eks._clusters[cluster]
    have, want = (int(version.split(".")[1]) for version in (record["version"], body["version"]))
    if want != have + 1:
        return refuse(
            "InvalidParameterException", f"Unsupported Kubernetes minor version update from 1.{have} to 1.{want}"
        )
    record["version"] = body["version"]
    return begin("VersionUpdate")


def update_nodegroup_config(body: dict[str, Any], cluster: str, group: str) -> Answer:
    """UpdateNodegroupConfig."""
    record = eks._nodegroups[f"{cluster}/{group}"]
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
    return begin("ConfigUpdate")


def update_nodegroup_version(body: dict[str, Any], cluster: str, group: str) -> Answer:
    """UpdateNodegroupVersion: to the cluster's version unless another is named, and to a version of its template."""
    record = eks._nodegroups[f"{cluster}/{group}"]
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


def create_cluster(inner: Callable[..., Answer], body: dict[str, Any], request: tuple[Any, ...]) -> Answer:
    """CreateCluster: with the settings that MiniStack drops, and a security group in the subnets' VPC."""
    answer = inner(*request)
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
    made: Answer = eks._json_resp(200, {"cluster": eks._sanitize(record)})
    return made


def delete_cluster(inner: Callable[..., Answer], cluster: str, request: tuple[Any, ...]) -> Answer:
    """DeleteCluster: refused while node groups hold it or it is protected; its security group goes with it."""
    record = eks._clusters.get(cluster)
    if record and record.get("deletionProtection"):
        return refuse("InvalidRequestException", f"Cluster {cluster} has deletion protection enabled.")
    if any(key.startswith(f"{cluster}/") for key in eks._nodegroups):
        return refuse("ResourceInUseException", "Cluster has nodegroups attached")
    for key in [key for key in eks._addons if key.startswith(f"{cluster}/")]:
        eks._addons.pop(key)
    if record:
        group = record["resourcesVpcConfig"]["clusterSecurityGroupId"]
        ec2._security_groups.pop(group, None)
        ec2._tags.pop(group, None)
    return inner(*request)


def create_nodegroup(
    inner: Callable[..., Answer], body: dict[str, Any], cluster: str, request: tuple[Any, ...]
) -> Answer:
    """CreateNodegroup: checked and kept as EKS does, with an access entry for its role."""
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
    answer = inner(*request)
    if answer[0] != 200:
        return answer
    record = eks._nodegroups[f"{cluster}/{body['nodegroupName']}"]
    record["updateConfig"] = body.get("updateConfig", {"maxUnavailable": 1})
    record["nodeRepairConfig"] = body.get("nodeRepairConfig", {"enabled": False})
    record["releaseVersion"] = record["releaseVersion"] or f"{record['version']}.0-20261101"
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
    made: Answer = eks._json_resp(200, {"nodegroup": record})
    return made


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


def in_pages(inner: Callable[..., Answer], key: str, query: dict[str, Any], request: tuple[Any, ...]) -> Answer:
    """Answer one page of a list: maxResults items (100 where none is asked for) after nextToken."""
    asked = {name: value[0] if isinstance(value, list) else value for name, value in query.items()}
    size, start = int(asked.get("maxResults") or 100), int(asked.get("nextToken") or 0)
    rest = {name: value for name, value in query.items() if name not in ("maxResults", "nextToken")}
    answer = inner(*request[:-1], {**rest, "maxResults": ["1000000"]})
    if answer[0] != 200:
        return answer
    items = json.loads(answer[2])[key]
    page: dict[str, Any] = {key: items[start : start + size]}
    if start + size < len(items):
        page["nextToken"] = str(start + size)
    paged: Answer = eks._json_resp(200, page)
    return paged


def describe_update(_: dict[str, Any], update: str, **__: str) -> Answer:
    """DescribeUpdate."""
    if update not in updates:
        return refuse("ResourceNotFoundException", f"No update found for ID: {update}")
    updates[update]["status"] = "Successful"
    answer: Answer = eks._json_resp(200, {"update": updates[update]})
    return answer


def default_version(kubernetes: str) -> str:
    """Return the version of an add-on that is the default for a Kubernetes version."""
    return f"v{kubernetes}.0-eksbuild.1"


def describe_addon_versions(query: dict[str, Any]) -> Answer:
    """DescribeAddonVersions: one version an add-on and Kubernetes version, which is also the default."""
    name, kubernetes = (
        str(query[key][0] if isinstance(query[key], list) else query[key]) for key in ("addonName", "kubernetesVersion")
    )
    compatible = [{"clusterVersion": kubernetes, "defaultVersion": True, "platformVersions": ["*"]}]
    versions = [{"addonVersion": default_version(kubernetes), "architecture": ["amd64"], "compatibilities": compatible}]
    answer: Answer = eks._json_resp(200, {"addons": [{"addonName": name, "addonVersions": versions}]})
    return answer


LISTS = {
    r"/clusters": "clusters",
    CLUSTER + r"/node-groups": "nodegroups",
    CLUSTER + r"/addons": "addons",
    CLUSTER + r"/access-entries": "accessEntries",
    CLUSTER + r"/access-entries/.+/access-policies": "associatedAccessPolicies",
    CLUSTER + r"/pod-identity-associations": "associations",
}

ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = [
    ("POST", re.compile(CLUSTER + r"/update-config"), update_cluster_config),
    ("POST", re.compile(CLUSTER + r"/updates"), update_cluster_version),
    ("POST", re.compile(GROUP + r"/update-config"), update_nodegroup_config),
    ("POST", re.compile(GROUP + r"/update-version"), update_nodegroup_version),
    ("GET", re.compile(CLUSTER + r"/updates/(?P<update>[\w-]+)"), describe_update),
]


def install() -> None:
    """Put the missing operations in front of MiniStack's own."""
    inner = eks._handle_request_sync

    def handle(method: str, path: str, headers: Any, body: bytes, query: Any) -> Answer:
        if path == "/addons/supported-versions":
            return describe_addon_versions(query)
        for verb, pattern, operation in ROUTES:
            match = pattern.fullmatch(path)
            if method == verb and match:
                names = match.groupdict()
                if names["cluster"] not in eks._clusters:
                    return refuse("ResourceNotFoundException", f"No cluster found for name: {names['cluster']}.")
                if "group" in names and f"{names['cluster']}/{names['group']}" not in eks._nodegroups:
                    return refuse("ResourceNotFoundException", f"No node group found for name: {names['group']}.")
                return operation(json.loads(body or b"{}"), **names)
        request = (method, path, headers, body, query)
        if method == "GET":
            for listing, key in LISTS.items():
                if re.fullmatch(listing, path):
                    return in_pages(inner, key, query, request)
        if method == "POST" and path == "/clusters":
            return create_cluster(inner, json.loads(body), request)
        match = re.fullmatch(CLUSTER, path)
        if method == "DELETE" and match:
            return delete_cluster(inner, match["cluster"], request)
        match = re.fullmatch(CLUSTER + "/node-groups", path)
        if method == "POST" and match:
            return create_nodegroup(inner, json.loads(body), match["cluster"], request)
        arn = urllib.parse.unquote(path.removeprefix("/tags/"))
        if path.startswith("/tags/") and "podidentityassociation" in arn and method == "POST":
            return tag_association(arn, json.loads(body)["tags"])
        match = re.fullmatch(CLUSTER + "/addons", path)
        if method == "POST" and match and match["cluster"] in eks._clusters:
            addon = json.loads(body)
            addon.setdefault("addonVersion", default_version(eks._clusters[match["cluster"]]["version"]))
            made: Answer = inner(method, path, headers, json.dumps(addon).encode(), query)
            own_associations(match["cluster"], addon["addonName"])
            return made
        match = re.fullmatch(ADDON, path)
        if match and method == "GET":
            # Made before this emulator knew of associations.
            own_associations(match["cluster"], match["addon"])
        answer: Answer = inner(method, path, headers, body, query)
        if match and method != "GET":
            own_associations(match["cluster"], match["addon"])
        if path.endswith(("/encryption-config/associate", "/update")) and answer[0] == 200:
            # MiniStack forgets the updates that it answers.
            update = json.loads(answer[2])["update"]
            updates[update["id"]] = update
        if path.startswith("/tags/") and answer[0] == 200 and method != "GET":
            show_tags(arn)
        return answer

    eks._handle_request_sync = handle
    keep_template_settings()


# What MiniStack drops of a launch template: path in a request, and the element of an answer.
TEMPLATE_SETTINGS = {
    ("Placement", "GroupName"): ("placement", "groupName"),
    ("InstanceMarketOptions", "MarketType"): ("instanceMarketOptions", "marketType"),
    ("CapacityReservationSpecification", "CapacityReservationPreference"): (
        "capacityReservationSpecification",
        "capacityReservationPreference",
    ),
    ("CapacityReservationSpecification", "CapacityReservationTarget", "CapacityReservationId"): (
        "capacityReservationSpecification",
        "capacityReservationTarget",
        "capacityReservationId",
    ),
    ("CapacityReservationSpecification", "CapacityReservationTarget", "CapacityReservationResourceGroupArn"): (
        "capacityReservationSpecification",
        "capacityReservationTarget",
        "capacityReservationResourceGroupArn",
    ),
}


def keep_template_settings() -> None:
    """Let launch templates keep the settings that MiniStack drops."""
    parse, render = ec2._parse_lt_data, ec2._lt_data_xml

    def parse_more(params: Any, prefix: str = "LaunchTemplateData") -> dict[str, Any]:
        data: dict[str, Any] = parse(params, prefix)
        for path in TEMPLATE_SETTINGS:
            value = ec2._p(params, ".".join((prefix, *path)))
            if value:
                place = data
                for step in path[:-1]:
                    place = place.setdefault(step, {})
                place[path[-1]] = value
        for index, mapping in enumerate(data.get("BlockDeviceMappings", ()), 1):
            key = ec2._p(params, f"{prefix}.BlockDeviceMapping.{index}.Ebs.KmsKeyId")
            if key:
                mapping["Ebs"]["KmsKeyId"] = key
        return data

    def render_more(data: dict[str, Any]) -> str:
        xml = str(render(data))
        for mapping in data.get("BlockDeviceMappings", ()):
            key = mapping.get("Ebs", {}).get("KmsKeyId")
            if key:
                device = f"<deviceName>{mapping['DeviceName']}</deviceName><ebs>"
                xml = xml.replace(device, f"{device}<kmsKeyId>{ec2._esc(key)}</kmsKeyId>")
        for path, elements in TEMPLATE_SETTINGS.items():
            value: Any = data
            for step in path:
                value = value.get(step, {})
            if value:
                opening = "".join(f"<{one}>" for one in elements)
                closing = "".join(f"</{one}>" for one in reversed(elements))
                xml += opening + str(ec2._esc(value)) + closing
        return xml

    ec2._parse_lt_data, ec2._lt_data_xml = parse_more, render_more
    create = ec2._ACTION_MAP["CreateLaunchTemplate"]

    def create_and_tag(params: Any) -> Any:
        answer = create(params)
        # A second record of the tags, which would hide those that are set and removed later.
        for template in ec2._launch_templates.values():
            template.pop("Tags", None)
        return answer

    ec2._ACTION_MAP["CreateLaunchTemplate"] = create_and_tag


def tag_association(arn: str, tags: dict[str, str]) -> Answer:
    """TagResource for a pod identity association."""
    for record in eks._pod_identity_associations.values():
        if record["associationArn"] == arn:
            record["tags"] = {**record["tags"], **tags}
            answer: Answer = eks._json_resp(200, {})
            return answer
    return refuse("ResourceNotFoundException", f"No resource found for ARN: {arn}")


def show_tags(arn: str) -> None:
    """Bring the tags of a description up to date with those of the resource."""
    for store in (eks._clusters, eks._nodegroups, eks._addons, eks._access_entries):
        for record in store.values():
            if arn in (
                record.get("arn"),
                record.get("nodegroupArn"),
                record.get("addonArn"),
                record.get("accessEntryArn"),
            ):
                record["tags"] = dict(eks._tags.get(arn, {}))
