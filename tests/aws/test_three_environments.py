"""Development, staging and production as three hosts of one run: planned, built and destroyed.

That a second run changes nothing is shown by test_drift.py, after its repair.
"""

from __future__ import annotations

from collections import Counter

import pytest

from .conftest import HOSTS, INVENTORY, Fleet, Playbook

# One an account: whichever environment comes first makes it for all.
SHARED = "create role AWSServiceRoleForAutoScaling"
STAGES = ("encryption : ", "network : ", "storage : ", "eks : ")
CLUSTERS = ["ray-llm-cluster-dev", "ray-llm-cluster-staging", "ray-llm-cluster-prod"]


def test_a_plan_changes_nothing(fleet: Fleet) -> None:
    assert not [str(call) for call in fleet.plan.calls if call.writes]
    assert fleet.planned == {}


@pytest.mark.parametrize("host", HOSTS)
def test_a_plan_reaches_into_kubernetes_before_there_is_a_cluster(fleet: Fleet, host: str) -> None:
    created = [name for result in fleet.plan.results(host) for name in result.get("created", ())]
    assert "StorageClass gp3" in created
    assert "Namespace rayplane" in created
    assert "Deployment kube-system/cluster-autoscaler" in created


@pytest.mark.parametrize("host", HOSTS)
def test_the_plan_is_what_happens(fleet: Fleet, host: str) -> None:
    planned, done = ([one for one in run.actions(host, STAGES) if one != SHARED] for run in (fleet.plan, fleet.first))
    assert len(planned) > 30
    assert planned == done


def test_each_has_its_own(fleet: Fleet) -> None:
    account, counts = fleet.account, fleet.counts
    assert counts["VPC"] == 3 and counts["cluster"] == 3
    nats = {cluster: len(account.owned("NAT gateway", cluster)) for cluster in CLUSTERS}
    assert nats == {"ray-llm-cluster-dev": 1, "ray-llm-cluster-staging": 1, "ray-llm-cluster-prod": 3}
    assert counts["address"] == 5 and counts["internet gateway"] == 3
    subnets = Counter({cluster: len(account.owned("subnet", cluster)) for cluster in CLUSTERS})
    assert subnets["ray-llm-cluster-dev"] < subnets["ray-llm-cluster-prod"]


def test_destroying_leaves_an_empty_account(fleet: Fleet, playbook: Playbook) -> None:
    variables = {**fleet.variables, "destroy_confirm": "all"}
    playbook("playbooks/destroy.yml", *INVENTORY, variables=variables).succeeded(*HOSTS)
    assert fleet.account.sweep() == {}
