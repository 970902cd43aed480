"""How the audit log is written: records chained by hash, heads signed with Ed25519.

A directory holds, for each instance (a replica of the gateway):

`audit-<instance>-<start>-<n>.jsonl`
    Segments: one record a line, `{seq, prev, time, kind, commitment, payload, salt}`. `<start>` is when the process
    began, `<n>` counts its segments; sorted by name they give the whole chain, over all restarts.
`heads-<instance>.jsonl`
    Signed heads, one a line; after retention the first line is a checkpoint.

A record's hash is SHA-256 over the bytes of its line up to the payload (with the instance's name in front), and the
next record's `prev` is that hash. The payload is in it through `commitment` = SHA-256(salt, payload) alone, so a
payload and its salt may be taken out (`null`) without breaking the chain: what remains tells nothing of the content,
because the salt is random and gone. Lines have exactly one spelling; any other byte is a change.

A head names the last record on disk with its hash, and the head before it by the hash of that line. The construction is
that of Schneier and Kelsey (Secure audit logs to support computer forensics, 1999) with signatures instead of shared
keys, and Certificate Transparency's signed tree heads (RFC 9162) with a chain instead of a tree.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

#: What the first record of all follows, and the first head.
ZERO = "0" * 64
SEGMENT = re.compile(r"audit-(?P<instance>[A-Za-z0-9._-]+)-(?P<start>\d{8}T\d{9}Z)-(?P<n>\d{6})\.jsonl")
HEADS = re.compile(r"heads-(?P<instance>[A-Za-z0-9._-]+)\.jsonl")
INSTANCE = re.compile(r"[A-Za-z0-9._-]{1,128}")
#: The only kind of record whose payload may be purged; the others are the log's own and the administrators' acts.
PURGEABLE = "request"
_HASH_TAG = b"rayplane-audit-record-1 "
_HEAD_TAG = b"rayplane-audit-head-1\n"


class Record(msgspec.Struct):
    """A line of a segment as it was read."""

    seq: int
    prev: str
    time: str
    kind: str
    commitment: str
    payload: msgspec.Raw
    salt: str | None

    def purged(self) -> bool:
        return self.salt is None and bytes(self.payload) == b"null"

    def content(self) -> dict[str, Any]:
        """The payload decoded; empty when it was purged or is nothing that can be decoded."""
        try:
            found = msgspec.json.decode(self.payload)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


class Head(msgspec.Struct, frozen=True):
    """A signed statement: record `seq` of `instance` has `hash`, and so have all before it by the chain.

    A `checkpoint` says besides that records up to `seq` were removed by retention, and heads up to number `n`, the last
    of which had the line hash `prev`.
    """

    type: Literal["head", "checkpoint"]
    instance: str
    n: int
    seq: int
    hash: str
    time: str
    #: SHA-256 of the line of head n - 1 (checkpoint: of head n).
    prev: str
    #: Which key signed: the first 16 hex digits of SHA-256 over the raw public key.
    key: str
    signature: str = ""


_records = msgspec.json.Decoder(Record)
_heads = msgspec.json.Decoder(Head)


@lru_cache(maxsize=64)
def _quoted(kind: str) -> bytes:
    return msgspec.json.encode(kind)


def commit(salt: str, payload: bytes) -> str:
    """The commitment to a payload under a salt of 32 hex digits.

    The length is fixed, so that the two cannot be shifted against each other.
    """
    return hashlib.sha256(salt.encode() + payload).hexdigest()


def chained(instance: str, seq: int, prev: str, at: str, *, kind: str, commitment: str) -> tuple[bytes, str]:
    """The part of a record's line that the chain covers, and the record's hash."""
    covered = b'{"seq":%d,"prev":"%s","time":"%s","kind":%s,"commitment":"%s"' % (
        seq,
        prev.encode(),
        at.encode(),
        _quoted(kind),
        commitment.encode(),
    )
    return covered, hashlib.sha256(_HASH_TAG + instance.encode() + b"\n" + covered).hexdigest()


def line(covered: bytes, payload: bytes, salt: str | None) -> bytes:
    """The whole line with its end; `salt` None: purged."""
    return (
        covered
        + b',"payload":'
        + payload
        + (b',"salt":null}\n' if salt is None else b',"salt":"%s"}\n' % salt.encode())
    )


def parse(raw: bytes, instance: str) -> tuple[Record, str]:
    """A record and its hash from a line without its end.

    Raises:
        ValueError: The line is not, byte for byte, a record as this module writes it, or its payload is not the one
            committed to.
    """
    try:
        record = _records.decode(raw)
        covered, digest = chained(
            instance, record.seq, record.prev, record.time, kind=record.kind, commitment=record.commitment
        )
        payload = bytes(record.payload)
        same = line(covered, payload, record.salt)[:-1] == raw
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ValueError("it is no record") from error
    if not same:
        raise ValueError("it is not spelled as records are")
    if record.salt is None:
        if payload != b"null" or record.kind != PURGEABLE:
            raise ValueError("its salt was taken out")
    elif len(record.salt) != 32 or commit(record.salt, payload) != record.commitment:
        raise ValueError("its content is not the one that was committed to")
    return record, digest


def head_bytes(head: Head) -> bytes:
    """The line of a head, with its end."""
    return msgspec.json.encode(head) + b"\n"


def head_hash(raw: bytes) -> str:
    """By which the next head names the line `raw` (with its end)."""
    return hashlib.sha256(raw).hexdigest()


def parse_head(raw: bytes) -> Head:
    """A head from a line without its end; its signature is not looked at.

    Raises:
        ValueError: The line is not a head as this module writes it.
    """
    try:
        head = _heads.decode(raw)
        if head_bytes(head)[:-1] != raw:
            raise ValueError("it is not spelled as heads are")
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ValueError("it is no head") from error
    return head


def _signed_part(head: Head) -> bytes:
    return _HEAD_TAG + msgspec.json.encode(msgspec.structs.replace(head, signature=""))


def sign(head: Head, key: Ed25519PrivateKey) -> Head:
    """The head with its signature."""
    return msgspec.structs.replace(head, signature=key.sign(_signed_part(head)).hex())


def signature_holds(head: Head, key: Ed25519PublicKey) -> bool:
    """Whether `key` signed exactly this head."""
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  slow to import, and only needed here

    try:
        signature = bytes.fromhex(head.signature)
        if signature.hex() != head.signature:
            return False
        key.verify(signature, _signed_part(head))
    except (InvalidSignature, ValueError):
        return False
    return True


def key_id(key: Ed25519PublicKey) -> str:
    """How heads name the key that signed them."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def stamp(now: float) -> str:
    """RFC 3339 in UTC with milliseconds."""
    seconds, milliseconds = divmod(int(now * 1000), 1000)
    return f"{_second(seconds)}.{milliseconds:03d}Z"


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def segments(directory: Path, instance: str) -> list[Path]:
    """The instance's segments in the chain's order."""
    found = [(match, path) for path in directory.iterdir() if (match := SEGMENT.fullmatch(path.name))]
    return sorted((path for match, path in found if match["instance"] == instance), key=lambda path: path.name)


def instances(directory: Path) -> list[str]:
    """Everyone who has a segment or heads in the directory."""
    names = (path.name for path in directory.iterdir())
    return sorted({m["instance"] for name in names if (m := SEGMENT.fullmatch(name) or HEADS.fullmatch(name))})


def heads_path(directory: Path, instance: str) -> Path:
    return directory / f"heads-{instance}.jsonl"


def to_gaps(seqs: Iterable[int]) -> list[int]:
    """Rising numbers as `[gap, length, gap, length, ...]`, each gap counted from the end of the run before.

    [2, 3, 7] gives [2, 2, 3, 1].
    """
    out: list[int] = []
    end = 0
    for seq in seqs:
        if out and seq == end:
            out[-1] += 1
        else:
            out += (seq - end, 1)
        end = seq + 1
    return out


def from_gaps(gaps: list[int]) -> Iterator[int]:
    """The numbers that `to_gaps` packed.

    Raises:
        ValueError: Not such a list.
    """
    if len(gaps) % 2 or any(not isinstance(gap, int) or gap < 0 for gap in gaps):
        raise ValueError("not a list of gaps and lengths")
    end = 0
    for gap, length in zip(gaps[::2], gaps[1::2], strict=True):
        yield from range(end + gap, end + gap + length)
        end += gap + length
