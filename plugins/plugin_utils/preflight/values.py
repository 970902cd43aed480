# Copyright (c) rayplane contributors
# SPDX-License-Identifier: Apache-2.0
"""Kinds of values and names that several systems agree on, and why they refuse one."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from ansible_collections.rayplane.platform.plugins.module_utils.kube.quantity import quantity
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem

__all__ = [
    "DNS_1035_LABEL",
    "DNS_LABEL",
    "HUB_ID",
    "Values",
    "as_label",
    "bounds",
    "bucket_name_problem",
    "cidr_problems",
    "entries_of",
    "quantity_problem",
    "strings",
    "taken_name",
    "whole",
]

#: The variables of one cluster, templated, by name; what could not be templated is missing.
Values = Mapping[str, Any]

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
DNS_1035_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]*[a-z0-9]")


def whole(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def strings(values: Any) -> TypeGuard[Sequence[str]]:
    """Whether it is a list of texts."""
    return (
        isinstance(values, Sequence) and not isinstance(values, str) and all(isinstance(value, str) for value in values)
    )


def as_label(name: str, letter: bool = False) -> str:
    """A cure: the label nearest to a name."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63].rstrip("-")
    if letter and label[:1].isdigit():
        label = f"r{label}"
    return f"write {label}" if label else "choose another name"


def taken_name(path: str, name: Any, seen: dict[str, str]) -> Iterator[Problem]:
    """The problem of a group's name that another group has; ``seen`` remembers the path of each name."""
    if not isinstance(name, str):
        return
    if name in seen:
        yield Problem(f"{path}.name", name, f"the name is taken by {seen[name]}", "give each group its own name")
    seen.setdefault(name, path)


def entries_of(values: Values, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each mapping in a list variable with its path; what is no mapping is left out."""
    entries = values.get(name)
    for index, entry in enumerate(entries if isinstance(entries, list | tuple) else ()):
        if isinstance(entry, Mapping):
            yield f"{name}[{index}]", entry


def bounds(path: str, low: Any, high: Any, names: tuple[str, str] = ("min", "max")) -> Iterator[Problem]:
    """Two bounds that a range is made of: whole numbers from 0 on, in order, and room for at least one."""
    for name, value in zip(names, (low, high), strict=True):
        if whole(value) and value < 0:
            yield Problem(
                f"{path}.{name}", value, "a number of replicas or nodes cannot be negative", "write 0 or more"
            )
    if whole(low) and whole(high) and low > high >= 0:
        yield Problem(
            f"{path}.{names[1]}",
            high,
            f"it is below {names[0]}, which is {low}",
            f"write {low} or more, or lower {names[0]}",
        )
    elif whole(high) and high == 0:
        yield Problem(
            f"{path}.{names[1]}",
            high,
            "with at most none there will never be one",
            "write 1 or more, or take the entry out",
        )


def cidr_problems(variable: str, blocks: Any, ipv6: bool = False) -> Iterator[Problem]:
    """What is wrong with a CIDR block, or with each of a list of them."""
    network: Any = ipaddress.ip_network if ipv6 else ipaddress.IPv4Network
    alone = [(variable, blocks)] if isinstance(blocks, str) else []
    for where, block in alone or ((f"{variable}[{i}]", one) for i, one in enumerate(blocks if strings(blocks) else ())):
        try:
            network(block)
        except ValueError as error:
            try:
                cure = f"write {network(block, strict=False)}"
            except ValueError:
                cure = "write a block such as 10.0.0.0/16" + ("" if ipv6 else ", of IPv4")
            yield Problem(where, block, f"it is no CIDR block: {error}", cure)


def bucket_name_problem(name: str) -> tuple[str, str] | None:
    """Why S3 refuses a name of a general purpose bucket, and what to do; None where it takes it.

    After "General purpose bucket naming rules" of the S3 user guide.
    """
    fixed = (
        re.sub(r"-{2,}", "-", re.sub(r"[^a-z0-9.-]", "-", re.sub(r"\.{2,}", ".", name.lower())))
        .strip("-.")[:63]
        .rstrip("-.")
    )
    write = f"write {fixed}" if len(fixed) >= 3 and fixed != name else "choose another name"
    if not 3 <= len(name) <= 63:
        return f"S3 takes 3 to 63 characters, this name has {len(name)}", write
    if not _BUCKET.fullmatch(name):
        return "S3 takes lower-case letters, digits, dots and hyphens only, with a letter or digit at both ends", write
    if ".." in name:
        return "S3 refuses two dots in a row", write
    if re.fullmatch(r"\d+\.\d+\.\d+\.\d+", name):
        return "S3 refuses names that look like an IP address", "choose a name with a letter in it"
    for prefix in ("xn--", "sthree-", "amzn-s3-demo-"):
        if name.startswith(prefix):
            return f"names that start with {prefix} belong to AWS", f"write {name.removeprefix(prefix)}"
    for suffix in ("-s3alias", "--ol-s3", ".mrap", "--x-s3", "--table-s3"):
        if name.endswith(suffix):
            return f"names that end with {suffix} belong to AWS", f"write {name.removesuffix(suffix)}"
    return None


def quantity_problem(value: Any) -> tuple[str, str] | None:
    """Why Kubernetes refuses a quantity such as ``16Gi`` or ``500m``, and what to do; None where it takes it."""
    try:
        amount = quantity(value)
    except ValueError:
        number = re.match(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT])i?[bB]?\s*$", str(value))
        cure = (
            f"write {number[1]}{number[2].upper()}i"
            if number
            else "write a number with an optional unit, such as 4, 500m or 16Gi"
        )
        return "it is no Kubernetes quantity", cure
    return None if amount > 0 else ("a quantity of resources is above 0", "write 1 or more")
