"""What one stage leaves to a later one, and what a changed choice leaves behind."""

from __future__ import annotations

import sys
from collections.abc import Callable

from .account import Account
from .conftest import INVENTORY, Playbook

HOST = "ray-llm-staging"
DEPLOY = ("playbooks/deploy.yml", *INVENTORY, "-l", HOST)


def test_flow_logs_reach_the_logs_bucket_from_the_first_deployment(
    new_account: Callable[[], Account], playbook: Playbook
) -> None:
    account = new_account()
    name = "ray-llm-flows"
    variables = {**account.environment, "platform_cluster_name": name, "network_flow_logs_destination": "s3"}
    stages = ("--tags", "preflight,network,storage")
    plan = playbook(*DEPLOY, *stages, "--check", variables=variables).succeeded(HOST)
    assert account.sweep() == {}
    done = playbook(*DEPLOY, *stages, variables=variables).succeeded(HOST)
    assert plan.actions(HOST) == done.actions(HOST)
    assert done.actions(HOST).count(f"create flow log {name}") == 1
    (log,) = account.owned("flow log", name)
    assert log["LogDestination"] == f"arn:aws:s3:::{name}-logs/flow-logs"
    again = playbook(*DEPLOY, *stages, variables=variables).succeeded(HOST)
    assert again.actions(HOST) == [] and again.changed(HOST) == 0
    # Gone by hand, it is the network's to bring back.
    account.ec2.delete_flow_logs(FlowLogIds=[log["FlowLogId"]])
    alone = playbook(*DEPLOY, "--tags", "network", variables=variables).succeeded(HOST)
    assert alone.actions(HOST) == [f"create flow log {name}"]


def test_karpenters_queue_goes_with_karpenter(new_account: Callable[[], Account], playbook: Playbook) -> None:
    account = new_account()
    pools = [{"name": "cpu", "instance_categories": ["m"], "capacity_types": ["spot", "on-demand"]}]
    variables = {
        **account.environment,
        "platform_cluster_name": "ray-llm-queue",
        "autoscaler_node_pools": pools,
        "encryption_enabled": False,
        # Preflight looks for it; nothing is rendered here.
        "autoscaler_helm": sys.executable,
    }
    stage = ("--tags", "autoscaler_cloud")
    first = playbook(*DEPLOY, *stage, variables={**variables, "platform_autoscaler": "karpenter"}).succeeded(HOST)
    assert "create service-linked role of spot.amazonaws.com" in first.actions(HOST)
    assert account.counts() == {"queue": 1, "event rule": 5}
    again = playbook(*DEPLOY, *stage, variables={**variables, "platform_autoscaler": "karpenter"}).succeeded(HOST)
    assert again.actions(HOST) == []
    changed = {**variables, "platform_autoscaler": "cluster_autoscaler"}
    plan = playbook(*DEPLOY, *stage, "--check", variables=changed).succeeded(HOST)
    done = playbook(*DEPLOY, *stage, variables=changed).succeeded(HOST)
    assert plan.actions(HOST) == done.actions(HOST)
    assert done.actions(HOST)[-1] == "delete queue ray-llm-queue"
    assert account.sweep() == {}
    assert playbook(*DEPLOY, *stage, variables=changed).succeeded(HOST).actions(HOST) == []
