"""The benchmark's own arithmetic and looks; what it measures is run by `make bench`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "bench"))

import rerun
from terraform_twin import Account, Twin, tags_of


def test_stages_are_read_from_the_table_below_a_run() -> None:
    output = "PLAY RECAP\nSTAGES ***\nstage            time  changed  failed\nnetwork         0.6 s        1\n"
    output += "eks             1.8 s\n---------\ntotal           2.4 s        1\n"
    assert rerun.stages(output) == [("network", 0.6), ("eks", 1.8), ("total", 2.4)]


def test_calls_of_a_kind_are_counted_together() -> None:
    assert rerun.shape("/clusters/one/node-groups/gpu") == "/clusters/*/node-groups/*"
    assert rerun.shape("/bucket?versioning=&x=1") == "/bucket?versioning&x"


def test_the_provider_is_found_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "share"))
    monkeypatch.delenv("TERRAFORM_PLUGIN_DIR", raising=False)
    assert rerun.plugin_folder() is None
    implied = tmp_path / "home" / ".terraform.d" / "plugins"
    (implied / rerun.PROVIDER).mkdir(parents=True)
    assert rerun.plugin_folder() == implied
    named = tmp_path / "mirror"
    monkeypatch.setenv("TERRAFORM_PLUGIN_DIR", str(named))
    assert rerun.plugin_folder() == implied
    (named / rerun.PROVIDER).mkdir(parents=True)
    assert rerun.plugin_folder() == named


def test_ids_of_the_account_become_references() -> None:
    twin = Twin(Account("http://127.0.0.1:1", "000000000001", "us-west-2"))
    twin.add("aws_vpc", "vpc0", {"cidr_block": "10.0.0.0/16", "tags": {}}, id="vpc-1")
    twin.add("aws_subnet", "subnet_10.0.0.0/24", {"vpc_id": twin.ref("vpc-1")}, id="subnet-1")
    twin.add("aws_subnet", "subnet_10.0.0.0/24", {"vpc_id": twin.ref("vpc-1")}, id="subnet-2")
    assert twin.resources["aws_vpc"] == {"vpc0": {"cidr_block": "10.0.0.0/16"}}
    assert list(twin.resources["aws_subnet"]) == ["subnet_10_0_0_0_24", "subnet_10_0_0_0_24_1"]
    assert twin.ref(["subnet-2", "subnet-9"]) == ["${aws_subnet.subnet_10_0_0_0_24_1.id}", "subnet-9"]
    assert twin.count().total() == 3


def test_tags_of_aws_itself_are_left_alone() -> None:
    assert tags_of([{"Key": "aws:eks:cluster-name", "Value": "x"}, {"Key": "Name", "Value": "y"}]) == {"Name": "y"}
    assert tags_of({"a": "b"}) == {"a": "b"}
