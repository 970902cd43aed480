"""What an inventory says about storage: lifecycle rules as S3 accepts them, bucket sets, replicas, StorageClasses."""

from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.rayplane.platform.plugins.filter.rayplane_storage import (
    bucket_lifecycle_rules,
    storage_bucket_set,
    storage_class_objects,
    storage_replication_role,
)
from ansible_collections.rayplane.platform.plugins.module_utils.kube.api import ApiError, Resource
from ansible_collections.rayplane.platform.plugins.module_utils.kube.apply import ApplyError, ApplySet
from botocore.session import get_session
from botocore.validate import ParamValidator
from hypothesis import given
from hypothesis import strategies as st

Json = dict[str, Any]


def rule(**options: Any) -> Json:
    return bucket_lifecycle_rules([{"name": "r", **options}])[0]


def test_a_rule_reads_as_it_acts() -> None:
    given_rule = {
        "name": "results",
        "prefix": "results/",
        "transitions": {"GLACIER": 90, "STANDARD_IA": "30"},
        "expire_days": 365,
        "noncurrent_transitions": {"STANDARD_IA": 30},
        "noncurrent_days": 60,
        "keep_versions": 3,
        "abort_upload_days": 7,
    }
    assert bucket_lifecycle_rules([given_rule], 30, 7) == [
        {
            "ID": "results",
            "Status": "Enabled",
            "Filter": {"Prefix": "results/"},
            "Transitions": [
                {"Days": 30, "StorageClass": "STANDARD_IA"},
                {"Days": 90, "StorageClass": "GLACIER"},
            ],
            "Expiration": {"Days": 365},
            "NoncurrentVersionTransitions": [{"NoncurrentDays": 30, "StorageClass": "STANDARD_IA"}],
            "NoncurrentVersionExpiration": {"NoncurrentDays": 60, "NewerNoncurrentVersions": 3},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
        },
        {
            "ID": "drop-old-versions",
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "NoncurrentVersionExpiration": {"NoncurrentDays": 30},
        },
        {
            "ID": "drop-unfinished-uploads",
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
        },
    ]
    assert bucket_lifecycle_rules([], 0, 0) == []


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, {"Prefix": ""}),
        ({"prefix": "x"}, {"Prefix": "x"}),
        ({"tags": {"a": 1}}, {"Tag": {"Key": "a", "Value": "1"}}),
        ({"min_size": 5}, {"ObjectSizeGreaterThan": 5}),
        ({"prefix": "x", "max_size": 9}, {"And": {"Prefix": "x", "ObjectSizeLessThan": 9}}),
        (
            {"tags": {"a": "1", "b": "2"}},
            {"And": {"Tags": [{"Key": "a", "Value": "1"}, {"Key": "b", "Value": "2"}]}},
        ),
    ],
)
def test_what_a_rule_is_about(options: Json, chosen: Json) -> None:
    assert rule(expire_days=1, **options)["Filter"] == chosen


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "does nothing"),
        ({"transitions": {"COLD": 30}}, "names storage class 'COLD'"),
        ({"transitions": 30}, "write storage classes with their days"),
        ({"transitions": {"STANDARD_IA": 29}}, "after 30 days at the earliest"),
        ({"transitions": {"STANDARD_IA": 30, "GLACIER": 59}}, "write 60 or more"),
        ({"transitions": {"GLACIER": 90, "DEEP_ARCHIVE": 90}}, "write 91 or more"),
        ({"transitions": {"ONEZONE_IA": 30, "GLACIER_IR": 90}}, "ONEZONE_IA to GLACIER_IR"),
        ({"transitions": {"STANDARD_IA": 30}, "expire_days": 30}, "31 days at the earliest"),
        ({"noncurrent_transitions": {"GLACIER": 30}, "noncurrent_days": 30}, "31 days at the earliest"),
        ({"keep_versions": 3}, "say with noncurrent_days"),
        ({"keep_versions": 101, "noncurrent_days": 1}, "S3 allows 100"),
        ({"expire_days": 1, "expired_delete_markers": True}, "without expire_days"),
        ({"abort_upload_days": 1, "tags": {"a": "b"}}, "a rule of its own"),
        ({"expire_days": "soon"}, "whole number of at least 1"),
        ({"expire_days": 1.5}, "whole number of at least 1"),
        ({"expire_days": True}, "whole number of at least 1"),
        ({"expire_days": -1}, "whole number of at least 1"),
        ({"name": "n" * 256, "expire_days": 1}, "255 characters"),
    ],
)
def test_what_s3_refuses_is_refused_by_name(options: Json, said: str) -> None:
    with pytest.raises(AnsibleFilterError, match=said):
        bucket_lifecycle_rules([{"name": "r", **options}])


def test_names_are_given_once() -> None:
    with pytest.raises(AnsibleFilterError, match=r"models\.lifecycle: rules named twice: r"):
        bucket_lifecycle_rules([{"name": "r", "expire_days": 1}] * 2, variable="models.lifecycle")


_CLASSES = ("STANDARD_IA", "INTELLIGENT_TIERING", "ONEZONE_IA", "GLACIER_IR", "GLACIER", "DEEP_ARCHIVE")


@given(
    st.dictionaries(st.sampled_from(_CLASSES), st.integers(0, 400), max_size=4),
    st.integers(0, 500),
    st.integers(0, 500),
)
def test_whatever_passes_is_well_formed(transitions: dict[str, int], expire: int, noncurrent: int) -> None:
    try:
        rules = bucket_lifecycle_rules(
            [{"name": "r", "transitions": transitions, "expire_days": expire}], noncurrent, noncurrent
        )
    except AnsibleFilterError:
        return
    shape = get_session().get_service_model("s3").operation_model("PutBucketLifecycleConfiguration").input_shape
    report = ParamValidator().validate({"Bucket": "b", "LifecycleConfiguration": {"Rules": rules}}, shape)
    assert not report.has_errors(), report.generate_report()
    days = [step["Days"] for step in rules[0].get("Transitions", [])]
    assert days == sorted(set(days))
    assert not expire or not days or expire > days[-1]


SETTINGS: Json = {
    "versioning": True,
    "kms_key_id": "",
    "tls_only": True,
    "noncurrent_days": 30,
    "abort_upload_days": 7,
    "access_logs": False,
    "logs_bucket": "c1-logs",
    "region": "us-west-2",
    "replica_region": "",
    "replica_kms_key_id": "",
    "replica_storage_class": "STANDARD_IA",
}
THREE = [
    {"name": "c1-models", "replicate": True},
    {"name": "c1-datasets", "versioning": False},
    {"name": "c1-logs", "kms_key_id": "", "log_writers": ["vended_logs"]},
]


def test_buckets_take_what_they_do_not_say_from_the_settings() -> None:
    models, datasets, logs = storage_bucket_set(THREE, {**SETTINGS, "kms_key_id": "key", "access_logs": True})
    assert (models["versioning"], datasets["versioning"]) == (True, False)
    assert (models["kms_key_id"], logs["kms_key_id"]) == ("key", "")
    assert models["access_logs"] == {"bucket": "c1-logs", "prefix": "s3/c1-models/"}
    assert "access_logs" not in logs
    assert [one["ID"] for one in models["lifecycle"]] == ["drop-old-versions", "drop-unfinished-uploads"]
    assert "replication" not in models


def test_a_replica_is_as_safe_as_its_bucket() -> None:
    settings = {**SETTINGS, "kms_key_id": "key", "replica_region": "eu-west-1", "replica_kms_key_id": "eu-key"}
    models, replica, *_ = storage_bucket_set(THREE, settings, "arn:role")
    assert models["replication"] == {
        "bucket": "c1-models-eu-west-1",
        "role_arn": "arn:role",
        "kms_key_id": "eu-key",
        "storage_class": "STANDARD_IA",
    }
    assert (replica["name"], replica["region"], replica["kms_key_id"]) == ("c1-models-eu-west-1", "eu-west-1", "eu-key")
    assert (replica["versioning"], replica["tls_only"]) == (True, True)
    assert replica["lifecycle"] == models["lifecycle"]


@pytest.mark.parametrize(
    ("bucket", "settings", "said"),
    [
        ({"versioning": False}, {}, "copies in eu-west-1 need versioning, which is off"),
        ({}, {"versioning": False}, "set storage_versioning"),
        ({}, {"region": "eu-west-1"}, "the cluster's own"),
        ({"kms_key_id": "key"}, {}, "storage_replica_kms_key_id, a key in eu-west-1"),
        ({"name": "n" * 60}, {}, "give a replica_name"),
    ],
)
def test_replicas_that_s3_refuses_are_refused(bucket: Json, settings: Json, said: str) -> None:
    with pytest.raises(AnsibleFilterError, match=said):
        storage_bucket_set(
            [{"name": "b", "replicate": True, **bucket}], {**SETTINGS, "replica_region": "eu-west-1", **settings}
        )


def test_the_role_that_copies_can_do_nothing_else() -> None:
    settings = {**SETTINGS, "kms_key_id": "key", "replica_region": "eu-west-1", "replica_kms_key_id": "eu-key"}
    role = storage_replication_role(storage_bucket_set(THREE, settings), "c1-replication", "aws", "us-west-2")
    statements = role["inline_policies"]["replicate"]["Statement"]
    allowed = {(action, one["Resource"]) for one in statements for action in one["Action"]}
    models, copy = "arn:aws:s3:::c1-models", "arn:aws:s3:::c1-models-eu-west-1"
    assert allowed == {
        ("s3:GetReplicationConfiguration", models),
        ("s3:ListBucket", models),
        ("s3:GetObjectVersionForReplication", f"{models}/*"),
        ("s3:GetObjectVersionAcl", f"{models}/*"),
        ("s3:GetObjectVersionTagging", f"{models}/*"),
        ("s3:ReplicateObject", f"{copy}/*"),
        ("s3:ReplicateDelete", f"{copy}/*"),
        ("s3:ReplicateTags", f"{copy}/*"),
        ("kms:Decrypt", "key"),
        ("kms:Encrypt", "eu-key"),
        ("kms:GenerateDataKey", "eu-key"),
    }
    keys = {one["Resource"]: one["Condition"]["StringEquals"] for one in statements if "Condition" in one}
    assert keys == {
        "key": {"kms:ViaService": "s3.us-west-2.amazonaws.com"},
        "eu-key": {"kms:ViaService": "s3.eu-west-1.amazonaws.com"},
    }
    assert role["trust"]["Statement"][0]["Principal"] == {"Service": "s3.amazonaws.com"}


# --- StorageClasses --------------------------------------------------------------------------------------------------

CLASS: Json = {
    "name": "gp3",
    "default": True,
    "encrypted": True,
    "kms_key_arn": "",
    "iops": 0,
    "throughput": 0,
    "fs_type": "ext4",
    "reclaim_policy": "Delete",
    "tags": {"rayplane.io/cluster": "c1"},
    "efs_name": "efs",
    "efs_id": "",
}


def test_the_default_class() -> None:
    (gp3,) = storage_class_objects({**CLASS, "kms_key_arn": "arn:k", "iops": "6000", "throughput": 1000})
    assert gp3["metadata"]["annotations"] == {"storageclass.kubernetes.io/is-default-class": "true"}
    assert gp3["parameters"] == {
        "type": "gp3",
        "encrypted": "true",
        "csi.storage.k8s.io/fstype": "ext4",
        "kmsKeyId": "arn:k",
        "iops": "6000",
        "throughput": "1000",
        "tagSpecification_1": "rayplane.io/cluster=c1",
    }
    assert gp3["volumeBindingMode"] == "WaitForFirstConsumer"
    assert gp3["allowVolumeExpansion"] is True


def test_the_class_of_the_shared_files() -> None:
    _, efs = storage_class_objects({**CLASS, "efs_id": "fs-1"})
    assert (efs["metadata"]["name"], efs["parameters"]["fileSystemId"]) == ("efs", "fs-1")
    assert efs["provisioner"] == "efs.csi.aws.com"


class FakeCluster:
    """StorageClasses whose parameters are fixed for life, as the API server keeps them."""

    def __init__(self) -> None:
        self.classes: dict[str, Json] = {}
        self.calls: list[str] = []

    def resource(self, version: str, kind: str, refresh: bool = False) -> Resource:
        return Resource(version, kind, "storageclasses", False)

    def get(self, resource: Resource, namespace: str | None, name: str) -> Json | None:
        return self.classes.get(name)

    def list(self, resource: Resource, namespace: str | None = None, selector: str = "") -> list[Json]:
        return list(self.classes.values())

    def apply(self, resource: Resource, definition: Json, manager: str, dry_run: bool = False) -> Json:
        name = definition["metadata"]["name"]
        live = self.classes.get(name)
        if live and live["parameters"] != definition["parameters"]:
            raise ApiError("PATCH", name, 422, {"message": "updates to parameters are forbidden."})
        if not dry_run:
            self.calls.append(f"apply {name}")
            self.classes[name] = definition
        return definition

    def delete(self, resource: Resource, namespace: str | None, name: str) -> bool:
        self.calls.append(f"delete {name}")
        return self.classes.pop(name, None) is not None

    def merge(self, resource: Resource, namespace: str | None, name: str, patch: Json, **_: Any) -> Json:
        self.calls.append(f"merge {name}")
        self.classes[name] = {**self.classes[name], **patch}
        return self.classes[name]


LABELS = {"app.kubernetes.io/part-of": "rayplane", "app.kubernetes.io/component": "storage-class"}


def applied(cluster: FakeCluster, dry_run: bool = False, **options: Any) -> ApplySet:
    work = ApplySet(cluster, LABELS, "rayplane", dry_run=dry_run)
    work.apply(storage_class_objects({**CLASS, **options}))
    return work


def test_a_class_whose_parameters_change_is_made_anew() -> None:
    cluster = FakeCluster()
    applied(cluster)
    cluster.calls.clear()
    plan = applied(cluster, dry_run=True, iops=4000)
    assert plan.outcome.updated == ["StorageClass gp3"]
    assert "iops: '4000'" in plan.outcome.diff[0]["after"]
    assert cluster.calls == []
    assert applied(cluster, iops=4000).outcome.updated == ["StorageClass gp3"]
    assert cluster.calls == ["delete gp3", "apply gp3"]
    assert applied(cluster, iops=4000).outcome.changed is False


def test_a_class_of_somebody_else_is_not_made_anew() -> None:
    cluster = FakeCluster()
    (gp3,) = storage_class_objects(CLASS)
    cluster.classes["gp3"] = {**gp3, "parameters": {"type": "gp2"}}
    with pytest.raises(ApplyError, match="updates to parameters are forbidden"):
        applied(cluster)
    assert cluster.calls == []


def test_only_classes_that_are_the_default_lose_that_mark() -> None:
    cluster = FakeCluster()
    mark = "storageclass.kubernetes.io/is-default-class"
    for name, marked in (("gp2", "true"), ("old", "false"), ("bare", None)):
        annotations = {mark: marked} if marked else {}
        cluster.classes[name] = {"kind": "StorageClass", "metadata": {"name": name, "annotations": annotations}}
    rule = {
        "api_version": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "where": {"metadata": {"annotations": {mark: "true"}}},
        "merge": {"metadata": {"annotations": {mark: "false"}}},
    }
    work = ApplySet(cluster, LABELS, "rayplane")
    work.align([rule])
    assert work.outcome.aligned == ["StorageClass gp2"]
    assert cluster.calls == ["merge gp2"]
