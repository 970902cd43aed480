"""Buckets: made closed, compared property by property, copied and logged in the right order, kept for their data."""

# ruff: noqa: N803 -- the fakes take arguments under the names AWS gives them
import copy
import json
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.aws.core import Api, Changes, PlatformError
from ansible_collections.rayplane.platform.plugins.module_utils.aws.policy import (
    by_statement,
    canonical,
    log_statements,
)
from ansible_collections.rayplane.platform.plugins.modules import aws_buckets
from aws_fake import FakeClient, refusal

Json = dict[str, Any]
ACCOUNT = "111122223333"
KEY = f"arn:aws:kms:us-west-2:{ACCOUNT}:key/k"
_NO_ENCRYPTION = "ServerSideEncryptionConfigurationNotFoundError"
#: Property of the fake's buckets -> part of the operations' names, argument, error code where it is not set.
PROPERTIES = {
    "versioning": ("bucket_versioning", "VersioningConfiguration", ""),
    "encryption": ("bucket_encryption", "ServerSideEncryptionConfiguration", _NO_ENCRYPTION),
    "block": ("public_access_block", "PublicAccessBlockConfiguration", "NoSuchPublicAccessBlockConfiguration"),
    "policy": ("bucket_policy", "Policy", "NoSuchBucketPolicy"),
    "lifecycle": ("bucket_lifecycle_configuration", "LifecycleConfiguration", "NoSuchLifecycleConfiguration"),
    "replication": ("bucket_replication", "ReplicationConfiguration", "ReplicationConfigurationNotFoundError"),
    "logging": ("bucket_logging", "BucketLoggingStatus", ""),
    "tags": ("bucket_tagging", "Tagging", "NoSuchTagSet"),
}  # fmt: skip
#: What S3 answers without a wrapper of the argument's name.
BARE = ("versioning", "lifecycle", "logging", "tags")


class FakeS3:
    """An account's buckets, which remember what is put into them and refuse what S3 refuses."""

    def __init__(self) -> None:
        self.buckets: dict[str, Json] = {}
        self.elsewhere: set[str] = set()
        self.objects: dict[str, list[Json]] = {}
        self.listable = True
        handlers: dict[str, Any] = {
            "list_buckets": self.list,
            "head_bucket": self.head,
            "create_bucket": self.create,
            "delete_bucket": self.delete,
            "list_object_versions": lambda Bucket, **_: {"Versions": self.objects.get(Bucket, [])},
            "list_multipart_uploads": lambda **_: {},
            "delete_objects": self.delete_objects,
            "delete_bucket_policy": lambda Bucket: self.buckets[Bucket].pop("policy"),
            "delete_bucket_lifecycle": lambda Bucket: self.buckets[Bucket].pop("lifecycle"),
            "delete_bucket_replication": lambda Bucket: self.buckets[Bucket].pop("replication"),
        }
        for key, (name, argument, code) in PROPERTIES.items():
            handlers[f"get_{name}"] = self._getter(key, argument, code)
            handlers[f"put_{name}"] = self._putter(key, argument)
        self.client = FakeClient("s3", **handlers)

    def _getter(self, key: str, argument: str, code: str) -> Any:
        def get(Bucket: str) -> Any:
            value = self.buckets[Bucket].get(key)
            if value is None:
                if code:
                    raise refusal(code)
                return {}
            return copy.deepcopy(value if key in BARE else {argument: value})

        return get

    def _putter(self, key: str, argument: str) -> Any:
        def put(Bucket: str, **arguments: Any) -> Json:
            value = arguments[argument]
            if key == "versioning" and value["Status"] == "Suspended" and "replication" in self.buckets[Bucket]:
                raise refusal("InvalidBucketState")
            if key == "replication":
                for rule in value["Rules"]:
                    target = self.buckets[rule["Destination"]["Bucket"].split(":")[-1]]
                    assert target["versioning"] == {"Status": "Enabled"}
            if key == "logging" and value:
                assert "policy" in self.buckets[value["LoggingEnabled"]["TargetBucket"]]
            self.buckets[Bucket][key] = copy.deepcopy(value)
            return {}

        return put

    def list(self, Prefix: str = "", **_: Any) -> Json:
        if not self.listable:
            raise refusal("AccessDenied")
        found = [name for name in sorted(self.buckets) if name.startswith(Prefix)]
        return {"Buckets": [{"Name": name, "BucketRegion": self.buckets[name]["region"]} for name in found]}

    def head(self, Bucket: str) -> Json:
        if Bucket in self.elsewhere:
            raise refusal("403", "Forbidden")
        if Bucket not in self.buckets:
            raise refusal("404")
        return {"BucketRegion": self.buckets[Bucket]["region"]}

    def create(self, Bucket: str, CreateBucketConfiguration: Json | None = None) -> Json:
        region = (CreateBucketConfiguration or {}).get("LocationConstraint", "us-east-1")
        aes = {"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}, "BucketKeyEnabled": True}]}
        self.buckets[Bucket] = {"region": region, "encryption": aes}
        return {}

    def delete(self, Bucket: str) -> Json:
        assert not self.objects.get(Bucket)
        del self.buckets[Bucket]
        return {}

    def delete_objects(self, Bucket: str, **_: Any) -> Json:
        self.objects[Bucket] = []
        return {}


def bucket(name: str = "c1-models", **options: Any) -> Json:
    plain = {"versioning": True, "tls_only": True, "kms_key_id": "", "region": ""}
    rest = {"policy_statements": [], "lifecycle": [], "log_writers": [], "access_logs": None, "replication": None}
    return {"name": name, **plain, **rest, **options}


def copied(target: str = "c1-copy", **options: Any) -> Json:
    return {"bucket": target, "role_arn": "arn:r", "prefix": "", "kms_key_id": "", "storage_class": "", **options}


def reconciler(
    fake: FakeS3, *wanted: Json, check: bool = False, destroy: bool = False, region: str = "us-west-2"
) -> tuple[aws_buckets.Buckets, Changes]:
    changes = Changes(check)
    params = {"cluster_name": "c1", "buckets": list(wanted), "tags": {"Team": "x"}, "destroy_data": destroy}
    api = Api(fake.client, changes)
    return aws_buckets.Buckets(params, region, lambda _: api, lambda: ACCOUNT, changes), changes


def run(fake: FakeS3, *wanted: Json, check: bool = False) -> list[str]:
    one, changes = reconciler(fake, *wanted, check=check)
    one.present()
    return changes.actions


SET = (
    bucket(kms_key_id=KEY, replication=copied(kms_key_id="arn:eu"), access_logs={"bucket": "c1-logs", "prefix": "s3/"}),
    bucket("c1-copy", region="eu-west-1", kms_key_id="arn:eu"),
    bucket(
        "c1-logs",
        log_writers=["vended_logs", "access_logs", "load_balancers"],
        lifecycle=[{"ID": "age", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 9}}],
    ),
)


def test_a_set_is_made_closed_then_left_alone() -> None:
    fake = FakeS3()
    assert run(fake, *SET, check=True) == ["create bucket c1-models", "create bucket c1-copy", "create bucket c1-logs"]
    assert fake.client.writes() == []
    run(fake, *SET)
    models = fake.buckets["c1-models"]
    assert models["block"] == aws_buckets.BLOCK
    assert json.loads(models["policy"])["Statement"][0]["Effect"] == "Deny"
    assert models["encryption"]["Rules"][0]["BucketKeyEnabled"] is True
    assert fake.buckets["c1-copy"]["region"] == "eu-west-1"
    fake.client.calls.clear()
    assert run(fake, *SET) == []
    assert fake.client.writes() == []
    # The calls of a run with nothing to do: eight a bucket, and one that lists them.
    assert len(fake.client.calls) == len(SET) * len(aws_buckets.READS) + 1


def test_whose_it_is_is_written_first() -> None:
    fake = FakeS3()
    run(fake, *SET)
    first = [name for name, arguments in fake.client.writes() if arguments["Bucket"] == "c1-models"][:2]
    assert first == ["create_bucket", "put_bucket_tagging"]


DAMAGE: list[tuple[str, Any, str]] = [
    ("versioning", {"Status": "Suspended"}, "versioning: Suspended -> Enabled"),
    ("block", {**aws_buckets.BLOCK, "BlockPublicAcls": False}, "public_access_block: "),
    ("policy", None, "policy TlsOnly: absent -> "),
    ("policy", json.dumps({"Statement": [{"Sid": "Stray"}]}), "policy Stray: "),
    ("lifecycle", {"Rules": [{"ID": "stray", "Status": "Enabled", "Expiration": {"Days": 1}}]}, "lifecycle stray: "),
    ("replication", None, "replication role: absent -> arn:r"),
    ("logging", {}, "access_logs: absent -> "),
    ("tags", {"TagSet": [{"Key": "mine", "Value": "1"}]}, "tag Team: absent -> x"),
    (
        "encryption",
        {"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]},
        f"encryption: AES256 -> {KEY}",
    ),
    (
        "encryption",
        {"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": KEY}}]},
        "bucket key: False -> True",
    ),
]


@pytest.mark.parametrize(("key", "value", "action"), DAMAGE)
def test_every_property_is_told_and_repaired(key: str, value: Any, action: str) -> None:
    fake = FakeS3()
    run(fake, *SET)
    before = copy.deepcopy(fake.buckets)
    fake.buckets["c1-models"][key] = value
    if value is None:
        del fake.buckets["c1-models"][key]
    actions = run(fake, *SET)
    assert any(one.startswith(f"update bucket c1-models: {action}") for one in actions), actions
    assert all("c1-models" in one for one in actions)
    fake.buckets["c1-models"]["tags"]["TagSet"] = [
        tag for tag in fake.buckets["c1-models"]["tags"]["TagSet"] if tag["Key"] != "mine"
    ]
    assert fake.buckets == before
    assert run(fake, *SET) == []


def test_what_s3_adds_to_a_lifecycle_rule_is_no_difference() -> None:
    rule = {"ID": "a", "Status": "Enabled", "Expiration": {"Days": 9}}
    tags = [{"Key": "k", "Value": "v"}]
    asked = {**rule, "Filter": {"And": {"Prefix": "x/", "Tags": tags}}}
    fake = FakeS3()
    run(fake, bucket(lifecycle=[asked]))
    answer = {"And": {"Prefix": "x/", "Tags": tags, "ObjectSizeGreaterThan": 0}}
    fake.buckets["c1-models"]["lifecycle"] = {"Rules": [{**rule, "Filter": answer}]}
    assert run(fake, bucket(lifecycle=[asked])) == []
    fake.buckets["c1-models"]["lifecycle"] = {"Rules": [{**rule, "Filter": {"Prefix": "x/"}}]}
    assert len(run(fake, bucket(lifecycle=[asked]))) == 1


def test_replication_ends_before_versioning_is_suspended() -> None:
    fake = FakeS3()
    run(fake, *SET)
    one, changes = reconciler(fake, bucket(versioning=False), SET[1])
    assert one.present() == {"unreplicated": ["c1-models"]}
    assert "update bucket c1-models: replication role: arn:r -> absent" in changes.actions
    assert fake.buckets["c1-models"]["versioning"] == {"Status": "Suspended"}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ([bucket(versioning=False, replication=copied())], "needs versioning, which bucket c1-models has"),
        ([bucket(replication=copied()), bucket("c1-copy", versioning=False)], "which bucket c1-copy has"),
        ([bucket(replication=copied("c1-models"))], "replication to itself"),
        ([bucket(kms_key_id=KEY, replication=copied())], "give the replication a kms_key_id"),
        ([bucket(kms_key_id=KEY, log_writers=["access_logs"])], "only into buckets with S3's own keys"),
        ([bucket(), bucket()], "named twice: c1-models"),
    ],
)
def test_the_impossible_is_refused_before_anything(wanted: list[Json], said: str) -> None:
    fake = FakeS3()
    with pytest.raises(PlatformError, match=said):
        run(fake, *wanted)
    assert fake.client.calls == []


def test_buckets_of_others_are_explained_and_nothing_is_touched() -> None:
    fake = FakeS3()
    fake.elsewhere = {"c1-models"}
    with pytest.raises(PlatformError, match="bucket names are shared by all of AWS"):
        run(fake, bucket("c1-new"), bucket())
    fake = FakeS3()
    run(fake, bucket())
    fake.buckets["c1-models"]["tags"] = {"TagSet": [{"Key": "rayplane.io/cluster", "Value": "c2"}]}
    fake.client.calls.clear()
    with pytest.raises(PlatformError, match="belongs to cluster c2"):
        run(fake, bucket("c1-new"), bucket())
    with pytest.raises(PlatformError, match="is in us-west-2 and not in eu-west-1"):
        fake.buckets["c1-models"]["tags"] = {"TagSet": []}
        run(fake, bucket(region="eu-west-1"))
    assert fake.client.writes() == []
    one, changes = reconciler(fake, bucket(), destroy=True)
    fake.buckets["c1-models"]["tags"] = {"TagSet": [{"Key": "rayplane.io/cluster", "Value": "c2"}]}
    assert one.absent() == {"kept": []}
    assert "left alone" in changes.warnings[0]
    assert "c1-models" in fake.buckets


def test_without_the_right_to_list_buckets_are_asked_for_one_by_one() -> None:
    fake = FakeS3()
    fake.listable = False
    run(fake, bucket())
    assert run(fake, bucket()) == []
    assert "head_bucket" in [name for name, _ in fake.client.calls]
    with pytest.raises(PlatformError, match="is in us-west-2 and not in eu-west-1"):
        run(fake, bucket(region="eu-west-1"))


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("listable", [False, True])
def test_destroying_in_the_wrong_region_deletes_no_bucket(listable: bool, check: bool) -> None:
    fake = FakeS3()
    run(fake, *SET)
    fake.listable = listable
    fake.client.calls.clear()
    one, changes = reconciler(fake, *SET, check=check, destroy=True, region="eu-west-1")
    with pytest.raises(
        PlatformError, match="is in us-west-2 and not in eu-west-1: no bucket was deleted; set platform"
    ):
        one.absent()
    assert changes.actions == []
    assert fake.client.writes() == []
    # A copy elsewhere is no mistake.
    fake = FakeS3()
    run(fake, bucket(region="eu-west-1"))
    one, changes = reconciler(fake, bucket(region="eu-west-1"))
    one.absent()
    assert changes.actions == ["delete bucket c1-models"]


def test_data_is_kept_unless_told() -> None:
    fake = FakeS3()
    run(fake, *SET)
    fake.objects["c1-models"] = [{"Key": "k", "VersionId": "1"}]
    one, changes = reconciler(fake, *SET)
    assert one.absent() == {"kept": ["c1-models"]}
    assert changes.actions == ["delete bucket c1-copy", "delete bucket c1-logs"]
    assert "storage_destroy_data" in changes.warnings[0]
    fake.client.calls.clear()
    one, changes = reconciler(fake, *SET, check=True, destroy=True)
    one.absent()
    assert changes.actions == ["delete bucket c1-models"]
    assert fake.client.writes() == []
    one, _ = reconciler(fake, *SET, destroy=True)
    assert one.absent() == {"kept": []}
    assert fake.buckets == {}
    one, changes = reconciler(fake, *SET, destroy=True)
    assert one.absent() == {"kept": []}
    assert changes.actions == []


def test_data_without_our_tag_is_never_deleted() -> None:
    fake = FakeS3()
    fake.create("c1-models", {"LocationConstraint": "us-west-2"})
    fake.objects["c1-models"] = [{"Key": "k", "VersionId": "1"}]
    one, _ = reconciler(fake, bucket(), destroy=True)
    assert one.absent() == {"kept": ["c1-models"]}


def test_documents_are_compared_by_meaning() -> None:
    one = {"Statement": [{"Sid": "a", "Action": ["y", "x"], "Condition": {"Bool": {"k": True}}}]}
    other = {"Statement": {"Sid": "a", "Action": ["x", "y"], "Condition": {"Bool": {"k": "true"}}}}
    assert by_statement(one) == by_statement(other)
    assert canonical(["x"]) == "x"
    assert by_statement(None) == {}


def test_log_writers_are_held_to_the_account() -> None:
    statements = log_statements("b", ["vended_logs", "access_logs", "load_balancers"], "us-west-2", ACCOUNT)
    assert all(one["Condition"]["StringEquals"]["aws:SourceAccount"] == ACCOUNT for one in statements)
    assert log_statements("b", [], "us-west-2", "") == []
