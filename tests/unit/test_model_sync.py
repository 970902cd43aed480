"""Model files into a bucket, against a client that keeps objects in memory and can fail in the middle."""

from __future__ import annotations

import datetime
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.rayplane.platform.plugins.module_utils.serving.model_sync import (
    Bucket,
    ChecksumCache,
    File,
    ModelError,
    Syncer,
    content_digest,
    folder_files,
)


class ClientError(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


class Client:
    """The calls of boto3's S3 client that are used. ``fail_at`` makes the n-th upload fail."""

    exceptions = SimpleNamespace(ClientError=ClientError)

    def __init__(self, *buckets: str, fail_at: int = 0) -> None:
        self.buckets: dict[str, dict[str, bytes]] = {name: {} for name in buckets}
        self.uploads: list[str] = []
        self.fail_at = fail_at
        self.clock = 0
        self.times: dict[str, int] = {}

    def head_bucket(self, Bucket: str) -> None:  # noqa: N803
        if Bucket not in self.buckets:
            raise ClientError("404")

    def get_paginator(self, name: str) -> Any:
        assert name == "list_objects_v2"
        return self

    def paginate(self, Bucket: str, Prefix: str) -> Any:  # noqa: N803
        if Bucket not in self.buckets:
            raise ClientError("NoSuchBucket")
        epoch = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        found = [
            {
                "Key": key,
                "Size": len(body),
                "ETag": f'"{hash(body)}"',
                "LastModified": epoch + datetime.timedelta(seconds=self.times.get(key, 0)),
            }
            for key, body in sorted(self.buckets[Bucket].items())
            if key.startswith(Prefix)
        ]
        yield {"Contents": found[:2]}
        yield {"Contents": found[2:]} if found[2:] else {}

    def _store(self, bucket: str, key: str, body: bytes) -> None:
        self.clock += 1
        self.times[key] = self.clock
        self.buckets[bucket][key] = body

    def get_object(self, Bucket: str, Key: str) -> Any:  # noqa: N803
        if Key not in self.buckets[Bucket]:
            raise ClientError("NoSuchKey")
        return {"Body": io.BytesIO(self.buckets[Bucket][Key])}

    def put_object(self, Bucket: str, Key: str, Body: bytes, ContentType: str) -> None:  # noqa: N803
        self._store(Bucket, Key, Body)

    def upload_file(self, path: str, bucket: str, key: str, **_: Any) -> None:
        self.uploads.append(key)
        if self.fail_at and len(self.uploads) == self.fail_at:
            raise ClientError("RequestTimeout")
        self._store(bucket, key, Path(path).read_bytes())

    def copy(self, source: dict[str, str], bucket: str, key: str, **_: Any) -> None:
        self.uploads.append(key)
        self._store(bucket, key, self.buckets[source["Bucket"]][source["Key"]])

    def delete_objects(self, Bucket: str, Delete: Any) -> None:  # noqa: N803
        for entry in Delete["Objects"]:
            self.buckets[Bucket].pop(entry["Key"], None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(b"w" * 100)
    (root / "sub" / "vocab.txt").write_text("a b")
    (root / ".cache").mkdir()
    (root / ".cache" / "lock").write_text("x")
    (root / "model.bin").write_bytes(b"old format")
    return root


def syncer(client: Client, tmp_path: Path, **options: Any) -> Syncer:
    return Syncer(Bucket(client, "models"), tmp_path / "cache", ignore=["*.bin"], workers=1, **options)


def model(folder: Path, **more: Any) -> dict[str, Any]:
    return {"id": "m", "source": str(folder), "license": "apache-2.0", **more}


def test_digest_depends_on_names_and_content_only() -> None:
    files = [File("a", 1, "x"), File("b", 2, "y")]
    assert content_digest(files) == content_digest(reversed(files))
    assert content_digest(files) != content_digest([File("a", 1, "x"), File("c", 2, "y")])
    assert content_digest(files) != content_digest([File("a", 1, "x"), File("b", 2, "z")])
    assert len(content_digest(files)) == 16


def test_upload_then_nothing(folder: Path, tmp_path: Path) -> None:
    client = Client("models")
    first = syncer(client, tmp_path).sync(model(folder))
    assert sorted(first.uploaded) == ["config.json", "model.safetensors", "sub/vocab.txt"]
    assert first.location == f"s3://models/models/m/{first.digest}"
    manifest = json.loads(client.buckets["models"][f"models/m/manifests/{first.digest}.json"])
    assert manifest["license"] == "apache-2.0"
    assert set(manifest["files"]) == {"config.json", "model.safetensors", "sub/vocab.txt"}
    client.uploads.clear()
    again = syncer(client, tmp_path).sync(model(folder))
    assert not again.changed
    assert client.uploads == []


def test_a_rerun_reads_no_file_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client("models")
    syncer(client, tmp_path).sync(model(folder))
    second = syncer(client, tmp_path)
    second.sync(model(folder))
    assert second.cache.hits == 3
    os.utime(folder / "config.json", ns=(1, 1))
    third = syncer(client, tmp_path)
    assert not third.sync(model(folder)).changed
    assert third.cache.hits == 2


def test_an_interrupted_upload_is_not_taken_for_whole(folder: Path, tmp_path: Path) -> None:
    client = Client("models", fail_at=2)
    with pytest.raises(ClientError):
        syncer(client, tmp_path).sync(model(folder))
    assert not [key for key in client.buckets["models"] if "manifests" in key]
    client.fail_at = 0
    client.uploads.clear()
    result = syncer(client, tmp_path).sync(model(folder))
    assert len(client.uploads) == 1  # the one that failed; whole objects are not sent again
    assert [key for key in client.buckets["models"] if key.endswith(f"{result.digest}.json")]


def test_a_deleted_object_is_put_back(folder: Path, tmp_path: Path) -> None:
    client = Client("models")
    first = syncer(client, tmp_path).sync(model(folder))
    del client.buckets["models"][f"models/m/{first.digest}/config.json"]
    assert syncer(client, tmp_path).sync(model(folder)).uploaded == ["config.json"]
    del client.buckets["models"][f"models/m/manifests/{first.digest}.json"]
    assert syncer(client, tmp_path).sync(model(folder)).uploaded == ["manifest"]


def test_new_content_gets_a_new_place_and_the_old_one_stays(folder: Path, tmp_path: Path) -> None:
    client = Client("models")
    first = syncer(client, tmp_path).sync(model(folder))
    (folder / "config.json").write_text('{"a": 1}')
    second = syncer(client, tmp_path).sync(model(folder))
    assert second.digest != first.digest
    assert f"models/m/{first.digest}/config.json" in client.buckets["models"]
    (folder / "config.json").write_text('{"a": 2}')
    third = syncer(client, tmp_path, keep_versions=2).sync(model(folder))
    assert third.pruned == [first.digest]
    assert not [key for key in client.buckets["models"] if first.digest in key]
    assert f"models/m/{second.digest}/config.json" in client.buckets["models"]


def test_check_mode_predicts_without_a_bucket(folder: Path, tmp_path: Path) -> None:
    client = Client()
    plan = syncer(client, tmp_path, dry_run=True).sync(model(folder))
    assert len(plan.uploaded) == 3
    assert client.uploads == []
    real = syncer(Client("models"), tmp_path).sync(model(folder))
    assert plan.location == real.location


def test_bucket_to_bucket(folder: Path, tmp_path: Path) -> None:
    client = Client("models", "other")
    client.buckets["other"] = {"m/config.json": b"{}", "m/model.bin": b"x", "m/w.safetensors": b"w", "n/x": b"1"}
    result = syncer(client, tmp_path).sync({"id": "m", "source": "s3://other/m/"})
    assert sorted(result.uploaded) == ["config.json", "w.safetensors"]
    assert client.buckets["models"][f"models/m/{result.digest}/config.json"] == b"{}"
    assert not syncer(client, tmp_path).sync({"id": "m", "source": "s3://other/m"}).changed


class Hub:
    """huggingface_hub with one repository; ``calls`` counts what was asked."""

    def __init__(self, folder: Path, fail: str = "") -> None:
        self.folder = folder
        self.fail = fail
        self.calls: list[str] = []
        self.HfApi = lambda: self

    def model_info(self, repository: str, revision: str, files_metadata: bool) -> Any:
        self.calls.append(f"info {repository}@{revision}")
        if self.fail:
            raise RuntimeError(self.fail)
        entries = [
            SimpleNamespace(rfilename="config.json", size=2, blob_id="b1", lfs=None),
            SimpleNamespace(rfilename="model.safetensors", size=100, blob_id="b2", lfs=SimpleNamespace(sha256="s2")),
            SimpleNamespace(rfilename="model.bin", size=10, blob_id="b3", lfs={"sha256": "s3"}),
        ]
        return SimpleNamespace(siblings=entries, sha="c" * 40)

    def hf_hub_download(self, repository: str, name: str, revision: str, local_dir: str) -> str:
        self.calls.append(f"get {name}@{revision[:4]}")
        target = Path(local_dir) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((self.folder / name).read_bytes())
        return str(target)


def test_hub(folder: Path, tmp_path: Path) -> None:
    client, hub = Client("models"), Hub(folder)
    entry = {"id": "m", "source": "org/m", "revision": "main"}
    plan = syncer(client, tmp_path, hub=lambda: hub, dry_run=True).sync(entry)
    assert hub.calls == ["info org/m@main"]
    result = syncer(client, tmp_path, hub=lambda: hub).sync(entry)
    assert result.location == plan.location
    assert hub.calls[2:] == ["get model.safetensors@cccc", "get config.json@cccc"]
    assert not list((tmp_path / "cache" / "hub").rglob("*.safetensors"))
    hub.calls.clear()
    assert not syncer(client, tmp_path, hub=lambda: hub).sync(entry).changed
    assert hub.calls == ["info org/m@main"]


def test_a_pinned_revision_asks_the_hub_once(folder: Path, tmp_path: Path) -> None:
    client, hub = Client("models"), Hub(folder)
    entry = {"id": "m", "source": "org/m", "revision": "c" * 40}
    first = syncer(client, tmp_path, hub=lambda: hub).sync(entry)
    hub.calls.clear()
    second = syncer(client, tmp_path, hub=lambda: hub).sync(entry)
    assert hub.calls == []
    assert second.location == first.location
    assert not second.changed


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"source": "/nowhere/at/all"}, "does not exist; put the model there or correct source"),
        ({"source": "what is this"}, "neither a folder, an s3:// address nor a hub id"),
        ({"source": "s3://absent/m"}, "cannot be listed"),
        ({"source": "s3://models/empty"}, "holds no file"),
        ({"source": "s3://models/old"}, "models_ignore (*.bin) leaves out others"),
        ({"source": "org/gated"}, "HUGGING_FACE_HUB_TOKEN"),
    ],
)
def test_bad_sources(entry: dict[str, Any], said: str, tmp_path: Path) -> None:
    client = Client("models")
    client.buckets["models"] = {"old/config.json": b"{}", "old/model.bin": b"w"}
    with pytest.raises(ModelError, match="model m: ") as caught:
        syncer(client, tmp_path, hub=lambda: Hub(tmp_path, "403 gated")).sync({"id": "m", **entry})
    assert said in str(caught.value)


def test_checksum_is_compared(folder: Path, tmp_path: Path) -> None:
    digest = content_digest([file for file, _ in folder_files(folder, ChecksumCache(tmp_path / "c"), ["*.bin"])])
    assert syncer(Client("models"), tmp_path).sync(model(folder, checksum=digest)).digest == digest
    with pytest.raises(ModelError, match="checksum is 0000"):
        syncer(Client("models"), tmp_path).sync(model(folder, checksum="0000"))


def test_a_missing_bucket_is_told_by_its_variable(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="bucket models does not exist: set platform_models_bucket"):
        syncer(Client(), tmp_path)
