#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the image repositories of one cluster in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ecr_repositories
short_description: Reconcile the image repositories of one cluster as one set
description:
  - Keeps repositories of Amazon ECR with scan on push, immutable tags, lifecycle policy, encryption and tags as
    described. (M(community.aws.ecs_ecr) knows no tags.)
  - A repository without the cluster's tag stops the call before anything is changed.
  - Encryption is fixed for a repository's life; where it differs there is a warning.
options:
  cluster_name:
    description: Owner of the repositories; the value of the tag C(rayplane.io/cluster).
    type: str
    required: true
  repositories:
    description: Names of the repositories.
    type: list
    elements: str
    required: true
  state:
    description: Whether the repositories exist. Those that go take their images with them.
    type: str
    choices: [present, absent]
    default: present
  scan_on_push:
    description: Whether each image is scanned for known vulnerabilities when it is pushed.
    type: bool
    default: true
  untagged_days:
    description: Days after which an image without a tag is deleted.
    type: int
    default: 7
  keep_images:
    description: Newest images that are kept; those before them are deleted.
    type: int
    default: 50
  kms_key:
    description: ARN of the KMS key of a new repository; empty takes AWS's own encryption.
    type: str
    default: ""
  tags:
    description: Tags of every repository.
    type: dict
    default: {}
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the repositories
  rayplane.platform.ecr_repositories:
    cluster_name: ray-llm-cluster
    repositories: [ray-llm-cluster/gateway]
"""

RETURN = r"""
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
"""

import json
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import (
    OWNER_TAG,
    Api,
    Changes,
    PlatformError,
    run,
    sync_tags,
    tag_dict,
    tag_list,
)

NO_REPOSITORY = ("RepositoryNotFoundException",)
NO_POLICY = ("LifecyclePolicyNotFoundException", *NO_REPOSITORY)

Json = dict[str, Any]


class Repositories:
    """The repositories of one cluster: what is there, what is wanted, and the calls between the two."""

    def __init__(self, params: Json, ecr: Api, changes: Changes) -> None:
        self.params = params
        self.ecr = ecr
        self.changes = changes
        self.owner: str = params["cluster_name"]
        self.tags = {str(key): str(value) for key, value in params["tags"].items()} | {OWNER_TAG: self.owner}

    def present(self) -> Json:
        """Bring the repositories to their description."""
        found = {name: self._find(name) for name in self.params["repositories"]}
        foreign = [name for name, one in found.items() if one and one["tags"].get(OWNER_TAG) != self.owner]
        if foreign:
            raise PlatformError(
                f"without the tag {OWNER_TAG}={self.owner}: repository {', '.join(foreign)}. Nothing was changed. Cure:"
                " choose another images_repository_prefix, or give it the tag if it is this cluster's"
            )
        for name, one in found.items():
            if one is None:
                self._create(name)
            else:
                self._repair(name, one)
        return {}

    def absent(self) -> Json:
        """Delete those that bear the cluster's tag, with their images."""
        for name in self.params["repositories"]:
            found = self._find(name)
            if found and found["tags"].get(OWNER_TAG) == self.owner:
                self.changes.delete(f"repository {name}", {"arn": found["repositoryArn"]})
                self.ecr.write("delete_repository", f"repository {name}", repositoryName=name, force=True)
        return {}

    def _find(self, name: str) -> Json | None:
        resource = f"repository {name}"
        answer = self.ecr.read("describe_repositories", resource, absent=NO_REPOSITORY, repositoryNames=[name])
        if not answer:
            return None
        one = answer["repositories"][0]
        tags = self.ecr.read("list_tags_for_resource", resource, resourceArn=one["repositoryArn"])
        return {**one, "tags": tag_dict(tags["tags"])}

    def _policy(self) -> Json:
        """Return the lifecycle policy (ECR user guide, "Lifecycle policy parameters")."""
        days, count = self.params["untagged_days"], self.params["keep_images"]
        rules: list[tuple[str, Json]] = [
            (
                f"Images without a tag go after {days} days",
                {"tagStatus": "untagged", "countType": "sinceImagePushed", "countUnit": "days", "countNumber": days},
            ),
            (
                f"The newest {count} images stay",
                {"tagStatus": "any", "countType": "imageCountMoreThan", "countNumber": count},
            ),
        ]
        return {
            "rules": [
                {"rulePriority": number, "description": text, "selection": selection, "action": {"type": "expire"}}
                for number, (text, selection) in enumerate(rules, 1)
            ]
        }

    def _settings(self) -> Json:
        return {"tag mutability": "IMMUTABLE", "scan on push": self.params["scan_on_push"]}

    def _encryption(self) -> Json:
        key = self.params["kms_key"]
        return {"encryptionType": "KMS", "kmsKey": key} if key else {"encryptionType": "AES256"}

    def _create(self, name: str) -> None:
        resource = f"repository {name}"
        settings, policy = self._settings(), self._policy()
        self.changes.create(
            resource, {**settings, "encryption": self._encryption(), "lifecycle policy": policy, "tags": self.tags}
        )
        # Another run may have made it since: the next one sees to what it is like.
        self.ecr.write(
            "create_repository",
            resource,
            done=("RepositoryAlreadyExistsException",),
            repositoryName=name,
            tags=tag_list(self.tags),
            imageTagMutability=settings["tag mutability"],
            imageScanningConfiguration={"scanOnPush": settings["scan on push"]},
            encryptionConfiguration=self._encryption(),
        )
        self._put_policy(name, policy)

    def _repair(self, name: str, one: Json) -> None:
        resource = f"repository {name}"
        wanted = self._settings()
        if self.changes.update(
            resource,
            {"tag mutability": one["imageTagMutability"]},
            {"tag mutability": wanted["tag mutability"]},
        ):
            self.ecr.write(
                "put_image_tag_mutability", resource, repositoryName=name, imageTagMutability=wanted["tag mutability"]
            )
        scan = one.get("imageScanningConfiguration", {}).get("scanOnPush", False)
        if self.changes.update(resource, {"scan on push": scan}, {"scan on push": wanted["scan on push"]}):
            self.ecr.write(
                "put_image_scanning_configuration",
                resource,
                repositoryName=name,
                imageScanningConfiguration={"scanOnPush": wanted["scan on push"]},
            )
        answer = self.ecr.read("get_lifecycle_policy", resource, absent=NO_POLICY, repositoryName=name)
        have, policy = json.loads(answer["lifecyclePolicyText"]) if answer else None, self._policy()
        if self.changes.update(resource, {"lifecycle policy": have}, {"lifecycle policy": policy}):
            self._put_policy(name, policy)
        if lacking := sync_tags(self.changes, resource, one["tags"], self.tags):
            self.ecr.write("tag_resource", resource, resourceArn=one["repositoryArn"], tags=tag_list(lacking))
        encryption = one.get("encryptionConfiguration", {"encryptionType": "AES256"})
        if encryption != self._encryption():
            self.changes.warnings.append(
                f"{resource} stays encrypted with {encryption.get('kmsKey') or encryption['encryptionType']}: ECR fixes"
                " that when a repository is made. To change it, delete the repository and deploy again"
            )

    def _put_policy(self, name: str, policy: Json) -> None:
        self.ecr.write(
            "put_lifecycle_policy", f"repository {name}", repositoryName=name, lifecyclePolicyText=json.dumps(policy)
        )


def reconcile(module: Any, changes: Changes) -> Json:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    repositories = Repositories(module.params, Api(module.client("ecr"), changes), changes)
    return repositories.present() if module.params["state"] == "present" else repositories.absent()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
