# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Flow logs of the VPC: who talked to whom, to CloudWatch Logs or to a bucket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import OWNER_TAG, PlatformError, wait_until
from ansible_collections.rayplane.platform.plugins.module_utils.aws.log_group import LogGroup
from ansible_collections.rayplane.platform.plugins.module_utils.network.core import Context, Item
from ansible_collections.rayplane.platform.plugins.module_utils.network.roles import ServiceRole

__all__ = ["FlowLogs"]

_CLOUDWATCH = "cloud-watch-logs"
# How long a role made a moment ago may stay unknown to the service that takes it on.
_ROLE_SETTLES = 60


class FlowLogs:
    """One flow log of the VPC with what it needs: a log group and a role, or a bucket that exists.

    A bucket that is made after the network (``flow_logs_bucket_later``) is waited for: as long as it is missing, the
    flow log is ``pending``, and left to a later call for this part alone.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.wanted: bool = context.params["flow_logs"] and context.params["state"] == "present"
        self.to_bucket: bool = context.params["flow_logs_destination"] == "s3"
        self.group_name = f"/aws/vpc-flow-logs/{context.owner}"
        self.role = ServiceRole(context, f"{context.owner}-flow-logs")
        self.logs = LogGroup(lambda: context.service("logs"), context.changes, self.group_name, context.owner)
        self.group: Item | None = None
        self.pending = False

    # What is there

    def jobs(self) -> dict[str, Callable[[], Any]]:
        """Return the reading calls; none where flow logs are off, which the flow log itself then tells."""
        if self.context.params["state"] == "present" and (not self.wanted or self.to_bucket):
            return {}
        self.context.service("logs")
        return {"flow_log_role": self.role.read, "log_group": self.logs.read}

    def take(self, answers: dict[str, Any]) -> None:
        """Remember the answers to `jobs`; read what is left over where flow logs were on and are off now."""
        if "log_group" in answers:
            self.role.found, self.group = answers["flow_log_role"], answers["log_group"]
        elif self._ours():
            self.role.found, self.group = self.role.read(), self.logs.read()

    def _ours(self) -> list[Item]:
        return [one for one in self.context.view.flow_logs if self.context.ours(one)]

    # What is wanted

    def check(self) -> None:
        """Refuse what cannot be, before anything is changed."""
        context = self.context
        if not self.wanted:
            return
        if not self.to_bucket:
            self.role.check()
            owner = (self.group or {}).get("tags", {}).get(OWNER_TAG, context.owner)
            if owner != context.owner:
                raise PlatformError(f"log group {self.group_name} belongs to {owner}: give this cluster another name")
            return
        bucket = context.params["flow_logs_bucket"]
        if not bucket:
            raise PlatformError("network_flow_logs_bucket is empty: name the bucket that takes the flow logs")
        if any(self._properties(one)["destination"] == self._bucket_arn() for one in self._ours()):
            return
        # A bucket of another account may refuse to be looked at, and still take the logs.
        if (
            context.service("s3").read(
                "head_bucket", f"bucket {bucket}", absent=("404", "NoSuchBucket", "NotFound", "403"), Bucket=bucket
            )
            is None
        ):
            if context.params["flow_logs_bucket_later"]:
                self.pending = context.params["part"] == "all"
                return
            context.changes.warnings.append(
                f"bucket {bucket} of network_flow_logs_bucket cannot be seen: it has to exist, and to admit"
                " delivery.logs.amazonaws.com, before flow logs go there"
            )

    def present(self) -> None:
        """Keep the flow log as asked for, or remove ours."""
        context = self.context
        if not self.wanted:
            self.remove()
            return
        if self.pending:
            return
        want: dict[str, Any] = {
            "traffic": context.params["flow_logs_traffic"],
            "destination_type": "s3" if self.to_bucket else _CLOUDWATCH,
            "destination": self._bucket_arn() if self.to_bucket else self.group_name,
            "interval": context.params["flow_logs_interval"],
        }
        role = "" if self.to_bucket else self._log_group_and_role()
        resource = f"flow log {context.name}"
        tags = context.tags("flow-logs", "-flow-logs")
        ours = [one for one in context.view.flow_logs if context.may_take(one) and self._is_or_was_ours(one, want)]
        if not ours:
            context.changes.create(resource, {**want, "tags": tags})
            self._create(resource, want, role, tags)
            return
        flow_log = ours[0]
        for doubled in ours[1:]:
            self._delete(doubled)
        have = self._properties(flow_log)
        # A flow log cannot be changed: one that differs is replaced.
        if context.changes.update(resource, have, want):
            context.discard(context.api, "delete_flow_logs", resource, FlowLogIds=[flow_log["FlowLogId"]])
            self._create(resource, want, role, tags)
            return
        if flow_log.get("DeliverLogsStatus") == "FAILED":
            context.changes.warnings.append(
                f"{resource} ({flow_log['FlowLogId']}) does not arrive: {flow_log.get('DeliverLogsErrorMessage')}"
            )
        context.retag(resource, flow_log["FlowLogId"], flow_log.get("Tags"), tags)

    def _is_or_was_ours(self, flow_log: Item, want: dict[str, Any]) -> bool:
        # An untagged one is ours, with its tags removed, only if it goes where ours would: others may log the VPC, too.
        if self.context.ours(flow_log):
            return True
        return bool(self._properties(flow_log)["destination"] == want["destination"])

    def _properties(self, flow_log: Item) -> dict[str, Any]:
        destination = flow_log.get("LogDestination") or flow_log.get("LogGroupName", "")
        if ":log-group:" in destination:
            destination = destination.partition(":log-group:")[2].removesuffix(":*")
        return {
            "traffic": flow_log["TrafficType"],
            "destination_type": flow_log.get("LogDestinationType", _CLOUDWATCH),
            "destination": flow_log.get("LogGroupName") or destination,
            # Emulators do not say it; AWS always does.
            "interval": flow_log.get("MaxAggregationInterval", self.context.params["flow_logs_interval"]),
        }

    def _bucket_arn(self) -> str:
        return f"arn:{self.context.partition}:s3:::{self.context.params['flow_logs_bucket']}/flow-logs"

    def _create(self, resource: str, want: dict[str, Any], role: str, tags: dict[str, str]) -> None:
        context = self.context
        if context.changes.check_mode:
            return
        arguments: dict[str, Any] = {
            "ResourceIds": [context.vpc_id],
            "ResourceType": "VPC",
            "TrafficType": want["traffic"],
            "LogDestinationType": want["destination_type"],
            "MaxAggregationInterval": want["interval"],
            "TagSpecifications": context.specification("vpc-flow-log", tags),
        }
        if self.to_bucket:
            arguments["LogDestination"] = want["destination"]
        else:
            arguments |= {"LogGroupName": want["destination"], "DeliverLogsPermissionArn": role}

        def attempt() -> tuple[bool, str]:
            try:
                answer = context.api.write("create_flow_logs", resource, **arguments)
            except PlatformError as error:
                # The role was made a moment ago: IAM is eventually consistent.
                if "assume" not in str(error).lower():
                    raise
                return False, str(error)
            refused = (answer or {}).get("Unsuccessful", ())
            if refused:
                reason = refused[0].get("Error", {})
                raise PlatformError(
                    f"ec2:CreateFlowLogs failed for {resource}: {reason.get('Code')}: {reason.get('Message')}. Cure:"
                    " the destination has to exist and to admit the log delivery service"
                )
            return True, "made"

        wait_until(resource, attempt, _ROLE_SETTLES)

    def _log_group_and_role(self) -> str:
        self._log_group()
        context = self.context
        logs = f"arn:{context.partition}:logs:{context.region}:{context.account}:log-group:{self.group_name}"
        # Only the flow logs of this account and region may use the role (VPC user guide, "IAM role for publishing").
        source = f"arn:{context.partition}:ec2:{context.region}:{context.account}:vpc-flow-log/*"
        trust = {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": {"Service": "vpc-flow-logs.amazonaws.com"},
                    "Action": "sts:AssumeRole",
                    "Condition": {
                        "StringEquals": {"aws:SourceAccount": context.account},
                        "ArnLike": {"aws:SourceArn": source},
                    },
                }
            ],
        }
        policy = {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Allow",
                    "Action": ["logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"],
                    "Resource": [logs, f"{logs}:*"],
                },
                # Listing has no resource of its own.
                {"Effect": "Allow", "Action": "logs:DescribeLogGroups", "Resource": "*"},
            ],
        }
        return str(self.role.present(f"Flow logs of {context.owner}", trust, policy))

    def _log_group(self) -> None:
        params = self.context.params
        days, key = params["flow_logs_retention_days"], params["flow_logs_kms_key_arn"]
        self.logs.keep(self.group, days, key, params["tags"])

    # The way down

    def remove(self) -> None:
        """Delete our flow log with its role and log group.

        The flow log goes last: it is what a run that finds flow logs switched off goes by.
        """
        self.role.remove()
        if self.group is not None and self.group["tags"].get(OWNER_TAG) == self.context.owner:
            resource = f"log group {self.group_name}"
            self.context.changes.delete(resource, {"stored_bytes": self.group.get("storedBytes")})
            self.context.discard(
                self.context.service("logs"), "delete_log_group", resource, logGroupName=self.group_name
            )
        for flow_log in self._ours():
            self._delete(flow_log)

    def _delete(self, flow_log: Item) -> None:
        resource = f"flow log {self.context.label(flow_log, flow_log['FlowLogId'])}"
        self.context.changes.delete(resource, {"id": flow_log["FlowLogId"]})
        self.context.discard(self.context.api, "delete_flow_logs", resource, FlowLogIds=[flow_log["FlowLogId"]])
