"""The EKS updates that MiniStack 1.5 lacks, added to it in its own process: ``install()`` before it serves.

UpdateClusterConfig, UpdateClusterVersion, UpdateNodegroupConfig, UpdateNodegroupVersion, DescribeUpdate and
DescribeAddonVersions answer like EKS: an update is in progress when it is asked for and successful when it is looked
at; a version moves one minor at a time. Tags set later show in descriptions, and managed node groups keep their update
limits.
"""

import json
import re
import urllib.parse
from collections.abc import Callable
from typing import Any

from ministack.services import eks  # type: ignore[import-not-found,unused-ignore]

Answer = tuple[int, dict[str, str], bytes]

updates: dict[str, dict[str, Any]] = {}
CLUSTER = r"/clusters/(?P<cluster>[\w-]+)"
GROUP = CLUSTER + r"/node-groups/(?P<group>[\w-]+)"


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
        for key in ("resourcesVpcConfig", "logging", "accessConfig", "upgradePolicy", "deletionProtection")
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
    record["updateConfig"] = {**record.get("updateConfig", {"maxUnavailable": 1}), **body.get("updateConfig", {})}
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
    """UpdateNodegroupVersion: to the cluster's version unless another is named."""
    record = eks._nodegroups[f"{cluster}/{group}"]
    record["version"] = body.get("version") or eks._clusters[cluster]["version"]
    record["releaseVersion"] = body.get("releaseVersion") or record["releaseVersion"]
    return begin("VersionUpdate")


def describe_update(_: dict[str, Any], update: str, **__: str) -> Answer:
    """DescribeUpdate."""
    if update not in updates:
        return refuse("ResourceNotFoundException", f"No update found for ID: {update}")
    updates[update]["status"] = "Successful"
    answer: Answer = eks._json_resp(200, {"update": updates[update]})
    return answer


def describe_addon_versions(query: dict[str, Any]) -> Answer:
    """DescribeAddonVersions: one version an add-on and Kubernetes version, which is also the default."""
    name, kubernetes = (
        str(query[key][0] if isinstance(query[key], list) else query[key]) for key in ("addonName", "kubernetesVersion")
    )
    compatible = [{"clusterVersion": kubernetes, "defaultVersion": True, "platformVersions": ["*"]}]
    versions = [
        {"addonVersion": f"v{kubernetes}.0-eksbuild.1", "architecture": ["amd64"], "compatibilities": compatible}
    ]
    answer: Answer = eks._json_resp(200, {"addons": [{"addonName": name, "addonVersions": versions}]})
    return answer


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
        arn = urllib.parse.unquote(path.removeprefix("/tags/"))
        if path.startswith("/tags/") and "podidentityassociation" in arn and method == "POST":
            return tag_association(arn, json.loads(body)["tags"])
        answer: Answer = inner(method, path, headers, body, query)
        if path.startswith("/tags/") and answer[0] == 200 and method != "GET":
            show_tags(arn)
        return answer

    eks._handle_request_sync = handle


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
