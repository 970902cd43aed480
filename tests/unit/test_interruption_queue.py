"""The interruption queue: made, repaired, refused to others, and removed with its rules."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
import json
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.modules import aws_interruption_queue
from aws_fake import Clock, FakeClient, refusal
from conftest import PROJECT

ARN = "arn:aws:sqs:us-west-2:1:c1"
TARGET = aws_interruption_queue.TARGET_ID


class FakeAccount:
    """An account with one queue and its rules."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}
        self.queue_tags: dict[str, str] = {}
        self.rules: dict[str, dict[str, Any]] = {}
        self.targets: dict[str, dict[str, Any]] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.name_held = 0
        self.sqs = FakeClient(
            "sqs",
            get_queue_url=self.get_queue_url,
            create_queue=self.create_queue,
            get_queue_attributes=lambda **_: {"Attributes": dict(self.attributes)},
            list_queue_tags=lambda **_: {"Tags": dict(self.queue_tags)},
            set_queue_attributes=lambda Attributes, **_: self.attributes.update(Attributes),
            tag_queue=lambda Tags, **_: self.queue_tags.update(Tags),
            delete_queue=lambda **_: self.attributes.clear(),
        )
        self.events = FakeClient(
            "events",
            list_rules=lambda NamePrefix: {
                "Rules": [{"Name": name, "Arn": f"arn:{name}", **rule} for name, rule in self.rules.items()]
            },
            list_targets_by_rule=lambda Rule: {"Targets": list(self.targets.get(Rule, {}).values())},
            list_tags_for_resource=lambda ResourceARN: {
                "Tags": [
                    {"Key": key, "Value": value}
                    for key, value in self.tags.get(ResourceARN.removeprefix("arn:"), {}).items()
                ]
            },
            put_rule=self.put_rule,
            put_targets=self.put_targets,
            remove_targets=lambda Rule, Ids: [self.targets[Rule].pop(one) for one in Ids] and {},
            delete_rule=lambda **given: self.rules.pop(given["Name"]),
            tag_resource=lambda ResourceARN, Tags: self.tags[ResourceARN.removeprefix("arn:")].update(
                {tag["Key"]: tag["Value"] for tag in Tags}
            ),
        )

    def get_queue_url(self, **_: Any) -> Any:
        if not self.attributes:
            raise refusal("AWS.SimpleQueueService.NonExistentQueue")
        return {"QueueUrl": "https://queue"}

    def create_queue(self, QueueName: str, Attributes: dict[str, str], tags: dict[str, str]) -> Any:
        if self.name_held:
            self.name_held -= 1
            raise refusal("AWS.SimpleQueueService.QueueDeletedRecently")
        self.attributes = {**Attributes, "QueueArn": ARN}
        self.queue_tags = dict(tags)
        return {"QueueUrl": "https://queue"}

    def put_rule(self, Name: str, Tags: Any = (), **rule: Any) -> Any:
        self.rules[Name] = rule
        if Tags:
            self.tags[Name] = {tag["Key"]: tag["Value"] for tag in Tags}
        return {}

    def put_targets(self, Rule: str, Targets: list[dict[str, Any]]) -> Any:
        self.targets.setdefault(Rule, {}).update({target["Id"]: target for target in Targets})
        return {"FailedEntryCount": 0, "FailedEntries": []}

    def writes(self) -> list[str]:
        """Names of the changing calls, in order."""
        return [name for name, _ in [*self.sqs.writes(), *self.events.writes()]]


def run(account: FakeAccount, check: bool = False, **params: Any) -> tuple[dict[str, Any], Changes]:
    """Reconcile once; a fresh call as Ansible would make it."""
    changes = Changes(check)
    given = {
        "cluster_name": "c1",
        "queue_name": "",
        "state": "present",
        "optional": False,
        "events": list(aws_interruption_queue.EVENTS),
        "retention_s": 300,
        "kms_key_id": "",
        "tags": {"Project": "p"},
        "purge": True,
        **params,
    }
    account.sqs.calls.clear()
    account.events.calls.clear()
    queue = aws_interruption_queue.InterruptionQueue(
        given, Api(account.sqs, changes), Api(account.events, changes), changes
    )
    return (queue.present() if given["state"] == "present" else queue.absent()), changes


@pytest.fixture
def made() -> FakeAccount:
    """An account after a first run."""
    account = FakeAccount()
    run(account)
    return account


def test_the_plan_is_what_the_first_run_does() -> None:
    account = FakeAccount()
    facts, plan = run(account, check=True)
    assert facts == {"queue": "c1", "queue_arn": "<new queue c1>"}
    assert account.writes() == []
    facts, done = run(account)
    assert facts["queue_arn"] == ARN
    assert plan.actions == done.actions
    assert len(done.actions) == 6
    assert account.queue_tags == {"Project": "p", "rayplane.io/cluster": "c1"}
    _, again = run(account)
    assert again.actions == []
    assert account.writes() == []


def test_only_this_clusters_rules_may_send_and_only_over_tls(made: FakeAccount) -> None:
    statements = {one["Sid"]: one for one in json.loads(made.attributes["Policy"])["Statement"]}
    assert statements["EventsOfThisCluster"]["Condition"] == {
        "ArnLike": {"aws:SourceArn": "arn:aws:events:us-west-2:1:rule/c1-interruption-*"}
    }
    assert statements["TlsOnly"]["Effect"] == "Deny"
    assert made.attributes["SqsManagedSseEnabled"] == "true"
    assert made.attributes["MessageRetentionPeriod"] == "300"


def test_rules_match_what_karpenter_understands(made: FakeAccount) -> None:
    assert json.loads(made.rules["c1-interruption-spot"]["EventPattern"]) == {
        "source": ["aws.ec2"],
        "detail-type": ["EC2 Spot Instance Interruption Warning"],
    }
    assert json.loads(made.rules["c1-interruption-health"]["EventPattern"])["source"] == ["aws.health"]
    assert made.targets["c1-interruption-spot"] == {TARGET: {"Id": TARGET, "Arn": ARN}}


def test_every_difference_is_named_and_repaired(made: FakeAccount) -> None:
    policy = json.loads(made.attributes["Policy"])
    policy["Statement"] = [policy["Statement"][0], {"Sid": "Open", "Effect": "Allow", "Principal": "*"}]
    made.attributes |= {"Policy": json.dumps(policy), "MessageRetentionPeriod": "60", "SqsManagedSseEnabled": "false"}
    made.queue_tags.pop("Project")
    made.rules["c1-interruption-spot"]["State"] = "DISABLED"
    made.rules["c1-interruption-state"]["EventPattern"] = '{"source": ["aws.s3"]}'
    made.targets["c1-interruption-health"] = {"stray": {"Id": "stray", "Arn": "arn:other"}}
    del made.rules["c1-interruption-reservation"]
    made.tags["c1-interruption-rebalance"].pop("Project")
    _, plan = run(made, check=True)
    assert made.writes() == []
    _, done = run(made)
    assert plan.actions == done.actions
    assert [action.split(": ")[0] + ": " + action.split(": ")[1] for action in done.actions if ": " in action] == [
        "update queue c1: MessageRetentionPeriod",
        "update queue c1: SqsManagedSseEnabled",
        "update queue c1: policy TlsOnly",
        "update queue c1: policy Open",
        "update queue c1: tag Project",
        "update rule c1-interruption-spot: state",
        "update rule c1-interruption-rebalance: tag Project",
        "update rule c1-interruption-state: pattern",
        "update rule c1-interruption-health: target",
        "update rule c1-interruption-health: target stray",
    ]
    assert "create rule c1-interruption-reservation" in done.actions
    assert run(made)[1].actions == []


def test_policies_are_compared_by_meaning(made: FakeAccount) -> None:
    policy = json.loads(made.attributes["Policy"])
    policy["Statement"].reverse()
    policy["Statement"][1]["Principal"]["Service"].reverse()
    made.attributes["Policy"] = json.dumps(policy)
    assert run(made)[1].actions == []


def test_encryption_moves_to_a_key_and_back(made: FakeAccount) -> None:
    _, to_key = run(made, kms_key_id="arn:key")
    assert to_key.actions == ["update queue c1: KmsMasterKeyId: absent -> arn:key"]
    _, back = run(made)
    assert "update queue c1: KmsMasterKeyId: arn:key -> " in back.actions


def test_events_that_are_not_wanted_any_more_lose_their_rule(made: FakeAccount) -> None:
    _, changes = run(made, events=["spot", "health", "state", "reservation"])
    assert changes.actions == ["delete rule c1-interruption-rebalance"]
    assert sorted(made.rules) == [
        "c1-interruption-health",
        "c1-interruption-reservation",
        "c1-interruption-spot",
        "c1-interruption-state",
    ]


def test_an_interrupted_run_is_continued() -> None:
    account = FakeAccount()
    account.sqs.handlers["set_queue_attributes"] = lambda **_: (_ for _ in ()).throw(refusal("InternalError"))
    with pytest.raises(PlatformError, match="sqs:SetQueueAttributes failed for queue c1"):
        run(account)
    account.sqs.handlers["set_queue_attributes"] = lambda Attributes, **_: account.attributes.update(Attributes)
    _, changes = run(account)
    assert [action.split(": ")[1] for action in changes.actions if action.startswith("update")] == [
        "policy EventsOfThisCluster",
        "policy TlsOnly",
    ]
    assert run(account)[1].actions == []


def test_a_name_that_sqs_still_holds_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    account = FakeAccount()
    account.name_held = 3
    run(account)
    assert account.attributes["QueueArn"] == ARN
    assert clock.now > 0
    account = FakeAccount()
    account.name_held = 1000
    with pytest.raises(PlatformError, match="holds the name for a minute"):
        run(account)


def test_another_clusters_queue_or_rule_stops_the_run(made: FakeAccount) -> None:
    made.queue_tags["rayplane.io/cluster"] = "c2"
    made.tags["c1-interruption-spot"]["rayplane.io/cluster"] = "c3"
    with pytest.raises(PlatformError, match=r"queue c1 \(c2\), rule c1-interruption-spot \(c3\)"):
        run(made)
    assert made.writes() == []


def test_a_name_that_is_too_long_stops_the_run() -> None:
    account = FakeAccount()
    with pytest.raises(PlatformError, match="leaves 39 for the cluster's"):
        run(account, cluster_name="c" * 40)
    assert account.writes() == []


def test_a_refused_target_is_an_error() -> None:
    account = FakeAccount()
    account.events.handlers["put_targets"] = lambda **_: {
        "FailedEntryCount": 1,
        "FailedEntries": [{"TargetId": TARGET, "ErrorCode": "AccessDenied", "ErrorMessage": "no"}],
    }
    with pytest.raises(PlatformError, match=f"rule c1-interruption-spot: target {TARGET}: AccessDenied: no"):
        run(account)


def test_rules_go_before_the_queue_and_what_is_not_ours_stays(made: FakeAccount) -> None:
    made.tags["c1-interruption-spot"] = {}
    _, plan = run(made, check=True, state="absent")
    assert made.writes() == []
    _, changes = run(made, state="absent")
    assert plan.actions == changes.actions
    assert changes.actions[-1] == "delete queue c1"
    assert list(made.rules) == ["c1-interruption-spot"]
    assert (
        "kept, because they do not bear the tag rayplane.io/cluster=c1: rule c1-interruption-spot"
        in (changes.warnings[0])
    )
    assert run(made, state="absent")[1].actions == []


def test_a_queue_without_our_tag_is_not_deleted(made: FakeAccount) -> None:
    made.queue_tags = {}
    _, changes = run(made, state="absent")
    assert "queue c1" in changes.warnings[0]
    assert made.attributes


def test_what_karpenter_left_goes_where_another_autoscaler_is_chosen(made: FakeAccount) -> None:
    _, plan = run(made, check=True, state="absent", optional=True)
    assert made.writes() == []
    _, changes = run(made, state="absent", optional=True)
    assert plan.actions == changes.actions
    assert changes.actions[-1] == "delete queue c1"
    assert made.rules == {} and made.attributes == {}
    assert run(made, state="absent", optional=True)[1].actions == []


def test_where_there_was_no_karpenter_nothing_is_told_and_no_permission_needed(made: FakeAccount) -> None:
    def denied(**_: Any) -> Any:
        raise refusal("AccessDenied")

    # Somebody's own Karpenter has a queue of the cluster's name, as its documentation says.
    made.queue_tags, made.rules = {}, {}
    _, changes = run(made, state="absent", optional=True)
    assert changes.actions == changes.warnings == []
    for client, operation in ((made.events, "list_rules"), (made.sqs, "get_queue_url")):
        client.handlers[operation] = denied
        _, changes = run(made, state="absent", optional=True)
        assert changes.actions == changes.warnings == []
    with pytest.raises(PlatformError, match="sqs:GetQueueUrl failed"):
        run(made, state="absent")
    made.sqs.handlers["get_queue_url"] = lambda **_: (_ for _ in ()).throw(refusal("InternalError"))
    with pytest.raises(PlatformError, match="sqs:GetQueueUrl failed"):
        run(made, state="absent", optional=True)


def test_the_clouds_tasks_reconcile_the_queue_whatever_the_autoscaler() -> None:
    tasks = yaml.safe_load((PROJECT / "roles/autoscaler/tasks/cloud.yml").read_text(encoding="utf-8"))
    (queue,) = [task for task in tasks if "rayplane.platform.aws_interruption_queue" in task]
    assert "when" not in queue
    states = {}
    for autoscaler in ("karpenter", "cluster_autoscaler", "none"):
        variables = {"platform_autoscaler": autoscaler, "autoscaler_interruption_queue": True}
        states[autoscaler] = [
            Templar(DataLoader(), variables=variables).template(
                trust_as_template(queue["rayplane.platform.aws_interruption_queue"][key])
            )
            for key in ("state", "optional")
        ]
    assert states == {
        "karpenter": ["present", False],
        "cluster_autoscaler": ["absent", True],
        "none": ["absent", True],
    }
