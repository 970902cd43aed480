"""What clusters cost: against sums made by hand, and by the playbook over the project's own inventories."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.rayplane.platform.plugins.filter import rayplane_cost
from conftest import PROJECT
from test_specs import run_ansible

TABLE: dict[str, Any] = yaml.safe_load((PROJECT / "roles/cost/files/prices-aws.yml").read_text(encoding="utf-8"))
# Prices of the sums below; the table in the repository may move on.
PRICES: dict[str, Any] = {
    "currency": "USD",
    "date": "2026-07-20",
    "services": {"eks_hour": 0.1, "eks_extended_hour": 0.6, "ipv4_hour": 0.005, "kms_key": 1.0},
    "eks_standard_support_until": {"1.34": "2026-12-02"},
    "regions": {
        "us-west-2": {
            "services": {
                "gp3_gb": 0.08, "gp3_iops": 0.005, "gp3_throughput": 0.04,
                "nat_hour": 0.045, "nat_gb": 0.045, "endpoint_hour": 0.01, "endpoint_gb": 0.01,
                "s3_gb": 0.023, "efs_gb": 0.3, "log_gb": 0.5,
            },
            "instances": {
                "m5.xlarge": {"on_demand": 0.192, "spot_saving": 67},
                "m5.2xlarge": {"on_demand": 0.384, "spot_saving": 59},
                "g4dn.xlarge": {"on_demand": 0.526, "spot_saving": 64},
                "g4dn.2xlarge": {"on_demand": 0.752, "spot_saving": 63},
                "g5.12xlarge": {"on_demand": 5.672, "spot": 2.0},
                "t3.micro": {"on_demand": 0.0104, "spot_saving": 70},
            },
        }
    },
}  # fmt: skip


def group(name: str, types: list[str], sizes: tuple[int, int, int], disk: int, market: str = "ON_DEMAND") -> Any:
    low, begin, high = sizes
    return {
        "name": name,
        "instance_types": types,
        "capacity_type": market,
        "min_size": low,
        "desired_size": begin,
        "max_size": high,
        "disk_size": disk,
    }


def cluster(**changes: Any) -> dict[str, Any]:
    """A cluster of staging's shape: three zones, one NAT gateway, everything on demand."""
    assumed = {"nat_gb": 100, "endpoint_gb": 100, "s3_gb": 100, "efs_gb": 100, "log_gb": 10, "flow_log_gb": 20}
    base: dict[str, Any] = {
        "name": "staging", "region": "us-west-2", "date": "2026-11-24", "kubernetes_version": "1.34",
        "support": "auto", "support_type": "",
        "node_groups": [
            group("cpu", ["m5.2xlarge"], (2, 2, 3), 100),
            group("gpu", ["g4dn.xlarge"], (1, 2, 4), 200),
        ],
        "node_pools": [], "node_classes": {"default": {"disk_size": 100}, "gpu": {"disk_size": 200}},
        "log_types": ["api"], "zones": 3, "subnets_exist": False, "nat_mode": "single",
        "interface_endpoints": [], "flow_logs": False, "bastion_type": "", "bastion_disk": 0, "replication": False,
        "efs": False, "kms_keys": 0, "upgrade_strategy": "NewCluster", "surge_percent": 100, "overlap_minutes": 30,
        "ray": {"head_cpu": 1, "groups": [
            {"name": "cpu", "min": 1, "max": 1, "cpu": 2},
            {"name": "nvidia-t4", "min": 2, "max": 4, "cpu": 4, "gpu": 1},
        ]},
        "assumed": assumed,
    }  # fmt: skip
    return base | changes


def price(extra: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return rayplane_cost.cost_report(cluster(**changes), PRICES, extra or {})


def row(report: dict[str, Any], item: str) -> dict[str, Any]:
    (found,) = [entry for entry in report["rows"] if entry["item"] == item]
    return found


DEV = {
    "zones": 2,
    "log_types": [],
    "node_groups": [
        group("cpu", ["m5.xlarge"], (1, 1, 3), 100),
        group("gpu", ["g4dn.xlarge", "g4dn.2xlarge"], (0, 1, 2), 200, "SPOT"),
    ],
}
PROD = {
    "nat_mode": "per_zone",
    "interface_endpoints": ["ecr.api", "ecr.dkr", "sts", "ec2", "logs", "eks-auth"],
    "node_groups": [group("cpu", ["m5.2xlarge"], (2, 2, 5), 100), group("gpu", ["g4dn.xlarge"], (1, 2, 10), 200)],
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 73 control plane; 140.16 a CPU node and 8 its disk; 0.526 x 0.36 x 730 = 138.23 a GPU node on spot to begin
        # with, 2 x 0.752 x 0.37 x 730 = 406.23 the two dearest; 16 a GPU disk; 32.85 + 4.50 NAT; 3.65 address; 2.30 S3.
        (DEV, [264.46, 418.69, 999.01]),
        # 73; 280.32 a CPU node, 8 its disk; 383.98 a GPU node, 16 its disk; 32.85 + 4.50; 3.65; 2.30; 5 logs.
        ({}, [1097.92, 1497.90, 2586.18]),
        # As staging with 98.55 for three NAT gateways, 10.95 addresses, 18 x 7.30 = 131.40 endpoints and 1 their data.
        (PROD, [1303.32, 1703.30, 5768.10]),
    ],
    ids=["dev", "staging", "prod"],
)
def test_totals_are_those_made_by_hand(changes: dict[str, Any], expected: list[float]) -> None:
    report = price(**changes)
    assert report["missing"] == []
    assert report["totals"]["declared"] == expected
    assert report["known"] == expected


def test_rows_are_priced_on_demand_and_on_spot() -> None:
    nodes = row(price(), "node group gpu")
    assert nodes["on_demand"] == [383.98, 767.96, 1535.92]
    # 0.526 x 0.36 = 0.18936 an hour
    assert nodes["spot"] == [138.23, 276.47, 552.93]
    totals = price()["totals"]
    assert totals["on_demand"] == totals["declared"]
    # 0.384 x 0.41 = 0.15744: 229.86 for two, 344.79 for three
    assert totals["spot"] == [
        round(1097.92 - 560.64 + 229.86 - 383.98 + 138.23, 2),
        round(1497.90 - 560.64 + 229.86 - 767.96 + 276.47, 2),
        round(2586.18 - 840.96 + 344.79 - 1535.92 + 552.93, 2),
    ]


def test_disks_cost_what_they_have_above_their_own() -> None:
    fast = {**group("gpu", ["g4dn.xlarge"], (1, 2, 4), 200), "disk_iops": 4000, "disk_throughput": 1000}
    report = price(node_groups=[fast])
    # 1000 IOPS x 0.005, and 875 MiB/s x 0.04, a node and month.
    assert row(report, "disk iops gpu")["on_demand"] == [5.0, 10.0, 20.0]
    assert row(report, "disk throughput gpu")["on_demand"] == [35.0, 70.0, 140.0]


def test_a_printed_table_adds_up() -> None:
    report = price(**PROD)
    for index in range(3):
        parts = sum(round(entry["on_demand"][index] * 100) for entry in report["rows"])
        assert parts == round(report["totals"]["declared"][index] * 100)


def test_fewest_nodes_are_the_cheapest_and_most_the_dearest() -> None:
    report = price(node_groups=[group("mixed", ["g4dn.2xlarge", "g4dn.xlarge"], (1, 1, 1), 20)])
    assert row(report, "node group mixed")["on_demand"] == [383.98, 548.96, 548.96]


@pytest.mark.parametrize("capacity_type", ["ON_DEMAND", "SPOT"])
def test_a_missing_price_is_never_zero(capacity_type: str) -> None:
    groups = [group("gpu", ["p5e.48xlarge"], (1, 1, 2), 200, capacity_type)]
    report = price(node_groups=groups)
    market = "spot" if capacity_type == "SPOT" else "on_demand"
    assert report["totals"] == {"declared": None, "on_demand": None, "spot": None}
    assert row(report, "node group gpu")["on_demand"] is None
    (message, *_others) = report["missing"]
    assert "p5e.48xlarge" in message
    assert f"cost_prices_extra: {{us-west-2: {{instances: {{p5e.48xlarge: {{{market}: USD per hour}}}}}}}}" in message
    assert report["known"][0] > 73
    assert "INCOMPLETE" in rayplane_cost.cost_table(report)
    extra = {"us-west-2": {"instances": {"p5e.48xlarge": {"on_demand": 60, "spot": 30, "gpus": 8}}}}
    mended = price(extra, node_groups=groups)
    assert mended["missing"] == []
    assert row(mended, "node group gpu")["on_demand"] == [43800.0, 43800.0, 87600.0]
    assert row(mended, "node group gpu")["spot"] == [21900.0, 21900.0, 43800.0]


def test_a_region_without_prices_says_so_for_each() -> None:
    report = price(region="mars-north-1")
    assert report["totals"]["declared"] is None
    assert {"gp3_gb", "nat_hour", "s3_gb", "m5.2xlarge"} <= {
        word.strip(";:{}") for text in report["missing"] for word in text.split()
    }
    # What is the same everywhere is still known: control plane and the address of the NAT gateway.
    assert report["known"] == [76.65] * 3


def test_a_missing_spot_price_leaves_what_runs_on_demand_complete() -> None:
    report = price(
        {"us-west-2": {"instances": {"x.large": {"on_demand": 1}}}},
        node_groups=[group("x", ["x.large"], (1, 1, 1), 20)],
    )
    assert report["missing"] == []
    assert report["totals"]["declared"] is not None
    assert report["totals"]["spot"] is None


def test_prices_of_the_inventory_win() -> None:
    report = price({"us-west-2": {"services": {"nat_hour": 0.1}, "instances": {"m5.2xlarge": {"on_demand": 1}}}})
    assert row(report, "node group cpu")["on_demand"] == [1460.0, 1460.0, 2190.0]
    assert next(entry for entry in report["rows"] if entry["item"] == "NAT gateways")["price"] == 0.1


@pytest.mark.parametrize("extra", [{"us-west-2": {"instance": {}}}, {"us-west-2": {"services": {"nat_hour": "much"}}}])
def test_a_slip_in_the_prices_of_the_inventory_is_an_error(extra: dict[str, Any]) -> None:
    with pytest.raises(AnsibleFilterError, match=r"us-west-2"):
        price(extra)


def test_negative_amounts_are_refused() -> None:
    with pytest.raises(AnsibleFilterError, match="at least 0"):
        price(assumed=cluster()["assumed"] | {"s3_gb": -1})


# --- control plane ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "amount"),
    [
        ({}, 73.0),
        ({"date": "2026-12-02"}, 73.0),
        ({"date": "2026-12-03"}, 438.0),
        # AWS upgrades it instead.
        ({"date": "2026-12-03", "support_type": "STANDARD"}, 73.0),
        ({"support": "extended"}, 438.0),
        ({"date": "2026-12-03", "support": "standard"}, 73.0),
        ({"kubernetes_version": "1.99", "date": "2030-01-01"}, 73.0),
    ],
)
def test_extended_support_of_kubernetes_is_dearer(changes: dict[str, Any], amount: float) -> None:
    assert row(price(**changes), "control plane")["on_demand"] == [amount] * 3


# --- what else is there ----------------------------------------------------------------------------------------------


def test_bastion_keys_file_system_and_flow_logs_are_counted() -> None:
    plain, full = (
        price(),
        price(bastion_type="t3.micro", bastion_disk=8, kms_keys=1, efs=True, flow_logs=True, replication=True),
    )
    # 0.0104 x 730 = 7.59, its disk 0.64, its address 3.65; a key 1; 30 EFS; 10 flow logs; 2.30 replicas
    extra = 7.59 + 0.64 + 3.65 + 1 + 30 + 10 + 2.30
    assert full["totals"]["declared"][0] == pytest.approx(plain["totals"]["declared"][0] + extra)


def test_in_subnets_of_somebody_else_there_is_no_nat_gateway_of_ours() -> None:
    report = price(subnets_exist=True, interface_endpoints=["sts"])
    assert not [entry for entry in report["rows"] if entry["item"].startswith(("NAT", "public"))]
    assert [entry["count"] for entry in report["rows"] if entry["item"] == "interface endpoints"] == ["3", "100"]


# --- Karpenter -------------------------------------------------------------------------------------------------------


def test_node_pools_cost_up_to_their_limits() -> None:
    pools = [
        {"name": "cpu", "instance_categories": ["m"], "limits": {"cpu": 64, "memory": "256Gi"}},
        {"name": "gpu", "accelerator": "nvidia", "instance_families": ["g4dn"], "limits": {"nvidia.com/gpu": 8},
         "node_class": "gpu"},
    ]  # fmt: skip
    report = price(node_groups=[], node_pools=pools)
    # 16 m5.xlarge or 8 m5.2xlarge: 3.072 an hour either way; Ray's three CPUs begin on one m5.xlarge.
    assert row(report, "node pool cpu")["on_demand"] == [0.0, 140.16, 2242.56]
    # 8 x g4dn.2xlarge; two g4dn.xlarge for Ray's two GPUs.
    assert row(report, "node pool gpu")["on_demand"] == [0.0, 767.96, 4391.68]
    # 8 a disk of one, then of 16 nodes; 16 a disk of two, then of eight.
    assert row(report, "root disks cpu")["on_demand"] == [0.0, 8.0, 128.0]
    assert row(report, "root disks gpu")["on_demand"] == [0.0, 32.0, 128.0]
    assert report["missing"] == []
    # Ray's second cluster lands on the pools, too: two to four g4dn.xlarge and one m5.xlarge.
    assert report["release"]["hourly"] == [1.244, 2.296]


def test_a_pool_of_named_types_needs_all_their_prices() -> None:
    pool = {"name": "p", "instance_types": ["m5.xlarge", "m99.xlarge"], "limits": {"cpu": 8}}
    report = price(node_groups=[], node_pools=[pool])
    assert row(report, "node pool p")["on_demand"] is None
    assert "m99.xlarge" in report["missing"][0]


def test_a_node_pool_without_limits_has_no_upper_bound() -> None:
    report = price(node_groups=[], node_pools=[{"name": "open", "instance_types": ["m5.xlarge"]}])
    assert report["totals"]["declared"] is None
    assert "set limits" in report["missing"][0]


def test_spot_pools_are_priced_as_spot() -> None:
    pool = {"name": "s", "instance_types": ["m5.xlarge"], "capacity_types": ["spot"], "limits": {"cpu": 8}}
    report = price(node_groups=[], node_pools=[pool])
    assert row(report, "node pool s")["market"] == "spot"
    assert report["totals"]["declared"][2] < report["totals"]["on_demand"][2]


# --- releases --------------------------------------------------------------------------------------------------------


def test_a_new_cluster_doubles_what_ray_holds() -> None:
    release = price()["release"]
    assert [(node["group"], node["min"], node["max"]) for node in release["nodes"]] == [("gpu", 2, 4), ("cpu", 1, 1)]
    # 2 x 0.526 + 0.384 and 4 x 0.526 + 0.384 an hour, half of it in 30 minutes
    assert release["hourly"] == [1.436, 2.488]
    assert release["once"] == [0.72, 1.24]


def test_a_step_by_step_release_takes_its_share() -> None:
    release = price(upgrade_strategy="NewClusterWithIncrementalUpgrade", surge_percent=25)["release"]
    assert [(node["min"], node["max"]) for node in release["nodes"]] == [(1, 1), (1, 1)]
    assert release["hourly"] == [0.91, 0.91]


def test_no_release_costs_nothing() -> None:
    report = price(upgrade_strategy="None")
    assert report["release"]["once"] == [0.0, 0.0]
    assert "costs nothing" in rayplane_cost.cost_table(report)


def test_several_gpus_of_a_pod_share_a_node() -> None:
    ray = {"head_cpu": 1, "groups": [{"name": "a10g", "min": 3, "max": 3, "cpu": 8, "gpu": 2}]}
    groups = [group("gpu", ["g5.12xlarge"], (0, 2, 8), 200), group("cpu", ["m5.xlarge"], (1, 1, 2), 100)]
    release = price(ray=ray, node_groups=groups)["release"]
    # Two pods with two GPUs each on a node of four: three pods need two nodes.
    assert release["nodes"][0]["max"] == 2


def test_each_kind_of_gpu_is_on_its_own_nodes() -> None:
    kinds = [{"name": kind, "accelerator": kind, "cpu": 2, "gpu": 1} for kind in ("nvidia-t4", "nvidia-a10g")]
    ray = {"head_cpu": 1, "groups": [{**group, "min": 1, "max": 3} for group in kinds]}
    groups = [("gpu", "g4dn.xlarge"), ("big", "g5.12xlarge"), ("cpu", "m5.xlarge")]
    report = price(ray=ray, node_groups=[group(name, [kind], (1, 2, 8), 200) for name, kind in groups])
    assert [(node["group"], node["max"]) for node in report["release"]["nodes"]] == [("gpu", 3), ("big", 1), ("cpu", 1)]


def test_a_release_that_has_no_room_is_told() -> None:
    assert any("max_size is 4" in text for text in price()["notes"])
    roomy = [group("cpu", ["m5.2xlarge"], (2, 2, 3), 100), group("gpu", ["g4dn.xlarge"], (1, 2, 8), 200)]
    assert not any("max_size" in text for text in price(node_groups=roomy)["notes"])


def test_gpu_pods_without_a_gpu_group_are_not_priced_as_nothing() -> None:
    release = price(node_groups=[group("cpu", ["m5.2xlarge"], (2, 2, 3), 100)])
    assert release["release"]["hourly"] is None
    assert any("GPU pods" in text for text in release["notes"])


# --- output ----------------------------------------------------------------------------------------------------------


def test_tables_are_aligned() -> None:
    lines = rayplane_cost.cost_table(price(**DEV)).splitlines()
    table = [line for line in lines if re.search(r" \d[\d,]*\.\d\d$", line)]
    assert len({len(line) for line in table}) == 1
    assert any("spot" in line and "*" not in line and line.startswith("node group gpu") for line in table)
    assert any("on demand *" in line and line.startswith("node group gpu") for line in table)


def test_totals_of_several_clusters() -> None:
    reports = [price(name="dev", **DEV), price(), price(name="prod", **PROD)]
    total = rayplane_cost.cost_total(reports)
    assert total["totals"]["declared"] == [2665.70, 3619.89, 9353.29]
    assert total["incomplete"] == []
    broken = price(name="broken", region="mars-north-1")
    total = rayplane_cost.cost_total([*reports, broken])
    assert total["totals"]["declared"] is None
    assert total["incomplete"] == ["broken"]
    assert "broken" in rayplane_cost.cost_total_table(total, [*reports, broken])


# --- the table in the repository -------------------------------------------------------------------------------------


def test_the_table_names_its_sources_and_their_days() -> None:
    assert TABLE["currency"] == "USD"
    for source in TABLE["sources"]:
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", source["date"]), source
        assert source["address"].startswith("https://")


def test_the_table_has_what_the_default_clusters_need() -> None:
    for region in ("us-west-2", "us-east-1", "eu-west-1", "eu-central-1", "ap-northeast-1"):
        instances, services = TABLE["regions"][region]["instances"], TABLE["regions"][region]["services"]
        assert {"m5.xlarge", "m5.2xlarge", "g4dn.xlarge", "g4dn.2xlarge", "g5.xlarge", "t3.micro"} <= set(instances)
        assert {"gp3_gb", "nat_hour", "nat_gb", "endpoint_hour", "endpoint_gb"} <= set(services)


def test_prices_are_plausible() -> None:
    for region, entry in TABLE["regions"].items():
        for name, prices in entry["instances"].items():
            assert 0 < prices["on_demand"] < 100, (region, name)
            assert 20 <= prices.get("spot_saving", 50) <= 95, (region, name)
            family, _, size = name.partition(".")
            if size == "2xlarge" and f"{family}.xlarge" in entry["instances"] and family in ("m5", "c5", "r5", "t3"):
                twice = entry["instances"][f"{family}.xlarge"]["on_demand"] * 2
                assert prices["on_demand"] == pytest.approx(twice), (region, name)


# --- the playbook ----------------------------------------------------------------------------------------------------


def run_cost(tmp_path: Path, *arguments: str) -> tuple[Any, dict[str, Any]]:
    target = tmp_path / "cost.json"
    result = run_ansible("ansible-playbook", "playbooks/cost.yml", "-e", f"cost_report_file={target}", *arguments)
    return result, json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}


@pytest.mark.parametrize("name", ["fleet", "local"])
def test_our_inventories_are_priced_completely(name: str, tmp_path: Path) -> None:
    result, report = run_cost(tmp_path, "-i", f"inventories/{name}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert report["total"]["incomplete"] == []
    low, begin, high = report["total"]["totals"]["declared"]
    assert 100 < low <= begin <= high


def test_inventory_and_command_line_win_over_the_roles_defaults(tmp_path: Path) -> None:
    """The play knows the roles' defaults (which read each other), and both stronger sources override them."""
    endpoints = ["ec2", "ecr.api", "ecr.dkr", "eks-auth", "sts", "autoscaling", "eks"]
    closed = {"network_nat_mode": "none", "network_interface_endpoints": endpoints}
    given = json.dumps({"eks_gpu_instance_types": ["g4dn.2xlarge"], **closed})
    result, report = run_cost(tmp_path, "-i", "inventories/prod", "-e", given)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {entry["item"]: entry for entry in next(iter(report["clusters"].values()))["rows"]}
    # From the command line, through the default of eks_node_groups.
    assert rows["node group gpu"]["detail"] == "g4dn.2xlarge"
    assert "NAT gateways" not in rows
    assert "interface endpoints" in rows
    # From the role's defaults.
    assert rows["root disks gpu"]["detail"].startswith("200 GiB")


def test_a_limit_that_is_exceeded_fails_with_one_message(tmp_path: Path) -> None:
    result, _ = run_cost(tmp_path, "-i", "inventories/prod", "-e", '{"cost_monthly_limit": 1000}')
    assert result.returncode == 2
    assert result.stdout.count("fatal: ") == 1
    assert "cost_monthly_limit is 1000" in result.stdout
    assert "costs up to" in result.stdout


def test_a_missing_price_breaks_the_limit(tmp_path: Path) -> None:
    group = {"name": "big", "instance_types": ["p5e.48xlarge"], "ami_type": "AL2023_x86_64_NVIDIA", "max_size": 1}
    sizes = {"min_size": 0, "desired_size": 1, "disk_size": 100}
    extra = json.dumps({"eks_extra_node_groups": [{**group, **sizes}]})
    arguments = ("-i", "inventories/dev", "-e", extra)
    result, report = run_cost(tmp_path, *arguments)
    assert result.returncode == 0
    assert report["total"]["incomplete"] == ["ray-llm-cluster-dev"]
    result, _ = run_cost(tmp_path, *arguments, "-e", '{"cost_monthly_limit": 1000000}')
    assert result.returncode == 2
    assert "prices are missing" in result.stdout


def test_clusters_of_other_platforms_are_told_apart(tmp_path: Path) -> None:
    result, report = run_cost(tmp_path, "-i", "inventories/existing", "-e", "images_registry=registry.of.ours/llm")
    assert result.returncode == 0, result.stdout + result.stderr
    assert report == {}
    assert "no price table" in result.stdout
