"""The deployer's policy and the code agree: what the plugins call is allowed, and what is allowed is called.

That the calls of whole runs are allowed, the fixture `playbook` of tests/aws looks after.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import pytest
from botocore import xform_name
from conftest import PROJECT

from tests.aws.deployer import FOLDER, actions, allowed, statements

#: What no plugin calls, and why the deployer needs it.
NOT_CALLED = {
    "asked by a service in the caller's name": {
        "ec2:CreateNetworkInterface",  # mount targets of EFS
        "ec2:ModifyNetworkInterfaceAttribute",
        "iam:PassRole",
        "kms:CreateGrant",
        "kms:Decrypt",
        "kms:GenerateDataKey",
        "kms:GenerateDataKeyWithoutPlaintext",  # disks of the bastion, and EFS
        "kms:ReEncryptFrom",
        "kms:ReEncryptTo",
        "kms:RetireGrant",
        "logs:CreateLogDelivery",  # flow logs into a bucket
        "logs:DeleteLogDelivery",
    },
    "tags that are given when something is made": {"iam:TagInstanceProfile"},
    "a registry's own protocol, by which images are pushed": {
        "ecr:BatchCheckLayerAvailability",
        "ecr:BatchGetImage",
        "ecr:CompleteLayerUpload",
        "ecr:GetDownloadUrlForLayer",
        "ecr:InitiateLayerUpload",
        "ecr:PutImage",
        "ecr:UploadLayerPart",
    },
}
_PREFIXES = {action.partition(":")[0] for action in allowed()}


def _operations() -> dict[str, list[list[str]]]:
    """Methods of boto3's clients, each with the actions that it needs, by service."""
    session = botocore.session.get_session()
    found: dict[str, list[list[str]]] = {}
    for service in session.get_available_services():
        if actions(service, "")[0].rstrip(":") in _PREFIXES:
            for name in session.get_service_model(service).operation_names:
                found.setdefault(xform_name(name), []).append(actions(service, name))
    return found


def _words(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


OPERATIONS = _operations()
CALLED = {
    word for path in PROJECT.glob("plugins/**/*.py") for word in _words(path) if "_" in word and word in OPERATIONS
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_a_document_fits_into_a_managed_policy(path: Path) -> None:
    document = json.loads(path.read_text())
    # IAM's quota, in which white space does not count; a cluster's name has up to 100 characters.
    assert len(json.dumps(document, separators=(",", ":")).replace("CLUSTER", "c" * 100)) < 6144
    names = [one["Sid"] for one in document["Statement"]]
    assert len(set(names)) == len(names)


def test_what_the_plugins_call_is_allowed() -> None:
    lacking = {word for word in CALLED if not any(allowed() >= set(needed) for needed in OPERATIONS[word])}
    assert not lacking


def test_what_is_allowed_is_called() -> None:
    called = {action for word in CALLED for needed in OPERATIONS[word] for action in needed}
    reasons = {action for group in NOT_CALLED.values() for action in group}
    assert allowed() - called == reasons


def test_what_is_changed_bears_the_clusters_name() -> None:
    """Only what makes new things, or what cannot be named, is allowed on everything."""
    free = {
        action.partition(":")[2]
        for one in statements()
        if one["Resource"] == "*" and "Condition" not in one
        for action in one["Action"]
    }
    changing = {name for name in free if not name.startswith(("Allocate", "Create", "Describe", "Get", "List", "Run"))}
    assert changing == {"DeleteLogDelivery", "DeleteNetworkInterface", "ModifyNetworkInterfaceAttribute"}
