#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: IAM's trust in the service account tokens of an EKS cluster."""

from __future__ import annotations

DOCUMENTATION = r"""
module: eks_oidc_provider
short_description: Keep the IAM OIDC provider of an EKS cluster
description:
  - Registers the issuer of a cluster's service account tokens with IAM, so that roles can trust service accounts
    (IRSA).
  - No thumbprint is given. IAM verifies EKS's issuers by its own library of certificate authorities.
  - IAM has no regions, clusters do. The tag C(rayplane.io/region) tells the provider from that of a cluster of the same
    name elsewhere. One without that tag, made by an earlier version, gets it.
options:
  cluster_name:
    description: Name of the cluster.
    type: str
    required: true
  state:
    description: >-
      Whether the provider exists. C(absent) finds it by its tags where the cluster is gone already.
    type: str
    choices: [present, absent]
    default: present
  tags:
    description: Tags of the provider.
    type: dict
    default: {}
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Let roles trust service accounts of the cluster
  rayplane.platform.eks_oidc_provider:
    cluster_name: ray-llm-cluster
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
arn:
  description: ARN of the provider; a description in angle brackets where check mode predicts a new one.
  returned: state is present
  type: str
issuer:
  description: Issuer of the tokens, without its scheme.
  returned: state is present
  type: str
"""

from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    REGION_TAG,
    Api,
    Changes,
    PlatformError,
    run,
    sync_tags,
    tag_dict,
    tag_list,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.eks import concurrently, require_cluster

# The audience of tokens meant for AWS.
AUDIENCE = "sts.amazonaws.com"
ABSENT = ("NoSuchEntity",)


class Provider:
    """The OIDC provider of one cluster."""

    def __init__(self, params: dict[str, Any], region: str, eks: Api, iam: Api, changes: Changes) -> None:
        self.region = region
        self.eks = eks
        self.iam = iam
        self.changes = changes
        self.cluster_name: str = params["cluster_name"]
        self.resource = f"OIDC provider of cluster {self.cluster_name}"
        given = {str(key): str(value) for key, value in params["tags"].items()}
        self.tags = given | {OWNER_TAG: self.cluster_name, REGION_TAG: region}

    def present(self) -> dict[str, Any]:
        """Register the issuer, or repair its registration; return its ARN and name."""
        cluster = require_cluster(self.eks, self.changes, self.cluster_name)
        url = str((cluster or {}).get("identity", {}).get("oidc", {}).get("issuer", ""))
        if not url:
            if cluster is not None:
                raise PlatformError(f"cluster {self.cluster_name} has no OIDC issuer yet: run again in a minute")
            self.changes.create(self.resource, {"audience": AUDIENCE, "tags": self.tags})
            return {"arn": f"<new {self.resource}>", "issuer": f"<issuer of {self.cluster_name}>"}
        issuer = url.split("://", 1)[1].rstrip("/")
        arn = next((one for one in self._arns() if one.split(":oidc-provider/", 1)[1] == issuer), "")
        if not arn:
            self.changes.create(self.resource, {"url": url, "audience": AUDIENCE, "tags": self.tags})
            answer = self.iam.write(
                "create_open_id_connect_provider",
                self.resource,
                Url=url,
                ClientIDList=[AUDIENCE],
                Tags=tag_list(self.tags),
            )
            arn = str(answer["OpenIDConnectProviderArn"]) if answer else f"<new {self.resource}>"
        else:
            self._repair(arn, self._read(arn) or {})
        return {"arn": arn, "issuer": issuer}

    def absent(self) -> dict[str, Any]:
        """Delete what was registered for the cluster, found by its tags."""
        arns = self._arns()
        for arn, provider in zip(arns, concurrently(self._read, arns), strict=True):
            tags = tag_dict((provider or {}).get("Tags"))
            if tags.get(OWNER_TAG) != self.cluster_name:
                continue
            region = tags.get(REGION_TAG, self.region)
            if region != self.region:
                self.changes.warnings.append(
                    f"{self.resource} in {region} (tag {REGION_TAG} of {arn}) is left alone, because this run is for"
                    f" {self.region}; to delete it set platform_region to {region}"
                )
                continue
            self.changes.delete(self.resource, {"arn": arn})
            self.iam.write("delete_open_id_connect_provider", self.resource, OpenIDConnectProviderArn=arn)
        return {}

    def _repair(self, arn: str, now: dict[str, Any]) -> None:
        have = sorted(now.get("ClientIDList", []))
        want = sorted({*have, AUDIENCE})
        if self.changes.update(self.resource, {"audiences": have}, {"audiences": want}):
            self.iam.write(
                "add_client_id_to_open_id_connect_provider",
                self.resource,
                OpenIDConnectProviderArn=arn,
                ClientID=AUDIENCE,
            )
        lacking = sync_tags(self.changes, self.resource, tag_dict(now.get("Tags")), self.tags)
        if lacking:
            self.iam.write(
                "tag_open_id_connect_provider", self.resource, OpenIDConnectProviderArn=arn, Tags=tag_list(lacking)
            )

    def _arns(self) -> list[str]:
        answer = self.iam.read("list_open_id_connect_providers", self.resource)
        return [str(one["Arn"]) for one in answer["OpenIDConnectProviderList"]]

    def _read(self, arn: str) -> dict[str, Any] | None:
        answer = self.iam.read(
            "get_open_id_connect_provider", self.resource, absent=ABSENT, OpenIDConnectProviderArn=arn
        )
        found: dict[str, Any] | None = answer
        return found


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    eks, iam = (Api(module.client(service), changes) for service in ("eks", "iam"))
    provider = Provider(module.params, module.region, eks, iam, changes)
    return provider.present() if module.params["state"] == "present" else provider.absent()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
