# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What the AWS modules share: recorded changes, explained errors, bounded waits, tags.

A module here reconciles a whole set in one call. It reads what is there, compares property by property, and either
changes what differs
or, in check mode, only says what it would change. ``Changes`` is that record; everything a person sees comes from it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.amazon.aws.plugins.module_utils.modules import AnsibleAWSModule
from ansible_collections.rayplane.platform.plugins.module_utils.arguments import argument_spec

try:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
except ImportError:  # AnsibleAWSModule reports the missing SDK before anything here is used
    BotoCoreError = ClientError = ResponseParserError = OSError  # type: ignore[misc,assignment]

__all__ = [
    "OWNER_TAG",
    "REGION_TAG",
    "ROLE_TAG",
    "Api",
    "Changes",
    "PlatformError",
    "cure_of",
    "explain",
    "only_given",
    "run",
    "run_with",
    "sync_tags",
    "tag_dict",
    "tag_list",
    "wait_until",
]

#: On every resource the modules create: whose it is. Its value is the cluster's name.
OWNER_TAG = "rayplane.io/cluster"
#: On what is the same in all regions, such as roles: the region of the cluster that it belongs to.
REGION_TAG = "rayplane.io/region"
#: On network resources: which part of the network it is, such as ``private-us-west-2a``.
ROLE_TAG = "rayplane.io/role"

_CREDENTIALS = "check AWS_PROFILE or the access key: AWS does not accept these credentials"
_LOG_IN = "the session has ended: log in again (`aws sso login`, or new temporary credentials)"
_PERMISSION = "give the deploying principal the permission {permission}"
_IN_USE = "something still uses it: wait for it to finish or remove it, then run again"


def _quota(what: str, code: str, otherwise: str = "", service: str = "vpc") -> str:
    """Return how to raise a quota; codes are those of the service quotas' list in the AWS General Reference."""
    raising = f"aws service-quotas request-service-quota-increase --service-code {service} --quota-code {code}"
    return f"raise the quota for {what} ({raising} --desired-value N){', or ' + otherwise if otherwise else ''}"


# Error code -> what to do about it. Codes are those of the services' API references, "Common errors" and each call's.
_CURES = {
    **dict.fromkeys(("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403"), _PERMISSION),
    **dict.fromkeys(("AuthFailure", "InvalidClientTokenId", "InvalidAccessKeyId"), _CREDENTIALS),
    **dict.fromkeys(("UnrecognizedClientException", "NotSignedUp"), _CREDENTIALS),
    "SignatureDoesNotMatch": "check the secret access key, and this machine's clock",
    **dict.fromkeys(("RequestExpired", "RequestTimeTooSkewed"), "set this machine's clock right, then run again"),
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException"), _LOG_IN),
    "OptInRequired": "subscribe the account to this service, or enable the region, in the AWS console",
    "PendingVerification": "AWS is still verifying the account in this region: run again in an hour",
    "VpcLimitExceeded": _quota("VPCs of this region", "L-F678F1CE", "remove an unused VPC"),
    "AddressLimitExceeded": _quota(
        "Elastic IP addresses", "L-0263D0A3", "release unused ones, or set network_nat_mode to single", service="ec2"
    ),
    "NatGatewayLimitExceeded": _quota("NAT gateways a zone", "L-FE5A380F", "set network_nat_mode to single"),
    "InternetGatewayLimitExceeded": _quota("internet gateways", "L-A4707A72", "remove an unused one"),
    "VpcEndpointLimitExceeded": _quota("VPC endpoints", "L-29B6F2EB", "take names out of network_interface_endpoints"),
    "VcpuLimitExceeded": _quota(
        "vCPUs of this instance family",
        "L-DB2E81BA (G and VT instances) or L-1216C47A (standard ones)",
        "lower the node groups' sizes",
        service="ec2",
    ),
    "MaxSpotInstanceCountExceeded": _quota(
        "vCPUs of spot instances",
        "L-3819A6DF (G and VT instances) or L-34B43A08 (standard ones)",
        "set the node group's capacity_type to ON_DEMAND",
        service="ec2",
    ),
    "ResourceLimitExceededException": "raise the quota for this kind of resource in the account (AWS console, Service"
    " Quotas), or remove unused ones, then run again",
    "TooManyBuckets": "raise the quota for buckets of the account (AWS console, Service Quotas), or remove unused ones",
    "UnsupportedAvailabilityZoneException": "take the zones that the message offers into network_availability_zones",
    "InsufficientFreeAddressesInSubnet": "the subnet is full: give larger ones (network_vpc_cidr) or free addresses",
    "InsufficientInstanceCapacity": "AWS has no such machines free in this zone: add instance types or zones, or run"
    " again later",
    "InvalidSubnet.Conflict": "another subnet of the VPC holds these addresses: remove it or give other CIDRs",
    "DependencyViolation": "something still uses it: delete the Kubernetes services of type LoadBalancer and the"
    " volumes first, then run again",
    **dict.fromkeys(("ResourceInUseException", "ResourceInUse", "DeleteConflict", "VolumeInUse"), _IN_USE),
    "ClusterUnreachableException": "the cluster's API server does not answer AWS: see its health in the EKS console,"
    " then run again",
    "EntityAlreadyExists": "a role or policy of this name is there and is not this cluster's: choose another"
    " platform_cluster_name, or delete it",
    "BucketAlreadyExists": "bucket names are shared by all of AWS: choose another name",
    "MalformedPolicyDocument": "correct the policy; a principal that it names must exist",
    "KMSInvalidStateException": "enable the KMS key, or cancel its deletion, then run again",
}

# What goes wrong before AWS answers: the SDK's exception -> what to do about it.
_TROUBLES = {
    **dict.fromkeys(
        ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
        "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role",
    ),
    **dict.fromkeys(
        ("SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError", "SSOError"),
        "the SSO session has ended or never began: aws sso login --profile NAME (platform_aws_profile)",
    ),
    "ProfileNotFound": "correct platform_aws_profile or AWS_PROFILE, or add the profile to ~/.aws/config",
    **dict.fromkeys(
        ("EndpointConnectionError", "ConnectTimeoutError"),
        "check the network, HTTPS_PROXY, platform_region and platform_aws_endpoint_url, then run again",
    ),
    "ProxyConnectionError": "correct HTTPS_PROXY, or name AWS in NO_PROXY",
    "SSLError": "check the clock and, where a proxy opens TLS, give its authority in AWS_CA_BUNDLE",
    **dict.fromkeys(
        ("ReadTimeoutError", "ConnectionClosedError", "ConnectionError", "HTTPClientError"),
        "the connection broke before the answer came: check the network and run again; what was made is found and kept",
    ),
    "ResponseParserError": "what answered is not AWS: check HTTPS_PROXY and platform_aws_endpoint_url, then run again",
}

# Permissions whose names are not those of their calls (Service Authorization Reference, Amazon S3).
_PERMISSIONS = {
    "s3:HeadBucket": "s3:ListBucket",
    "s3:ListObjectVersions": "s3:ListBucketVersions",
    "s3:ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "s3:DeleteObjects": "s3:DeleteObjectVersion",
    "s3:GetPublicAccessBlock": "s3:GetBucketPublicAccessBlock",
    "s3:PutPublicAccessBlock": "s3:PutBucketPublicAccessBlock",
    "s3:GetBucketEncryption": "s3:GetEncryptionConfiguration",
    "s3:PutBucketEncryption": "s3:PutEncryptionConfiguration",
    "s3:GetBucketLifecycleConfiguration": "s3:GetLifecycleConfiguration",
    "s3:PutBucketLifecycleConfiguration": "s3:PutLifecycleConfiguration",
    "s3:DeleteBucketLifecycle": "s3:PutLifecycleConfiguration",
}

_THROTTLED = ("throttl", "requestlimitexceeded", "slowdown", "toomanyrequests", "bandwidthlimitexceeded")
# What AWS answers while a resource made a moment ago has not reached all of its servers.
_SETTLING = ("NotFound", "Malformed")
# The same, where the name of the code tells nothing: taken so only by a module that has just made something itself.
_UNKNOWN = ("NoSuchEntity", "NoSuchBucket", "ResourceNotFoundException", "NotFoundException", "QueueDoesNotExist")
# Two changes of one resource at a time; AWS asks to repeat the second.
_CONFLICTS = (
    "OperationAborted",
    "ConcurrentModification",
    "ConcurrentModificationException",
    "PriorRequestNotComplete",
)
_BUSY = (
    "DependencyViolation",
    "ResourceInUseException",
    "ResourceInUse",
    "DeleteConflict",
    "IncorrectState",
    "InvalidPlacementGroup.InUse",
)
_ROLE_CODES = (
    "InvalidParameterException",
    "InvalidParameterValue",
    "InvalidParameterValueException",
    "ValidationError",
)
_ROLE_SETTLING = (
    "could not be assumed",
    "cannot be assumed",
    "is not authorized to assume",
    "does not exist",
    "invalid iamrole",
    "invalid role",
    "iaminstanceprofile",
)
_POLICY_CODES = ("MalformedPolicyDocument", "MalformedPolicyDocumentException", "MalformedPolicy")

# A deletion whose resource is gone has come true.
_REMOVING = ("delete_", "release_", "detach_", "disassociate_", "remove_", "revoke_")
_GONE = (".NotFound", "NotFoundException", "NoSuchEntity", "NoSuchBucket", "NatGatewayNotFound", "Gateway.NotAttached")

# AWS gives every creation with a client token once however often it is asked for; these have none, or one that the SDK
# makes anew for every call. Where their answer is lost they are looked up by the tags that they were given, before they
# are asked for again: operation -> the listing, its key, and the key in the creation's answer (none: the item itself).
_MADE_WITH_TAGS = {
    "create_vpc": ("describe_vpcs", "Vpcs", "Vpc"),
    "create_subnet": ("describe_subnets", "Subnets", "Subnet"),
    "create_internet_gateway": ("describe_internet_gateways", "InternetGateways", "InternetGateway"),
    "create_nat_gateway": ("describe_nat_gateways", "NatGateways", "NatGateway"),
    "create_route_table": ("describe_route_tables", "RouteTables", "RouteTable"),
    "create_vpc_endpoint": ("describe_vpc_endpoints", "VpcEndpoints", "VpcEndpoint"),
    "create_vpc_peering_connection": (
        "describe_vpc_peering_connections",
        "VpcPeeringConnections",
        "VpcPeeringConnection",
    ),
    "create_launch_template": ("describe_launch_templates", "LaunchTemplates", "LaunchTemplate"),
    "create_security_group": ("describe_security_groups", "SecurityGroups", ""),
    "allocate_address": ("describe_addresses", "Addresses", ""),
}
# Those that are known by name: operation -> the reading call with the same answer, and its arguments.
_MADE_BY_NAME: dict[str, tuple[str, tuple[str, ...]]] = {
    "create_role": ("get_role", ("RoleName",)),
    "create_instance_profile": ("get_instance_profile", ("InstanceProfileName",)),
    "create_cluster": ("describe_cluster", ("name",)),
    "create_nodegroup": ("describe_nodegroup", ("clusterName", "nodegroupName")),
    "create_addon": ("describe_addon", ("clusterName", "addonName")),
    "create_access_entry": ("describe_access_entry", ("clusterName", "principalArn")),
    "create_bucket": ("head_bucket", ("Bucket",)),
}
# What is told to who asks a second time for something whose first answer was lost.
_REPEATED = (
    "AlreadyExists",
    "AlreadyExistsException",
    "AlreadyAssociated",
    "AlreadyOwnedByYou",
    ".Duplicate",
    ".Conflict",
    "ResourceInUseException",
)
_ENDED = ("deleted", "deleting", "failed", "rejected", "expired")
_GARBAGE_TRIES = 3
_LOST_TRIES = 2
_FOREVER = float("inf")

# Names of our own so that tests replace them and not the clock of the whole process.
_sleep = time.sleep
_now = time.monotonic
# Seconds between two tries: doubled from the first to the longest.
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 5.0


class PlatformError(Exception):
    """Something a person has to know or do; the message says what, where and how."""


class Changes:
    """The record of what was, or in check mode would be, changed."""

    def __init__(self, check_mode: bool) -> None:
        self.check_mode = check_mode
        self.actions: list[str] = []
        self.warnings: list[str] = []
        self._diff: list[dict[str, Any]] = []
        self._foreign: list[dict[str, Any]] = []

    def create(self, resource: str, after: Mapping[str, Any]) -> None:
        """Record a resource that was not there."""
        self._note(f"create {resource}", resource, {}, dict(after))

    def delete(self, resource: str, before: Mapping[str, Any] | None = None) -> None:
        """Record a resource that goes away."""
        self._note(f"delete {resource}", resource, dict(before or {"state": "present"}), {})

    def update(self, resource: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
        """Record the properties in which ``before`` and ``after`` differ; return whether there are any.

        Only keys of ``after`` count: what is not asked for is not compared.
        """
        differing = [key for key in after if before.get(key) != after[key]]
        for key in differing:
            was = before.get(key)
            self.actions.append(f"update {resource}: {key}: {'absent' if was is None else was} -> {after[key]}")
        if differing:
            self._diff.append(
                {
                    "before_header": resource,
                    "after_header": resource,
                    "before": {key: before.get(key) for key in differing},
                    "after": {key: after[key] for key in differing},
                }
            )
        return bool(differing)

    def foreign(self, resource: str, key: str, value: Any) -> None:
        """Record what somebody else added to a resource of ours, or with an empty ``key`` beside them: it stays."""
        self._foreign.append({"resource": resource, "property": key, "value": value})

    def result(self) -> dict[str, Any]:
        """Return what every module returns: ``changed``, ``actions`` in order, and ``diff`` by property.

        Where others added something, also ``foreign``.
        """
        found = {"changed": bool(self.actions), "actions": self.actions, "diff": self._diff}
        return found | ({"foreign": self._foreign} if self._foreign else {})

    def _note(self, action: str, resource: str, before: dict[str, Any], after: dict[str, Any]) -> None:
        self.actions.append(action)
        self._diff.append({"before_header": resource, "after_header": resource, "before": before, "after": after})


class Api:
    """One AWS service. A failing call becomes a ``PlatformError`` that names call, resource, reason and cure.

    The SDK itself repeats throttled and broken calls. What it cannot know is repeated here, for a bounded time: what
    AWS refuses because something made a moment ago has not reached all of its servers, and creations whose answer
    was lost, which are looked up first so that none is made twice.
    """

    def __init__(self, client: Any, changes: Changes) -> None:
        self._client = client
        self._changes = changes
        self._service = str(client.meta.service_model.service_name)
        # Whether something was made through this object: only then may a resource be "not yet there".
        self._fresh = False
        self._forbid_blind_repetition()

    def read(self, operation: str, resource: str, absent: Sequence[str] = (), **arguments: Any) -> Any:
        """Call a reading operation; return None where the answer is one of the ``absent`` error codes."""
        start, pause, garbage = _now(), _FIRST_PAUSE, 0
        while True:
            try:
                return self._call(operation, arguments)
            except (ClientError, BotoCoreError, ResponseParserError) as error:
                if _code(error) in absent:
                    return None
                garbage += isinstance(error, ResponseParserError)
                unsettled = self._fresh and _unknown(error) and _now() - start < _patience(30)
                if not unsettled and not 0 < garbage < _GARBAGE_TRIES:
                    raise self._failure(operation, resource, error) from error
            _sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def pages(self, operation: str, key: str, resource: str, **arguments: Any) -> list[Any]:
        """Return the items under ``key`` of all pages of a listing operation."""
        for attempt in range(1, _GARBAGE_TRIES + 1):
            items: list[Any] = []
            try:
                for page in self._client.get_paginator(operation).paginate(**arguments):
                    items += page[key]
            except KeyError as error:
                broken = ResponseParserError(f"the answer has no {error}")
                if attempt == _GARBAGE_TRIES:
                    raise self._failure(operation, resource, broken) from error
            except ResponseParserError as error:
                if attempt == _GARBAGE_TRIES:
                    raise self._failure(operation, resource, error) from error
            except (ClientError, BotoCoreError) as error:
                raise self._failure(operation, resource, error) from error
            else:
                return items
            _sleep(_FIRST_PAUSE)
        raise AssertionError  # pragma: no cover - the last attempt returns or raises

    def write(
        self,
        operation: str,
        resource: str,
        settle: float = 30,
        busy: float = 0,
        done: Sequence[str] = (),
        **arguments: Any,
    ) -> Any:
        """Call a changing operation; in check mode do nothing and return None.

        AWS is eventually consistent: an id or a role created a moment ago may be unknown to the next call. Such answers
        are retried for ``settle`` seconds; answers that something else still uses the resource for ``busy`` seconds.
        The variable RAYPLANE_AWS_SETTLE of the environment replaces ``settle``, in seconds. A deletion of what is gone
        succeeds, and so does what ends with one of the error codes of ``done``: somebody else has done it meanwhile.
        """
        if self._changes.check_mode:
            return None
        answer = self._write(operation, resource, arguments, settle=_patience(settle), busy=busy, done=done)
        self._fresh = True
        return answer

    def _write(
        self,
        operation: str,
        resource: str,
        arguments: dict[str, Any],
        *,
        settle: float,
        busy: float,
        done: Sequence[str],
    ) -> Any:
        start, pause, lost = _now(), _FIRST_PAUSE, 0
        while True:
            try:
                return self._call(operation, arguments)
            except (ClientError, BotoCoreError, ResponseParserError) as error:
                code = _code(error)
                if code in done or (operation.startswith(_REMOVING) and code.endswith(_GONE)):
                    return {}
                if _answer_lost(error):
                    lost += 1
                    # Where it is repeated after all, it is because it was looked for and is not there. An answer that
                    # never came may have taken all the patience there is.
                    patience = settle if lost > _LOST_TRIES else _FOREVER
                    made = self._made(operation, arguments)
                elif _repeated(error) and (lost or _attempts(error)):
                    patience, made = 0.0, self._made(operation, arguments)
                    if made is None and operation not in _MADE_WITH_TAGS and operation not in _MADE_BY_NAME:
                        made = {}
                else:
                    made = None
                    patience = settle if self._settling(error) else busy if code in _BUSY else 0
                if made is not None:
                    return made
                if _now() - start >= patience:
                    raise self._failure(operation, resource, error) from error
            _sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _call(self, operation: str, arguments: dict[str, Any]) -> Any:
        answer = getattr(self._client, operation)(**arguments)
        # The SDK reads JSON leniently: a proxy's error page becomes an answer without a single member.
        telling = self._service == "eks" and operation.startswith(("describe_", "create_", "list_"))
        if telling and isinstance(answer, dict) and not set(answer) - {"ResponseMetadata"}:
            raise ResponseParserError("the answer is empty")
        return answer

    def _forbid_blind_repetition(self) -> None:
        """Keep the SDK from repeating creations that may have been carried out."""
        events = getattr(self._client.meta, "events", None)
        if events is None:
            return
        service = self._client.meta.service_model.service_id.hyphenize()
        for operation in (*_MADE_WITH_TAGS, "create_key"):
            events.register_first(
                f"needs-retry.{service}.{_camel(operation)}", _repeat_by_sdk, unique_id=f"rayplane-{operation}"
            )

    def _made(self, operation: str, arguments: Mapping[str, Any]) -> Any:
        """Return the answer of a creation that was carried out although nobody heard of it, or None."""
        try:
            if operation in _MADE_BY_NAME:
                reading, names = _MADE_BY_NAME[operation]
                return getattr(self._client, reading)(**{name: arguments[name] for name in names})
            if operation in _MADE_WITH_TAGS:
                return self._made_with_tags(*_MADE_WITH_TAGS[operation], arguments)
        except (ClientError, BotoCoreError, ResponseParserError):
            # Then the creation is asked for again; what is wrong shows there.
            return None
        return None

    def _made_with_tags(self, listing: str, key: str, single: str, arguments: Mapping[str, Any]) -> Any:
        given = tag_dict(arguments["TagSpecifications"][0]["Tags"]) if arguments.get("TagSpecifications") else {}
        if OWNER_TAG not in given:
            return None
        tags = {tag: given[tag] for tag in (OWNER_TAG, ROLE_TAG, "Name") if tag in given}
        parameter = "Filter" if listing == "describe_nat_gateways" else "Filters"
        filters = [{"Name": f"tag:{tag}", "Values": [value]} for tag, value in tags.items()]
        for item in getattr(self._client, listing)(**{parameter: filters})[key]:
            state = item.get("State", item.get("Status", ""))
            state = state.get("Code", "") if isinstance(state, dict) else state
            taken = key == "Addresses" and item.get("AssociationId")
            # Compared once more: not every endpoint knows every filter.
            if not taken and str(state).lower() not in _ENDED and tags.items() <= tag_dict(item.get("Tags")).items():
                return {single: item} if single else item
        return None

    def _settling(self, error: Any) -> bool:
        code, message = _code(error), _message(error).lower()
        if code in _CONFLICTS or (code.startswith("Invalid") and code.endswith(_SETTLING)):
            return True
        if code in _ROLE_CODES:
            return any(part in message for part in _ROLE_SETTLING)
        if code in _POLICY_CODES:
            return "invalid principal" in message
        if code == "ResourceInUseException":
            return "in progress" in message
        return self._fresh and _unknown(error)

    def _failure(self, operation: str, resource: str, error: Exception) -> PlatformError:
        call = f"{self._service}:{_camel(operation)}"
        what, cure = explain(call, error)
        return PlatformError(f"{call} failed for {resource}: {what}{'. Cure: ' + cure if cure else ''}")


def explain(call: str, error: Exception) -> tuple[str, str]:
    """Return what AWS or its SDK says in the error of a call (``ec2:CreateVpc``), and the cure, if one is known."""
    what = f"{_code(error) or type(error).__name__}: {_message(error)}"
    return what.rstrip(". "), _cure(call, error)


def _camel(operation: str) -> str:
    return "".join(part.title() for part in operation.split("_"))


def _code(error: Exception) -> str:
    return str(error.response["Error"].get("Code", "")) if isinstance(error, ClientError) else ""


def _message(error: Exception) -> str:
    if not isinstance(error, ClientError):
        return " ".join(str(error).split())[:500]
    response: Mapping[str, Any] = error.response
    zones = response.get("validZones")
    return str(error.response["Error"].get("Message", "")) + (f" Zones to be had: {', '.join(zones)}" if zones else "")


def _attempts(error: Exception) -> int:
    """Return how many times the SDK has repeated the call that ended with this error."""
    metadata = error.response.get("ResponseMetadata", {}) if isinstance(error, ClientError) else {}
    return int(metadata.get("RetryAttempts", 0))


def _patience(seconds: float) -> float:
    given = os.environ.get("RAYPLANE_AWS_SETTLE", "")
    return float(given) if given else seconds


def _throttled(code: str) -> bool:
    return any(part in code.lower() for part in _THROTTLED)


def _unknown(error: Exception) -> bool:
    return _code(error) in _UNKNOWN or _code(error).endswith("NotFound")


def _repeated(error: Exception) -> bool:
    code = _code(error)
    return code.endswith(_REPEATED) and (code != "ResourceInUseException" or "exist" in _message(error).lower())


def _answer_lost(error: Exception) -> bool:
    """Return whether the call may have been carried out although it failed."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 and not _throttled(_code(error))
    if isinstance(error, ResponseParserError):
        return True
    # Class names, because the SDK's exceptions of this kind have no common base that means it.
    return type(error).__name__ in ("ReadTimeoutError", "ConnectionClosedError", "HTTPClientError", "ConnectionError")


def _repeat_by_sdk(response: Any = None, caught_exception: Exception | None = None, **_: Any) -> bool | None:
    """Answer the SDK's question whether to repeat a call: False forbids it, None leaves it to the SDK's own rules."""
    if caught_exception is not None:
        return False if _answer_lost(caught_exception) else None
    http, parsed = response
    return False if http.status_code >= 500 and not _throttled(parsed.get("Error", {}).get("Code", "")) else None


def _cure(call: str, error: Exception) -> str:
    code, message = _code(error), _message(error)
    if not code:
        return next((_TROUBLES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _TROUBLES), "")
    cure = _CURES.get(code, "")
    if cure == _PERMISSION:
        named = re.search(r"perform: ([\w-]+:\w+)", message)
        cure = cure.format(permission=named.group(1) if named else _PERMISSIONS.get(call, call))
        if "encoded" in message.lower():
            cure += "; aws sts decode-authorization-message --encoded-message MESSAGE tells which policy denies it"
    if not cure and _throttled(code):
        cure = "AWS limits the rate of these calls: run again later, or with fewer forks"
    if not cure and ("LimitExceeded" in code or "QuotaExceeded" in code):
        cure = "raise this quota of the account (AWS console, Service Quotas), or remove what is unused, then run again"
    if not cure and _answer_lost(error):
        cure = "AWS has trouble of its own: see https://health.aws.amazon.com, then run again; what was made is kept"
    return cure


def cure_of(text: str) -> str:
    """Return what to do about the first known error code that a text of AWS names, or an empty text."""
    known = (_CURES[word] for word in re.findall(r"[A-Z]\w+", text) if word in _CURES)
    return next(known, "").format(permission="that the message names")


def wait_until(what: str, probe: Callable[[], tuple[bool, str]], timeout: float, delay: float = 5) -> None:
    """Call ``probe`` until its first element is true, at most ``timeout`` seconds long, in the end every ``delay``.

    The second element says how things stand; it goes into the ``PlatformError`` raised when time is up. ``probe``
    itself raises ``PlatformError`` where waiting is pointless.
    """
    deadline = _now() + timeout
    pause = min(_FIRST_PAUSE, delay)
    while True:
        done, evidence = probe()
        if done:
            return
        if _now() + pause > deadline:
            raise PlatformError(
                f"{what}: not there after {timeout:g} s, last seen: {evidence}. Run again to go on waiting"
            )
        _sleep(pause)
        pause = min(2 * pause, delay)


def tag_dict(tags: Iterable[Mapping[str, str]] | None) -> dict[str, str]:
    """Return EC2's list of Key and Value as a mapping."""
    return {tag["Key"]: tag["Value"] for tag in tags or ()}


def tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Return a mapping as EC2's list of Key and Value, in the order of the keys."""
    return [{"Key": key, "Value": tags[key]} for key in sorted(tags)]


def sync_tags(changes: Changes, resource: str, have: Mapping[str, str], want: Mapping[str, str]) -> dict[str, str]:
    """Record and return the tags that are missing or have another value.

    Tags nobody asked for stay: load balancer controllers, autoscalers and cost tools put theirs on the same resources.
    """
    lacking = {key: value for key, value in want.items() if have.get(key) != value}
    changes.update(
        resource,
        {f"tag {key}": have.get(key) for key in lacking},
        {f"tag {key}": value for key, value in lacking.items()},
    )
    return lacking


def only_given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries whose value is neither None nor empty; numbers and booleans count as given."""
    return {key: value for key, value in values.items() if value not in (None, "", [], {})}


def run(documentation: str, reconcile: Callable[[Any, Changes], dict[str, Any]], **more: Any) -> None:
    """Be the module of this documentation; ``more`` goes to AnsibleAWSModule."""
    run_with(AnsibleAWSModule(argument_spec=argument_spec(documentation), supports_check_mode=True, **more), reconcile)


def run_with(module: Any, reconcile: Callable[[Any, Changes], dict[str, Any]]) -> None:
    """Run ``reconcile(module, changes)`` and end the module with facts and changes, or with the explained error."""
    # The SDK's own back-off for throttled and broken calls; the user's environment wins.
    os.environ.setdefault("AWS_RETRY_MODE", "standard")
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "8")
    # Seconds. The SDK waits a minute for each of them by default, eight times over.
    limits = {"connect_timeout": 10.0, "read_timeout": float(os.environ.get("RAYPLANE_AWS_READ_TIMEOUT") or 30)}
    module.params["aws_config"] = {**limits, **(module.params.get("aws_config") or {})}
    changes = Changes(module.check_mode)
    try:
        facts = reconcile(module, changes)
    except PlatformError as error:
        module.fail_json(msg=str(error), **changes.result())
    except (ClientError, BotoCoreError, ResponseParserError) as error:
        cure = _cure("", error)
        module.fail_json(msg=f"{module._name}: {error}{'. Cure: ' + cure if cure else ''}", **changes.result())
    for warning in changes.warnings:
        module.warn(warning)
    module.exit_json(**facts, **changes.result())
