"""The audit log over restarts, kills, full disks, purges and retention, and its command line."""

from __future__ import annotations

import asyncio
import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from serve_app.gateway import audit, audit_cli, audit_format, audit_verify
from serve_app.gateway.audit import AuditFailed, AuditLog
from serve_app.gateway.config import Audit

from .waiting import wait_until

PROJECT = Path(__file__).resolve().parents[2]


class Place:
    """A directory with a key, and how to open logs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directory = folder / "log"
        self.private, self.public = folder / "key.pem", folder / "key.pub"
        assert audit_cli.main(["keygen", str(self.private), str(self.public)]) == 0
        self.now = 1_800_000_000.0

    def config(self, **more: Any) -> Audit:
        return Audit(enabled=True, directory=str(self.directory), signing_key_file=str(self.private), **more)

    def log(self, instance: str = "gw-0", **more: Any) -> AuditLog:
        return AuditLog(self.config(**more), instance, clock=lambda: self.now)

    def key(self) -> Ed25519PublicKey:
        found = load_pem_public_key(self.public.read_bytes())
        assert isinstance(found, Ed25519PublicKey)
        return found

    def verify(self, *anchors: audit_format.Head) -> audit_verify.Report:
        return audit_verify.verify(self.directory, [self.key()], anchors)

    def segments(self, instance: str = "gw-0") -> list[Path]:
        return audit_format.segments(self.directory, instance)

    def heads(self, instance: str = "gw-0") -> Path:
        return audit_format.heads_path(self.directory, instance)

    def records(self, instance: str = "gw-0") -> list[audit_format.Record]:
        return [
            audit_format.parse(raw, instance)[0]
            for path in self.segments(instance)
            for raw in path.read_bytes().split(b"\n")[:-1]
        ]

    def fill(self, count: int = 10, instance: str = "gw-0", *, client: str = "alice", **more: Any) -> None:
        log = self.log(instance, **more)
        log.open()
        for number in range(count):
            log.append({"request_id": f"r{number}", "client": client, "tenant": "t"})
        log.shut()


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    found = Place(tmp_path)
    capsys.readouterr()
    return found


def kinds(report: audit_verify.Report) -> set[str]:
    return {finding.what for finding in report.findings}


def test_records_come_back_as_they_were_written(place: Place) -> None:
    log = place.log()
    log.open()
    log.append({"request_id": "a", "client": "alice", "text": 'quotes " and \u2028 and 💡'})
    log.append({"kind": "admin", "action": "revoke", "actor": "root"})
    log.shut()
    assert [record.kind for record in place.records()] == ["start", "request", "admin", "stop"]
    assert [record.seq for record in place.records()] == [1, 2, 3, 4]
    assert place.records()[1].content() == {
        "request_id": "a",
        "client": "alice",
        "text": 'quotes " and \u2028 and 💡',
    }
    assert place.records()[2].content() == {"action": "revoke", "actor": "root"}
    assert place.records()[1].time == "2027-01-15T08:00:00.000Z"
    report = place.verify()
    assert (report.findings, report.notes, report.records, report.heads) == ([], [], 4, {"gw-0": 4})


def test_what_json_cannot_hold_is_recorded_nevertheless(place: Place) -> None:
    log = place.log()
    log.open()
    log.append({"path": Path("/x")})
    log.append(
        {"text": "\ud800", "number": 1 << 70, "path": Path("/x"), "nan": float("nan"), "many": ["\ud800", 1.5, True, 7]}
    )
    log.shut()
    content = json.loads(bytes(place.records()[2].payload))
    assert content == {"text": "?", "number": str(1 << 70), "path": "/x", "nan": None, "many": ["?", 1.5, True, 7]}
    assert place.verify().findings == []


def test_a_record_is_on_disk_soon_and_signed_when_due(place: Place) -> None:
    log = place.log(head_every_records=5, head_every_s=3600.0)
    log.open()
    for number in range(4):
        log.append({"n": number})
    wait_until(lambda: len(place.records()) == 5)
    report = place.verify()
    assert report.findings == []
    assert report.notes == ["gw-0: records 2 to 5 not signed yet: chained, but not proven"]
    log.append({"n": 4})
    wait_until(lambda: place.verify().heads == {"gw-0": 6})
    log.shut()


def test_a_head_is_signed_after_the_time_given(place: Place) -> None:
    log = place.log(head_every_s=0.2)
    log.open()
    log.append({"n": 1})
    wait_until(lambda: place.verify().heads == {"gw-0": 2})
    log.shut()


def test_heads_are_told_in_the_event_loop(place: Place) -> None:
    async def run() -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        told: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()

        def hear(head: dict[str, Any]) -> None:
            assert asyncio.get_running_loop() is loop
            told.append(head)

        log = AuditLog(place.config(), "gw-0", on_head=hear)
        log.start()
        log.append({"n": 1})
        await log.sync()
        log.close()
        log.close()
        await asyncio.sleep(0)
        return told, log.head

    told, last = asyncio.run(run())
    assert [head["seq"] for head in told] == [1, 2, 3]
    assert told[-1] == last
    assert place.verify(audit_format.Head(**told[1])).findings == []


def test_requests_of_nobody_take_a_record_for_all(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "REFUSED_EVERY_S", 3600)
    log = place.log()
    log.open()
    for number in range(5000):
        log.refused("invalid_api_key", f"10.0.0.{number % 7}")
        log.refused("unknown_url", "")
    log._refused_at = 0.0  # the time is over
    log.append({"n": 1})
    wait_until(lambda: sum(record.kind == "refused" for record in place.records()) == 2)
    log.refused("unknown_url", "10.0.0.1")
    log.shut()
    found = [record.content() for record in place.records() if record.kind == "refused"]
    assert [(one["error"], one["count"], one["addresses"]) for one in found] == [
        ("invalid_api_key", 5000, 7),
        ("unknown_url", 5000, 0),
        ("unknown_url", 1, 1),
    ]
    assert all(one["since"].endswith("Z") for one in found)
    assert place.verify().findings == []
    log.refused("unknown_url", "10.0.0.1")


def test_addresses_are_told_apart_up_to_a_bound(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_MOST_ADDRESSES", 10)
    log = place.log()
    log.open()
    for number in range(50):
        log.refused("invalid_api_key", str(number))
    log.shut()
    (record,) = [record.content() for record in place.records() if record.kind == "refused"]
    assert (record["count"], record["addresses"]) == (50, 10)


def test_a_log_that_is_not_enabled_takes_everything_and_writes_nothing(place: Place) -> None:
    async def run() -> int:
        log = AuditLog(Audit(directory=str(place.directory)), "gw-0")
        log.start()
        log.append({"n": 1})
        log.check()
        gone = await log.purge("alice", actor="root")
        log.close()
        return gone

    assert asyncio.run(run()) == 0
    assert not place.directory.exists()


def test_after_the_end_nothing_is_taken(place: Place) -> None:
    log = place.log()
    log.open()
    log.shut()
    with pytest.raises(AuditFailed, match="closed"):
        log.append({"n": 1})
    with pytest.raises(AuditFailed, match="closed"):
        log.sync_now()


def test_segments_end_at_their_size_under_a_head(place: Place) -> None:
    log = place.log(segment_bytes=2000)
    log.open()
    for number in range(30):
        log.append({"n": number, "text": "x" * 100})
        if number % 5 == 4:
            log.sync_now()
    log.shut()
    assert len(place.segments()) > 3
    assert place.verify().findings == []
    assert place.verify().records == 32


def test_restarts_continue_the_chain_even_if_the_clock_was_set_back(place: Place) -> None:
    for _ in range(3):
        place.fill(3)
        place.now -= 100_000
    assert len(place.segments()) == 3
    records = place.records()
    assert [record.seq for record in records] == list(range(1, 16))
    assert [record.kind for record in records].count("start") == 3
    assert records[5].content()["previous"] == {"seq": 5, "signed": 5}
    assert place.verify().findings == []


WRITER = """
import sys, time
from serve_app.gateway.audit import AuditLog
from serve_app.gateway.config import Audit
log = AuditLog(Audit(enabled=True, directory=sys.argv[1], signing_key_file=sys.argv[2], head_every_records=200), "gw-0")
log.open()
n = 0
while True:
    log.append({"n": n, "client": "alice", "text": "x" * 50})
    n += 1
    if n % 100 == 0:
        print(n, flush=True)
        time.sleep(0.005)
"""


def test_a_kill_is_no_tampering_and_loses_no_signed_record(place: Place) -> None:
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(place.directory), str(place.private)],
            cwd=PROJECT,
            stdout=subprocess.DEVNULL,
        )
        before = sum(place.verify().heads.values()) if place.directory.is_dir() else 0
        wait_until(lambda start=before: place.directory.is_dir() and sum(place.verify().heads.values()) > start + 400)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert place.verify().findings == []
    signed = place.verify().heads["gw-0"]
    assert signed > 1200
    last = place.segments()[-1]
    last.write_bytes(last.read_bytes() + b'{"seq":99')
    report = place.verify()
    assert report.findings == []
    assert any("half written, as after a kill (9 bytes)" in note for note in report.notes)
    place.fill(1)
    report = place.verify()
    assert report.findings == []
    assert any("the start cut off 9 bytes" in note for note in report.notes)
    assert report.heads["gw-0"] > signed


def test_a_head_half_written_is_cut_off(place: Place) -> None:
    place.fill(2)
    with place.heads().open("ab") as file:
        file.write(b'{"type":"hea')
    report = place.verify()
    assert report.findings == []
    assert report.notes == ["heads-gw-0.jsonl: the last line is half written, as after a kill"]
    place.fill(2)
    assert place.verify().findings == []
    assert place.verify().notes == []


def test_records_that_vanished_while_the_gateway_was_down_are_missed_afterwards(place: Place) -> None:
    place.fill(5)
    path = place.segments()[0]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    place.fill(5)
    findings = place.verify().findings
    assert [str(finding) for finding in findings] == ["removed: gw-0: records 5 to 7"]


def test_records_changed_after_the_last_head_while_the_gateway_was_down_are_named(place: Place) -> None:
    log = place.log()
    log.open()
    log.shut()
    path = place.segments()[0]
    forged = path.read_bytes() + b'{"seq":3,"prev":"no"}\n'
    path.write_bytes(forged)
    place.fill(1)
    report = place.verify()
    assert [(finding.what, finding.where) for finding in report.findings] == [("changed", f"{path.name} line 3")]
    start = audit_format.parse(place.segments()[1].read_bytes().split(b"\n")[0], "gw-0")[0]
    assert start.content()["previous"]["damaged"] == path.name


def test_one_writer_an_instance(place: Place) -> None:
    first = place.log()
    first.open()
    with pytest.raises(AuditFailed, match="another process writes the audit log of instance gw-0"):
        place.log().open()
    first.shut()
    again = place.log()
    again.open()
    again.shut()


@pytest.mark.parametrize("name", ["", "a/b", "..\n", "ä", "x" * 129])
def test_names_that_cannot_be_files_are_refused(place: Place, name: str) -> None:
    with pytest.raises(AuditFailed, match="cannot be an instance's name"):
        place.log(name).open()


def test_keys_that_cannot_sign_are_refused(place: Place) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    other = place.folder / "ec.pem"
    other.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    for path, reason in (
        ("", "empty"),
        ("/nonexistent", "cannot be read: No such file"),
        (str(place.public), "no unencrypted private key"),
        (str(other), "not Ed25519"),
    ):
        with pytest.raises(AuditFailed, match=reason):
            AuditLog(Audit(enabled=True, directory=str(place.directory), signing_key_file=path), "gw-0").open()


def test_a_directory_that_cannot_be_made_is_refused(place: Place) -> None:
    place.directory.write_text("a file")
    with pytest.raises(AuditFailed, match="cannot be opened"):
        place.log().open()


# --- the disk is full. A limit on the size of files is a full disk that needs no mount: writes come out short, then
# fail.

FULL = """
import resource, sys, time
from serve_app.gateway import audit
from serve_app.gateway.audit import AuditFailed, AuditLog
from serve_app.gateway.config import Audit
audit.RETRY_S = 0.05
audit.BUFFER_BYTES = 20000
log = AuditLog(
    Audit(enabled=True, directory=sys.argv[1], signing_key_file=sys.argv[2], on_failure=sys.argv[3]), "gw-0"
)
log.open()
def until(condition):
    end = time.monotonic() + 50
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
refused = 0
for n in range(10):
    log.append({"n": n, "text": "x" * 500})
until(lambda: log.failed)
print(log.failed, log.refusing, flush=True)
for n in range(10, 100):
    try:
        log.append({"n": n, "text": "x" * 500})
    except AuditFailed:
        refused += 1
try:
    log.sync_now()
except AuditFailed as error:
    print(error)
print(refused, log.lost > 0, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
until(lambda: not log.failed)
log.check()
lost = log.lost
log.append({"n": "after"})
log.shut()
print(lost)
"""


@pytest.mark.parametrize("on_failure", ["closed", "open"])
def test_a_full_disk(place: Place, on_failure: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(place.directory), str(place.private), on_failure],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"File too large {on_failure == 'closed'}"
    assert lines[1] == "The audit log cannot be written: File too large."
    assert lines[2] == f"{90 if on_failure == 'closed' else 0} True"
    lost = int(lines[3])
    assert place.verify().findings == []
    contents = [record.content() for record in place.records()]
    written = [content["n"] for content in contents if "n" in content]
    assert written == [*range(100 - lost), "after"]
    told = [record.content() for record in place.records() if record.kind == "lost"]
    assert sum(one["records"] for one in told) == lost


STARTS_FULL = """
import resource, sys
from serve_app.gateway.audit import AuditFailed, AuditLog
from serve_app.gateway.config import Audit
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
log = AuditLog(
    Audit(enabled=True, directory=sys.argv[1], signing_key_file=sys.argv[2], on_failure=sys.argv[3]), "gw-0"
)
try:
    log.start()
except AuditFailed as error:
    print(error)
else:
    print(log.failed)
    log.append({"n": 1})
"""


@pytest.mark.parametrize(
    ("on_failure", "said"), [("closed", "the audit log cannot be written in"), ("open", "File too large")]
)
def test_a_disk_that_is_full_at_the_start(place: Place, on_failure: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTS_FULL, str(place.directory), str(place.private), on_failure],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


# --- purge


def test_a_purge_takes_the_content_out_and_the_chain_still_verifies(place: Place) -> None:
    place.fill(5, client="alice")
    log = place.log(segment_bytes=1500)
    log.open()
    for number in range(20):
        log.append({"client": ("alice", "bob", 'm"ü\ud800')[number % 3], "text": f"secret of {number}"})
    log.append({"kind": "admin", "client": "alice", "action": "revoke"})
    assert log.purge_now("alice", actor="root") == 12
    assert log.purge_now("alice", actor="root") == 0
    assert log.purge_now('m"ü\ud800', actor="root") == 6
    log.append({"client": "alice", "text": "later"})
    log.shut()
    report = place.verify()
    assert (report.findings, report.purged) == ([], 18)
    clients = [record.content().get("client") for record in place.records() if record.kind == "request"]
    assert sorted(filter(None, clients)) == ["alice", *["bob"] * 7]
    assert [record.kind for record in place.records()].count("admin") == 1
    everything = b"".join(path.read_bytes() for path in place.segments())
    assert b"secret of 0" not in everything
    assert b"secret of 1" in everything
    purges = [record.content() for record in place.records() if record.kind == "purge"]
    assert {one["actor"] for one in purges} == {"root"}


def test_a_purge_until_a_time_leaves_what_came_later(place: Place) -> None:
    log = place.log()
    log.open()
    log.append({"client": "alice", "n": 1})
    place.now += 10
    log.append({"client": "alice", "n": 2})
    assert log.purge_now("alice", actor="root", before=place.now - 5) == 1
    log.shut()
    assert [record.content().get("n") for record in place.records() if record.kind == "request"] == [None, 2]
    assert place.verify().findings == []


def test_a_purge_reaches_instances_that_nobody_writes_any_more(place: Place) -> None:
    place.fill(3, "gone")
    place.fill(3, "living")
    living = place.log("living")
    living.open()
    log = place.log("here")
    log.open()
    assert log.purge_now("alice", actor="root") == 3
    log.shut()
    living.shut()
    report = place.verify()
    assert (report.findings, report.purged) == ([], 3)
    assert all(record.purged() for record in place.records("gone") if record.kind == "request")


def test_content_taken_out_without_a_purge_is_found(place: Place) -> None:
    place.fill(3)
    path = place.segments()[0]
    lines = path.read_bytes().splitlines(keepends=True)
    record, _ = audit_format.parse(lines[2][:-1], "gw-0")
    covered, _ = audit_format.chained(
        "gw-0", record.seq, record.prev, record.time, kind=record.kind, commitment=record.commitment
    )
    lines[2] = audit_format.line(covered, b"null", None)
    path.write_bytes(b"".join(lines))
    report = place.verify()
    assert [str(one) for one in report.findings] == [
        "changed: gw-0: the content of record 3 was taken out, and no purge says so"
    ]


def test_only_requests_may_be_purged(place: Place) -> None:
    log = place.log()
    log.open()
    log.append({"kind": "admin", "action": "revoke"})
    log.shut()
    path = place.segments()[0]
    lines = path.read_bytes().splitlines(keepends=True)
    record, _ = audit_format.parse(lines[1][:-1], "gw-0")
    covered, _ = audit_format.chained(
        "gw-0", record.seq, record.prev, record.time, kind=record.kind, commitment=record.commitment
    )
    lines[1] = audit_format.line(covered, b"null", None)
    path.write_bytes(b"".join(lines))
    assert [str(one) for one in place.verify().findings] == [
        f"changed: {path.name} line 2: its salt was taken out",
    ]


def test_a_purge_that_a_crash_interrupted_is_noted_and_can_be_repeated(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise OSError(5, "Input/output error")

    log = place.log()
    log.open()
    log.append({"client": "alice", "text": "secret"})
    with monkeypatch.context() as patch:
        patch.setattr("serve_app.gateway.audit._take_out", crash)
        with pytest.raises(OSError, match="Input/output"):
            log.purge_now("alice", actor="root")
    report = place.verify()
    assert report.findings == []
    assert any("1 records still hold what this purge names" in note for note in report.notes)
    assert log.purge_now("alice", actor="root") == 1
    log.shut()
    report = place.verify()
    assert (report.findings, report.notes) == ([], [])


# --- retention


def test_retention_removes_whole_segments_and_leaves_a_signed_checkpoint(place: Place) -> None:
    day = 86400
    place.now = time.time() - 100 * day
    for _ in range(4):
        place.fill(3)
        place.now += 10 * day
    place.fill(3, "gone")
    place.now = time.time()
    log = place.log(retention_days=75)
    log.open()
    wait_until(lambda: len(place.segments()) == 2)
    assert log.expire_now() == 0
    log.append({"n": 1})
    log.shut()
    report = place.verify()
    assert report.findings == []
    assert place.records()[0].seq == 16
    assert json.loads(place.heads().read_bytes().split(b"\n")[0])["type"] == "checkpoint"
    place.fill(2)
    place.now += 80 * day
    last = place.log(retention_days=75)
    last.open()
    wait_until(lambda: len(place.segments()) == 1)
    last.shut()
    assert place.segments("gone") == []
    report = place.verify()
    assert report.findings == []
    place.fill(2, "gone")
    assert place.verify().findings == []


def test_what_retention_may_not_remove_is_missed(place: Place) -> None:
    place.now = time.time() - 50 * 86400
    place.fill(3)
    place.fill(3)
    place.now = time.time()
    place.fill(3)
    place.segments()[0].unlink()
    assert kinds(place.verify()) == {"removed"}


def test_a_checkpoint_that_is_changed_is_found(place: Place) -> None:
    place.now = time.time() - 50 * 86400
    place.fill(3)
    place.now = time.time()
    log = place.log(retention_days=10)
    log.open()
    wait_until(lambda: len(place.segments()) == 1)
    log.shut()
    assert place.verify().findings == []
    heads = place.heads().read_bytes()
    assert b'"seq":5' in heads.split(b"\n")[0]
    place.heads().write_bytes(heads.replace(b'"seq":5', b'"seq":6', 1))
    assert "bad signature" in kinds(place.verify())


def test_a_clock_that_jumps_ahead_deletes_nothing(place: Place) -> None:
    place.fill(3)
    log = place.log(retention_days=10)
    log.open()
    place.now += 100 * 86400
    assert log.expire_now() == 0
    log.shut()
    assert len(place.segments()) == 2


def test_an_interrupted_retention_is_no_tampering(place: Place) -> None:
    place.now = time.time() - 50 * 86400
    place.fill(3)
    place.fill(3)
    place.now = time.time()
    kept = {path: path.read_bytes() for path in place.segments()}
    log = place.log(retention_days=10)
    log.open()
    wait_until(lambda: len(place.segments()) == 1)
    log.shut()
    # As if it had removed one of two segments when the power went.
    path, content = list(kept.items())[1]
    path.write_bytes(content)
    assert place.verify().findings == []


# --- several replicas, heads kept elsewhere


def test_a_replica_whose_files_vanish_is_missed_by_those_that_started_later(place: Place) -> None:
    place.fill(3, "first")
    place.fill(3, "second")
    for path in place.segments("first"):
        path.unlink()
    place.heads("first").unlink()
    report = place.verify()
    assert [finding.what for finding in report.findings] == ["removed"]
    assert "all of first, of which this had seen record 5" in str(report.findings[0])


def test_a_rollback_of_everything_is_found_by_a_head_kept_elsewhere(place: Place) -> None:
    place.fill(3)
    old = {path: path.read_bytes() for path in place.directory.iterdir()}
    log = place.log()
    log.open()
    log.append({"n": 1})
    log.shut()
    assert log.head is not None
    anchor = audit_format.Head(**log.head)
    assert place.verify(anchor).findings == []
    for path in place.directory.iterdir():
        path.unlink()
    for path, content in old.items():
        path.write_bytes(content)
    assert place.verify().findings == []
    assert kinds(place.verify(anchor)) == {"truncated"}
    forged = audit_format.Head(**{**log.head, "seq": 2})
    assert kinds(place.verify(forged)) == {"bad signature"}


def test_a_chain_signed_with_another_key_is_found(place: Place) -> None:
    place.fill(3)
    other = Place(place.folder / "other") if (place.folder / "other").mkdir() is None else place
    assert kinds(audit_verify.verify(place.directory, [other.key()])) >= {"bad signature"}


def test_a_change_of_keys_verifies_with_both(place: Place) -> None:
    place.fill(3)
    (place.folder / "new").mkdir()
    new = Place(place.folder / "new")
    new.directory = place.directory
    new.fill(3)
    assert audit_verify.verify(place.directory, [place.key(), new.key()]).findings == []
    assert kinds(audit_verify.verify(place.directory, [new.key()])) == {"bad signature"}


def test_verify_while_a_gateway_writes(place: Place) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(place.directory), str(place.private)], cwd=PROJECT, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    try:
        for _ in range(10):
            assert writer.stdout.readline()
            assert place.verify().findings == []
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()


# --- the command


def run_cli(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = audit_cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_verifies(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.fill(3)
    code, out, _ = run_cli(capsys, "verify", place.directory, "--public-key", place.public)
    assert (code, out) == (0, "gw-0: signed up to record 5\n5 records: as they were written\n")
    path = place.segments()[0]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))
    code, out, _ = run_cli(capsys, "verify", place.directory, "--public-key", place.public)
    assert code == 1
    assert "reordered: " in out
    assert "TAMPERED WITH" in out
    code, out, _ = run_cli(capsys, "verify", place.directory, "--public-key", place.public, "--json")
    assert code == 1
    assert json.loads(out)["findings"][0]["what"] == "reordered"


def test_the_command_takes_heads_kept_elsewhere(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    log = place.log()
    log.open()
    log.shut()
    head = json.dumps(log.head)
    file = place.folder / "head.json"
    file.write_text(head)
    verify = ("verify", place.directory, "--public-key", place.public)
    assert run_cli(capsys, *verify, "--head", head)[0] == 0
    assert run_cli(capsys, *verify, "--head", f"@{file}")[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(head))
    assert run_cli(capsys, *verify, "--head", "-")[0] == 0
    stream = place.folder / "gateway.log"
    stream.write_text(json.dumps({"message": "listening"}) + "\n\n" + json.dumps({"message": "head", "head": log.head}))
    assert run_cli(capsys, *verify, "--head", f"@{stream}")[0] == 0
    stream.write_text(json.dumps({"message": "head", "head": {**(log.head or {}), "seq": 1}}))
    assert "bad signature: given head 2 of gw-0" in run_cli(capsys, *verify, "--head", f"@{stream}")[1]
    for bad in ("{}", "7", '{"hash":1}', "{"):
        assert run_cli(capsys, *verify, "--head", bad)[0] == 2
    for path in place.directory.iterdir():
        path.unlink()
    code, out, _ = run_cli(capsys, *verify, "--head", head)
    assert code == 1
    assert "removed: given head 2 of gw-0: all of gw-0" in out


def test_the_command_shows(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.fill(2, client="alice")
    place.now += 86400
    place.fill(1, client="bob")
    code, out, _ = run_cli(capsys, "show", place.directory, "--client", "alice")
    assert code == 0
    shown = [json.loads(line) for line in out.splitlines()]
    assert [(one["seq"], one["request_id"], one["kind"]) for one in shown] == [
        (2, "r0", "request"),
        (3, "r1", "request"),
    ]
    _, out, _ = run_cli(capsys, "show", place.directory, "--since", "2027-01-16", "--kind", "request")
    assert [json.loads(line)["client"] for line in out.splitlines()] == ["bob"]
    path = place.segments()[0]
    path.write_bytes(b"rubbish\n" + path.read_bytes())
    _, out, err = run_cli(capsys, "show", place.directory)
    assert len(out.splitlines()) == 7
    assert "a line left out: it is no record" in err


def test_the_command_purges(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.fill(2, client="alice")
    living = place.log("living")
    living.open()
    living.append({"client": "a/ü"})
    living.sync_now()
    purge = ("purge", place.directory, "--signing-key", place.private, "--actor", "root", "--client")
    code, out, _ = run_cli(capsys, *purge, "alice")
    assert (code, out) == (0, "2 records purged\n")
    assert run_cli(capsys, *purge, "nobody")[1] == "0 records purged\n"
    code, _, err = run_cli(capsys, *purge, "a/ü")
    assert code == 2
    assert "a gateway is writing as living" in err
    assert "POST /admin/v1/clients/a%2F%C3%BC/purge" in err
    living.shut()
    _, out, _ = run_cli(capsys, "show", place.directory, "--kind", "request")
    assert [json.loads(line).get("purged", False) for line in out.splitlines()] == [True, True, False]
    assert place.verify().findings == []


def test_the_command_says_what_was_wrong_with_the_call(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.fill(1)
    empty = place.folder / "empty"
    empty.mkdir()
    for words, said in (
        (("verify", place.folder / "none", "--public-key", place.public), "is no directory"),
        (("verify", place.folder / "none", "--public-key", place.public, "--head", "x"), "--head is not a head"),
        (("verify", empty, "--public-key", place.public), "holds no audit log"),
        (("verify", place.directory, "--public-key", place.private), "holds no public key"),
        (("verify", place.directory, "--public-key", place.folder / "none"), "No such file"),
        (("show", empty), "holds no audit log"),
        (("purge", place.directory, "--client", "x", "--signing-key", place.public), "no unencrypted private key"),
        (("keygen", place.private, place.folder / "x"), "exists already"),
    ):
        code, _, err = run_cli(capsys, *words)
        assert (code, said in err) == (2, True), (words, err)
    for bad in ([], ["show", str(place.directory), "--since", "yesterday"]):
        with pytest.raises(SystemExit) as ended:
            audit_cli.main(bad)
        assert ended.value.code == 2


def test_a_private_key_is_readable_by_its_owner_alone(place: Place) -> None:
    assert place.private.stat().st_mode & 0o777 == 0o600


def test_the_module_is_a_program(place: Place) -> None:
    place.fill(1)
    done = subprocess.run(
        [sys.executable, "-m", "serve_app.gateway.audit_cli", "verify", place.directory, "--public-key", place.public],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("3 records: as they were written\n")


def test_the_lock_is_the_kernels_and_ends_with_its_holder(place: Place) -> None:
    place.fill(1)
    with (place.directory / ".lock-gw-0").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(AuditFailed):
            place.log().open()
    place.fill(1)
    assert place.records()[-1].kind == "stop"
