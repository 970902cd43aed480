#!/usr/bin/python
# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: the queue of one cluster that AWS's warnings about instances go to."""

from __future__ import annotations

DOCUMENTATION = r"""
module: aws_interruption_queue
short_description: Reconcile the interruption queue of one cluster and the rules that fill it
description:
  - Keeps an SQS queue and the EventBridge rules that send it spot interruption warnings, rebalance recommendations,
    state changes of instances, AWS Health events and warnings about capacity reservations, in one call.
  - Karpenter reads the queue and drains a node before AWS takes it.
  - The queue takes messages from these rules only, over TLS only.
  - A queue or rule that bears another cluster's tag stops the call before anything is changed.
options:
  cluster_name:
    description: >-
      Owner of queue and rules; the value of the tag C(rayplane.io/cluster). Rules are named
      C(<cluster>-interruption-<event>).
    type: str
    required: true
  queue_name:
    description: Name of the queue; empty takes the cluster's name.
    type: str
    default: ""
  state:
    description: Whether queue and rules exist.
    type: str
    choices: [present, absent]
    default: present
  optional:
    description: >-
      With O(state=absent), whether the queue is one that the cluster perhaps never had. Then a queue of its name
      without the tag is somebody else's and not told of, and credentials that may not look for it find nothing.
    type: bool
    default: false
  events:
    description: What the queue is told about.
    type: list
    elements: str
    choices: [spot, rebalance, state, health, reservation]
    default: [spot, rebalance, state, health, reservation]
  retention_s:
    description: Seconds that a message is kept; a warning is of no use after the two minutes that it announces.
    type: int
    default: 300
  kms_key_id:
    description: >-
      KMS key that encrypts messages; its policy has to let events.amazonaws.com use it. Empty takes keys of SQS.
    type: str
    default: ""
  tags:
    description: Tags of queue and rules.
    type: dict
    default: {}
  purge:
    description: Whether this cluster's rules and their targets that are no longer wanted are removed.
    type: bool
    default: true
extends_documentation_fragment: [amazon.aws.common.modules, amazon.aws.region.modules, amazon.aws.boto3]
author: rayplane contributors (@rayplane)
"""

EXAMPLES = r"""
- name: Keep the interruption queue
  rayplane.platform.aws_interruption_queue:
    cluster_name: ray-llm-cluster
"""

RETURN = r"""
queue:
  description: Name of the queue.
  returned: always
  type: str
queue_arn:
  description: ARN of the queue; in check mode before the first run a name in angle brackets.
  returned: state is present
  type: str
actions:
  description: What was (in check mode would be) done, in order, each with resource and property.
  returned: always
  type: list
  elements: str
"""

import json
from concurrent.futures import ThreadPoolExecutor
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
    wait_until,
)
from ansible_collections.rayplane.platform.plugins.module_utils.aws.policy import VERSION, by_statement, canonical

# Source and detail type of each event that Karpenter understands (its pkg/controllers/interruption/messages).
EVENTS = {
    "spot": ("aws.ec2", "EC2 Spot Instance Interruption Warning"),
    "rebalance": ("aws.ec2", "EC2 Instance Rebalance Recommendation"),
    "state": ("aws.ec2", "EC2 Instance State-change Notification"),
    "health": ("aws.health", "AWS Health Event"),
    "reservation": ("aws.ec2", "EC2 Capacity Reservation Instance Interruption Warning"),
}
TARGET_ID = "KarpenterInterruptionQueueTarget"
LONGEST_RULE_NAME = 64  # EventBridge's quota
NO_QUEUE = ("AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist")
NO_RULE = ("ResourceNotFoundException",)
DENIED = ("AccessDenied", "AccessDeniedException")
# SQS refuses the name of a queue for 60 s after its deletion.
NAME_FREE_AFTER_S = 90


class InterruptionQueue:
    """Queue and rules of one cluster: what is there, what is wanted, and the calls between the two."""

    def __init__(self, params: dict[str, Any], sqs: Api, events: Api, changes: Changes) -> None:
        self.params = params
        self.sqs = sqs
        self.events = events
        self.changes = changes
        self.owner: str = params["cluster_name"]
        self.queue: str = params["queue_name"] or self.owner
        self.prefix = f"{self.owner}-interruption-"
        self.tags = {str(key): str(value) for key, value in params["tags"].items()} | {OWNER_TAG: self.owner}

    def present(self) -> dict[str, Any]:
        """Bring queue and rules to their description."""
        self._refuse_long_names()
        url, attributes, queue_tags = self._observe_queue()
        rules = self._observe_rules()
        self._refuse_foreign(queue_tags, rules)
        arn = self._queue_present(url, attributes, queue_tags)
        for event in self.params["events"]:
            self._rule_present(event, rules.get(self.prefix + event), arn)
        if self.params["purge"]:
            for name, rule in rules.items():
                if name.removeprefix(self.prefix) not in self.params["events"] and self._owned(rule["tags"]):
                    self._rule_absent(name, rule)
        return {"queue": self.queue, "queue_arn": arn}

    def absent(self) -> dict[str, Any]:
        """Delete rules and queue that bear the cluster's tag."""
        optional = self.params["optional"]
        try:
            url, attributes, queue_tags = self._observe_queue()
            rules = self._observe_rules()
        except PlatformError as error:
            if optional and getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") in DENIED:
                return {"queue": self.queue}
            raise
        # First the rules, so that none of them sends to a queue that is gone.
        kept = [f"rule {name}" for name, rule in rules.items() if not self._owned(rule["tags"])]
        for name, rule in rules.items():
            if self._owned(rule["tags"]):
                self._rule_absent(name, rule)
        resource = f"queue {self.queue}"
        if url and self._owned(queue_tags):
            self.changes.delete(resource, {"arn": attributes["QueueArn"]})
            self.sqs.write("delete_queue", resource, QueueUrl=url)
        elif url:
            kept.append(resource)
        if kept and not optional:
            self.changes.warnings.append(
                f"kept, because they do not bear the tag {OWNER_TAG}={self.owner}: {', '.join(kept)};"
                " delete them by hand if they are this cluster's"
            )
        return {"queue": self.queue}

    # --- what is there -----------------------------------------------------------------------------------------------

    def _observe_queue(self) -> tuple[str, dict[str, str], dict[str, str]]:
        """Return address, attributes and tags of the queue; empty where there is none."""
        resource = f"queue {self.queue}"
        answer = self.sqs.read("get_queue_url", resource, absent=NO_QUEUE, QueueName=self.queue)
        if not answer:
            return "", {}, {}
        url = answer["QueueUrl"]
        # A queue that is being deleted is still listed for a moment.
        found = self.sqs.read("get_queue_attributes", resource, absent=NO_QUEUE, QueueUrl=url, AttributeNames=["All"])
        if not found:
            return "", {}, {}
        tags = self.sqs.read("list_queue_tags", resource, absent=NO_QUEUE, QueueUrl=url) or {}
        return url, found["Attributes"], tags.get("Tags", {})

    def _observe_rules(self) -> dict[str, dict[str, Any]]:
        """Return this cluster's rules by name, each with its targets and tags."""
        listed = self.events.pages("list_rules", "Rules", f"rules {self.prefix}*", NamePrefix=self.prefix)

        def details(rule: dict[str, Any]) -> tuple[str, dict[str, Any]]:
            resource = f"rule {rule['Name']}"
            tags = self.events.read("list_tags_for_resource", resource, absent=NO_RULE, ResourceARN=rule["Arn"]) or {}
            targets = self.events.read("list_targets_by_rule", resource, absent=NO_RULE, Rule=rule["Name"]) or {}
            return rule["Name"], {
                **rule,
                "tags": tag_dict(tags.get("Tags")),
                "targets": {target["Id"]: target for target in targets.get("Targets", [])},
            }

        with ThreadPoolExecutor(max_workers=5) as pool:
            return dict(pool.map(details, sorted(listed, key=lambda rule: str(rule["Name"]))))

    # --- what must fail, fails first ---------------------------------------------------------------------------------

    def _refuse_long_names(self) -> None:
        longest = max((len(self.prefix + event) for event in self.params["events"]), default=0)
        if longest > LONGEST_RULE_NAME:
            room = LONGEST_RULE_NAME - (longest - len(self.owner))
            raise PlatformError(
                f"platform_cluster_name is {self.owner!r} ({len(self.owner)} characters): EventBridge takes names of"
                f" {LONGEST_RULE_NAME}, which leaves {room} for the cluster's; choose a shorter one"
            )

    def _refuse_foreign(self, queue_tags: dict[str, str], rules: dict[str, dict[str, Any]]) -> None:
        owners = {f"queue {self.queue}": queue_tags.get(OWNER_TAG, self.owner)}
        owners |= {
            f"rule {self.prefix}{event}": rules[self.prefix + event]["tags"].get(OWNER_TAG, self.owner)
            for event in self.params["events"]
            if self.prefix + event in rules
        }
        foreign = [f"{resource} ({owner})" for resource, owner in owners.items() if owner != self.owner]
        if foreign:
            raise PlatformError(
                f"belong to another cluster by their tag {OWNER_TAG}: {', '.join(foreign)}. Nothing was changed."
                " Choose another platform_cluster_name"
            )

    def _owned(self, tags: dict[str, str]) -> bool:
        return tags.get(OWNER_TAG) == self.owner

    # --- queue -------------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, str]:
        key = self.params["kms_key_id"]
        encryption = {"KmsMasterKeyId": key} if key else {"SqsManagedSseEnabled": "true"}
        return {"MessageRetentionPeriod": str(self.params["retention_s"]), **encryption}

    def _policy(self, queue_arn: str) -> dict[str, Any]:
        """Who may send: this cluster's rules, and nobody without TLS."""
        _, partition, _, region, account, _ = (queue_arn.split(":") + [""] * 6)[:6]
        return {
            "Version": VERSION,
            "Id": "EC2InterruptionPolicy",
            "Statement": [
                {
                    "Sid": "EventsOfThisCluster",
                    "Effect": "Allow",
                    "Principal": {"Service": ["events.amazonaws.com", "sqs.amazonaws.com"]},
                    "Action": "sqs:SendMessage",
                    "Resource": queue_arn,
                    "Condition": {
                        "ArnLike": {"aws:SourceArn": f"arn:{partition}:events:{region}:{account}:rule/{self.prefix}*"}
                    },
                },
                {
                    "Sid": "TlsOnly",
                    "Effect": "Deny",
                    "Principal": "*",
                    "Action": "sqs:*",
                    "Resource": queue_arn,
                    "Condition": {"Bool": {"aws:SecureTransport": "false"}},
                },
            ],
        }

    def _queue_present(self, url: str, attributes: dict[str, str], tags: dict[str, str]) -> str:
        resource = f"queue {self.queue}"
        settings = self._settings()
        if not url:
            self.changes.create(resource, {**settings, "tags": self.tags})
            url = self._create(resource, settings)
            if not url:
                return f"<new queue {self.queue}>"
            found = self.sqs.read("get_queue_attributes", resource, QueueUrl=url, AttributeNames=["All"])
            attributes = found["Attributes"]
            # The policy names the queue's ARN, which a new queue has only now; a run cut short here is repaired.
            self._set(resource, url, {"Policy": json.dumps(self._policy(attributes["QueueArn"]))})
            return attributes["QueueArn"]
        arn = attributes["QueueArn"]
        policy = self._policy(arn)
        have: dict[str, Any] = {key: attributes.get(key) for key in settings}
        want: dict[str, Any] = dict(settings)
        if self.params["kms_key_id"] == "" and attributes.get("KmsMasterKeyId"):
            have["KmsMasterKeyId"], want["KmsMasterKeyId"] = attributes["KmsMasterKeyId"], ""
        statements = by_statement(json.loads(attributes["Policy"]) if attributes.get("Policy") else None)
        wanted = by_statement(policy)
        # Property by property, a policy's being its statements; one that nobody declared has to go, too.
        have |= {f"policy {sid}": statements.get(sid) for sid in [*wanted, *statements]}
        want |= {f"policy {sid}": wanted.get(sid, "absent") for sid in [*wanted, *statements]}
        if self.changes.update(resource, have, want):
            differing = {key: value for key, value in want.items() if have[key] != value}
            attributes = {key: value for key, value in differing.items() if not key.startswith("policy ")}
            if attributes != differing:
                attributes["Policy"] = json.dumps(policy)
            self._set(resource, url, attributes)
        if lacking := sync_tags(self.changes, resource, tags, self.tags):
            self.sqs.write("tag_queue", resource, QueueUrl=url, Tags=lacking)
        return arn

    def _set(self, resource: str, url: str, attributes: dict[str, str]) -> None:
        self.sqs.write("set_queue_attributes", resource, QueueUrl=url, Attributes=attributes)

    def _create(self, resource: str, settings: dict[str, str]) -> str:
        """Create the queue, waiting for its name where a queue of that name has just been deleted."""
        made: dict[str, str] = {}

        def attempt() -> tuple[bool, str]:
            try:
                answer = self.sqs.write(
                    "create_queue", resource, QueueName=self.queue, Attributes=settings, tags=self.tags
                )
            except PlatformError as error:
                if "QueueDeletedRecently" in str(error):
                    return False, "SQS holds the name for a minute after the last queue of this name was deleted"
                raise
            made["url"] = answer["QueueUrl"] if answer else ""
            return True, ""

        wait_until(resource, attempt, NAME_FREE_AFTER_S)
        return made["url"]

    # --- rules -------------------------------------------------------------------------------------------------------

    def _rule_present(self, event: str, now: dict[str, Any] | None, queue_arn: str) -> None:
        name = self.prefix + event
        resource = f"rule {name}"
        source, detail_type = EVENTS[event]
        pattern = {"source": [source], "detail-type": [detail_type]}
        wanted: dict[str, Any] = {
            "description": f"{detail_type} for the autoscaler of {self.owner}",
            "pattern": pattern,
            "state": "ENABLED",
        }
        target = {"Id": TARGET_ID, "Arn": queue_arn}
        if now is None:
            self.changes.create(resource, {**wanted, "target": queue_arn, "tags": self.tags})
            self._put_rule(resource, name, wanted, Tags=tag_list(self.tags))
            self._put_target(resource, name, target)
            return
        have = {
            "description": now.get("Description"),
            "pattern": json.loads(now["EventPattern"]) if now.get("EventPattern") else None,
            "state": now.get("State"),
        }
        if canonical(have["pattern"]) == canonical(pattern):
            have["pattern"] = pattern
        if self.changes.update(resource, have, wanted):
            self._put_rule(resource, name, wanted)
        targets = now["targets"]
        if self.changes.update(resource, {"target": targets.get(TARGET_ID, {}).get("Arn")}, {"target": queue_arn}):
            self._put_target(resource, name, target)
        strays = [one for one in targets if one != TARGET_ID] if self.params["purge"] else []
        if strays:
            self.changes.update(
                resource,
                {f"target {one}": targets[one]["Arn"] for one in strays},
                dict.fromkeys((f"target {one}" for one in strays), "absent"),
            )
            self._remove_targets(resource, name, strays)
        if lacking := sync_tags(self.changes, resource, now["tags"], self.tags):
            self.events.write("tag_resource", resource, ResourceARN=now["Arn"], Tags=tag_list(lacking))

    def _rule_absent(self, name: str, rule: dict[str, Any]) -> None:
        resource = f"rule {name}"
        self.changes.delete(resource, {"pattern": rule.get("EventPattern")})
        if rule["targets"]:
            self._remove_targets(resource, name, list(rule["targets"]))
        self.events.write("delete_rule", resource, Name=name)

    def _put_rule(self, resource: str, name: str, wanted: dict[str, Any], **more: Any) -> None:
        self.events.write(
            "put_rule",
            resource,
            Name=name,
            Description=wanted["description"],
            EventPattern=json.dumps(wanted["pattern"]),
            State=wanted["state"],
            **more,
        )

    def _put_target(self, resource: str, name: str, target: dict[str, str]) -> None:
        self._succeed(resource, self.events.write("put_targets", resource, Rule=name, Targets=[target]))

    def _remove_targets(self, resource: str, name: str, ids: list[str]) -> None:
        self._succeed(resource, self.events.write("remove_targets", resource, Rule=name, Ids=ids))

    def _succeed(self, resource: str, answer: Any) -> None:
        """EventBridge reports targets that it refused inside a successful answer."""
        for entry in (answer or {}).get("FailedEntries") or []:
            raise PlatformError(
                f"{resource}: target {entry.get('TargetId')}: {entry.get('ErrorCode')}: {entry.get('ErrorMessage')}"
            )


def reconcile(module: Any, changes: Changes) -> dict[str, Any]:
    """Entry point with the module's parameters; separate from ``main`` for tests."""
    queue = InterruptionQueue(
        module.params, Api(module.client("sqs"), changes), Api(module.client("events"), changes), changes
    )
    return queue.present() if module.params["state"] == "present" else queue.absent()


def main() -> None:
    """Run the module."""
    run(DOCUMENTATION, reconcile)


if __name__ == "__main__":
    main()
