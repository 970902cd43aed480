# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""What the AWS modules share: recorded changes, explained errors, bounded waits, tags.

A module here reconciles a whole set in one call. It reads what is there, compares property by property, and either
changes what differs
or, in check mode, only says what it would change. ``Changes`` is that record; everything a person sees comes from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

try:
    from botocore.exceptions import BotoCoreError, ClientError
except ImportError:  # AnsibleAWSModule reports the missing SDK before anything here is used
    BotoCoreError = ClientError = OSError  # type: ignore[misc,assignment]

__all__ = [
    "OWNER_TAG",
    "ROLE_TAG",
    "Api",
    "Changes",
    "PlatformError",
    "only_given",
    "run",
    "sync_tags",
    "tag_dict",
    "tag_list",
    "wait_until",
]

#: On every resource the modules create: whose it is. Its value is the cluster's name.
OWNER_TAG = "rayplane.io/cluster"
#: On network resources: which part of the network it is, such as ``private-us-west-2a``.
ROLE_TAG = "rayplane.io/role"

# Error code -> what to do about it. Codes are those of the EC2 and EKS API references, "Common errors".
_CURES = {
    "AccessDenied": "give the deploying principal this permission",
    "AccessDeniedException": "give the deploying principal this permission",
    "UnauthorizedOperation": "give the deploying principal this permission",
    "AuthFailure": "check AWS_PROFILE or the access key: AWS does not accept these credentials",
    "InvalidClientTokenId": "check AWS_PROFILE or the access key: AWS does not know these credentials",
    "UnrecognizedClientException": "check AWS_PROFILE or the access key: AWS does not know these credentials",
    "ExpiredToken": "the session has ended: log in again",
    "ExpiredTokenException": "the session has ended: log in again",
    "AddressLimitExceeded": "raise the quota for Elastic IP addresses, release unused ones, or set network_nat_mode"
    " to single",
    "VpcLimitExceeded": "raise the quota for VPCs of this region, or remove an unused VPC",
    "NatGatewayLimitExceeded": "raise the quota for NAT gateways a zone, or set network_nat_mode to single",
    "ResourceLimitExceededException": "raise the quota for this kind of resource in the account, then run again",
    "UnsupportedAvailabilityZoneException": "take the zones that the message offers into network_availability_zones",
    "InvalidSubnet.Conflict": "another subnet of the VPC holds these addresses: remove it or give other CIDRs",
    "DependencyViolation": "something still uses it: delete the Kubernetes services of type LoadBalancer and the"
    " volumes first, then run again",
    "ResourceInUseException": "something still uses it: wait for it to finish or remove it, then run again",
    "ClusterUnreachableException": "the cluster's API server does not answer AWS: see its health in the EKS console,"
    " then run again",
}

# What AWS answers while a resource made a moment ago has not reached all of its servers.
_SETTLING = ("NotFound", "Malformed")
_BUSY = ("DependencyViolation", "ResourceInUseException")
_ROLE_SETTLING = (
    "could not be assumed",
    "is not authorized to assume",
    "does not exist",
    "invalid iamrole",
    "invalid role",
)

# Names of our own so that tests replace them and not the clock of the whole process.
_sleep = time.sleep
_now = time.monotonic


class PlatformError(Exception):
    """Something a person has to know or do; the message says what, where and how."""


class Changes:
    """The record of what was, or in check mode would be, changed."""

    def __init__(self, check_mode: bool) -> None:
        self.check_mode = check_mode
        self.actions: list[str] = []
        self.warnings: list[str] = []
        self._diff: list[dict[str, Any]] = []

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

    def result(self) -> dict[str, Any]:
        """Return what every module returns: ``changed``, ``actions`` in order, and ``diff`` by property."""
        return {"changed": bool(self.actions), "actions": self.actions, "diff": self._diff}

    def _note(self, action: str, resource: str, before: dict[str, Any], after: dict[str, Any]) -> None:
        self.actions.append(action)
        self._diff.append({"before_header": resource, "after_header": resource, "before": before, "after": after})


class Api:
    """One AWS service. A failing call becomes a ``PlatformError`` that names call, resource, reason and cure."""

    def __init__(self, client: Any, changes: Changes) -> None:
        self._client = client
        self._changes = changes
        self._service = str(client.meta.service_model.service_name)

    def read(self, operation: str, resource: str, absent: Sequence[str] = (), **arguments: Any) -> Any:
        """Call a reading operation; return None where the answer is one of the ``absent`` error codes."""
        try:
            return getattr(self._client, operation)(**arguments)
        except ClientError as error:
            if _code(error) in absent:
                return None
            raise self._failure(operation, resource, error) from error
        except BotoCoreError as error:
            raise self._failure(operation, resource, error) from error

    def pages(self, operation: str, key: str, resource: str, **arguments: Any) -> list[Any]:
        """Return the items under ``key`` of all pages of a listing operation."""
        items: list[Any] = []
        try:
            for page in self._client.get_paginator(operation).paginate(**arguments):
                items += page[key]
        except (ClientError, BotoCoreError) as error:
            raise self._failure(operation, resource, error) from error
        return items

    def write(self, operation: str, resource: str, settle: float = 30, busy: float = 0, **arguments: Any) -> Any:
        """Call a changing operation; in check mode do nothing and return None.

        AWS is eventually consistent: an id or a role created a moment ago may be unknown to the next call. Such answers
        are retried for
        ``settle`` seconds; answers that something else still uses the resource for ``busy`` seconds.
        """
        if self._changes.check_mode:
            return None
        start = _now()
        while True:
            try:
                return getattr(self._client, operation)(**arguments)
            except ClientError as error:
                patience = settle if _settling(error) else busy if _code(error) in _BUSY else 0
                if _now() - start >= patience:
                    raise self._failure(operation, resource, error) from error
                _sleep(2)
            except BotoCoreError as error:
                raise self._failure(operation, resource, error) from error

    def _failure(self, operation: str, resource: str, error: Exception) -> PlatformError:
        call = f"{self._service}:{''.join(part.title() for part in operation.split('_'))}"
        code = _code(error)
        reason = error.response["Error"].get("Message", "") if isinstance(error, ClientError) else str(error)
        cure = _CURES.get(code)
        if cure is None and "throttl" in code.lower():
            cure = "AWS limits the rate of these calls: run again later, or with fewer forks"
        return PlatformError(
            f"{call} failed for {resource}: {code + ': ' if code else ''}{reason}{'. Cure: ' + cure if cure else ''}"
        )


def _code(error: Exception) -> str:
    return str(error.response["Error"].get("Code", "")) if isinstance(error, ClientError) else ""


def _settling(error: Any) -> bool:
    code, message = _code(error), str(error.response["Error"].get("Message", "")).lower()
    if code.startswith("Invalid") and code.endswith(_SETTLING):
        return True
    return code == "InvalidParameterException" and any(part in message for part in _ROLE_SETTLING)


def wait_until(what: str, probe: Callable[[], tuple[bool, str]], timeout: float, delay: float = 5) -> None:
    """Call ``probe`` until its first element is true, at most ``timeout`` seconds long.

    The second element says how things stand; it goes into the ``PlatformError`` raised when time is up. ``probe``
    itself raises ``PlatformError`` where waiting is pointless.
    """
    deadline = _now() + timeout
    while True:
        done, evidence = probe()
        if done:
            return
        if _now() + delay > deadline:
            raise PlatformError(
                f"{what}: not there after {timeout:g} s, last seen: {evidence}. Run again to go on waiting"
            )
        _sleep(delay)


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


def run(module: Any, reconcile: Callable[[Any, Changes], dict[str, Any]]) -> None:
    """Run ``reconcile(module, changes)`` and end the module with facts and changes, or with the explained error."""
    # The SDK's own back-off for throttled and broken calls; the user's environment wins.
    os.environ.setdefault("AWS_RETRY_MODE", "standard")
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "8")
    changes = Changes(module.check_mode)
    try:
        facts = reconcile(module, changes)
    except PlatformError as error:
        module.fail_json(msg=str(error), **changes.result())
    except (ClientError, BotoCoreError) as error:
        module.fail_json(msg=f"{module._name}: {error}", **changes.result())
    for warning in changes.warnings:
        module.warn(warning)
    module.exit_json(**facts, **changes.result())
