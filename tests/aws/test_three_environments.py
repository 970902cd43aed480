"""Development, staging and production as three hosts of one run: planned, built, built again, destroyed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from .account import Account
from .conftest import CLOUD, HOSTS, INVENTORY, Fleet, Playbook

# One an account: whichever environment comes first makes it for all.
SHARED = "create role AWSServiceRoleForAutoScaling"
CLUSTERS = ["ray-llm-cluster-dev", "ray-llm-cluster-staging", "ray-llm-cluster-prod"]


def test_a_plan_changes_nothing(fleet: Fleet) -> None:
    assert not [str(call) for call in fleet.plan.calls if call.writes]
    assert fleet.planned == {}


def test_a_plan_reaches_into_kubernetes_before_there_is_a_cluster(
    new_account: Callable[[], Account], playbook: Playbook
) -> None:
    host = "ray-llm-prod"
    account = new_account()
    # Upstream's kustomization and the hub are out of reach here.
    stages = ("--check", "--diff", "--skip-tags", "kuberay,models,rayservice,verify")
    # A name of its own: bucket names are shared by all accounts, and the fleet may stand in another.
    variables = {**account.environment, "platform_cluster_name": "ray-llm-to-come"}
    plan = playbook("playbooks/deploy.yml", *INVENTORY, "-l", host, *stages, variables=variables)
    plan.succeeded(host)
    created = [name for result in plan.results(host) for name in result.get("created", ())]
    assert "StorageClass gp3" in created
    assert "Namespace rayplane" in created
    assert "Deployment kube-system/cluster-autoscaler" in created
    assert not [str(call) for call in plan.calls if call.writes]


@pytest.mark.parametrize("host", HOSTS)
def test_the_plan_is_what_happens(fleet: Fleet, host: str) -> None:
    planned, done = ([one for one in run.actions(host) if one != SHARED] for run in (fleet.plan, fleet.first))
    assert len(planned) > 30
    assert planned == done


def test_each_has_its_own(fleet: Fleet) -> None:
    account = fleet.account
    counts = account.counts()
    assert counts["VPC"] == 3 and counts["cluster"] == 3
    nats = {cluster: len(account.owned("NAT gateway", cluster)) for cluster in CLUSTERS}
    assert nats == {"ray-llm-cluster-dev": 1, "ray-llm-cluster-staging": 1, "ray-llm-cluster-prod": 3}
    assert counts["address"] == 5 and counts["internet gateway"] == 3
    subnets = Counter({cluster: len(account.owned("subnet", cluster)) for cluster in CLUSTERS})
    assert subnets["ray-llm-cluster-dev"] < subnets["ray-llm-cluster-prod"]


def test_a_second_run_changes_nothing(fleet: Fleet, playbook: Playbook) -> None:
    counts = fleet.account.counts()
    again = playbook(*CLOUD, variables=fleet.variables).succeeded(*HOSTS)
    assert {host: again.actions(host) for host in HOSTS} == {host: [] for host in HOSTS}
    assert {host: again.changed(host) for host in HOSTS} == dict.fromkeys(HOSTS, 0)
    assert not [str(call) for call in again.calls if call.writes]
    assert fleet.account.counts() == counts


def test_the_plan_after_it_is_empty(fleet: Fleet, playbook: Playbook) -> None:
    plan = playbook(*CLOUD, "--check", variables=fleet.variables).succeeded(*HOSTS)
    assert {host: plan.changed(host) for host in HOSTS} == dict.fromkeys(HOSTS, 0)


def test_destroying_leaves_an_empty_account(fleet: Fleet, playbook: Playbook) -> None:
    variables = {**fleet.variables, "destroy_confirm": "all"}
    playbook("playbooks/destroy.yml", *INVENTORY, variables=variables).succeeded(*HOSTS)
    assert fleet.account.sweep() == {}
    again = playbook("playbooks/destroy.yml", *INVENTORY, variables=variables).succeeded(*HOSTS)
    assert {host: again.actions(host) for host in HOSTS} == {host: [] for host in HOSTS}
