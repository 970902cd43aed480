"""What the account and the hub are asked before anything is made: quotas, machines in zones, names, administrators."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Changes
from ansible_collections.rayplane.platform.plugins.module_utils.aws.instances import vcpus_of
from ansible_collections.rayplane.platform.plugins.modules import aws_account
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight import account
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.hub import check_hub, known_gated
from ansible_collections.rayplane.platform.plugins.plugin_utils.preflight.problem import Problem
from aws_fake import FakeClient, refusal
from test_preflight_rules import found

ME = {"Account": "123456789012", "Arn": "arn:aws:sts::123456789012:assumed-role/deployer/session"}
ROLE = "arn:aws:iam::123456789012:role/deployer"
ADMIN = [{"policy": "AmazonEKSClusterAdminPolicy"}]
VALUES: dict[str, Any] = {
    "platform_cluster_name": "c1",
    "network_availability_zones": ["a", "b"],
    "eks_node_groups": [
        {"name": "gpu", "instance_types": ["g6.2xlarge"], "min_size": 1, "max_size": 4, "desired_size": 2}
    ],
    "eks_access_entries": [{"principal_arn": ROLE, "policies": ADMIN}],
    "account_old_buckets": ["c1-models"],
    "platform_models_bucket": f"c1-models-{account.STAND_IN}-us-west-2",
}


class Client(FakeClient):
    """A client of a service that has no pages."""

    def can_paginate(self, _: str) -> bool:
        return False


class Cloud:
    """An account with room for everything, whose parts a test replaces."""

    def __init__(self, **answers: Any) -> None:
        self.quota = 1000.0
        self.zones = {"us-west-2a": "usw2-az1", "us-west-2b": "usw2-az2", "us-west-2c": "usw2-az3"}
        self.offered = {"g6.2xlarge": ["us-west-2a", "us-west-2b", "us-west-2c"]}
        self.instances: list[dict[str, Any]] = []
        self.buckets: dict[str, str | None] = {}
        self.cluster: dict[str, Any] | None = None
        self.entries: list[str] = []
        vars(self).update(answers)
        self.clients = {
            "service-quotas": Client("service-quotas", get_service_quota=self.get_service_quota),
            "ec2": Client(
                "ec2",
                describe_instances=lambda **_: {"Reservations": [{"Instances": self.instances}]},
                describe_availability_zones=lambda **_: {
                    "AvailabilityZones": [{"ZoneName": name, "ZoneId": zone} for name, zone in self.zones.items()]
                },
                describe_subnets=lambda **_: {"Subnets": [{"AvailabilityZone": "us-west-2c"}]},
                describe_instance_type_offerings=lambda **_: {
                    "InstanceTypeOfferings": [
                        {"InstanceType": kind, "Location": zone}
                        for kind, zones in self.offered.items()
                        for zone in zones
                    ]
                },
            ),
            "s3": Client(
                "s3",
                head_bucket=self.head_bucket,
                get_bucket_tagging=self.get_bucket_tagging,
                list_buckets=lambda **_: {"Buckets": [{"Name": name} for name, who in self.buckets.items() if who]},
            ),
            "eks": Client(
                "eks",
                describe_cluster=self.describe_cluster,
                list_access_entries=lambda **_: {"accessEntries": self.entries},
            ),
            "sts": Client("sts", get_caller_identity=lambda: ME),
        }

    def get_service_quota(self, **_: str) -> Any:
        if self.quota < 0:
            raise refusal("AccessDeniedException")
        return {"Quota": {"Value": self.quota}}

    def head_bucket(self, Bucket: str) -> Any:
        if Bucket not in self.buckets:
            raise refusal("404")
        if self.buckets[Bucket] is None:
            raise refusal("403")
        return {}

    def get_bucket_tagging(self, Bucket: str, **_: str) -> Any:
        if Bucket not in self.buckets:
            raise refusal("NoSuchBucket")
        if self.buckets[Bucket] is None:
            raise refusal("AccessDenied")
        return {"TagSet": [{"Key": "rayplane.io/cluster", "Value": self.buckets[Bucket]}]}

    def describe_cluster(self, **_: str) -> Any:
        if self.cluster is None:
            raise refusal("ResourceNotFoundException")
        return {"cluster": self.cluster}

    def check(self, **changes: Any) -> list[Problem]:
        return list(account.check_account(self.clients.__getitem__, ME, "us-west-2", {**VALUES, **changes}))


def test_an_account_with_room_has_no_problem() -> None:
    assert Cloud().check() == []


def instance(kind: str, **more: Any) -> dict[str, Any]:
    return {"InstanceType": kind, "CpuOptions": {"CoreCount": 4, "ThreadsPerCore": 2}, **more}


OURS = {"Tags": [{"Key": "eks:cluster-name", "Value": "c1"}]}


@pytest.mark.parametrize(
    ("quota", "instances", "variable", "words"),
    [
        (32, [], "", ()),
        (31, [], "max_size", ("may reach 32 vCPUs (gpu: 4 x 8)", "is 31", "--desired-value 32")),
        (0, [], "desired_size", ("begin with 16 vCPUs (gpu: 2 x 8)", "L-DB2E81BA (Running On-Demand G and VT", "is 0")),
        (20, [instance("g5.2xlarge")], "desired_size", ("of which 8 are in use", "--desired-value 40")),
        (32, [instance("g5.2xlarge", **OURS), instance("g5.2xlarge", InstanceLifecycle="spot")], "", ()),
    ],
)
def test_quotas(quota: float, instances: list[dict[str, Any]], variable: str, words: tuple[str, ...]) -> None:
    problems = Cloud(quota=quota, instances=instances).check()
    assert [problem.variable for problem in problems] == ([f"eks_node_groups[0].{variable}"] if variable else [])
    for problem in problems:
        assert problem.warning == (variable == "max_size")
        assert all(word in f"{problem.reason} {problem.cure}" for word in words), problem


def test_spot_has_its_own_quota_and_groups_of_a_kind_add_up() -> None:
    gpu = {**VALUES["eks_node_groups"][0], "instance_types": ["g5.xlarge", "g6.2xlarge"], "capacity_type": "SPOT"}
    cloud = Cloud(quota=8, offered={kind: ["us-west-2a", "us-west-2b"] for kind in gpu["instance_types"]})
    problems = cloud.check(eks_node_groups=[gpu, {**gpu, "name": "more", "desired_size": 1}])
    assert "gpu: 2 x 4, more: 1 x 4" in problems[0].reason and "L-3819A6DF" in problems[0].reason


@pytest.mark.parametrize(
    ("kind", "vcpus", "code"),
    [
        ("g4dn.xlarge", 4, "L-DB2E81BA"),
        ("gr6.8xlarge", 32, "L-DB2E81BA"),
        ("p5.48xlarge", 192, "L-417A185B"),
        ("m5.2xlarge", 8, "L-1216C47A"),
        ("t2.micro", 1, "L-1216C47A"),
        ("m7g.medium", 1, "L-1216C47A"),
        ("m7i.metal-24xl", 96, "L-1216C47A"),
        ("inf2.xlarge", 4, "L-1945791B"),
        ("trn1.32xlarge", 128, "L-2C3B7624"),
        ("g4dn.metal", None, "L-DB2E81BA"),
        ("dl1.24xlarge", 96, None),
    ],
)
def test_what_a_machine_counts(kind: str, vcpus: int | None, code: str | None) -> None:
    quota = account.family_of(kind, spot=False)
    assert (vcpus_of(kind), quota and quota.code) == (vcpus, code)


@pytest.mark.parametrize(
    ("answers", "changes", "variable", "warning", "words"),
    [
        ({}, {"network_availability_zones": ["a", "d"]}, "network_availability_zones[1]", False, "no such zone"),
        (
            {"zones": {"us-west-2a": "use1-az3", "us-west-2b": "x"}},
            {},
            "network_availability_zones[0]",
            False,
            "use1-az3",
        ),
        ({"offered": {}}, {}, "eks_node_groups[0].instance_types", False, "offers no g6.2xlarge in us-west-2"),
        (
            {"offered": {"g6.2xlarge": ["us-west-2c"]}},
            {},
            "eks_node_groups[0].instance_types",
            False,
            "none of the zones",
        ),
        ({"offered": {"g6.2xlarge": ["us-west-2a"]}}, {}, "eks_node_groups[0].instance_types", True, "in us-west-2b"),
        (
            {"offered": {"g6.2xlarge": ["us-west-2a"]}},
            {"eks_subnet_ids": ["subnet-1"]},
            "eks_node_groups[0].instance_types",
            False,
            "none of the zones chosen (us-west-2c)",
        ),
    ],
)
def test_machines_in_their_zones(
    answers: dict[str, Any], changes: dict[str, Any], variable: str, warning: bool, words: str
) -> None:
    problems = [problem for problem in Cloud(**answers).check(**changes) if words in problem.reason]
    assert [(problem.variable, problem.warning) for problem in problems] == [(variable, warning)]


NEW = "c1-models-123456789012-us-west-2"


@pytest.mark.parametrize(
    ("buckets", "value"),
    [
        ({}, ""),
        ({NEW: "c1"}, ""),
        ({NEW: None}, NEW),
        ({NEW: "another"}, NEW),
        # Named by an earlier release: it stays in use, whoever has the new name.
        ({"c1-models": "c1", NEW: None}, ""),
        ({"c1-models": "another"}, ""),
    ],
)
def test_names_of_buckets(buckets: dict[str, str | None], value: str) -> None:
    problems = Cloud(buckets=buckets).check()
    assert [(one.variable, one.value) for one in problems] == ([("platform_models_bucket", value)] if value else [])


@pytest.mark.parametrize("operation", ["list_buckets", "get_bucket_tagging"])
def test_who_may_not_ask_all_of_buckets_has_the_same_names(operation: str) -> None:
    def refuse(**_: Any) -> Any:
        raise refusal("AccessDenied")

    old = {"c1-models": "c1"} if operation == "list_buckets" else {NEW: "c1"}
    cloud = Cloud(buckets=old)
    cloud.clients["s3"].handlers[operation] = refuse
    assert cloud.check() == []


def test_buckets_that_are_there_take_one_call_each_and_a_listing() -> None:
    cloud = Cloud(buckets={NEW: "c1"})
    cloud.check()
    assert [name for name, _ in cloud.clients["s3"].calls] == ["list_buckets", "get_bucket_tagging"]


@pytest.mark.parametrize(
    ("buckets", "suffix"),
    [({}, "-123456789012-us-west-2"), ({"c1-logs": "c1"}, ""), ({"c1-models": "c2"}, "-123456789012-us-west-2")],
)
def test_the_account_names_the_buckets(buckets: dict[str, str], suffix: str) -> None:
    params = {"cluster_name": "c1", "old_buckets": ["c1-models", "c1-logs"]}
    clients = Cloud(buckets=buckets).clients
    module = SimpleNamespace(params=params, region="us-west-2", client=clients.__getitem__)
    assert aws_account.reconcile(module, Changes(True)) == {"account": "123456789012", "bucket_suffix": suffix}


@pytest.mark.parametrize(
    ("cluster", "entries", "changes", "wrong"),
    [
        (None, [], {"eks_access_entries": []}, False),
        (None, [], {"eks_access_entries": [], "eks_creator_is_admin": False}, True),
        ({}, [], {}, False),
        ({}, [], {"eks_access_entries": []}, True),
        ({}, [ROLE.replace("role/", "role/teams/")], {"eks_access_entries": []}, False),
        (
            {},
            [],
            {"eks_access_entries": [{"principal_arn": ROLE, "policies": [{"policy": "AmazonEKSViewPolicy"}]}]},
            True,
        ),
        ({"accessConfig": {"authenticationMode": "CONFIG_MAP"}}, [], {"eks_access_entries": []}, False),
        ({"accessConfig": {"authenticationMode": "API_AND_CONFIG_MAP"}}, [], {"eks_access_entries": []}, False),
    ],
)
def test_who_deploys_is_an_administrator(
    cluster: dict[str, Any] | None, entries: list[str], changes: dict[str, Any], wrong: bool
) -> None:
    problems = Cloud(cluster=cluster, entries=entries).check(**changes)
    assert [problem.variable for problem in problems] == (["eks_access_entries"] if wrong else [])
    assert all(ROLE in problem.cure for problem in problems)


def test_what_may_not_be_asked_is_told_once_and_holds_nothing() -> None:
    (problem,) = Cloud(quota=-1).check()
    assert problem.warning and problem.value == ["servicequotas:GetServiceQuota"]


@pytest.mark.parametrize(
    ("code", "changes", "variable", "words"),
    [
        (
            "InvalidSubnetID.NotFound",
            {"eks_subnet_ids": ["subnet-1"]},
            "eks_subnet_ids",
            "InvalidSubnetID.NotFound: no",
        ),
        (
            "RequestLimitExceeded",
            {"eks_subnet_ids": ["subnet-1"]},
            "AWS",
            "ec2:DescribeSubnets: RequestLimitExceeded: no",
        ),
        ("UnauthorizedOperation", {"eks_subnet_ids": ["subnet-1"]}, "AWS permissions", "UnauthorizedOperation"),
    ],
)
def test_what_is_no_permission_is_told_in_awss_own_words(
    code: str, changes: dict[str, Any], variable: str, words: str
) -> None:
    def refuse(**_: Any) -> Any:
        raise refusal(code)

    cloud = Cloud()
    cloud.clients["ec2"].handlers["describe_subnets"] = refuse
    (problem,) = cloud.check(**changes)
    assert problem.variable == variable and words in problem.reason
    assert problem.warning is (variable != "eks_subnet_ids")


def test_names_with_account_and_region_are_measured_before_anybody_is_asked() -> None:
    suffix = f"-{account.STAND_IN}-us-west-2"
    name = f"{'c' * 40}-models{suffix}"
    problem = found(platform_models_bucket=name, platform_bucket_suffix=suffix)["platform_models_bucket"]
    assert "shorten platform_cluster_name by 7" in problem.cure


# --- the hub ---------------------------------------------------------------------------------------------------------

GATED, OPEN = "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"
TOKEN = "hf_" + "a" * 34


@contextlib.contextmanager
def hub(answers: dict[str, tuple[int, str]], *files: str) -> Iterator[str]:
    """A hub that gives open models to everybody, and answers for others as it is told."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            model, _, what = self.path.removeprefix("/api/models/").partition("/revision/")
            status, code = answers.get(model.removesuffix("/auth-check"), (200, ""))
            named = (*files, "config.json", "training_args.bin", "nested/model.safetensors") if what == "main" else ()
            body = json.dumps({"siblings": [{"rfilename": name} for name in named]}).encode()
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(url: str, token: str, *models: str) -> list[Problem]:
    entries = [{"id": f"m{index}", "source": source} for index, source in enumerate(models)]
    values = {"platform_hub_url": url, "secrets_hugging_face_token": token, "rayservice_models": entries}
    return list(check_hub(values))


@pytest.mark.parametrize(
    ("answer", "token", "variable", "words"),
    [
        ((200, ""), TOKEN, "", ""),
        # The hub knows better than the table.
        ((200, ""), "", "", ""),
        ((401, "GatedRepo"), "", "secrets_hugging_face_token", GATED),
        ((403, "GatedRepo"), TOKEN, "rayservice_models[1].source", "accept its licence"),
        ((404, "RepoNotFound"), TOKEN, "rayservice_models[1].source", "no such model"),
        ((401, ""), TOKEN, "secrets_hugging_face_token", "does not accept"),
        ((503, ""), TOKEN, "", ""),
    ],
)
def test_the_hub_is_asked(
    monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str], token: str, variable: str, words: str
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with hub({GATED: answer}, "model.safetensors") as url:
        problems = ask(url, token, OPEN, GATED, "s3://bucket/model")
    assert [problem.variable for problem in problems] == ([variable] if variable else [])
    assert all(words in f"{problem.reason} {problem.cure}" and not problem.warning for problem in problems)


@pytest.mark.parametrize(
    ("files", "engine", "mode", "cure"),
    [
        (["model.safetensors", "model.bin"], {}, "copy", None),
        (["model-00001-of-00002.bin", "tf_model.h5"], {}, "copy", "or take *.bin out of models_ignore"),
        (["model-00001-of-00002.bin"], {}, "direct", None),
        (["consolidated.00.pth"], {}, "direct", "name a source that has them"),
        (["model.bin"], {"load_format": "safetensors"}, "direct", "name a source that has them"),
        ([], {"load_format": "dummy"}, "copy", None),
    ],
)
def test_the_hub_has_weights_that_vllm_loads(
    monkeypatch: pytest.MonkeyPatch, files: list[str], engine: dict[str, Any], mode: str, cure: str | None
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    values = {
        "models_hub_mode": mode,
        "models_ignore": ["*.bin", "*.h5"],
        "rayservice_models": [{"source": OPEN, "engine": engine}],
    }
    with hub({}, *files) as url:
        problems = list(check_hub({"platform_hub_url": url, **values}))
    assert [cure in problem.cure for problem in problems] == ([True] if cure else [])


@pytest.mark.parametrize("url", ["", "http://127.0.0.1:9"])
def test_without_a_hub_the_table_tells(url: str) -> None:
    (problem,) = ask(url, "", OPEN, GATED)
    assert problem.variable == "secrets_hugging_face_token" and GATED in problem.reason and OPEN not in problem.reason
    assert ask(url, TOKEN, GATED) == ask(url, "", OPEN) == []


@pytest.mark.parametrize(
    ("model", "gated"),
    [
        (GATED, True),
        ("google/gemma-3-4b-it", True),
        ("google/medgemma-4b-it", True),
        (OPEN, False),
        ("openai/gpt-oss-20b", False),
    ],
)
def test_known_gated_models(model: str, gated: bool) -> None:
    assert known_gated(model) == gated
