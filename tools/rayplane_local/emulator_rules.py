"""What AWS refuses and MiniStack 1.5 takes, added to it in its own process: ``install()`` before it serves.

Names and values outside the limits of the service models, names of buckets, rules of security groups that are there
already or contradict themselves, and more vCPUs than the account may run. Requests that bear a client token are
carried out once.

Some of it is a matter of the account, and so of settings: ``PUT /_rayplane/settings/ACCOUNT`` with a JSON object

- ``quotas``: vCPUs by quota code, as in ``{"L-DB2E81BA": 8}``; Service Quotas answers them, and a node group that wants
  more ends as CREATE_FAILED
- ``taken_buckets``: names that belong to somebody else
- ``unsupported_zones``: zones, by name or id, in which EKS takes no subnets, beside those that AWS documents
- ``caller``: the address from which the clusters' API servers are asked; empty: from inside the VPC
- ``api_server``: ``endpoint`` and ``certificate_authority`` of what answers in place of the clusters' API servers

They hold until the emulator ends. ``GET /_rayplane/operations`` answers which operations are patched, by service.
"""

import ipaddress
import json
import re
import socket
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any
from urllib.parse import parse_qs

import botocore.session
import ministack.app as ministack  # type: ignore[import-not-found,unused-ignore]
from botocore.model import ListShape, MapShape, ServiceModel, Shape, StringShape, StructureShape
from ministack.core import router  # type: ignore[import-not-found,unused-ignore]
from ministack.services import ec2, eks, iam, s3  # type: ignore[import-not-found,unused-ignore]

Answer = tuple[int, dict[str, str], bytes]
Params = dict[str, Any]

SETTINGS: dict[str, Any] = {
    "quotas": dict,
    "taken_buckets": list,
    "unsupported_zones": list,
    "caller": str,
    "api_server": dict,
}
settings: dict[str, dict[str, Any]] = {}

#: Zones in which EKS makes no cluster. Source: EKS user guide, "View Amazon EKS networking requirements", subnets.
UNSUPPORTED_ZONES = ["use1-az3", "usw1-az2", "cac1-az3"]
#: vCPU quotas of EC2: code -> name, whether of spot instances, and the instance types that they count.
_STANDARD, _G, _P = r"[acdhimrtz]\d", r"(g|gr|vt)\d", r"p\d"
QUOTAS = {
    "L-1216C47A": ("Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances", False, _STANDARD),
    "L-DB2E81BA": ("Running On-Demand G and VT instances", False, _G),
    "L-417A185B": ("Running On-Demand P instances", False, _P),
    "L-34B43A08": ("All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests", True, _STANDARD),
    "L-3819A6DF": ("All G and VT Spot Instance Requests", True, _G),
    "L-7212CCBC": ("All P4, P3 and P2 Spot Instance Requests", True, r"p[234]\D*\."),
}
PLENTY = 10000.0


def setting(name: str, default: Any) -> Any:
    """Return a setting of the account whose request this is."""
    return settings.get(str(ec2.get_account_id()), {}).get(name, default)


def control(method: str, path: str, body: bytes, operations: dict[str, list[str]]) -> tuple[int, Any]:
    """Answer a request about the emulator itself: status and JSON."""
    _, _, rest = path.partition("/_rayplane/")
    if (method, rest) == ("GET", "operations"):
        return 200, operations
    subject, _, account = rest.partition("/")
    if (method, subject) != ("PUT", "settings") or not account:
        return 404, {"message": f"there is no {method} {path}"}
    given = json.loads(body)
    wrong = [name for name, value in given.items() if not isinstance(value, SETTINGS.get(name, ()))]
    if wrong:
        known = ", ".join(f"{name} ({kind.__name__})" for name, kind in SETTINGS.items())
        return 400, {"message": f"{', '.join(wrong)}: the settings are {known}"}
    settings[account] = given
    return 200, given


# Limits of the service models


#: Service -> error code for a value outside the limits of its model.
CHECKED = {
    "iam": "ValidationError",
    "eks": "InvalidParameterException",
    "kms": "ValidationException",
    "logs": "InvalidParameterException",
    "events": "ValidationException",
}


@cache
def model(service: str) -> ServiceModel:
    """Return the description of a service."""
    return botocore.session.get_session().get_service_model(service)


def faults(shape: Shape, value: Any, place: str) -> Iterator[str]:
    """Return what AWS says about values that are too long, too short, too many or of another form."""
    if isinstance(shape, StructureShape) and isinstance(value, dict):
        for name, member in shape.members.items():
            key = member.serialization.get("name", name)
            if key in value:
                yield from faults(member, value[key], f"{place}.{key}".strip("."))
    elif isinstance(shape, ListShape) and isinstance(value, list):
        for index, one in enumerate(value, 1):
            yield from faults(shape.member, one, f"{place}.{index}.member")
    elif isinstance(shape, MapShape) and isinstance(value, dict):
        for key, one in value.items():
            yield from faults(shape.key, key, f"{place}.key")
            yield from faults(shape.value, one, f"{place}.{key}")
    elif isinstance(shape, StringShape) and isinstance(value, str):
        limits = shape.metadata
        wrong = ""
        if len(value) > limits.get("max", len(value)):
            wrong = f"have length less than or equal to {limits['max']}"
        elif len(value) < limits.get("min", 0):
            wrong = f"have length greater than or equal to {limits['min']}"
        elif shape.enum and value not in shape.enum:
            wrong = f"satisfy enum value set: [{', '.join(shape.enum)}]"
        elif not _matches(limits.get("pattern", ""), value):
            wrong = f"satisfy regular expression pattern: {limits['pattern']}"
        if wrong:
            yield f"Value '{value}' at '{place}' failed to satisfy constraint: Member must {wrong}"


def _matches(pattern: str, value: str) -> bool:
    try:
        return not pattern or bool(
            re.search(pattern, value) if pattern.startswith("^") else re.fullmatch(pattern, value)
        )
    except re.error:
        # A class of characters that Python's expressions do not have.
        return True


@cache
def _paths(service: str) -> list[tuple[str, re.Pattern[str], str]]:
    """Return method, path and name of the operations of a REST service."""
    found = []
    for name in model(service).operation_names:
        http = model(service).operation_model(name).http
        path = re.sub(r"\{[^}]+\}", "[^/]+", http["requestUri"].partition("?")[0])
        found.append((http["method"], re.compile(path), name))
    return found


def refusal(service: str, method: str, path: str, headers: Any, body: bytes) -> Answer | None:
    """Return the refusal of a request whose members break the limits of the service's model, or None."""
    if method != "POST":
        return None
    if model(service).metadata["protocol"] == "query":
        given = {key: values[0] for key, values in parse_qs(body.decode("utf-8", "replace")).items()}
        name = given.pop("Action", "")
    else:
        given = json.loads(body or b"{}")
        target = headers.get("x-amz-target", "").rpartition(".")[2]
        name = target or next((one for verb, uri, one in _paths(service) if verb == method and uri.fullmatch(path)), "")
    if name not in model(service).operation_names or not isinstance(given, dict):
        return None
    shape = model(service).operation_model(name).input_shape
    found = list(faults(shape, given, "")) if shape else []
    if not found:
        return None
    message = f"{len(found)} validation error{'s' * (len(found) > 1)} detected: {'; '.join(found)}"
    code = CHECKED[service]
    if service == "iam":
        refused: Answer = iam._error(400, code, message, ns="iam")
        return refused
    kind = {"Content-Type": "application/x-amz-json-1.1", "x-amzn-errortype": code}
    return 400, kind, json.dumps({"__type": code, "message": message}).encode()


def checked(service: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return the handler of a service with the limits of its model in front."""

    async def handle(method: str, path: str, headers: Any, body: bytes, query: Any) -> Any:
        return refusal(service, method, path, headers, body) or await inner(method, path, headers, body, query)

    return handle


# Names of buckets


def is_bucket_name(inner: Callable[[str], bool], name: str) -> bool:
    """Whether S3 takes a name. Source: S3 user guide, "General purpose bucket naming rules"."""
    reserved = name.startswith(("xn--", "sthree-", "amzn-s3-demo-"))
    reserved = reserved or name.endswith(("-s3alias", "--ol-s3", ".mrap", "--x-s3", "--table-s3"))
    return inner(name) and not reserved


def create_bucket(inner: Callable[..., Answer], name: str, *arguments: Any, **more: Any) -> Answer:
    """CreateBucket: not of a name that somebody else has."""
    if name not in setting("taken_buckets", ()):
        return inner(name, *arguments, **more)
    message = (
        "The requested bucket name is not available. The bucket namespace is shared by all users of the system."
        " Please select a different name and try again."
    )
    refused: Answer = s3._error("BucketAlreadyExists", message, 409, f"/{name}", extra={"BucketName": name})
    return refused


def head_bucket(inner: Callable[[str], Answer], name: str) -> Answer:
    """HeadBucket: somebody else's is there, and forbidden."""
    return (403, {}, b"") if name in setting("taken_buckets", ()) else inner(name)


def get_bucket_tagging(inner: Callable[[str], Answer], name: str) -> Answer:
    """GetBucketTagging: the same."""
    if name not in setting("taken_buckets", ()):
        return inner(name)
    refused: Answer = s3._error("AccessDenied", "Access Denied", 403, f"/{name}")
    return refused


# Rules of security groups


def parse_permissions(inner: Callable[[Params, str], Any], params: Params, prefix: str) -> Any:
    """Read the rules of a request, with protocols and networks in canonical form, as AWS keeps them."""
    rules = inner(params, prefix)
    for rule in rules:
        protocol = str(rule["IpProtocol"]).lower()
        rule["IpProtocol"] = {"all": "-1", "1": "icmp", "6": "tcp", "17": "udp"}.get(protocol, protocol)
        if rule["IpProtocol"] == "-1":
            # It has no ports, whatever was asked for.
            rule.pop("FromPort", None)
            rule.pop("ToPort", None)
        for key, name in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6")):
            for one in rule[key]:
                try:
                    one[name] = str(ipaddress.ip_network(one[name], strict=False))
                except ValueError:
                    # Refused below, where it is to be added.
                    continue
    return rules


def sources(rule: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a rule as AWS counts them: protocol, ports and one source."""
    head = tuple(str(rule.get(key, "")) for key in ("IpProtocol", "FromPort", "ToPort"))
    keys = (
        ("IpRanges", "CidrIp"),
        ("Ipv6Ranges", "CidrIpv6"),
        ("PrefixListIds", "PrefixListId"),
        ("UserIdGroupPairs", "GroupId"),
    )
    return [(*head, str(one.get(name, ""))) for key, name in keys for one in rule.get(key, ())]


def authorize(key: str, inner: Callable[[Params], Answer], params: Params) -> Answer:
    """AuthorizeSecurityGroupIngress and Egress: rules that make sense, and once."""
    group = ec2._security_groups.get(ec2._p(params, "GroupId"))
    rules = ec2._parse_ip_permissions(params, "IpPermissions")
    problem = next((one for one in map(contradiction, rules) if one), None)
    wanted = [one for rule in rules for one in sources(rule)]
    have = {one for rule in (group or {}).get(key, ()) for one in sources(rule)}
    if problem is None and len(set(wanted)) < len(wanted):
        problem = ("InvalidParameterValue", "The same permission must not appear multiple times")
    if problem is None and group and have & set(wanted):
        protocol, low, high, peer = next(one for one in wanted if one in have)
        ports = f", from port: {low}, to port: {high}" if low else ""
        name = "ALL" if protocol == "-1" else protocol.upper()
        problem = (
            "InvalidPermission.Duplicate",
            f'the specified rule "peer: {peer}, {name}{ports}, ALLOW" already exists',
        )
    if problem is None:
        return inner(params)
    refused: Answer = ec2._error(*problem, 400)
    return refused


def contradiction(rule: dict[str, Any]) -> tuple[str, str] | None:
    """Return error code and message for a rule that no packet could match, or None."""
    protocol, low, high = rule["IpProtocol"], rule.get("FromPort"), rule.get("ToPort")
    if protocol in ("tcp", "udp"):
        if low is None or high is None:
            message = "Invalid value 'Must specify both from and to ports with TCP/UDP.' for portRange."
            return "InvalidParameterValue", message
        if not 0 <= low <= high <= 65535:
            return "InvalidParameterValue", f"Invalid {protocol.upper()} port range ({low}:{high})"
    for key, name, version in (("IpRanges", "CidrIp", 4), ("Ipv6Ranges", "CidrIpv6", 6)):
        for one in rule[key]:
            try:
                right = ipaddress.ip_network(one[name]).version == version
            except ValueError:
                right = False
            if not right:
                return "InvalidParameterValue", f"CIDR block {one[name]} is malformed"
    for pair in rule["UserIdGroupPairs"]:
        if pair.get("GroupId") and pair["GroupId"] not in ec2._security_groups:
            return "InvalidGroup.NotFound", f"The security group '{pair['GroupId']}' does not exist"
    return None


def revoke(key: str, inner: Callable[[Params], Answer], params: Params) -> Answer:
    """RevokeSecurityGroupIngress and Egress: of rules that are there, each source by itself."""
    group = ec2._security_groups.get(ec2._p(params, "GroupId"))
    rules = ec2._parse_ip_permissions(params, "IpPermissions")
    have = {one for rule in (group or {}).get(key, ()) for one in sources(rule)}
    wanted = {one for rule in rules for one in sources(rule)}
    if not wanted <= have and group is not None:
        refused: Answer = ec2._error(
            "InvalidPermission.NotFound", "The specified rule does not exist in this security group.", 400
        )
        return refused
    # MiniStack removes a permission with all of its sources, or none.
    if group is not None and not all(any(ec2._rules_match(rule, one) for one in group[key]) for rule in rules):
        group[key] = [kept for rule in group[key] if sources(kept := without(rule, wanted)) or not sources(rule)]
    return inner(params)


def without(rule: dict[str, Any], gone: set[tuple[str, ...]]) -> dict[str, Any]:
    """Return a rule less some of its sources."""
    keys = ("IpRanges", "Ipv6Ranges", "PrefixListIds", "UserIdGroupPairs")
    empty = {**rule, **{key: [] for key in keys}}
    return rule | {
        key: [one for one in rule.get(key, ()) if sources({**empty, key: [one]})[0] not in gone] for key in keys
    }


# Once a client token

answered: dict[tuple[str, str, str], Answer] = {}
REMEMBERED = 1000


def once(name: str, inner: Callable[[Params], Answer], params: Params) -> Answer:
    """Answer a request that bears the client token of an earlier one as that one was."""
    token = ec2._p(params, "ClientToken")
    if not token:
        return inner(params)
    key = (str(ec2.get_account_id()), name, token)
    if key not in answered:
        answer = inner(params)
        if answer[0] != 200:
            return answer
        answered[key] = answer
        if len(answered) > REMEMBERED:
            answered.pop(next(iter(answered)))
    return answered[key]


# Quotas


def quota(code: str) -> float:
    """Return how many vCPUs of a kind the account may run."""
    return float(setting("quotas", {}).get(code, PLENTY))


def quota_of(instance_type: str, spot: bool) -> str:
    """Return the code of the quota that counts an instance type; empty for kinds that are not counted here."""
    return next(
        (code for code, (_, of_spot, types) in QUOTAS.items() if of_spot == spot and re.match(types, instance_type)), ""
    )


def vcpus(instance_type: str) -> int:
    """Return the vCPUs of an instance type, by its size: an xlarge has four."""
    size = instance_type.partition(".")[2]
    number = re.match(r"(\d*)xlarge", size)
    return 4 * int(number[1] or 1) if number else {"large": 2, "medium": 1}.get(size, 2)


def judge(record: dict[str, Any]) -> None:
    """Set health and status of a node group by what its instances need and the account may run."""
    spot = record["capacityType"] == "SPOT"
    kind = (record.get("instanceTypes") or [""])[0]
    code = quota_of(kind, spot)
    needed = sum(
        vcpus(one["instanceTypes"][0]) * one["scalingConfig"]["desiredSize"]
        for one in eks._nodegroups.values()
        if one.get("instanceTypes")
        and one["status"] != "CREATE_FAILED"
        and quota_of(one["instanceTypes"][0], one["capacityType"] == "SPOT") == code
    )
    issues = []
    if code and needed > quota(code):
        why = (
            "Could not launch Spot Instances. MaxSpotInstanceCountExceeded - Max spot instance count exceeded."
            if spot
            else "Could not launch On-Demand Instances. VcpuLimitExceeded - You have requested more vCPU capacity than"
            f" your current vCPU limit of {quota(code):g} allows for the instance bucket that the specified instance"
            " type belongs to. Please visit http://aws.amazon.com/contact-us/ec2-request to request an adjustment to"
            " this limit."
        )
        groups = [one["name"] for one in record["resources"]["autoScalingGroups"]]
        message = f"{why} Launching EC2 instance failed."
        issues = [{"code": "AsgInstanceLaunchFailures", "message": message, "resourceIds": groups}]
    record["health"] = {"issues": issues}
    record["status"] = "DEGRADED" if issues else "ACTIVE"


async def service_quotas(_method: str, _path: str, headers: Any, body: bytes, _query: Any) -> Answer:
    """GetServiceQuota and ListServiceQuotas of EC2's vCPUs."""
    kind = {"Content-Type": "application/x-amz-json-1.1"}
    asked = json.loads(body or b"{}")
    operation = headers.get("x-amz-target", "").rpartition(".")[2]
    listed = [_described(code) for code in QUOTAS] if asked.get("ServiceCode") == "ec2" else []
    if operation == "ListServiceQuotas":
        return 200, kind, json.dumps({"Quotas": listed}).encode()
    found = [one for one in listed if one["QuotaCode"] == asked.get("QuotaCode")]
    if operation == "GetServiceQuota" and found:
        return 200, kind, json.dumps({"Quota": found[0]}).encode()
    code = "NoSuchResourceException" if operation == "GetServiceQuota" else "UnknownOperationException"
    message = f"{operation}: {asked} is not known to this emulator"
    return 400, {**kind, "x-amzn-errortype": code}, json.dumps({"__type": code, "message": message}).encode()


def _described(code: str) -> dict[str, Any]:
    return {
        "ServiceCode": "ec2",
        "ServiceName": "Amazon Elastic Compute Cloud (Amazon EC2)",
        "QuotaArn": f"arn:aws:servicequotas:{ec2.get_region()}:{ec2.get_account_id()}:ec2/{code}",
        "QuotaCode": code,
        "QuotaName": QUOTAS[code][0],
        "Value": quota(code),
        "Unit": "None",
        "Adjustable": True,
        "GlobalQuota": False,
    }


# Clusters


def zone_refusal(name: str, subnets: list[str]) -> Answer | None:
    """Return EKS's refusal of a cluster with a subnet in a zone where it makes none, or None."""
    refused = {*UNSUPPORTED_ZONES, *setting("unsupported_zones", ())}
    zones = {one: ec2._az_id_for_zone_name(one) for one in (f"{ec2.get_region()}{letter}" for letter in "abc")}
    valid = [zone for zone, number in zones.items() if not {zone, number} & refused]
    for one in subnets:
        zone = ec2._subnets.get(one, {}).get("AvailabilityZone")
        if zone and zone not in valid:
            code = "UnsupportedAvailabilityZoneException"
            message = (
                f"Cannot create cluster '{name}' because {zone}, the targeted availability zone, does not currently"
                f" have sufficient capacity to support the cluster. Retry and choose from these availability zones:"
                f" {', '.join(valid)}"
            )
            body = {"__type": code, "message": message, "clusterName": name, "validZones": valid}
            return 400, {"Content-Type": "application/json", "x-amzn-errortype": code}, json.dumps(body).encode()
    return None


def seen_from_outside(cluster: dict[str, Any]) -> dict[str, Any]:
    """Return a cluster's description with the address of its API server as the caller reaches it."""
    server, caller, access = setting("api_server", {}), setting("caller", ""), cluster["resourcesVpcConfig"]
    networks = [ipaddress.ip_network(one, strict=False) for one in access.get("publicAccessCidrs") or ["0.0.0.0/0"]]
    admitted = access["endpointPublicAccess"] and any(ipaddress.ip_address(caller) in one for one in networks if caller)
    if caller and not admitted:
        return {**cluster, "endpoint": f"https://{silent_address()}"}
    if not server:
        return cluster
    authority = server.get("certificate_authority", cluster["certificateAuthority"]["data"])
    return {**cluster, "endpoint": server["endpoint"], "certificateAuthority": {"data": authority}}


@cache
def silent_address() -> str:
    """Return an address that answers no connection, as a private one does not from outside."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    # Nobody accepts these, so the queue is full and the kernel drops what comes after them.
    waiting = [socket.socket() for _ in range(4)]
    for one in waiting:
        one.setblocking(False)
        one.connect_ex(listener.getsockname())
    held.extend([listener, *waiting])
    return f"127.0.0.1:{listener.getsockname()[1]}"


held: list[socket.socket] = []

DIRECTIONS = {"Ingress": "IpPermissions", "Egress": "IpPermissionsEgress"}


def operations() -> dict[str, list[str]]:
    """Return what is patched here and answers otherwise than MiniStack, by service."""
    rules = [f"{verb}SecurityGroup{direction}" for verb in ("Authorize", "Revoke") for direction in DIRECTIONS]
    return {"ec2": rules, "service-quotas": ["GetServiceQuota", "ListServiceQuotas"]}


def install() -> None:
    """Put these rules in front of MiniStack."""
    for service in CHECKED:
        ministack.SERVICE_HANDLERS[service] = checked(service, ministack.SERVICE_HANDLERS[service])
    ministack.SERVICE_HANDLERS["servicequotas"] = service_quotas
    router.SERVICE_PATTERNS["servicequotas"] = {"target_prefixes": ["ServiceQuotasV20190624"]}
    s3._validate_bucket_name = partial(is_bucket_name, s3._validate_bucket_name)
    s3._create_bucket = partial(create_bucket, s3._create_bucket)
    s3._head_bucket = partial(head_bucket, s3._head_bucket)
    s3._get_bucket_tagging = partial(get_bucket_tagging, s3._get_bucket_tagging)
    ec2._parse_ip_permissions = partial(parse_permissions, ec2._parse_ip_permissions)
    for direction, key in DIRECTIONS.items():
        for verb, wrapper in (("Authorize", authorize), ("Revoke", revoke)):
            name = f"{verb}SecurityGroup{direction}"
            ec2._ACTION_MAP[name] = partial(wrapper, key, ec2._ACTION_MAP[name])
    for name, operation in ec2._ACTION_MAP.items():
        if name.startswith(("Create", "Run", "Allocate")):
            ec2._ACTION_MAP[name] = partial(once, name, operation)
