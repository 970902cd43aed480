"""The address plan: holds, stays apart, never moves a zone, refuses with reason and cure."""

import ipaddress
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.network.addresses import (
    check_peers,
    inside,
    plan_subnets,
)
from hypothesis import given
from hypothesis import strategies as st

ZONES = [f"us-west-2{letter}" for letter in "abcdef"]


def test_the_default_network() -> None:
    plan = plan_subnets("10.0.0.0/16", ZONES[:3])
    assert [(subnet["role"], subnet["zone"][-1], subnet["cidr"]) for subnet in plan] == [
        ("private", "a", "10.0.0.0/19"),
        ("private", "b", "10.0.32.0/19"),
        ("private", "c", "10.0.64.0/19"),
        ("public", "a", "10.0.224.0/22"),
        ("public", "b", "10.0.228.0/22"),
        ("public", "c", "10.0.232.0/22"),
    ]


@given(prefix=st.integers(16, 22), block=st.integers(0, 255), zones=st.integers(2, 6), public=st.booleans())
def test_subnets_lie_inside_and_apart(prefix: int, block: int, zones: int, public: bool) -> None:
    vpc = ipaddress.IPv4Network((f"10.{block}.0.0", prefix))
    plan = plan_subnets(str(vpc), ZONES[:zones], public, intra=public)
    networks = [ipaddress.IPv4Network(subnet["cidr"]) for subnet in plan]
    assert len(networks) == zones * (3 if public else 1)
    assert all(network.subnet_of(vpc) and network.prefixlen <= 28 for network in networks)
    assert not any(a.overlaps(b) for index, a in enumerate(networks) for b in networks[index + 1 :])


@given(prefix=st.integers(16, 22), zones=st.integers(2, 5))
def test_a_zone_added_at_the_end_moves_nothing(prefix: int, zones: int) -> None:
    before = plan_subnets(f"10.0.0.0/{prefix}", ZONES[:zones])
    after = plan_subnets(f"10.0.0.0/{prefix}", ZONES[: zones + 1], intra=True)
    assert all(subnet in after for subnet in before)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"vpc_cidr": "10.0.0.0/24"}, "use a VPC of /22 or wider"),
        ({"vpc_cidr": "10.0.0.0/26", "public": False}, "use a VPC of /25 or wider"),
        ({"vpc_cidr": "10.0.1.0/16"}, "write 10.0.0.0/16"),
        ({"vpc_cidr": "ten"}, "write an IPv4 block"),
        ({"vpc_cidr": "10.0.0.0/8"}, "from /16 to /28"),
        ({"zones": ["a"]}, "at least 2"),
        ({"zones": list("abcdefg")}, "at most 6"),
        ({"zones": ["a", "a"]}, "given twice: a"),
        ({"private_cidrs": ["10.0.0.0/20"]}, "1 private subnet CIDRs for 2"),
        ({"private_cidrs": ["10.0.0.0/20", "10.1.0.0/20"]}, "not inside the VPC"),
        ({"public_cidrs": ["10.0.0.0/24", "10.0.1.0/24"]}, "overlaps"),
        ({"private_cidrs": ["10.0.0.0/29", "10.0.1.0/24"]}, "from /16 to /28"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_cure(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan_subnets(**{"vpc_cidr": "10.0.0.0/16", "zones": ["a", "b"], **arguments})


def test_given_subnets_are_taken_as_they_are() -> None:
    plan = plan_subnets("10.0.0.0/24", ["a", "b"], False, ["10.0.0.0/25", "10.0.0.128/25"])
    assert [subnet["cidr"] for subnet in plan] == ["10.0.0.0/25", "10.0.0.128/25"]


def test_intra_subnets_take_the_seventh_eighth() -> None:
    plan = plan_subnets("10.0.0.0/16", ZONES[:2], intra=True)
    assert [(one["role"], one["cidr"]) for one in plan[-2:]] == [("intra", "10.0.192.0/22"), ("intra", "10.0.196.0/22")]


def test_peers_lie_apart() -> None:
    check_peers(["10.0.0.0/16"], [("a", ["10.1.0.0/16"]), ("b", ["10.2.0.0/16", "192.168.0.0/24"])])
    for peers, reason in (
        ([("a", ["10.0.1.0/24"])], "overlap the VPC's 10.0.0.0/16"),
        ([("a", ["10.1.0.0/16"]), ("b", ["10.1.4.0/24"])], "of peer a"),
        ([("a", ["ten"])], "no CIDR block"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_peers(["10.0.0.0/16"], peers)
    assert inside("10.0.4.0/24", ["10.9.0.0/16", "10.0.0.0/16"])
    assert not inside("10.0.0.0/16", ["10.0.4.0/24"])
