"""Upstream's release files, from a mirror on loopback that holds small stand-ins for the programs."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rayplane_local import parts, releases, stages
from rayplane_local.errors import PlatformError
from rayplane_local.graph import run_graph
from rayplane_local.progress import Step
from rayplane_local.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


class Mirror(http.server.ThreadingHTTPServer):
    """A file server with ranges, and a knob: how many answers break off, and after how many bytes."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.breaks = 0
        self.break_after = 0
        self.asked: list[tuple[str, str, str]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Mirror

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        wanted = self.headers.get("Range", "")
        self.server.asked.append((self.command, self.path, wanted))
        file = self.server.root / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        size = file.stat().st_size
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if first >= size:
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(size - first))
        self.end_headers()
        if not body:
            return
        with file.open("rb") as stream:
            stream.seek(first)
            if self.server.breaks > 0:
                self.server.breaks -= 1
                self.wfile.write(stream.read(self.server.break_after))
                self.close_connection = True
                return
            while block := stream.read(1 << 20):
                self.wfile.write(block)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: the requests are kept in `asked`."""


def content(name: str) -> bytes:
    return f"#!/bin/sh\necho {name}\n".encode()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in upstream's layout."""
    root = tmp_path_factory.mktemp("mirror")
    for part in parts.PARTS:
        if part.release is not None:
            file = root / part.release.base / part.release.file
            file.parent.mkdir(parents=True)
            with tarfile.open(file, "w:gz", compresslevel=0) as tar:
                for name, member in part.release.members.items():
                    data = content(name)
                    info = tarfile.TarInfo(member)
                    info.size, info.mode = len(data), 0o755
                    tar.addfile(info, io.BytesIO(data))
    return root


@pytest.fixture
def mirror(filled: Path) -> Iterator[Mirror]:
    with Mirror(filled) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def settings(tmp_path: Path, mirror: Mirror, filled: Path) -> Settings:
    bases = {part.release.base: f"{mirror.address}/{part.release.base}" for part in parts.PARTS if part.release}
    checksums = {
        part.release.base: f"sha256:{releases.digest(filled / part.release.base / part.release.file, 'sha256')}"
        for part in parts.PARTS
        if part.release
    }
    return Settings(
        home=tmp_path / "home",
        source="release",
        release_bases=bases,
        release_checksums=checksums,
        probe_seconds=60,
    )


def etcd() -> tuple[parts.Part, releases.Release]:
    part = parts.part("etcd")
    assert part.release is not None
    return part, part.release


def test_releases_are_downloaded_checked_and_unpacked(settings: Settings) -> None:
    released = stages.from_release(settings)
    assert released == {"kubernetes", "etcd"}
    works = [work for work in stages.artefacts_works(settings, released) if work.name.startswith("release ")]
    run_graph(works, lambda line: None)
    for part in parts.PARTS:
        if part.release is not None:
            folder = parts.ready_folder(settings, part)
            assert folder.name.endswith("-release")
            for name in part.programs:
                program = folder / "bin" / name
                assert program.read_bytes() == content(name)
                assert os.access(program, os.X_OK)
    assert list((settings.home / "downloads").iterdir()) == []
    assert stages.from_release(settings) == set()  # nothing is asked for twice


def test_auto_takes_releases_where_upstream_answers(settings: Settings, mirror: Mirror) -> None:
    assert stages.from_release(replace(settings, source="auto")) == {"kubernetes", "etcd"}
    assert {method for method, _, _ in mirror.asked} == {"HEAD"}


def test_auto_builds_where_upstream_does_not_answer_in_time(settings: Settings) -> None:
    gone = {"kubernetes": settings.release_bases["kubernetes"], "etcd": "http://127.0.0.1:1"}
    assert stages.from_release(replace(settings, source="auto", release_bases=gone)) == set()
    empty = {"kubernetes": "", "etcd": ""}
    assert stages.from_release(replace(settings, source="auto", release_bases=empty)) == set()


def test_auto_does_not_wait_longer_than_it_is_told(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        bases = {"kubernetes": silent_address, "etcd": silent_address}
        began = time.monotonic()
        assert stages.from_release(replace(settings, source="auto", release_bases=bases, probe_seconds=0.3)) == set()
        assert time.monotonic() - began < 30


def test_a_wrong_checksum_is_refused_with_one_clear_error(settings: Settings) -> None:
    part, release = etcd()
    wrong = replace(settings, release_checksums={"etcd": f"sha256:{hashlib.sha256(b'other').hexdigest()}"})
    with pytest.raises(PlatformError) as caught:
        parts.take_release(wrong, part, Step("release etcd"))
    text = str(caught.value)
    for word in (release.file, "is not the file that was pinned", "It was deleted", "local_platform_release_base_etcd"):
        assert word in text
    assert parts.folder(wrong, part) is None
    assert list((wrong.home / "downloads").iterdir()) == []


def test_the_pinned_checksum_holds_where_the_inventory_gives_none(settings: Settings) -> None:
    part, release = etcd()
    with pytest.raises(PlatformError, match=release.checksum.partition(":")[2]):
        parts.take_release(replace(settings, release_checksums={}), part, Step("release etcd"))


def test_a_download_that_breaks_off_goes_on_where_it_stopped(
    settings: Settings, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, _ = etcd()
    mirror.breaks, mirror.break_after = 2, 10
    step = Step("release etcd")
    monkeypatch.setattr(step.cancel, "wait", lambda seconds: False)  # no pause between attempts
    parts.take_release(settings, part, step)
    assert [wanted for _, _, wanted in mirror.asked] == ["", "bytes=10-", "bytes=20-"]
    assert (parts.ready_folder(settings, part) / "bin" / "etcd").read_bytes() == content("etcd")


def test_what_an_interrupted_run_left_is_used(settings: Settings, mirror: Mirror, filled: Path) -> None:
    part, release = etcd()
    whole = (filled / release.base / release.file).read_bytes()
    left = settings.home / "downloads" / f"{release.file.replace('/', '-')}.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(whole[:100])
    parts.take_release(settings, part, Step("release etcd"))
    assert mirror.asked == [("GET", f"/{release.base}/{release.file}", "bytes=100-")]


def test_a_part_file_that_is_whole_already_is_used(settings: Settings, filled: Path) -> None:
    part, release = etcd()
    left = settings.home / "downloads" / f"{release.file.replace('/', '-')}.part"
    left.parent.mkdir(parents=True)
    left.write_bytes((filled / release.base / release.file).read_bytes())
    parts.take_release(settings, part, Step("release etcd"))
    assert parts.folder(settings, part) is not None


def test_an_upstream_that_is_gone_is_named_with_the_cure(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "ATTEMPTS", 1)
    part, _ = etcd()
    gone = replace(settings, release_bases={"etcd": "http://127.0.0.1:1"})
    with pytest.raises(PlatformError, match=r"could not be downloaded.*local_platform_release_base_etcd"):
        parts.take_release(gone, part, Step("release etcd"))
