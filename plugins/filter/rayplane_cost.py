# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Prices a cluster as declared: pure arithmetic over a price table, without a call to anybody.

Money is counted in Decimal. A month has 730 hours (8760 / 12), as AWS's own price calculator counts it. Every row is
rounded to cents and totals add the rounded rows, so that a printed table adds up. A price that is not known is never
zero: its row has no amount, and every total that would hold it is incomplete.

An amount is a triple: fewest nodes, nodes to begin with, most nodes.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.rayplane.platform.plugins.module_utils.aws.instances import gpus_of_instance, vcpus_of
from ansible_collections.rayplane.platform.plugins.module_utils.kube.quantity import quantity
from ansible_collections.rayplane.platform.plugins.module_utils.serving.gpus import gpu_of_instance, gpus_named

__all__ = ["FilterModule", "cost_json", "cost_report", "cost_table", "cost_total", "cost_total_table"]

Json = dict[str, Any]
Triple = tuple[Decimal, Decimal, Decimal]

HOURS_PER_MONTH = Decimal(730)
CENT = Decimal("0.01")
ZERO: Triple = (Decimal(0), Decimal(0), Decimal(0))
TOTALS = ("declared", "on_demand", "spot")

_TYPE = re.compile(r"(?P<category>[a-z]+)(?P<generation>\d+)(?P<rest>[a-z-]*)\.(?P<size>[a-z0-9-]+)\Z")


def _decimal(value: Any, what: str) -> Decimal:
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        raise AnsibleFilterError(f"{what} is {value!r}: a number is needed") from None
    if not number.is_finite() or number < 0:
        raise AnsibleFilterError(f"{what} is {value!r}: a number of at least 0 is needed")
    return number


def _cents(amount: Decimal) -> Decimal:
    return amount.quantize(CENT, ROUND_HALF_UP)


class _Prices:
    """The price table of one region, with what the inventory adds, and every price that was asked for in vain."""

    def __init__(self, table: Mapping[str, Any], extra: Mapping[str, Any], region: str) -> None:
        self.region = region
        self._gpus: Json = {}
        known = (table.get("regions") or {}).get(region) or {}
        given = extra.get(region) or {}
        unknown = sorted(set(given) - {"instances", "services"})
        if unknown:
            raise AnsibleFilterError(
                f"cost_prices_extra.{region} has {', '.join(unknown)}: known are instances and services"
            )
        self.services: Json = {**(table.get("services") or {}), **(known.get("services") or {})}
        self.services |= given.get("services") or {}
        self.instances: dict[str, Json] = {name: dict(entry) for name, entry in (known.get("instances") or {}).items()}
        for name, entry in (given.get("instances") or {}).items():
            self.instances[name] = self.instances.get(name, {}) | dict(entry)
            if "gpus" in entry:
                self._gpus[name] = entry["gpus"]
        self.missing: list[str] = []

    def gpus(self, kind: str) -> int:
        """NVIDIA GPUs of an instance type."""
        return int(self._gpus.get(kind, gpus_of_instance(kind)) or 0)

    def service(self, name: str, item: str) -> Decimal | None:
        """USD for one unit of a service, or None, which is noted."""
        if name in self.services:
            return _decimal(self.services[name], f"price {name} of {self.region}")
        self._note(
            f"{item}: the price table has no {name} for {self.region}; add "
            f"cost_prices_extra: {{{self.region}: {{services: {{{name}: USD}}}}}}"
        )
        return None

    def instance(self, name: str, market: str, item: str, needed: bool = True) -> Decimal | None:
        """USD an hour of an instance ``on_demand`` or on ``spot``, or None, which is noted where it is ``needed``.

        A spot price is given as such, or by its saving over the price on demand in percent, as AWS's Spot Instance
        Advisor gives it.
        """
        entry = self.instances.get(name, {})
        if market in entry:
            return _decimal(entry[market], f"price of {name} in {self.region}")
        if market == "spot" and {"on_demand", "spot_saving"} <= set(entry):
            share = 1 - _decimal(entry["spot_saving"], f"spot_saving of {name} in {self.region}") / 100
            return _decimal(entry["on_demand"], f"price of {name} in {self.region}") * share
        if needed:
            self._note(
                f"{item}: the price table has no {market.replace('_', ' ')} price of {name} in {self.region}; add "
                f"cost_prices_extra: {{{self.region}: {{instances: {{{name}: {{{market}: USD per hour}}}}}}}}"
            )
        return None

    def _note(self, text: str) -> None:
        if text not in self.missing:
            self.missing.append(text)


def _times(price: Decimal | None, counts: Iterable[Any], hours: Decimal = HOURS_PER_MONTH) -> Triple | None:
    """Monthly amounts of ``counts`` units at ``price`` an hour."""
    if price is None:
        return None
    low, begin, high = (_cents(price * Decimal(str(count)) * hours) for count in counts)
    return low, begin, high


def _row(item: str, detail: str, count: str, price: Decimal | None, unit: str, **amounts: Any) -> Json:
    """One row. ``amounts``: on_demand and spot (triples or None), and which of the two is declared."""
    return {"item": item, "detail": detail, "count": count, "price": price, "unit": unit, "market": ""} | amounts


def _flat(item: str, detail: str, count: Any, price: Decimal | None, unit: str, *, monthly: bool = False) -> Json:
    """A row that is the same whatever the nodes are: ``count`` units at ``price``, an hour or (``monthly``) a month."""
    amount = _times(price, [count] * 3, Decimal(1) if monthly else HOURS_PER_MONTH)
    return _row(item, detail, str(count), price, unit, on_demand=amount, spot=amount)


def _node_group_rows(group: Mapping[str, Any], prices: _Prices) -> list[Json]:
    """Nodes and root disks of one managed node group.

    EKS takes the instance types in order on demand and as they are to be had on spot, so nodes to begin with are
    priced as the first type, the fewest as the cheapest and the most as the dearest.
    """
    name, types = str(group["name"]), [str(kind) for kind in group.get("instance_types") or []]
    counts = [int(group.get(key, 0)) for key in ("min_size", "desired_size", "max_size")]
    declared = "spot" if group.get("capacity_type") == "SPOT" else "on_demand"
    item = f"node group {name}"
    if not types:
        prices.missing.append(f"{item}: it names no instance types, so nothing can be priced; give instance_types")
    row = _row(item, ", ".join(types), "/".join(map(str, counts)), None, "h", market=declared)
    for market in ("on_demand", "spot"):
        each = [prices.instance(kind, market, item, needed=market == declared) for kind in types]
        known = [price for price in each if price is not None]
        row[market], row[f"{market}_price"] = None, None
        if known and len(known) == len(types):
            picked = (min(known), known[0], max(known))
            low, begin, high = (
                _cents(price * count * HOURS_PER_MONTH) for price, count in zip(picked, counts, strict=True)
            )
            row[market], row[f"{market}_price"] = (low, begin, high), known[0]
    row["price"] = row[f"{declared}_price"]
    return [row, *_disk_rows(name, group, counts, prices)]


def _disk_rows(name: str, node: Mapping[str, Any], counts: Sequence[int], prices: _Prices) -> list[Json]:
    """Root disks of nodes: their size, and what they have above gp3's own 3000 IOPS and 125 MiB/s."""
    size = int(node.get("disk_size") or 20)
    parts = [("root disks", f"{size} GiB gp3 each", size, "gp3_gb", "GB month")]
    for option, unit, free in (("iops", "IOPS", 3000), ("throughput", "MiB/s", 125)):
        more = int(node.get(f"disk_{option}") or 0) - free
        if more > 0:
            parts.append((f"disk {option}", f"{more} above {free} each", more, f"gp3_{option}", f"{unit} month"))
    rows = []
    for item, detail, each, service, unit in parts:
        price = prices.service(service, f"{item} {name}")
        amount = _times(price, [count * each for count in counts], Decimal(1))
        count = "/".join(map(str, counts))
        rows.append(_row(f"{item} {name}", detail, count, price, unit, on_demand=amount, spot=amount))
    return rows


def _pool_types(pool: Mapping[str, Any], prices: _Prices) -> list[str]:
    """Instance types of the price table that a Karpenter NodePool may start."""
    if pool.get("instance_types"):
        return [str(kind) for kind in pool["instance_types"]]
    found = []
    for kind in prices.instances:
        match = _TYPE.fullmatch(kind)
        if not match or not vcpus_of(kind):
            continue
        family = kind.partition(".")[0]
        arm = "g" in match["rest"]
        if (
            (not pool.get("instance_families") or family in pool["instance_families"])
            and (not pool.get("instance_categories") or match["category"] in pool["instance_categories"])
            and (not pool.get("instance_sizes") or match["size"] in pool["instance_sizes"])
            and int(match["generation"]) >= int(pool.get("min_generation") or 0)
            and ("arm64" if arm else "amd64") in (pool.get("architectures") or ["amd64"])
            and (pool.get("accelerator") != "nvidia" or prices.gpus(kind))
        ):
            found.append(kind)
    return found


def _pool_market(pool: Mapping[str, Any]) -> str:
    return "on_demand" if "on-demand" in (pool.get("capacity_types") or ["on-demand"]) else "spot"


def _pool_room(limits: Mapping[str, Any], kind: str, prices: _Prices) -> int | None:
    """Nodes of one type that a NodePool's limits allow; None where they say nothing of it. Memory is left out."""
    room: list[int] = []
    if "cpu" in limits and (vcpus := vcpus_of(kind)):
        room.append(int(quantity(limits["cpu"]) // vcpus))
    if "nvidia.com/gpu" in limits and (gpus := prices.gpus(kind)):
        room.append(int(limits["nvidia.com/gpu"]) // gpus)
    return min(room, default=None)


def _pool_rows(pool: Mapping[str, Any], prices: _Prices, cluster: Mapping[str, Any], notes: list[str]) -> list[Json]:
    """Nodes and root disks of a Karpenter NodePool: at least nothing, at most what its limits allow of the dearest.

    To begin with it is priced as what Ray's smallest size needs of the cheapest type.
    """
    item, limits, declared = f"node pool {pool['name']}", pool.get("limits") or {}, _pool_market(pool)
    kinds = _pool_types(pool, prices)
    row = _row(item, f"{len(kinds)} types", "by limits", None, "h", market=declared, on_demand=None, spot=None)
    if not kinds:
        prices.missing.append(f"{item}: the price table has no type of {prices.region} that it may start")
    elif not pool.get("instance_types"):
        notes.append(f"{item} is priced by the {len(kinds)} types of the price table that it may start")
    rooms = {kind: _pool_room(limits, kind, prices) for kind in kinds}
    if not {"cpu", "nvidia.com/gpu"} & set(limits):
        prices.missing.append(f"{item}: without limits (cpu or nvidia.com/gpu) its cost has no upper bound; set limits")
        return [row]
    counts = (0, 0)
    for market in ("on_demand", "spot"):
        begin: list[tuple[Decimal, int]] = []
        most: list[Decimal] = []
        for kind, room in rooms.items():
            named = bool(pool.get("instance_types"))
            price = prices.instance(kind, market, item, needed=market == declared and named)
            if price is None and named:
                most = []
                break
            if price is None or room is None:
                continue
            most.append(price * room)
            needed = _nodes(cluster["ray"], kind, prices, "min", pool.get("accelerator") == "nvidia")
            if needed is not None and needed <= room:
                begin.append((price * needed, needed))
        if most:
            amount, nodes = min(begin, default=(Decimal(0), 0))
            row[market] = (Decimal(0), _cents(amount * HOURS_PER_MONTH), _cents(max(most) * HOURS_PER_MONTH))
            if market == declared:
                counts = (nodes, max(room or 0 for room in rooms.values()))
    node = cluster["node_classes"].get(pool.get("node_class") or "default") or {}
    return [row, *_disk_rows(pool["name"], node, (0, *counts), prices)]


def _nodes(
    ray: Mapping[str, Any], kind: str, prices: _Prices, bound: str, gpu: bool, *, percent: int = 100
) -> int | None:
    """Nodes of one type that hold ``percent`` of Ray's pods with (``gpu``) or without GPUs; None where they do not fit.

    A lower bound: what the system itself takes of a node, and memory, are left out.
    """
    nodes, spare = 0, quantity(ray["head_cpu"]) if not gpu else 0.0
    for group in ray["groups"]:
        each = int(group.get("gpu", 0))
        pods = math.ceil(int(group[bound]) * percent / 100)
        if gpu and each:
            on_one = prices.gpus(kind) // each
            if not on_one:
                return None
            nodes += math.ceil(pods / on_one)
        elif not gpu and not each:
            spare += pods * quantity(group["cpu"])
    if not gpu:
        capacity = vcpus_of(kind)
        return math.ceil(spare / capacity) if capacity else None
    return nodes


def _release(cluster: Mapping[str, Any], prices: _Prices) -> Json:
    """What a release costs on top: the second Ray cluster beside the first one, for as long as both are there.

    KubeRay's NewCluster makes a whole second Ray cluster before it moves the traffic; NewClusterWithIncrementalUpgrade
    adds at most maxSurgePercent of it (KubeRay's RayService API, ``upgradeStrategy``); None makes none.
    """
    ray, strategy = cluster["ray"], str(cluster["upgrade_strategy"])
    percent = {"NewCluster": 100, "None": 0}.get(strategy, int(cluster["surge_percent"]))
    minutes = _decimal(cluster["overlap_minutes"], "cost_release_overlap_minutes")
    release: Json = {"strategy": strategy, "surge_percent": percent, "overlap_minutes": minutes}
    release |= {"nodes": [], "notes": []}
    hourly: list[Decimal] | None = [Decimal(0), Decimal(0)]
    for part, accelerator, gpu in _parts(ray) if percent else ():
        home = _home(cluster, prices, part, gpu, accelerator)
        if home is None:
            what = f"GPU ({accelerator})" if accelerator else "GPU" if gpu else "CPU"
            release["notes"].append(f"no node group holds Ray's {what} pods, so their part of a release is not counted")
            hourly = None
            continue
        group, kind, market, room = home
        extra = [_nodes(part, kind, prices, bound, gpu, percent=percent) or 0 for bound in ("min", "max")]
        # Where there is none, the group's own row says so.
        price = prices.instance(kind, market, group, needed=False)
        release["nodes"].append(
            {"group": group, "type": kind, "min": extra[0], "max": extra[1], "price": price, "market": market}
        )
        for bound, more in zip(("min", "max"), extra, strict=True):
            held = _nodes(part, kind, prices, bound, gpu) or 0
            if room is not None and held + more > room:
                size = {"min": "smallest", "max": "largest"}[bound]
                release["notes"].append(
                    f"a release at Ray's {size} size needs {held + more} nodes in group {group}, whose "
                    f"max_size is {room}: the new Ray cluster waits until there is room"
                )
                break
        if price is None:
            hourly = None
        elif hourly is not None:
            hourly = [total + price * count for total, count in zip(hourly, extra, strict=True)]
    release["hourly"] = hourly
    release["once"] = None if hourly is None else [_cents(amount * minutes / 60) for amount in hourly]
    return release


def _parts(ray: Mapping[str, Any]) -> list[tuple[Json, str, bool]]:
    """Ray's pods by the nodes that they need: those of each accelerator (empty: any GPU), and those without GPUs."""
    groups = [(str(group.get("accelerator") or ""), group) for group in ray["groups"] if int(group.get("gpu", 0))]
    kinds = dict.fromkeys(name for name, _ in groups)
    parts = [({**ray, "groups": [group for name, group in groups if name == kind]}, kind, True) for kind in kinds]
    return [*parts, (dict(ray), "", False)]


def _home(
    cluster: Mapping[str, Any], prices: _Prices, ray: Mapping[str, Any], gpu: bool, accelerator: str
) -> tuple[str, str, str, int | None] | None:
    """Where Ray's pods with or without GPUs go: name of the group, its first type, its market, its largest size.

    The first node group that they fit on, with their accelerator; with Karpenter else the cheapest type of a node pool.
    """
    named = gpus_named(accelerator) if accelerator else ()

    def fits(kind: str) -> bool:
        neuron = kind.startswith(("inf", "trn"))
        if named and gpu_of_instance(kind) not in named:
            return False
        return bool(prices.gpus(kind)) == gpu and not neuron and _nodes(ray, kind, prices, "max", gpu) is not None

    for group in cluster["node_groups"]:
        types = [str(kind) for kind in group.get("instance_types") or []]
        if types and fits(types[0]):
            market = "spot" if group.get("capacity_type") == "SPOT" else "on_demand"
            return str(group["name"]), types[0], market, int(group.get("max_size", 0))
    for pool in cluster["node_pools"]:
        market = _pool_market(pool)
        priced = []
        for kind in filter(fits, _pool_types(pool, prices)):
            price, needed = prices.instance(kind, market, kind, needed=False), _nodes(ray, kind, prices, "min", gpu)
            if price is not None and needed is not None:
                priced.append((price * needed, kind))
        if priced:
            return str(pool["name"]), min(priced)[1], market, None
    return None


def _control_plane(cluster: Mapping[str, Any], prices: _Prices, table: Mapping[str, Any], notes: list[str]) -> Json:
    """The EKS cluster itself: dearer once standard support of its Kubernetes version has ended (EKS pricing page).

    With eks_support_type STANDARD AWS upgrades the cluster at that day, so it is never in extended support.
    """
    version, support = str(cluster["kubernetes_version"]), str(cluster["support"])
    ends = (table.get("eks_standard_support_until") or {}).get(version)
    if support == "auto":
        today = datetime.date.fromisoformat(str(cluster["date"]))
        over = bool(ends) and today > datetime.date.fromisoformat(str(ends))
        support = "extended" if over and cluster["support_type"] != "STANDARD" else "standard"
        if ends and not over:
            after = "AWS upgrades it" if cluster["support_type"] == "STANDARD" else "the control plane costs more"
            notes.append(f"standard support of Kubernetes {version} ends on {ends}; after it {after}")
        elif not ends:
            notes.append(f"the price table does not say when standard support of Kubernetes {version} ends")
    price = prices.service("eks_hour" if support == "standard" else "eks_extended_hour", "control plane")
    return _flat("control plane", f"Kubernetes {version}, {support} support", 1, price, "h")


def _fixed_rows(cluster: Mapping[str, Any], prices: _Prices) -> list[Json]:
    """What does not depend on the number of nodes: network, storage, keys, logs."""
    zones, assumed = int(cluster["zones"]), cluster["assumed"]
    rows: list[Json] = []

    def add(item: str, detail: str, count: Any, name: str, unit: str, *, monthly: bool = False) -> None:
        if _decimal(count, f"{item}, {detail}"):
            rows.append(_flat(item, detail, count, prices.service(name, item), unit, monthly=monthly))

    # In subnets of somebody else the way out is theirs, too.
    nats = 0 if cluster["subnets_exist"] else {"none": 0, "single": 1, "per_zone": zones}[cluster["nat_mode"]]
    add("NAT gateways", "", nats, "nat_hour", "h")
    if nats:
        add("NAT gateways", "data, assumed", assumed["nat_gb"], "nat_gb", "GB", monthly=True)
    endpoints = len(set(cluster["interface_endpoints"]))
    add("interface endpoints", f"{endpoints} in {zones} zones", endpoints * zones, "endpoint_hour", "h")
    if endpoints:
        add("interface endpoints", "data, assumed", assumed["endpoint_gb"], "endpoint_gb", "GB", monthly=True)
    bastion = str(cluster["bastion_type"])
    add("public IPv4 addresses", "", nats + bool(bastion), "ipv4_hour", "h")
    if bastion:
        rows.append(_flat("bastion", bastion, 1, prices.instance(bastion, "on_demand", "bastion"), "h"))
        add("bastion", "root disk, GiB gp3", cluster["bastion_disk"], "gp3_gb", "GB month", monthly=True)
    add("S3", "objects, assumed", assumed["s3_gb"], "s3_gb", "GB month", monthly=True)
    if cluster["replication"]:
        add("S3", "replicas, assumed; priced as here", assumed["s3_gb"], "s3_gb", "GB month", monthly=True)
    if cluster["efs"]:
        add("EFS", "files, assumed", assumed["efs_gb"], "efs_gb", "GB month", monthly=True)
    add("KMS keys", "", cluster["kms_keys"], "kms_key", "month", monthly=True)
    if cluster["log_types"]:
        add("CloudWatch Logs", "control plane, assumed", assumed["log_gb"], "log_gb", "GB", monthly=True)
    if cluster["flow_logs"]:
        add("CloudWatch Logs", "flow logs, assumed", assumed["flow_log_gb"], "log_gb", "GB", monthly=True)
    return rows


def _sum(rows: Sequence[Mapping[str, Any]], total: str) -> Triple | None:
    """Total of the rows at their declared market, or all on demand, or all on spot; None where an amount is missing."""
    amounts = [row[(row["market"] or "on_demand") if total == "declared" else total] for row in rows]
    if any(amount is None for amount in amounts):
        return None
    low, begin, high = (sum((amount[index] for amount in amounts), Decimal(0)) for index in range(3))
    return low, begin, high


def _known(rows: Sequence[Mapping[str, Any]]) -> Triple:
    """Declared total of the rows whose price is known: what an incomplete total is at least."""
    return _sum([row for row in rows if row[row["market"] or "on_demand"] is not None], "declared") or ZERO


def cost_report(cluster: Mapping[str, Any], table: Mapping[str, Any], extra: Mapping[str, Any]) -> Json:
    """Price one cluster.

    ``cluster`` is the role's ``__cost_cluster`` (roles/cost/vars/main.yml lists it), ``table`` the price table
    (roles/cost/files), ``extra`` prices of the inventory, which win: ``{region: {instances: {type: {on_demand, spot or
    spot_saving, gpus}}, services: {name: USD}}}``.

    Returns plain values (amounts in USD as floats of whole cents): ``rows``, ``totals`` (by ``declared``, ``on_demand``
    and ``spot``; None where a price is missing), ``known`` (declared total of what is known), ``missing`` (what to add,
    one message a price), ``release`` and ``notes``. Raises AnsibleFilterError where a price or a size is no number.
    """
    prices = _Prices(table, extra, str(cluster["region"]))
    notes: list[str] = []
    rows = [_control_plane(cluster, prices, table, notes)]
    for group in cluster["node_groups"]:
        rows += _node_group_rows(group, prices)
    for pool in cluster["node_pools"]:
        rows += _pool_rows(pool, prices, cluster, notes)
    rows += _fixed_rows(cluster, prices)
    release = _release(cluster, prices)
    report = {
        "cluster": str(cluster["name"]),
        "region": prices.region,
        "currency": str(table["currency"]),
        "prices_of": str(table["date"]),
        "hours": int(HOURS_PER_MONTH),
        "rows": rows,
        "totals": {total: _sum(rows, total) for total in TOTALS},
        "known": _known(rows),
        "release": release,
        "missing": prices.missing,
        "notes": notes + release.pop("notes"),
    }
    plain: Json = _plain(report)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def cost_total(reports: Sequence[Mapping[str, Any]]) -> Json:
    """Add the reports of several clusters: ``totals`` as in a report, ``known``, and how many are incomplete."""

    def add(amounts: Sequence[Any]) -> list[float] | None:
        if any(amount is None for amount in amounts):
            return None
        return [float(sum(Decimal(str(amount[index])) for amount in amounts)) for index in range(3)]

    return {
        "clusters": len(reports),
        "currency": reports[0]["currency"] if reports else "",
        "totals": {total: add([report["totals"][total] for report in reports]) for total in TOTALS},
        "known": add([report["known"] for report in reports]),
        "incomplete": [report["cluster"] for report in reports if report["missing"]],
    }


def _money(amounts: Sequence[float] | None) -> list[str]:
    return ["?"] * 3 if amounts is None else [f"{amount:,.2f}" for amount in amounts]


def _lines(rows: Sequence[Sequence[str]], rules: Iterable[int] = ()) -> list[str]:
    """Align columns: the first two to the left, the others to the right; a rule before each row of ``rules``."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        if number in rules:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
        cells = [
            f"{cell:<{width}}" if index < 2 else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


_MARKETS = {"on_demand": "on demand", "spot": "spot"}
_TOTAL_NAMES = {"declared": "total", "on_demand": "total, every node on demand", "spot": "total, every node on spot"}


def cost_table(report: Mapping[str, Any]) -> str:
    """The report as an aligned table, followed by what is missing, the cost of a release and the notes."""
    table = [["item", "", "count", "USD each", "min", "begin", "max"]]
    for row in report["rows"]:
        for market in ("on_demand", "spot"):
            if not row["market"] and market == "spot":
                continue
            price = row.get(f"{market}_price", row["price"]) if row["market"] else row["price"]
            aside = bool(row["market"]) and row["market"] != market
            detail = f"{row['detail']}, {_MARKETS[market]}{' *' if aside else ''}" if row["market"] else row["detail"]
            each = "?" if price is None else f"{price:,.5f}".rstrip("0").rstrip(".") + f" / {row['unit']}"
            if row["count"] == "by limits":
                each = ""
            table.append([row["item"], detail, row["count"], each, *_money(row[market])])
    body = len(table)
    for total, name in _TOTAL_NAMES.items():
        table.append([name, "", "", "", *_money(report["totals"][total])])
    currency, region = report["currency"], report["region"]
    lines = [
        f"{report['cluster']} in {region}: {currency} a month of {report['hours']} hours, list prices of "
        f"{report['prices_of']}",
        *_lines(table, [1, body]),
    ]
    if any(row["market"] for row in report["rows"]):
        lines.append("* not in the total, which counts each node group as it is declared")
    if report["missing"]:
        known = " / ".join(_money(report["known"]))
        lines += ["", f"INCOMPLETE: {len(report['missing'])} prices are missing. Without them it is {known}."]
        lines += [f"  - {text}" for text in report["missing"]]
    lines += ["", *_release_lines(report["release"], currency)]
    lines += [f"Note: {text}." for text in report["notes"]]
    return "\n".join(line.rstrip() for line in lines)


def _release_lines(release: Mapping[str, Any], currency: str) -> list[str]:
    what = f"A release ({release['strategy']}, {release['surge_percent']} % more Ray pods)"
    if not release["surge_percent"]:
        return [f"{what} costs nothing on top."]
    nodes = [
        f"{node['min']} to {node['max']} x {node['type']} ({_MARKETS[node['market']]}) in group {node['group']}"
        for node in release["nodes"]
    ]
    if release["hourly"] is None:
        return [f"{what} cannot be priced: {'; '.join(nodes) or 'see the notes'}."]
    hourly = " to ".join(f"{amount:,.2f}" for amount in release["hourly"])
    once = " to ".join(f"{amount:,.2f}" for amount in release["once"])
    return [
        f"{what} costs {hourly} {currency} an hour of overlap, {once} {currency} each "
        f"({release['overlap_minutes']:g} min):",
        *(f"  {text}" for text in nodes),
    ]


def cost_total_table(total: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> str:
    """One line a cluster, and their sum."""
    table = [["cluster", "region", "min", "begin", "max"]]
    for report in reports:
        name = report["cluster"] + (" (incomplete)" if report["missing"] else "")
        table.append([name, report["region"], *_money(report["totals"]["declared"])])
    body = len(table)
    for key, name in _TOTAL_NAMES.items():
        table.append([name, "", *_money(total["totals"][key])])
    lines = [f"{total['clusters']} clusters: {total['currency']} a month", *_lines(table, [1, body])]
    if total["incomplete"]:
        known = " / ".join(_money(total["known"]))
        lines += ["", f"INCOMPLETE: prices are missing for {', '.join(total['incomplete'])}. Without: {known}."]
    return "\n".join(lines)


def cost_json(reports: Sequence[Mapping[str, Any]], assumptions: Mapping[str, Any], sources: Any) -> Json:
    """The file that other programs read: every report, their total, what was assumed, and where prices come from."""
    return {
        "total": cost_total(reports),
        "clusters": {report["cluster"]: dict(report) for report in reports},
        "assumptions": dict(assumptions),
        "sources": sources,
    }


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {
            "cost_json": cost_json,
            "cost_report": cost_report,
            "cost_table": cost_table,
            "cost_total": cost_total,
            "cost_total_table": cost_total_table,
        }
