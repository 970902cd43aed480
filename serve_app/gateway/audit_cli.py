"""`rayplane-audit`: check an audit log, read it, purge a client's content, make a signing key."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from . import audit, audit_format, audit_verify
from .config import Audit

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

OK, TAMPERED, USAGE = 0, 1, 2


class UsageError(Exception):
    """What was asked for cannot be done as it was asked."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: done, and the log is as it was written; 1: it was tampered with; 2: the call was wrong.
    """
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except (UsageError, audit.AuditFailed) as error:
        print(f"rayplane-audit: {error}", file=sys.stderr)
    except OSError as error:
        print(f"rayplane-audit: {error.filename or ''}: {error.strerror}", file=sys.stderr)
    return USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rayplane-audit", description=__doc__)
    commands = parser.add_subparsers(required=True)

    verify = commands.add_parser(
        "verify", help="name every record that was removed, changed, put elsewhere or brought in"
    )
    verify.add_argument("directory", type=Path)
    verify.add_argument(
        "--public-key", type=Path, action="append", required=True, help="PEM; repeat after a change of keys"
    )
    verify.add_argument(
        "--head",
        action="append",
        default=[],
        help="heads kept elsewhere: JSON, @FILE or - for standard input, one a line; log lines of the gateway will do",
    )
    verify.add_argument("--json", action="store_true", help="print the report as JSON")
    verify.set_defaults(run=_verify)

    show = commands.add_parser("show", help="print the records as JSON, one a line; checks nothing")
    show.add_argument("directory", type=Path)
    show.add_argument("--client", help="only of this client")
    show.add_argument("--kind", help="only of this kind (request, admin, start, ...)")
    show.add_argument("--since", type=_time, help="only from this time on (RFC 3339, or a date)")
    show.set_defaults(run=_show)

    purge = commands.add_parser("purge", help="take the content of a client's requests out; the chain still verifies")
    purge.add_argument("directory", type=Path)
    purge.add_argument("--client", required=True)
    purge.add_argument("--signing-key", type=Path, required=True, help="PEM of the private key")
    purge.add_argument("--actor", default=os.environ.get("USER", "unknown"), help="who purges; it is recorded")
    purge.set_defaults(run=_purge)

    keygen = commands.add_parser("keygen", help="make an Ed25519 key: PRIVATE, readable by you alone, and PUBLIC")
    keygen.add_argument("private", type=Path)
    keygen.add_argument("public", type=Path)
    keygen.set_defaults(run=_keygen)
    return parser


def _time(text: str) -> str:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a date nor a time as in RFC 3339") from error
    return audit_format.stamp((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())


def _public_key(path: Path) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415  slow to import
    from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415

    try:
        key = load_pem_public_key(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} holds no public key in PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{path} holds a key that is not Ed25519")
    return key


def _heads(text: str) -> list[audit_format.Head]:
    """The heads in an argument, a file or standard input: heads, or log lines of the gateway of which some hold one."""
    if text == "-":
        text = sys.stdin.read()
    elif text.startswith("@"):
        text = Path(text[1:]).read_text(encoding="utf-8")
    found: list[audit_format.Head] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        try:
            value = msgspec.json.decode(line)
            if isinstance(value, dict) and "hash" not in value:
                value = value.get("head")
            if isinstance(value, dict):
                found.append(msgspec.convert(value, audit_format.Head))
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise UsageError(f"--head is not a head: {error}") from error
    if not found:
        raise UsageError("--head holds no head")
    return found


def _directory(path: Path) -> list[str]:
    if not path.is_dir():
        raise UsageError(f"{path} is no directory")
    found = audit_format.instances(path)
    if not found:
        raise UsageError(f"{path} holds no audit log")
    return found


def _verify(parsed: argparse.Namespace) -> int:
    keys = [_public_key(path) for path in parsed.public_key]
    anchors = [head for text in parsed.head for head in _heads(text)]
    if anchors:
        # With a head from elsewhere an empty directory is a finding, not a mistake.
        if not parsed.directory.is_dir():
            raise UsageError(f"{parsed.directory} is no directory")
    else:
        _directory(parsed.directory)
    report = audit_verify.verify(parsed.directory, keys, anchors)
    if parsed.json:
        print(msgspec.json.encode(report).decode())
    else:
        for finding in report.findings:
            print(finding)
        for note in report.notes:
            print(f"note: {note}")
        for instance, seq in report.heads.items():
            print(f"{instance}: signed up to record {seq}")
        purged = f", {report.purged} of them purged" if report.purged else ""
        verdict = f"{len(report.findings)} findings: TAMPERED WITH" if report.findings else "as they were written"
        print(f"{report.records} records{purged}: {verdict}")
    return TAMPERED if report.findings else OK


def _show(parsed: argparse.Namespace) -> int:
    for instance in _directory(parsed.directory):
        for path in audit_format.segments(parsed.directory, instance):
            with path.open("rb") as file:
                for raw in file:
                    try:
                        record, _ = audit_format.parse(raw.rstrip(b"\n"), instance)
                    except ValueError as error:
                        print(f"rayplane-audit: {path.name}: a line left out: {error}", file=sys.stderr)
                        continue
                    content = record.content()
                    if (parsed.since and record.time < parsed.since) or (parsed.kind and record.kind != parsed.kind):
                        continue
                    if parsed.client is not None and content.get("client") != parsed.client:
                        continue
                    head = {"instance": instance, "seq": record.seq, "time": record.time, "kind": record.kind}
                    shown = head | ({"purged": True} if record.purged() else content)
                    print(msgspec.json.encode(shown).decode())
    return OK


def _purge(parsed: argparse.Namespace) -> int:
    names = _directory(parsed.directory)
    config = Audit(enabled=True, directory=str(parsed.directory), signing_key_file=str(parsed.signing_key))
    audit.load_signing_key(config.signing_key_file)
    count = 0
    busy: list[str] = []
    for instance in names:
        if not audit.holds(parsed.directory, instance, parsed.client):
            continue
        log = audit.AuditLog(config, instance)
        try:
            os.close(audit.take_lock(parsed.directory, instance))
        except audit.AuditFailed:
            busy.append(instance)
            continue
        log.open()
        try:
            count += log.purge_own(parsed.client, actor=parsed.actor)
        finally:
            log.shut()
    print(f"{count} records purged")
    if busy:
        raise UsageError(
            f"a gateway is writing as {', '.join(busy)}; there, purge by its admin API: POST /admin/v1/clients/"
            f"{re.sub('[^A-Za-z0-9._~-]', lambda m: ''.join(f'%{b:02X}' for b in m[0].encode()), parsed.client)}/purge"
        )
    return OK


def _keygen(parsed: argparse.Namespace) -> int:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415  slow to import
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for path, content, mode in ((parsed.private, private, 0o600), (parsed.public, public, 0o644)):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError as error:
            raise UsageError(f"{path} exists already") from error
        with os.fdopen(fd, "wb") as file:
            file.write(content)
    print(f"key {audit_format.key_id(key.public_key())}: {parsed.private}, {parsed.public}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
