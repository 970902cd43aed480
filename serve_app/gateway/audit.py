"""The tamper-evident audit log: what a gateway writes (`audit_format` says how, `audit_verify` checks it).

`AuditLog.append` costs the request path microseconds: it chains the record in memory; a thread writes within 50 ms, and
syncs and signs a head after `head_every_records` records or `head_every_s` seconds. So `kill -9` loses at most 50 ms of
records, a power cut at most `head_every_s`. What was written after the last head is chained but not yet signed:
somebody with the disk could rewrite those last records of a process that is dead. Nobody can rewrite anything before a
head that is known elsewhere, which is what `on_head` is for (log stream, Redis).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import mmap
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from . import __version__, audit_format
from .audit_format import PURGEABLE, ZERO, Head
from .config import Audit
from .errors import Unavailable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

#: Seconds for which the thread gathers records.
GATHER_S = 0.05
#: Requests without a valid key or token become one record in so many seconds, for each error code.
REFUSED_EVERY_S = 60.0
#: Addresses that are told apart for it; more count as one.
_MOST_ADDRESSES = 10_000
#: Bytes of records held while the disk takes none.
BUFFER_BYTES = 32 * 1024 * 1024
#: Seconds between attempts while the disk takes none, and between looks for segments that are too old.
RETRY_S = 1.0
RETENTION_EVERY_S = 600.0
#: A wall clock that moved by more than this against the monotonic one is not trusted to delete anything.
CLOCK_JUMP_S = 3600.0
_SEQ = re.compile(rb'\{"seq":(\d{1,19}),')


class AuditFailed(Unavailable):
    """The audit log cannot be written, and `on_failure` is `closed`."""

    code = "audit_unavailable"


class _Refused:
    """Requests that came from nobody, since the last record of them."""

    __slots__ = ("addresses", "count", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.count = 0
        self.addresses: set[str] = set()


class AuditLog:
    """The audit log of one instance.

    All methods are for the thread of the event loop, but `purge_now` and `sync_now`, which block and are for another.

    Args:
        config: Directory, signing key, how often, how long.
        instance: The replica's name; letters, digits, `.`, `_` and `-`. Only one process at a time may write as an
            instance.
        on_head: Gets every signed head as a dict (in the event loop if `start` ran in one, else in the writing
            thread): the anchor outside this disk.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        config: Audit,
        instance: str,
        *,
        on_head: Callable[[dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.instance = instance
        self.directory = Path(config.directory)
        self.on_head = on_head
        #: The last signed head; None before `start`.
        self.head: dict[str, Any] | None = None
        #: Appended by this process; lost because the disk took none and the buffer was full; write errors.
        self.records = 0
        self.lost = 0
        self.failures = 0
        #: Why the disk takes nothing at the moment; empty: it does.
        self.failed = ""
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._key: Ed25519PrivateKey | None = None
        self._key_id = ""
        self._encoder = msgspec.json.Encoder(enc_hook=str)
        # _lock guards the chain's end and the buffer and is held for microseconds; _io the files; _maintenance closed
        # segments (purge, retention).
        self._lock = threading.Lock()
        self._io = threading.Lock()
        self._maintenance = threading.Lock()
        self._seq = 0
        self._prev = ZERO
        self._buffer: list[bytes] = []
        self._buffered = 0
        self._pending: list[bytes] = []
        self._written = (0, ZERO)
        self._unsigned = 0
        self._refused: dict[str, _Refused] = {}
        self._refused_at = 0.0
        self._lost_told = 0
        self._head_n = 0
        self._head_prev = ZERO
        self._head_at = 0.0
        self._lock_fd = self._segment_fd = self._heads_fd = -1
        self._segment_size = self._heads_size = 0
        self._segment_n = 0
        self._run = ""
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = True
        self._monotonic_0 = self._wall_0 = 0.0

    # --- life

    def start(self) -> None:
        """`open`, where `config.enabled`; called before anything is served. Heads are told in the running event loop.

        Raises:
            AuditFailed: The directory or the key cannot be used, or another process writes as this instance.
        """
        if self.config.enabled:
            with contextlib.suppress(RuntimeError):
                self._loop = asyncio.get_running_loop()
            self.open()

    def close(self) -> None:
        """`shut`; for the end, when nothing is served any more."""
        self.shut()

    def open(self) -> None:
        """Continue the instance's chain: find its end, cut off a line that a kill left half written, begin a segment
        and sign a head.

        Raises:
            AuditFailed: The directory or the key cannot be used, another process writes as this instance, or
                (`closed`) the disk is full.
        """
        if not audit_format.INSTANCE.fullmatch(self.instance):
            raise AuditFailed(f"{self.instance!r} cannot be an instance's name: letters, digits, '.', '_' and '-' only")
        self._key = load_signing_key(self.config.signing_key_file)
        self._key_id = audit_format.key_id(self._key.public_key())
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._lock_fd = take_lock(self.directory, self.instance)
            try:
                self._recover()
            except BaseException:
                self._release()
                raise
        except OSError as error:
            raise AuditFailed(f"the audit log cannot be opened in {self.directory}: {error.strerror}") from error
        self._monotonic_0, self._wall_0 = time.monotonic(), self._clock()
        if not self._step(head=True) and self.config.on_failure == "closed":
            self._release()
            raise AuditFailed(f"the audit log cannot be written in {self.directory}: {self.failed}")
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="audit", daemon=True)
        self._thread.start()

    def shut(self) -> None:
        """Write what is left, sign a last head and let go of the files; more calls do nothing."""
        if self._thread is None:
            return
        self._stopping.set()
        self._wake.set()
        self._thread.join()
        self._thread = None
        with self._maintenance:
            with self._lock:
                self._tell_refused()
                self._chain("stop", self._encode({"records": self.records, "lost": self.lost}))
                self._closed = True
            self._step(head=True)
            self._release()

    def _release(self) -> None:
        for fd in (self._segment_fd, self._heads_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._segment_fd = self._heads_fd = self._lock_fd = -1

    # --- records

    @property
    def refusing(self) -> bool:
        """Requests have to be refused: nothing can be written, and `on_failure` is `closed`."""
        return bool(self.failed) and self.config.on_failure == "closed"

    def check(self) -> None:
        """Before a request is served: may it be?

        Raises:
            AuditFailed: Nothing can be written, and `on_failure` is `closed`.
        """
        if self.refusing:
            raise AuditFailed("The audit log cannot be written at the moment; requests are refused until it can.")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record. `record["kind"]` (default `request`) is chained openly, all else is the payload.

        While the disk takes nothing, records are kept in memory as long as 32 MiB hold them, and written when it does
        again.

        Raises:
            AuditFailed: The disk takes nothing and `on_failure` is `closed`; the record is kept nevertheless while
                there is room. Or the log is closed.
        """
        kind = record.get("kind", PURGEABLE)
        payload = self._encode(
            {key: value for key, value in record.items() if key != "kind"} if "kind" in record else record
        )
        with self._lock:
            if self._closed:
                if not self.config.enabled:
                    return
                raise AuditFailed("The audit log is closed.")
            if self._buffered < BUFFER_BYTES:
                self._chain(kind, payload)
            else:
                self.lost += 1
        if not self._wake.is_set():
            self._wake.set()
        if self.failed:
            self.check()

    def refused(self, code: str, address: str) -> None:
        """Count a request that failed before anybody was found who sent it: it costs no record of its own.

        A record of kind `refused` in `REFUSED_EVERY_S` seconds says how many there were with this code, from how many
        addresses, and since when. Nothing is raised: where the disk takes nothing, these wait with all others.

        Args:
            code: The error's code; one of this program's, so that there are few.
            address: The client's; empty: unknown.
        """
        with self._lock:
            if self._closed:
                return
            first = not self._refused
            entry = self._refused.get(code)
            if entry is None:
                entry = self._refused[code] = _Refused(self._clock())
            entry.count += 1
            if address and len(entry.addresses) < _MOST_ADDRESSES:
                entry.addresses.add(address)
        if first:
            self._refused_at = time.monotonic() + REFUSED_EVERY_S
            self._wake.set()

    def _tell_refused(self) -> None:
        """The records of those; the caller holds `_lock`."""
        told, self._refused = self._refused, {}
        for code, entry in told.items():
            since = audit_format.stamp(entry.since)
            counts = {"error": code, "count": entry.count, "addresses": len(entry.addresses), "since": since}
            self._chain("refused", self._encode(counts))

    def _encode(self, record: Mapping[str, Any]) -> bytes:
        try:
            return self._encoder.encode(record)
        except (TypeError, ValueError, OverflowError):
            # A lone surrogate or an integer beyond 64 bits, which msgspec does not take.
            return self._encoder.encode(_plain(record))

    def _chain(self, kind: str, payload: bytes) -> None:
        """Give the record its place; the caller holds `_lock` (or nobody else runs yet)."""
        salt = secrets.token_hex(16)
        self._seq += 1
        now = audit_format.stamp(self._clock())
        covered, self._prev = audit_format.chained(
            self.instance, self._seq, self._prev, now, kind=kind, commitment=audit_format.commit(salt, payload)
        )
        raw = audit_format.line(covered, payload, salt)
        self._buffer.append(raw)
        self._buffered += len(raw)
        self.records += 1

    async def sync(self) -> None:
        """Until everything appended so far is on disk under a signed head.

        Raises:
            AuditFailed: The disk takes nothing (whatever `on_failure` says: the caller asked).
        """
        await asyncio.to_thread(self.sync_now)

    def sync_now(self) -> None:
        """`sync` for a thread that may block."""
        if self._closed or not self._step(head=True):
            raise AuditFailed(
                "The audit log is closed." if self._closed else f"The audit log cannot be written: {self.failed}."
            )

    # --- the writing thread

    def _work(self) -> None:
        retention_at = 0.0
        while not self._stopping.is_set():
            if self.config.retention_days and time.monotonic() >= retention_at:
                retention_at = time.monotonic() + RETENTION_EVERY_S
                with contextlib.suppress(OSError):
                    self.expire_now()
            self._wake.wait(self._idle())
            if self._stopping.wait(RETRY_S if self.failed else GATHER_S):
                break
            self._wake.clear()
            if self._refused and time.monotonic() >= self._refused_at:
                with self._lock:
                    self._tell_refused()
            self._step()

    def _idle(self) -> float:
        """Seconds until something is due although nothing is appended."""
        if self.failed or self._pending:
            return 0.0
        now = time.monotonic()
        due = max(self.config.head_every_s - (now - self._head_at), 0.0) if self._unsigned else 60.0
        return min(due, max(self._refused_at - now, 0.0)) if self._refused else due

    def _step(self, *, head: bool = False) -> bool:
        """Write what is buffered, and sign a head if one is due or asked for; False: the disk took it not."""
        with self._io:
            try:
                self._write()
                due = self._unsigned >= self.config.head_every_records
                due = due or time.monotonic() - self._head_at >= self.config.head_every_s
                if self._unsigned and (due or head):
                    self._sign()
                if self._segment_size >= self.config.segment_bytes:
                    self._rotate()
            except OSError as error:
                self.failures += 1
                self.failed = error.strerror or "input/output error"
                return False
            self.failed = ""
            if self.lost > self._lost_told:
                with self._lock:
                    self._chain("lost", self._encode({"records": self.lost - self._lost_told}))
                    self._lost_told = self.lost
                self._wake.set()
            return True

    def _write(self) -> None:
        with self._lock:
            self._pending += self._buffer
            self._buffer = []
            end = (self._seq, self._prev)
        if not self._pending:
            return
        if self._segment_fd < 0:
            self._begin_segment()
        self._segment_size = _write_at(self._segment_fd, self._segment_size, b"".join(self._pending))
        self._unsigned += len(self._pending)
        self._pending = []
        self._written = end
        with self._lock:
            self._buffered = sum(map(len, self._buffer))

    def _begin_segment(self) -> None:
        path = self.directory / f"audit-{self.instance}-{self._run}-{self._segment_n:06d}.jsonl"
        self._segment_fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        self._segment_size = 0
        self._segment_n += 1
        _sync_directory(self.directory)

    def _rotate(self) -> None:
        """End the segment under a head; the next record begins another."""
        if self._unsigned:
            self._sign()
        if self._segment_fd >= 0:
            os.close(self._segment_fd)
        self._segment_fd = -1
        self._segment_size = 0

    def _sign(self) -> None:
        assert self._key is not None
        if self._segment_fd >= 0:
            os.fsync(self._segment_fd)
        seq, digest = self._written
        n = self._head_n + 1
        unsigned = Head(
            "head", self.instance, n, seq, digest, audit_format.stamp(self._clock()), self._head_prev, self._key_id
        )
        head = audit_format.sign(unsigned, self._key)
        raw = audit_format.head_bytes(head)
        self._heads_size = _write_at(self._heads_fd, self._heads_size, raw)
        os.fsync(self._heads_fd)
        self._head_n, self._head_prev = n, audit_format.head_hash(raw)
        self._head_at = time.monotonic()
        self._unsigned = 0
        self._tell(head)

    def _tell(self, head: Head) -> None:
        self.head = msgspec.to_builtins(head)
        if self.on_head is None or self.head is None:
            return
        if self._loop is None:
            self.on_head(self.head)
        else:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self.on_head, self.head)

    # --- restarts

    def _recover(self) -> None:
        """Find the end of the chain and of the heads, and begin this run."""
        for leftover in self.directory.glob(f".audit-{self.instance}-*.tmp"):
            leftover.unlink(missing_ok=True)
        path = audit_format.heads_path(self.directory, self.instance)
        self._heads_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        last, self._heads_size = _last_head(self._heads_fd)
        if last is not None:
            head, raw = last
            self._head_n = head.n
            self._head_prev = head.prev if head.type == "checkpoint" else audit_format.head_hash(raw)
            self._seq, self._prev = head.seq, head.hash
        signed = self._seq
        damage: dict[str, Any] = {}
        existing = audit_format.segments(self.directory, self.instance)
        filled = [one for one in existing if one.stat().st_size]
        if filled:
            self._seq, self._prev, damage = _find_end(filled[-1], self.instance, self._seq, self._prev)
        began = int(self._clock() * 1000)
        if existing and (match := audit_format.SEGMENT.fullmatch(existing[-1].name)):
            # Names have to rise although the clock may have been set back.
            began = max(began, _from_run(match["start"]) + 1)
        self._run = _to_run(began)
        self._written = (self._seq, self._prev)
        start = {
            "instance": self.instance,
            "version": __version__,
            "key": self._key_id,
            "previous": {"seq": self._seq, "signed": signed, **damage} if self._seq else None,
            "heads": {"n": self._head_n, "hash": self._head_prev},
            "seen": self._others(),
        }
        self._chain("start", self._encode(start))

    def _others(self) -> dict[str, dict[str, Any]]:
        """The last heads of the other instances here: should one's files vanish, this chain remembers them."""
        seen: dict[str, dict[str, Any]] = {}
        for other in audit_format.instances(self.directory):
            path = audit_format.heads_path(self.directory, other)
            if other == self.instance or not path.exists():
                continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                last, _ = _last_head(fd, cut=False)
            finally:
                os.close(fd)
            if last is not None:
                seen[other] = {"seq": last[0].seq, "hash": last[0].hash}
        return seen

    # --- purge and retention

    async def purge(self, client: str, *, actor: str, before: float | None = None) -> int:
        """Take the content of a client's requests out; see `purge_now`. Nothing where the log is not enabled."""
        if not self.config.enabled:
            return 0
        return await asyncio.to_thread(self.purge_now, client, actor=actor, before=before)

    def purge_now(self, client: str, *, actor: str, before: float | None = None) -> int:
        """Take out what the requests of `client` until `before` (seconds; None: now) held; the chain still verifies.
        Blocks while it reads all segments.

        A record of kind `purge` that names them is written and signed first; it stays, and so do records of other
        kinds. Instances in the same directory that no process writes any more are purged too; those of living replicas
        are theirs to purge.

        Returns:
            How many records.

        Raises:
            AuditFailed: The purge record cannot be written; nothing was taken out.
        """
        count = self.purge_own(client, actor=actor, before=before)
        for other in audit_format.instances(self.directory):
            if other == self.instance or _is_written(self.directory, other):
                continue
            if not holds(self.directory, other, client, before):
                continue
            log = AuditLog(self.config, other, clock=self._clock)
            try:
                log.open()
            except AuditFailed:
                # It began to write meanwhile.
                continue
            try:
                count += log.purge_own(client, actor=actor, before=before)
            finally:
                log.shut()
        return count

    def purge_own(self, client: str, *, actor: str, before: float | None = None) -> int:
        """`purge_now` for this instance alone."""
        with self._maintenance:
            self.sync_now()
            found = {
                path: seqs
                for path in audit_format.segments(self.directory, self.instance)
                if (seqs := _of(path, client, before))
            }
            if not found:
                return 0
            try:
                with self._io:
                    self._rotate()
            except OSError as error:
                raise AuditFailed(f"The audit log cannot be written: {error.strerror}.") from error
            for path, seqs in found.items():
                # Named before it happens: a crash in between leaves content that may go, never content that went
                # without leave.
                record = {"client": client, "actor": actor, "segment": path.name, "records": audit_format.to_gaps(seqs)}
                with self._lock:
                    self._chain("purge", self._encode(record))
            self.sync_now()
            for path, seqs in found.items():
                _take_out(path, self.instance, set(seqs))
            return sum(map(len, found.values()))

    def expire_now(self) -> int:
        """Remove whole segments whose last record is older than `retention_days`, oldest first, leaving a signed
        checkpoint; blocks.

        Also those of instances in this directory that no process writes any more.

        Returns:
            How many segments; none where the clock has jumped since the start, because a wrong clock must not delete a
            log.
        """
        drift = (self._clock() - self._wall_0) - (time.monotonic() - self._monotonic_0)
        if not self.config.retention_days or abs(drift) > CLOCK_JUMP_S:
            return 0
        before = audit_format.stamp(self._clock() - self.config.retention_days * 86400)
        with self._maintenance:
            count = self._expire(self.instance, before)
            for other in audit_format.instances(self.directory):
                if other == self.instance:
                    continue
                try:
                    fd = take_lock(self.directory, other)
                except AuditFailed:
                    continue
                try:
                    count += self._expire(other, before)
                finally:
                    os.close(fd)
        return count

    def _expire(self, instance: str, before: str) -> int:
        paths = audit_format.segments(self.directory, instance)
        if instance == self.instance:
            paths = paths[:-1]
        gone: list[Path] = []
        end: tuple[int, str] | None = None
        for path in paths:
            last = _last_record(path, instance)
            # A segment whose end cannot be read is evidence: it and all after it stay.
            if last is None or last[2] >= before:
                break
            gone.append(path)
            end = last[:2]
        if end is None:
            return 0
        own = instance == self.instance
        with self._io if own else contextlib.nullcontext():
            self._checkpoint(instance, *end, own=own)
        for path in gone:
            path.unlink()
        _sync_directory(self.directory)
        return len(gone)

    def _checkpoint(self, instance: str, seq: int, digest: str, *, own: bool) -> None:
        """Replace the heads up to record `seq` by a checkpoint, atomically."""
        assert self._key is not None
        path = audit_format.heads_path(self.directory, instance)
        n, prev, kept = 0, ZERO, []
        for raw in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            try:
                head = audit_format.parse_head(raw.rstrip(b"\n"))
            except ValueError:
                kept.append(raw)
                continue
            if head.seq > seq:
                kept.append(raw)
            elif not kept:
                n, prev = head.n, head.prev if head.type == "checkpoint" else audit_format.head_hash(raw)
        now = audit_format.stamp(self._clock())
        checkpoint = audit_format.sign(Head("checkpoint", instance, n, seq, digest, now, prev, self._key_id), self._key)
        content = audit_format.head_bytes(checkpoint) + b"".join(kept)
        _replace(path, content)
        if own:
            os.close(self._heads_fd)
            self._heads_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self._heads_size = len(content)


def _plain(value: Any) -> Any:
    """The value as JSON can say it: lone surrogates become `?`, what is no JSON its text."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, float) or (isinstance(value, int) and -(1 << 63) <= value < 1 << 64):
        return value
    return _plain(str(value))


def load_signing_key(path: str) -> Ed25519PrivateKey:
    """The Ed25519 private key in a PEM file.

    Raises:
        AuditFailed: There is none.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415  slow to import
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    if not path:
        raise AuditFailed(
            "audit.signing_key_file is empty: heads have to be signed (rayplane-audit keygen makes a key)"
        )
    try:
        key = load_pem_private_key(Path(path).read_bytes(), password=None)
    except OSError as error:
        raise AuditFailed(f"audit.signing_key_file {path} cannot be read: {error.strerror}") from error
    except (TypeError, ValueError) as error:
        raise AuditFailed(f"audit.signing_key_file {path} holds no unencrypted private key in PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise AuditFailed(f"audit.signing_key_file {path} holds a key that is not Ed25519")
    return key


def take_lock(directory: Path, instance: str) -> int:
    """The file descriptor that makes this process the only writer of the instance; closing it gives the lock back.

    Raises:
        AuditFailed: Another process is.
    """
    fd = os.open(directory / f".lock-{instance}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise AuditFailed(f"another process writes the audit log of instance {instance} in {directory}") from None
    return fd


def _is_written(directory: Path, instance: str) -> bool:
    try:
        os.close(take_lock(directory, instance))
    except AuditFailed:
        return True
    return False


def _write_at(fd: int, offset: int, data: bytes) -> int:
    """Write all of `data` at `offset`, and give the offset after it.

    A part that an error leaves behind is cut off, and overwritten next time.
    """
    view = memoryview(data)
    at = offset
    try:
        while view:
            done = os.pwrite(fd, view, at)
            at += done
            view = view[done:]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, offset)
        raise
    return at


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _replace(path: Path, content: bytes) -> None:
    """Put `content` in the file's place, so that a crash leaves the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        _write_at(fd, 0, content)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    _sync_directory(path.parent)


def _to_run(milliseconds: int) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(seconds))}{rest:03d}Z"


def _from_run(run: str) -> int:
    import calendar  # noqa: PLC0415  once a start

    try:
        return calendar.timegm(time.strptime(run[:15], "%Y%m%dT%H%M%S")) * 1000 + int(run[15:18])
    except ValueError:
        return 0


def _last_head(fd: int, *, cut: bool = True) -> tuple[tuple[Head, bytes] | None, int]:
    """The last whole head with its line, and where the next one goes.

    A line that a crash left half written is cut off if `cut`.
    """
    size = os.fstat(fd).st_size
    data = os.pread(fd, size, 0) if size < 1 << 20 else os.pread(fd, 1 << 20, size - (1 << 20))
    end = data.rfind(b"\n") + 1
    if end < len(data):
        size -= len(data) - end
        if cut:
            os.ftruncate(fd, size)
    for raw in reversed(data[:end].splitlines(keepends=True)):
        with contextlib.suppress(ValueError):
            return (audit_format.parse_head(raw.rstrip(b"\n")), raw), size
    return None, size


def _find_end(path: Path, instance: str, seq: int, digest: str) -> tuple[int, str, dict[str, Any]]:
    """The last record of the last segment, given the last head's record, and what was wrong with the end.

    A half-written last line is what a kill leaves; it is cut off, and its size and hash are kept in the next record.
    Whole lines that do not follow from the head stay where they are for `rayplane-audit verify` to name.
    """
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        whole = data.rfind(b"\n") + 1
        torn = data[whole:]
        at = whole
        while at:
            begin = data.rfind(b"\n", 0, at - 1) + 1
            match = _SEQ.match(data, begin, at)
            if match and int(match[1]) <= seq:
                break
            at = begin
        damage: dict[str, Any] = {}
        last = (seq, digest)
        for raw in data[at:whole].split(b"\n")[:-1]:
            try:
                record, found = audit_format.parse(raw, instance)
            except ValueError:
                damage = {"damaged": path.name}
                continue
            if record.seq != last[0] + 1 or record.prev != last[1]:
                damage = {"damaged": path.name}
            last = (record.seq, found)
        if torn:
            damage |= {"torn_bytes": len(torn), "torn_sha256": hashlib.sha256(torn).hexdigest()}
    if torn:
        os.truncate(path, whole)
    return *last, damage


def _last_record(path: Path, instance: str) -> tuple[int, str, str] | None:
    """Number, hash and time of a segment's last whole record."""
    size = path.stat().st_size
    with path.open("rb") as file:
        window = 1 << 16
        while True:
            file.seek(max(size - window, 0))
            lines = file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                lines.pop()
            if len(lines) > 1 or window >= size:
                break
            window *= 8
    try:
        record, digest = audit_format.parse(lines[-1][:-1], instance)
    except (ValueError, IndexError):
        return None
    return record.seq, digest, record.time


def _of(path: Path, client: str, before: float | None) -> list[int]:
    """The numbers of the client's request records, written until `before`, that still have their content."""
    until = "~" if before is None else audit_format.stamp(before)
    client = _plain(client)
    # Spelled as AuditLog does; the full look is only for lines that hold it.
    needle = b'"client":' + msgspec.json.encode(client)
    found: list[int] = []
    with path.open("rb") as file:
        for raw in file:
            if needle not in raw:
                continue
            try:
                record = audit_format._records.decode(raw)
            except (msgspec.DecodeError, UnicodeError):
                continue
            if record.kind == PURGEABLE and record.time <= until and record.content().get("client") == client:
                found.append(record.seq)
    return found


def holds(directory: Path, instance: str, client: str, before: float | None = None) -> bool:
    """Whether the instance's segments hold content of the client's requests; reads them all."""
    return any(_of(path, client, before) for path in audit_format.segments(directory, instance))


def _take_out(path: Path, instance: str, seqs: set[int]) -> None:
    """Rewrite a closed segment without payload and salt of the records numbered."""
    out: list[bytes] = []
    with path.open("rb") as file:
        for raw in file:
            match = _SEQ.match(raw)
            if match and int(match[1]) in seqs:
                try:
                    record, _ = audit_format.parse(raw.rstrip(b"\n"), instance)
                except ValueError:
                    out.append(raw)
                    continue
                covered, _ = audit_format.chained(
                    instance, record.seq, record.prev, record.time, kind=record.kind, commitment=record.commitment
                )
                out.append(audit_format.line(covered, b"null", None))
            else:
                out.append(raw)
    _replace(path, b"".join(out))
