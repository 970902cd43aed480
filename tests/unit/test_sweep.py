"""The look at everything of a cluster: EC2 is asked as its API takes it."""

from __future__ import annotations

from typing import Any

import botocore.session
import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws import sweep as rayplane_sweep
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import OWNER_TAG, Changes
from ansible_collections.rayplane.platform.plugins.module_utils.aws.sweep import Sweep
from aws_fake import FakeClient

EC2 = botocore.session.get_session().get_service_model("ec2")
KINDS = {kind.kind: kind for kind in rayplane_sweep._EC2_KINDS}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_tags_are_filtered_by_where_ec2_documents_it(kind: Any) -> None:
    operation = next(name for name in EC2.operation_names if name.lower() == kind.operation.replace("_", ""))
    documented = "tag-key" in EC2.operation_model(operation).input_shape.members[kind.filters].documentation
    assert kind.by_tag == documented, f"{operation}: {kind.filters}"


def test_prefix_lists_are_told_apart_by_the_tags_they_have() -> None:
    tags = {"pl-ours": "c1", "pl-theirs": "c2"}
    lists = [
        {"PrefixListId": name, "PrefixListName": name, "Tags": [{"Key": OWNER_TAG, "Value": owner}]}
        for name, owner in tags.items()
    ]
    client = FakeClient(
        "ec2",
        describe_managed_prefix_lists=lambda: {
            # AWS's own lists of services have no tags.
            "PrefixLists": [*lists, {"PrefixListId": "pl-aws", "PrefixListName": "com.amazonaws.s3", "OwnerId": "AWS"}]
        },
    )
    sweep = Sweep("c1", lambda service: client, Changes(True))
    assert [item.id for item in sweep.ec2(only=["prefix list"])] == ["pl-ours"]
