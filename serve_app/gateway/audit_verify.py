"""Checks an audit log: every record that was removed, changed, put elsewhere or brought in is named.

What cannot be proven from the directory alone: that records after the last signed head (of a process that is still
writing, or was killed) are as they were written, and that nobody put the whole directory back to an earlier state. A
head kept elsewhere (`anchor`) settles the second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from . import audit_format
from .audit_format import ZERO, Head, Record

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

What = Literal["removed", "changed", "reordered", "truncated", "foreign", "bad signature"]
_RESTARTS = 3


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was written."""

    what: What
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: {self.where}: {self.reason}"


@dataclass
class Report:
    """The result; the log is as it was written, as far as can be proven, where `findings` is empty."""

    findings: list[Finding] = field(default_factory=list)
    #: What a reader should know and what is no tampering: a line half written at a kill, records not signed yet,
    #: purges.
    notes: list[str] = field(default_factory=list)
    records: int = 0
    purged: int = 0
    #: The last signed record by instance.
    heads: dict[str, int] = field(default_factory=dict)


class _Known(msgspec.Struct):
    """What a start had seen of another chain, or of the heads before (`n`)."""

    hash: str
    seq: int = 0
    n: int = 0


class _Previous(msgspec.Struct):
    torn_bytes: int = 0


class _Start(msgspec.Struct):
    """The payload of a start record, as far as it is checked."""

    heads: _Known
    seen: dict[str, _Known]
    previous: _Previous | None = None


@dataclass
class _Line:
    """A line of a segment; `record` None: it is no record, for `reason`."""

    where: str
    record: Record | None
    digest: str = ""
    reason: str = ""


class _Chain:
    """The check of one instance."""

    def __init__(self, directory: Path, instance: str, keys: dict[str, Ed25519PublicKey], report: Report) -> None:
        self.directory = directory
        self.instance = instance
        self.keys = keys
        self.report = report
        self.heads: dict[int, Head] = {}
        self.head_hashes: dict[int, str] = {0: ZERO}
        self.checkpoint: Head | None = None
        self.heads_read = 0
        #: Highest record that a good signature covers.
        self.signed = 0
        self.digests: dict[int, str] = {}
        self.wanted: set[int] = set()
        self.first = self.last = 0
        self.nulls: set[int] = set()
        self.purges: list[tuple[int, str, dict[str, Any]]] = []
        self.starts: list[tuple[str, _Start]] = []

    def find(self, what: What, where: str, reason: str) -> None:
        self.report.findings.append(Finding(what, where, reason))

    # --- heads

    def read_heads(self) -> None:
        path = audit_format.heads_path(self.directory, self.instance)
        if not path.exists():
            return
        data = path.read_bytes()
        lines = data.split(b"\n")
        self.heads_read = len(lines) - 1
        if lines.pop():
            self.report.notes.append(f"{path.name}: the last line is half written, as after a kill")
        previous: tuple[int, str] | None = (0, ZERO)
        for number, raw in enumerate(lines, 1):
            where = f"{path.name} line {number}"
            try:
                head = audit_format.parse_head(raw)
            except ValueError as error:
                self.find("changed", where, str(error))
                previous = None
                continue
            believed = self._believed(head, where)
            link = audit_format.head_hash(raw + b"\n")
            if not believed:
                # What follows it may be good.
                previous = (head.n, link)
                self.head_hashes[head.n] = link
                continue
            if head.type == "checkpoint":
                if number != 1:
                    self.find("reordered", where, "a checkpoint that is not the first line")
                self.checkpoint = head
                previous = (head.n, head.prev)
                self.head_hashes = {head.n: head.prev}
                self.signed = max(self.signed, head.seq)
                continue
            if previous is not None and head.n != previous[0] + 1:
                removed = head.n > previous[0]
                self.find(
                    "removed" if removed else "reordered",
                    where,
                    f"head {head.n} follows head {previous[0]}"
                    + (" (retention leaves a checkpoint; there is none)" if removed and number == 1 else ""),
                )
            elif previous is not None and head.prev != previous[1]:
                self.find("changed", where, f"the head before is not the one that head {head.n} follows")
            previous = (head.n, link)
            self.heads[head.seq] = head
            self.head_hashes[head.n] = link
            self.signed = max(self.signed, head.seq)

    def _believed(self, head: Head, where: str) -> bool:
        key = self.keys.get(head.key)
        if key is None:
            self.find("bad signature", where, f"signed with the key {head.key[:16]}, which is none of those given")
        elif not audit_format.signature_holds(head, key):
            self.find("bad signature", where, f"the signature of head {head.n} does not hold")
        elif head.instance != self.instance:
            self.find("foreign", where, f"a head of instance {head.instance}")
        else:
            return True
        return False

    # --- records

    def lines(self) -> Iterator[_Line]:
        paths = audit_format.segments(self.directory, self.instance)
        filled = [path for path in paths if path.stat().st_size]
        for path in filled:
            with path.open("rb") as file:
                for number, raw in enumerate(file, 1):
                    where = f"{path.name} line {number}"
                    if not raw.endswith(b"\n"):
                        if path == filled[-1]:
                            self.report.notes.append(f"{where}: half written, as after a kill ({len(raw)} bytes)")
                        else:
                            yield _Line(where, None, reason="it has no end")
                        continue
                    try:
                        record, digest = audit_format.parse(raw[:-1], self.instance)
                    except ValueError as error:
                        yield _Line(where, None, reason=str(error))
                        continue
                    yield _Line(where, record, digest)

    def read_records(self) -> None:
        """Walk along the chain.

        `due` is the number that comes next, `link` the hash it has to follow (None after something that is wrong).
        """
        missing: list[tuple[int, int]] = []
        displaced: list[tuple[int, str]] = []
        unread = 0
        due, link = 1, ZERO  # type: int, str | None
        if self.checkpoint:
            due, link = self.checkpoint.seq + 1, self.checkpoint.hash
        begun = False
        for line, coming in _with_next(self.lines()):
            if line.record is None:
                self.find("changed", line.where, line.reason)
                unread += 1
                link = None
                continue
            record = line.record
            seq = record.seq
            if not begun and self.checkpoint and 1 <= seq <= self.checkpoint.seq:
                # Retention was interrupted between its checkpoint and the removal.
                due, link = seq, None
            begun = True
            if seq != due:
                gap = seq - due
                if 0 < gap <= unread:
                    pass  # the lines that could not be read stood here
                elif coming == due + 1 or (coming == 0 and gap > 0 and due == self.signed):
                    # It stands where record `due` belongs.
                    displaced.append((seq, line.where))
                    self._keep(line)
                    missing.append((due, due))
                    due, link, unread = due + 1, None, 0
                    continue
                elif coming == due or gap < 0:
                    # It stands between two that belong together, or comes late.
                    displaced.append((seq, line.where))
                    self._keep(line)
                    continue
                else:
                    missing.append((due + unread, seq - 1))
                link = None
            elif link is not None and record.prev != link:
                self.find("changed", line.where, f"record {seq} does not follow the record before it here")
            unread = 0
            due, link = seq + 1, line.digest
            self.last = seq
            self.first = self.first or seq
            self._keep(line)
        self.last = max(self.last, due - 1)
        self._tell_places(missing, displaced, unread)
        self._check_heads()
        self._check_purges()

    def _keep(self, line: _Line) -> None:
        record = line.record
        assert record is not None
        self.report.records += 1
        if record.seq in self.heads and self.heads[record.seq].hash != line.digest:
            self.find("changed", line.where, f"record {record.seq} is not the one that was signed")
        if record.seq in self.wanted or record.seq in self.heads:
            self.digests[record.seq] = line.digest
        if record.salt is None:
            self.nulls.add(record.seq)
        elif record.kind == "purge":
            self.purges.append((record.seq, line.where, record.content()))
        elif record.kind == "start":
            try:
                self.starts.append((line.where, msgspec.json.decode(record.payload, type=_Start)))
            except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
                self.find("foreign", line.where, f"a start record that no gateway writes: {error}")

    def _tell_places(self, missing: list[tuple[int, int]], displaced: list[tuple[int, str]], unread: int) -> None:
        gone = [*missing, (self.last + unread + 1, self.signed)]
        for seq, where in displaced:
            if any(begin <= seq <= end for begin, end in gone):
                self.find("reordered", where, f"record {seq} does not stand in its place")
            elif seq <= self.last:
                self.find("foreign", where, f"one more record {seq}")
            else:
                self.find("changed", where, f"record {seq} stands where another belongs")
        elsewhere = sorted({seq for seq, _ in displaced})
        for begin, end in _without(missing, elsewhere):
            self.find("removed", self.instance, _named(begin, end))
        for begin, end in _without([(self.last + unread + 1, self.signed)], elsewhere):
            self.find("truncated", self.instance, f"{_named(begin, end)}, signed, at the end")

    def _check_heads(self) -> None:
        tail = self.last - max(self.signed, self.first - 1)
        if self.first and tail > 0:
            self.report.notes.append(
                f"{self.instance}: {_named(self.last - tail + 1, self.last)} not signed yet: chained, but not proven"
            )
        if not self.heads_read and self.last > 1:
            self.find("removed", self.instance, f"all heads of {self.instance}")
        for where, start in self.starts:
            n = start.heads.n
            if self.checkpoint is not None and n < self.checkpoint.n:
                continue
            if n not in self.head_hashes:
                self.find("removed", where, f"head {n}, which this start had seen")
            elif self.head_hashes[n] != start.heads.hash:
                self.find("changed", where, f"head {n} is not the one that this start had seen")
            if start.previous and start.previous.torn_bytes:
                cut = f"{start.previous.torn_bytes} bytes, half written at a kill"
                self.report.notes.append(f"{where}: the start cut off {cut}")

    def _check_purges(self) -> None:
        allowed: set[int] = set()
        for seq, where, content in self.purges:
            try:
                gaps = content["records"]
                if sum(gaps) > seq:
                    raise ValueError("it names records after itself")
                numbers = set(audit_format.from_gaps(gaps))
            except (KeyError, TypeError, ValueError) as error:
                self.find("foreign", where, f"a purge record that no gateway writes: {error}")
                continue
            if seq > self.signed:
                self.report.notes.append(f"{where}: a purge that is not signed yet")
                continue
            allowed |= numbers
            left = {n for n in numbers - self.nulls if self.first <= n}
            if left:
                self.report.notes.append(f"{where}: {len(left)} records still hold what this purge names; purge again")
        for begin, end in _ranges(sorted(self.nulls - allowed)):
            self.find(
                "changed", self.instance, f"the content of {_named(begin, end)} was taken out, and no purge says so"
            )
        self.report.purged += len(self.nulls & allowed)


def verify(directory: Path, keys: Sequence[Ed25519PublicKey], anchors: Iterable[Head] = ()) -> Report:
    """Check all chains in a directory; a gateway may be writing there.

    Args:
        directory: Where the segments and heads are.
        keys: Public keys, any of which may have signed.
        anchors: Heads that were kept elsewhere (log stream, Redis); the chains have to reach them.

    Raises:
        OSError: The directory cannot be read.
    """
    for _ in range(_RESTARTS):
        try:
            return _verify(directory, keys, list(anchors))
        except FileNotFoundError:
            # Retention removed a segment meanwhile; its checkpoint is there now.
            if not directory.is_dir():
                raise
    return _verify(directory, keys, list(anchors))


def _verify(directory: Path, keys: Sequence[Ed25519PublicKey], anchors: list[Head]) -> Report:
    report = Report()
    by_id = {audit_format.key_id(key): key for key in keys}
    chains = {name: _Chain(directory, name, by_id, report) for name in audit_format.instances(directory)}
    names = re.compile(r"(audit|heads)-.*\.jsonl")
    for path in sorted(directory.iterdir()):
        name = path.name
        if names.fullmatch(name) and not (audit_format.SEGMENT.fullmatch(name) or audit_format.HEADS.fullmatch(name)):
            report.findings.append(Finding("foreign", name, "a file that no gateway writes"))
    good: list[Head] = []
    for anchor in anchors:
        where = f"given head {anchor.n} of {anchor.instance}"
        key = by_id.get(anchor.key)
        if key is None or not audit_format.signature_holds(anchor, key):
            report.findings.append(Finding("bad signature", where, "its signature does not hold with the keys given"))
        elif anchor.instance not in chains:
            report.findings.append(Finding("removed", where, f"all of {anchor.instance}"))
        else:
            good.append(anchor)
            chains[anchor.instance].wanted.add(anchor.seq)
    for chain in chains.values():
        chain.read_heads()
    # Starts name what they had seen of other chains; which records those are is known only after reading.
    links: list[tuple[str, str, int, str]] = [
        (f"given head {one.n} of {one.instance}", one.instance, one.seq, one.hash) for one in good
    ]
    for chain in chains.values():
        chain.read_records()
        for where, start in chain.starts:
            links += [(where, other, at.seq, at.hash) for other, at in start.seen.items()]
        report.heads[chain.instance] = chain.signed
    for where, other, seq, digest in links:
        _check_link(report, chains.get(other), where, other=other, seq=seq, digest=digest)
    return report


def _check_link(report: Report, chain: _Chain | None, where: str, *, other: str, seq: int, digest: str) -> None:
    if chain is None:
        report.findings.append(Finding("removed", where, f"all of {other}, of which this had seen record {seq}"))
        return
    if chain.checkpoint is not None and seq <= chain.checkpoint.seq:
        if seq == chain.checkpoint.seq and chain.checkpoint.hash != digest:
            report.findings.append(
                Finding("changed", where, f"record {seq} of {other} is not the one that was known here")
            )
        return
    if seq > chain.last:
        report.findings.append(Finding("truncated", where, f"record {seq} of {other}, which was known here, is gone"))
    elif chain.digests.get(seq, digest) != digest:
        report.findings.append(Finding("changed", where, f"record {seq} of {other} is not the one that was known here"))


def _with_next(lines: Iterator[_Line]) -> Iterator[tuple[_Line, int]]:
    """Each line with the number of the next one that can be read (0: none)."""
    waiting: list[_Line] = []
    for line in lines:
        if line.record is None:
            waiting.append(line)
            continue
        for one in waiting:
            yield one, line.record.seq
        waiting = [line]
    for one in waiting:
        yield one, 0


def _ranges(numbers: list[int]) -> Iterator[tuple[int, int]]:
    begin = 0
    for index, number in enumerate(numbers):
        if index + 1 == len(numbers) or numbers[index + 1] != number + 1:
            yield numbers[begin], number
            begin = index + 1


def _without(ranges: list[tuple[int, int]], numbers: list[int]) -> Iterator[tuple[int, int]]:
    """The ranges less the rising numbers; empty ranges are left out."""
    for begin, end in ranges:
        at = begin
        for number in numbers:
            if at <= number <= end:
                if number > at:
                    yield at, number - 1
                at = number + 1
        if at <= end:
            yield at, end


def _named(begin: int, end: int) -> str:
    return f"record {begin}" if begin == end else f"records {begin} to {end}"
