"""Upstream's release files: is upstream there, and is what came what its checksum says."""

from __future__ import annotations

import hashlib
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import CancelledError, PlatformError
from .progress import Step
from .settings import Settings

ATTEMPTS = 4
BLOCK = 1 << 20


@dataclass(frozen=True)
class Release:
    """One release file: the name of its base address, its path below it, its checksum, and the programs in it.

    The checksum is ALGORITHM:HEX, or ALGORITHM:ADDRESS of the file in which upstream publishes it.
    """

    base: str
    file: str
    checksum: str
    members: Mapping[str, str]

    def address(self, settings: Settings) -> str | None:
        """Where the file is, or None where no base address is set."""
        base = settings.release_bases.get(self.base, "")
        return f"{base.rstrip('/')}/{self.file}" if base else None

    def pinned(self, settings: Settings) -> str:
        """The checksum to hold it to: the inventory's (a mirror of one's own builds), else upstream's."""
        return settings.release_checksums.get(self.base, "") or self.checksum


def reachable(releases: Iterable[Release], settings: Settings) -> bool:
    """Whether every release file answers, asked at once and within the probe's time."""
    addresses = [release.address(settings) for release in releases]
    if not addresses or None in addresses:
        return False
    answers: list[bool] = []

    def ask(address: str) -> None:
        try:
            request = urllib.request.Request(address, method="HEAD")  # noqa: S310  the inventory names it
            with urllib.request.urlopen(request, timeout=settings.probe_seconds) as answer:  # noqa: S310
                answers.append(answer.status == 200)
        except (OSError, ValueError):
            answers.append(False)

    threads = [threading.Thread(target=ask, args=(address,), daemon=True) for address in addresses]
    for thread in threads:
        thread.start()
    end = time.monotonic() + settings.probe_seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return len(answers) == len(addresses) and all(answers)


def digest(path: Path, algorithm: str) -> str:
    """A file's checksum, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def published(release: Release, algorithm: str, address: str) -> str:
    """The checksum, in hex, that the file at an address begins with."""
    length = 2 * hashlib.new(algorithm).digest_size
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:  # noqa: S310  upstream's, or the inventory's
            text = answer.read(BLOCK).decode(errors="replace")
    except (OSError, ValueError) as error:
        text = str(error)
    if not (found := re.match(rf"[0-9a-f]{{{length}}}(?=\s|$)", text)):
        raise PlatformError(
            f"{address} gave no {algorithm} checksum of {release.file}: {text.strip()[:200]!r}. "
            f"Set it in local_platform_release_checksums.{release.base} ({algorithm}:HEX), "
            "or set local_platform_source to 'build'."
        )
    return found[0]


def download(release: Release, settings: Settings, target: Path, step: Step) -> None:
    """Bring a release file to target, going on where an earlier try stopped, and hold it to its checksum.

    Raises PlatformError where upstream does not answer, or answers with something else than what was pinned.
    """
    algorithm, _, wanted = release.pinned(settings).partition(":")
    address = release.address(settings)
    if address is None:
        raise PlatformError(
            f"local_platform_source is 'release', but no address is set for {release.base}: "
            f"set local_platform_release_base_{release.base}."
        )
    if "://" in wanted:
        wanted = published(release, algorithm, wanted)
    if target.is_file() and digest(target, algorithm) == wanted:
        return
    part = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    error: Exception | None = None
    for attempt in range(ATTEMPTS):
        if step.cancel.wait(attempt):
            raise CancelledError(f"{step.name} was stopped")
        try:
            fetch(address, part, step)
            error = None
            break
        except (OSError, urllib.error.URLError) as caught:
            error = caught
    if error is not None:
        raise PlatformError(
            f"{address} could not be downloaded: {error}. "
            f"Check the address (local_platform_release_base_{release.base}) and the network, "
            "or set local_platform_source to 'build'. What came so far is kept; the next run goes on there."
        )
    found = digest(part, algorithm)
    if found != wanted:
        part.unlink()
        raise PlatformError(
            f"{address} is not the file that was pinned: its {algorithm} is {found}, "
            f"pinned is {wanted}. It was deleted. "
            f"Check what answers at local_platform_release_base_{release.base}, "
            "or set local_platform_source to 'build'."
        )
    part.rename(target)


def fetch(address: str, part: Path, step: Step) -> None:
    """Fetch an address into a file, from the byte on where the file ends. Raises OSError where it breaks off."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    try:
        answer = urllib.request.urlopen(request, timeout=30)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing after the last byte: the file is whole, its checksum decides
            return
        raise
    with answer:
        resumed = answer.status == 206
        length = int(answer.headers.get("Content-Length") or 0) + (have if resumed else 0)
        got = have if resumed else 0
        with part.open("ab" if resumed else "wb") as output:
            while block := answer.read(BLOCK):
                output.write(block)
                got += len(block)
                step.note = f"{got >> 20} of {length >> 20} MiB"
                if step.cancel.is_set():
                    raise CancelledError(f"{step.name} was stopped")
        if length and got < length:
            raise OSError(f"the connection ended after {got} of {length} bytes")
