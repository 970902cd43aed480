"""Bring model files from a folder, a hub or another bucket into the models bucket, one prefix per content.

Layout in the bucket::

    models/<id>/<digest>/...                 the files
    models/<id>/manifests/<digest>.json      what they are; written last, so an interrupted upload is never taken for
    whole

The digest is the SHA-256 over the sorted names and content checksums, cut to 16 hexadecimal digits. Equal content has
an equal address, so a
model's pods restart only when its files did change, and an older version stays where it is for a rollback.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]

S3_ADDRESS = re.compile(r"s3://(?P<bucket>[^/]+)/?(?P<prefix>.*)\Z")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+\Z")
COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_CHUNK = 8 * 1024 * 1024
#: Endings of the weights that a load format of vLLM reads; the others read safetensors.
_WEIGHTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("auto", "hf"), (".safetensors", ".bin", ".pt")),
    **dict.fromkeys(("dummy", "modelexpress", "tensorizer"), ()),
    **{"npcache": (".bin", ".pt"), "pt": (".pt",)},
}
_OF_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")


class ModelError(Exception):
    """A model cannot be brought to the bucket; the message names the model, the reason and the cure."""


@dataclass(frozen=True)
class File:
    """One file of a model: its name inside the model, its size in bytes, and a checksum of its content."""

    name: str
    size: int
    checksum: str


@dataclass
class Source:
    """A model's files and how each gets to the bucket. ``put(file, key)`` uploads or copies one."""

    files: list[File]
    put: Callable[[File, str], None]
    revision: str = ""
    checksum: str = "sha256"


@dataclass
class Result:
    """What became of one model."""

    id: str
    location: str
    digest: str
    files: int
    bytes: int
    uploaded: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def changed(self) -> bool:
        return bool(self.uploaded or self.pruned)


def content_digest(files: Iterable[File]) -> str:
    """16 hexadecimal digits over the sorted names and checksums."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda entry: entry.name):
        digest.update(f"{file.name}\0{file.checksum}\n".encode())
    return digest.hexdigest()[:16]


class ChecksumCache:
    """SHA-256 of files, remembered by path, size and modification time: gigabytes are read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hits = 0
        self._dirty = False
        try:
            self._known: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def sha256(self, path: Path) -> str:
        stat = path.stat()
        key, state = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        found = self._known.get(key)
        if found and found[:2] == state:
            self.hits += 1
            return str(found[2])
        digest = hashlib.sha256()
        with path.open("rb") as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
        self._known[key] = [*state, digest.hexdigest()]
        self._dirty = True
        return digest.hexdigest()

    def save(self) -> None:
        """Write what was learned, in one step; entries of files that are gone are dropped."""
        if not self._dirty:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in self._known.items() if Path(key).exists()}
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(kept), encoding="utf-8")
        temporary.replace(self.path)


def skipped(name: str, ignore: Sequence[str]) -> bool:
    """Whether a file is left out by one of the patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in ignore)


def has_weights(engine: Any, names: Iterable[str]) -> bool:
    """Whether vLLM with the arguments ``engine`` finds weights among a model's files. Source: vLLM 0.29,
    model_executor/model_loader/default_loader.py, DefaultModelLoader._prepare_weights.
    """
    chosen = engine.get("load_format") if isinstance(engine, Mapping) else None
    endings = _WEIGHTS.get(str(chosen or "auto"), (".safetensors",))
    return not endings or any(
        name.endswith(endings) and "/" not in name and not name.endswith(_OF_TRAINING) for name in names
    )


def folder_files(folder: Path, cache: ChecksumCache, ignore: Sequence[str] = ()) -> list[tuple[File, Path]]:
    """The files below ``folder`` with their checksums; hidden files and ``ignore`` patterns are left out."""
    paths = [
        (path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    chosen = [(name, path) for name, path in paths if not skipped(name, ignore)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        sums = list(pool.map(lambda entry: cache.sha256(entry[1]), chosen))
    return [(File(name, path.stat().st_size, digest), path) for (name, path), digest in zip(chosen, sums, strict=True)]


class Bucket:
    """The models bucket: listing, uploads in parallel parts, manifests."""

    def __init__(self, client: Any, name: str, transfer: Any = None) -> None:
        self.client = client
        self.name = name
        self.transfer = transfer

    def exists(self) -> bool:
        """Whether the bucket is there. Raises what the service says where it refuses to tell."""
        try:
            self.client.head_bucket(Bucket=self.name)
        except self.client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchBucket", "NotFound"):
                return False
            raise
        return True

    def sizes(self, prefix: str) -> dict[str, int]:
        """Size in bytes of each object below ``prefix``, by its name relative to it."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return {item["Key"][len(prefix) :]: item["Size"] for page in pages for item in page.get("Contents", [])}

    def read_json(self, key: str) -> Json | None:
        try:
            body = self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
        except self.client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NoSuchBucket", "NotFound"):
                return None
            raise
        found: Json = json.loads(body)
        return found

    def write_json(self, key: str, value: Json) -> None:
        body = json.dumps(value, indent=1, sort_keys=True).encode()
        self.client.put_object(Bucket=self.name, Key=key, Body=body, ContentType="application/json")

    def upload(self, path: Path, key: str, checksum: str) -> None:
        extra = {"Metadata": {"sha256": checksum}}
        self.client.upload_file(str(path), self.name, key, ExtraArgs=extra, Config=self.transfer)

    def copy(self, bucket: str, source_key: str, key: str) -> None:
        self.client.copy({"Bucket": bucket, "Key": source_key}, self.name, key, Config=self.transfer)

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), 1000):
            chunk = [{"Key": key} for key in keys[start : start + 1000]]
            self.client.delete_objects(Bucket=self.name, Delete={"Objects": chunk, "Quiet": True})


class Syncer:
    """Synchronises models into one bucket.

    ``hub`` is a module with ``HfApi`` and ``hf_hub_download`` (huggingface_hub), asked for only when a model comes
    from a hub.
    ``dry_run`` changes nothing and needs no bucket.
    """

    def __init__(
        self,
        bucket: Bucket,
        cache_dir: Path,
        *,
        prefix: str = "models",
        ignore: Sequence[str] = (),
        keep_versions: int = 0,
        hub: Callable[[], Any] | None = None,
        dry_run: bool = False,
        workers: int = 4,
    ) -> None:
        self.bucket = bucket
        self.cache_dir = cache_dir
        self.cache = ChecksumCache(cache_dir / "checksums.json")
        self.prefix = prefix.strip("/")
        self.ignore = list(ignore)
        self.keep_versions = keep_versions
        self.hub = hub
        self.dry_run = dry_run
        self.workers = workers
        self.has_bucket = bucket.exists()
        if not self.has_bucket and not dry_run:
            raise ModelError(
                f"bucket {bucket.name} does not exist: set platform_models_bucket to one that does, "
                "or let the storage role create it"
            )

    def sync(self, model: Json) -> Result:
        """Bring one model to the bucket and return where it is. A model that is there already costs two requests."""
        started = time.monotonic()
        source = self._source(model)
        if not source.files:
            raise ModelError(f"model {model['id']}: {model['source']} holds no file")
        if not has_weights(model.get("engine"), (file.name for file in source.files)):
            raise ModelError(
                f"model {model['id']}: {model['source']} has no weights in safetensors, and models_ignore "
                f"({', '.join(self.ignore)}) leaves out others: name a source with weights in safetensors, or take "
                "their format out of models_ignore"
            )
        digest = content_digest(source.files)
        wanted = model.get("checksum")
        if wanted and not digest.startswith(str(wanted)[:16]):
            raise ModelError(
                f"model {model['id']}: checksum is {wanted} and the content's {digest}; "
                f"the files of {model['source']} are others than declared"
            )
        root = f"{self.prefix}/{model['id']}"
        target = f"{root}/{digest}/"
        result = Result(
            id=model["id"],
            location=f"s3://{self.bucket.name}/{root}/{digest}",
            digest=digest,
            files=len(source.files),
            bytes=sum(file.size for file in source.files),
        )
        manifest_key = f"{root}/manifests/{digest}.json"
        present = self.bucket.sizes(target) if self.has_bucket else {}
        whole = self.has_bucket and self.bucket.read_json(manifest_key) is not None
        # Without a manifest an object may be of an upload that was cut off: sizes tell whole objects, S3 shows no
        # partial ones.
        missing = [file for file in source.files if present.get(file.name) != file.size]
        result.uploaded = [file.name for file in missing] or ([] if whole else ["manifest"])
        if not self.dry_run and result.uploaded:
            with ThreadPoolExecutor(max_workers=self.workers) as pool:
                list(
                    pool.map(
                        lambda file: source.put(file, target + file.name), sorted(missing, key=lambda file: -file.size)
                    )
                )
            self.bucket.write_json(manifest_key, self._manifest(model, source, digest))
        if self.keep_versions and self.has_bucket:
            result.pruned = self._prune(root, digest)
        result.seconds = round(time.monotonic() - started, 2)
        return result

    def _manifest(self, model: Json, source: Source, digest: str) -> Json:
        return {
            "id": model["id"],
            "source": model["source"],
            "revision": source.revision or model.get("revision") or "",
            "license": model.get("license") or "unknown",
            "digest": digest,
            "checksum": source.checksum,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": {file.name: {"size": file.size, "checksum": file.checksum} for file in source.files},
        }

    def _prune(self, root: str, current: str) -> list[str]:
        """Delete all but the newest ``keep_versions`` versions; the current one always stays. Returns the digests."""
        listed = self.bucket.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket.name, Prefix=f"{root}/manifests/"
        )
        manifests = sorted(
            (
                (item["LastModified"], item["Key"].rsplit("/", 1)[1].removesuffix(".json"))
                for page in listed
                for item in page.get("Contents", [])
            ),
            reverse=True,
        )
        others = [digest for _, digest in manifests if digest != current]
        gone = others[max(self.keep_versions - 1, 0) :]
        if not self.dry_run:
            for digest in gone:
                # The manifest first: what is left of a cut-off deletion must not pass for a whole version.
                self.bucket.delete([f"{root}/manifests/{digest}.json"])
                self.bucket.delete([f"{root}/{digest}/{name}" for name in self.bucket.sizes(f"{root}/{digest}/")])
        return gone

    def _source(self, model: Json) -> Source:
        address = str(model["source"])
        match = S3_ADDRESS.fullmatch(address)
        if match:
            return self._s3_source(model, match["bucket"], match["prefix"].rstrip("/"))
        folder = Path(address).expanduser()
        if address.startswith(("/", "./", "../", "~")) or folder.is_dir():
            return self._folder_source(model, folder)
        if HUB_ID.fullmatch(address):
            return self._hub_source(model, address)
        raise ModelError(
            f"model {model['id']}: source is {address}, "
            "which is neither a folder, an s3:// address nor a hub id (org/name)"
        )

    def _folder_source(self, model: Json, folder: Path) -> Source:
        if not folder.is_dir():
            raise ModelError(
                f"model {model['id']}: source is the folder {folder}, which does not exist; "
                "put the model there or correct source"
            )
        found = folder_files(folder, self.cache, self.ignore)
        self.cache.save()
        paths = {file.name: path for file, path in found}
        return Source(
            [file for file, _ in found], lambda file, key: self.bucket.upload(paths[file.name], key, file.checksum)
        )

    def _s3_source(self, model: Json, bucket: str, prefix: str) -> Source:
        """Copied inside the service; the checksum is the ETag, which the service changes whenever the content does."""
        root = f"{prefix}/" if prefix else ""
        pages = self.bucket.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=root)
        try:
            files = [
                File(item["Key"][len(root) :], item["Size"], item["ETag"].strip('"'))
                for page in pages
                for item in page.get("Contents", [])
                if not item["Key"].endswith("/") and not skipped(item["Key"][len(root) :], self.ignore)
            ]
        except self.bucket.client.exceptions.ClientError as error:
            raise ModelError(f"model {model['id']}: source s3://{bucket}/{prefix} cannot be listed: {error}") from error
        return Source(files, lambda file, key: self.bucket.copy(bucket, root + file.name, key), checksum="etag")

    def _hub_source(self, model: Json, repository: str) -> Source:
        """Files of a hub repository. The hub tells checksums without a download, so a plan and a rerun fetch
        nothing."""
        if self.hub is None:
            raise ModelError(f"model {model['id']}: source is the hub id {repository}, and no hub is configured")
        hub = self.hub()
        revision = str(model.get("revision") or "main")
        known = self._known_revision(model, revision)
        if known is not None:
            return known
        try:
            info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
        except Exception as error:
            raise ModelError(
                f"model {model['id']}: the hub does not give {repository} at revision {revision}: "
                f"{str(error).strip().splitlines()[0]} "
                "(a gated model needs HUGGING_FACE_HUB_TOKEN of an account that accepted its licence; "
                "without a way to the hub name a folder or an s3:// address as source)"
            ) from error
        files = []
        for entry in info.siblings:
            if skipped(entry.rfilename, self.ignore):
                continue
            large = getattr(entry, "lfs", None)
            checksum = (
                large.get("sha256") if isinstance(large, dict) else getattr(large, "sha256", None)
            ) or entry.blob_id
            files.append(File(entry.rfilename, int(entry.size or 0), str(checksum)))

        def put(file: File, key: str) -> None:
            local = Path(
                hub.hf_hub_download(
                    repository, file.name, revision=info.sha, local_dir=str(self.cache_dir / "hub" / model["id"])
                )
            )
            try:
                self.bucket.upload(local, key, self.cache.sha256(local))
            finally:
                local.unlink(missing_ok=True)

        return Source(files, put, revision=str(info.sha), checksum="sha256 (large files) or git blob id")

    def _known_revision(self, model: Json, revision: str) -> Source | None:
        """A revision given as a commit never changes: where its manifest is in the bucket, the hub need not be
        asked."""
        if not COMMIT.fullmatch(revision) or not self.has_bucket:
            return None
        root = f"{self.prefix}/{model['id']}"
        for name in self.bucket.sizes(f"{root}/manifests/"):
            manifest = self.bucket.read_json(f"{root}/manifests/{name}")
            if manifest and manifest["revision"] == revision and manifest["source"] == model["source"]:
                files = [File(key, value["size"], value["checksum"]) for key, value in manifest["files"].items()]
                present = self.bucket.sizes(f"{root}/{manifest['digest']}/")
                if all(present.get(file.name) == file.size for file in files):
                    return Source(files, lambda file, key: None, revision=revision)
        return None
