"""Container images without a container tool: layers of files, written as an OCI archive into any stream.

The format: OCI image layout and image manifest (opencontainers/image-spec, v1). Layers are plain tar streams with fixed
times and owners, so the same files always give the same digests. A layer is written twice, once into the hash and once
into the archive, and never lies on disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

BLOCK = 1 << 20
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"


class Sink(Protocol):
    """What a layer is written into."""

    def write(self, data: bytes, /) -> Any: ...


class _Hash:
    """A sink that keeps the digest and the size of what was written."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is kept back."""

    @property
    def digest(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"


@dataclass(frozen=True)
class Blob:
    """Bytes with their digest: given, or written on demand."""

    digest: str
    size: int
    write: Callable[[Sink], object]


def blob_of_bytes(data: bytes) -> Blob:
    return Blob(f"sha256:{hashlib.sha256(data).hexdigest()}", len(data), lambda sink: sink.write(data))


def blob_of(write: Callable[[Sink], object]) -> Blob:
    """A blob of what a function writes; the function is called once now and once for every archive."""
    counter = _Hash()
    write(counter)
    return Blob(counter.digest, counter.size, write)


def blob_of_file(path: Path) -> Blob:
    """A blob of a file that is a layer already."""

    def write(sink: Sink) -> None:
        with path.open("rb") as stream:
            while block := stream.read(BLOCK):
                sink.write(block)

    return blob_of(write)


def layer(
    files: Mapping[str, Path],
    *,
    links: Mapping[str, str] | None = None,
    texts: Mapping[str, str | bytes] | None = None,
    trees: Mapping[str, Path] | None = None,
) -> Blob:
    """A layer with programs (path in the image: file here), symbolic links, small texts, whole folders with the links
    in them, and a /tmp for everybody.
    """

    def entry(name: str, kind: bytes, mode: int, size: int = 0) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.size = kind, mode, size
        return info

    def write(sink: Sink) -> None:
        with tarfile.open(fileobj=_as_file(sink), mode="w|", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(entry("tmp", tarfile.DIRTYPE, 0o1777))
            for name, text in sorted((texts or {}).items()):
                data = text if isinstance(text, bytes) else text.encode()
                tar.addfile(entry(name, tarfile.REGTYPE, 0o644, len(data)), io.BytesIO(data))
            for name, path in sorted(files.items()):
                with path.open("rb") as stream:
                    tar.addfile(entry(name, tarfile.REGTYPE, 0o755, path.stat().st_size), stream)
            for name, target in sorted((links or {}).items()):
                info = entry(name, tarfile.SYMTYPE, 0o777)
                info.linkname = target
                tar.addfile(info)
            for name, folder in sorted((trees or {}).items()):
                for path in sorted(folder.rglob("*")):
                    inside = f"{name}/{path.relative_to(folder)}"
                    if path.is_symlink():
                        info = entry(inside, tarfile.SYMTYPE, 0o777)
                        info.linkname = str(path.readlink())
                        tar.addfile(info)
                    elif path.is_file():
                        mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
                        with path.open("rb") as stream:
                            tar.addfile(entry(inside, tarfile.REGTYPE, mode, path.stat().st_size), stream)

    return blob_of(write)


def _as_file(sink: Sink) -> IO[bytes]:
    return sink  # type: ignore[return-value]  # tarfile's stream mode calls write() only


@dataclass(frozen=True)
class Image:
    """An image: its name as containerd keeps it, its layers, and what its containers start with."""

    name: str
    layers: Sequence[Blob]
    config: Mapping[str, Any] = field(default_factory=dict)

    def blobs(self) -> tuple[Blob, Blob]:
        """The image's config and its manifest."""
        config = blob_of_bytes(
            _json(
                {
                    "architecture": "amd64",
                    "os": "linux",
                    "config": dict(self.config),
                    "rootfs": {"type": "layers", "diff_ids": [item.digest for item in self.layers]},
                }
            )
        )
        manifest = blob_of_bytes(
            _json(
                {
                    "schemaVersion": 2,
                    "mediaType": _MANIFEST,
                    "config": {"mediaType": _CONFIG, "digest": config.digest, "size": config.size},
                    "layers": [{"mediaType": _LAYER, "digest": item.digest, "size": item.size} for item in self.layers],
                }
            )
        )
        return config, manifest


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def write_archive(images: Sequence[Image], stream: IO[bytes], note: Callable[[str], None] = lambda text: None) -> None:
    """Write images as one OCI archive; layers that they share are written once."""
    blobs: dict[str, Blob] = {}
    index = []
    for image in images:
        config, manifest = image.blobs()
        blobs |= {item.digest: item for item in (*image.layers, config, manifest)}
        # containerd reads the name from its own annotation; the specification's is for tags only.
        index.append(
            {
                "mediaType": _MANIFEST,
                "digest": manifest.digest,
                "size": manifest.size,
                "annotations": {"io.containerd.image.name": image.name},
            }
        )
    files = {
        "oci-layout": blob_of_bytes(_json({"imageLayoutVersion": "1.0.0"})),
        "index.json": blob_of_bytes(_json({"schemaVersion": 2, "mediaType": _INDEX, "manifests": index})),
    }
    files |= {f"blobs/sha256/{item.digest.partition(':')[2]}": item for item in blobs.values()}
    total, written = sum(item.size for item in files.values()), 0
    for name, blob in files.items():
        info = tarfile.TarInfo(name)
        info.size = blob.size
        stream.write(info.tobuf(tarfile.PAX_FORMAT))
        blob.write(stream)
        stream.write(b"\0" * (-blob.size % tarfile.BLOCKSIZE))
        written += blob.size
        note(f"{written >> 20} of {total >> 20} MiB")
    stream.write(b"\0" * (2 * tarfile.BLOCKSIZE))
