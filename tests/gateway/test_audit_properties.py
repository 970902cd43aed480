"""Whatever one does to an audit log's records, `verify` finds it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.gateway import audit_cli, audit_format, audit_verify
from serve_app.gateway.audit import AuditLog
from serve_app.gateway.config import Audit

Files = dict[str, bytes]
WEIRD = [
    b"",
    b"\n" * 50,
    b"[" * 100_000 + b"\n",
    b'{"seq":1,"prev":"","time":"","kind":"start","commitment":"","payload":' + b"[" * 100_000 + b',"salt":null}\n',
    b'{"seq":' + b"9" * 10_000 + b"}\n",
    b'{"seq":-1,"prev":"","time":"","kind":"","commitment":"","payload":null,"salt":null}\n',
]


@cache
def original() -> tuple[Files, bytes]:
    """A log of three runs over several segments, one client's content purged, cleanly closed; and the public key."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audit_cli.main(["keygen", str(folder / "key"), str(folder / "key.pub")])
        config = Audit(
            enabled=True,
            directory=str(folder / "log"),
            signing_key_file=str(folder / "key"),
            segment_bytes=1800,
            head_every_records=3,
        )
        for run in range(3):
            log = AuditLog(config, "gw-0")
            log.open()
            for number in range(8):
                log.append({"client": f"client-{number % 3}", "request_id": f"{run}-{number}", "text": "ünï 💡"})
                if number % 2:
                    log.sync_now()
            if run == 1:
                log.append({"kind": "admin", "action": "purge"})
                log.purge_now("client-1", actor="root")
            log.shut()
        files = {path.name: path.read_bytes() for path in (folder / "log").iterdir() if path.suffix == ".jsonl"}
        return files, (folder / "key.pub").read_bytes()


def segments(files: Files) -> list[str]:
    return sorted(name for name in files if name.startswith("audit-"))


def lines(files: Files) -> list[tuple[str, int]]:
    """Every record by segment and index."""
    return [(name, index) for name in segments(files) for index in range(files[name].count(b"\n"))]


def check(files: Files) -> audit_verify.Report:
    key = load_pem_public_key(original()[1])
    assert isinstance(key, Ed25519PublicKey)
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        return audit_verify.verify(Path(name), [key])


def kinds(files: Files) -> set[str]:
    return {finding.what for finding in check(files).findings}


def edited(files: Files, edit: Callable[[dict[str, list[bytes]]], None]) -> Files:
    """The files after an edit of their lines."""
    split = {name: content.splitlines(keepends=True) for name, content in files.items()}
    edit(split)
    return {name: b"".join(parts) for name, parts in split.items()}


@st.composite
def records(draw: st.DrawFn, count: int) -> list[tuple[str, int]]:
    found = lines(original()[0])
    picked = draw(st.lists(st.integers(0, len(found) - 1), min_size=count, max_size=count, unique=True))
    return [found[index] for index in picked]


def test_the_log_itself_is_as_it_was_written() -> None:
    files, _ = original()
    report = check(files)
    assert (report.findings, report.notes) == ([], [])
    assert report.records == len(lines(files)) > 30
    assert report.purged == 6
    assert len(segments(files)) >= 7


def test_every_single_removal_is_found() -> None:
    files, _ = original()
    for name, index in lines(files):
        found = kinds(edited(files, lambda split, name=name, index=index: split[name].pop(index)))
        assert found & {"removed", "truncated"}, (name, index, found)


def test_every_single_duplicate_in_place_is_found_as_such() -> None:
    files, _ = original()
    for name, index in lines(files):
        found = kinds(
            edited(files, lambda split, name=name, index=index: split[name].insert(index, split[name][index]))
        )
        assert found == {"foreign"}, (name, index, found)


@settings(max_examples=100)
@given(st.data())
def test_any_changed_byte_is_found(data: st.DataObject) -> None:
    files, _ = original()
    name = data.draw(st.sampled_from(segments(files)))
    at = data.draw(st.integers(0, len(files[name]) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != files[name][at]))
    content = files[name][:at] + bytes([value]) + files[name][at + 1 :]
    assert check({**files, name: content}).findings


@settings(max_examples=100)
@given(st.data())
def test_any_inserted_or_deleted_bytes_are_found(data: st.DataObject) -> None:
    files, _ = original()
    name = data.draw(st.sampled_from(segments(files)))
    at = data.draw(st.integers(0, len(files[name]) - 1))
    cut = data.draw(st.integers(0, 40))
    more = data.draw(st.binary(max_size=20))
    content = files[name][:at] + more + files[name][at + cut :]
    if content != files[name]:
        # Bytes after the last newline of all are what a kill leaves; nothing that was written is touched by them.
        report = check({**files, name: content})
        only_torn = (
            name == segments(files)[-1] and content.startswith(files[name]) and b"\n" not in content[len(files[name]) :]
        )
        assert bool(report.findings) != only_torn
        assert bool(report.notes) or not only_torn


@settings(max_examples=100)
@given(records(2))
def test_any_two_records_exchanged_are_found_as_reordered(two: list[tuple[str, int]]) -> None:
    (first, i), (second, j) = two

    def swap(split: dict[str, list[bytes]]) -> None:
        split[first][i], split[second][j] = split[second][j], split[first][i]

    files, _ = original()
    assert "reordered" in kinds(edited(files, swap))


@settings(max_examples=100)
@given(records(2))
def test_any_record_moved_is_found(two: list[tuple[str, int]]) -> None:
    (source, i), (target, j) = two
    files, _ = original()

    def move(split: dict[str, list[bytes]]) -> None:
        line = split[source].pop(i)
        split[target].insert(j, line)

    after = edited(files, move)
    together = [b"".join(one[name] for name in segments(files)) for one in (files, after)]
    # Over the border of two segments a record can be moved without changing the order.
    assert bool(check(after).findings) == (together[0] != together[1])


@settings(max_examples=100)
@given(records(2))
def test_any_record_repeated_elsewhere_is_found(two: list[tuple[str, int]]) -> None:
    (source, i), (target, j) = two
    files, _ = original()
    assert kinds(edited(files, lambda split: split[target].insert(j, split[source][i])))


@settings(max_examples=100)
@given(st.data())
def test_any_truncation_is_found(data: st.DataObject) -> None:
    files, _ = original()
    names = segments(files)
    which = data.draw(st.integers(0, len(names) - 1))
    size = data.draw(st.integers(0, len(files[names[which]]) - 1))
    cut = {name: content for name, content in files.items() if name not in names[which + 1 :]}
    cut[names[which]] = files[names[which]][:size]
    assert "truncated" in kinds(cut)


def test_every_missing_segment_is_found() -> None:
    files, _ = original()
    for name in segments(files):
        assert kinds({other: content for other, content in files.items() if other != name}) & {"removed", "truncated"}


@settings(max_examples=100)
@given(st.data())
def test_any_changed_byte_of_the_heads_is_found(data: st.DataObject) -> None:
    files, _ = original()
    content = files["heads-gw-0.jsonl"]
    # The very last byte is the line's end: without it the head counts as torn by a kill.
    at = data.draw(st.integers(0, len(content) - 2))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != content[at]))
    report = check({**files, "heads-gw-0.jsonl": content[:at] + bytes([value]) + content[at + 1 :]})
    assert report.findings


def test_every_missing_head_is_found_but_the_last() -> None:
    files, _ = original()
    heads = files["heads-gw-0.jsonl"].splitlines(keepends=True)
    for index in range(len(heads)):
        report = check({**files, "heads-gw-0.jsonl": b"".join(heads[:index] + heads[index + 1 :])})
        if index + 1 < len(heads):
            assert {finding.what for finding in report.findings} & {"removed", "changed"}, index
        else:
            assert report.findings == []
            assert "not signed yet" in report.notes[0]
    assert kinds({**files, "heads-gw-0.jsonl": b""}) >= {"removed"}


@settings(max_examples=100)
@given(st.integers(1, 40), st.booleans())
def test_whoever_writes_the_chain_anew_cannot_sign_it(at: int, heads_too: bool) -> None:
    """With the disk, but without the key: a record is replaced, and all after it are chained to the new one."""
    files, _ = original()
    everything = [raw for name in segments(files) for raw in files[name].splitlines()]
    at = min(at, len(everything) - 1)
    prev = audit_format.ZERO
    forged: list[bytes] = []
    last = 0, ""
    for index, raw in enumerate(everything):
        record, _ = audit_format.parse(raw, "gw-0")
        payload = b'{"client":"somebody else"}' if index == at else bytes(record.payload)
        commitment = audit_format.commit("0" * 32, payload) if index == at else record.commitment
        salt = "0" * 32 if index == at else record.salt
        covered, prev = audit_format.chained(
            "gw-0", record.seq, prev, record.time, kind=record.kind, commitment=commitment
        )
        forged.append(audit_format.line(covered, payload, salt))
        last = record.seq, prev
    name = segments(files)[0]
    content: Files = {name: b"".join(forged)}
    content["heads-gw-0.jsonl"] = files["heads-gw-0.jsonl"]
    if heads_too:
        mine = Ed25519PrivateKey.generate()
        genuine = audit_format.parse_head(files["heads-gw-0.jsonl"].splitlines()[0])
        head = audit_format.Head("head", "gw-0", 1, *last, genuine.time, audit_format.ZERO, genuine.key)
        content["heads-gw-0.jsonl"] = audit_format.head_bytes(audit_format.sign(head, mine))
    assert kinds(content) & {"changed", "bad signature"}


def test_a_record_of_another_instance_is_found() -> None:
    files, _ = original()
    renamed = {name.replace("gw-0", "gw-1"): content for name, content in files.items()}
    assert {"foreign", "removed"} & kinds(renamed)
    assert kinds({**files, "audit-x.jsonl": b""}) == {"foreign"}


@given(st.sets(st.integers(1, 10_000), max_size=200))
def test_gaps_give_the_numbers_back(numbers: set[int]) -> None:
    packed = audit_format.to_gaps(sorted(numbers))
    assert list(audit_format.from_gaps(packed)) == sorted(numbers)


@pytest.mark.parametrize("bad", [[1], [-1, 2], ["1", "2"], [1.5, 2]])
def test_what_are_no_gaps_is_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="not a list of gaps"):
        list(audit_format.from_gaps(bad))


@settings(max_examples=100)
@given(st.data())
def test_no_rubbish_stops_the_check(data: st.DataObject) -> None:
    files, _ = original()
    names = [*segments(files), "heads-gw-0.jsonl"]
    name = data.draw(st.sampled_from(names))
    rubbish = data.draw(st.binary(max_size=300) | st.sampled_from(WEIRD))
    report = check({**files, name: rubbish})
    assert report.findings or report.notes


@pytest.mark.parametrize("kind", ["start", "purge"])
@pytest.mark.parametrize(
    "payload",
    [
        b"{}",
        b"[1]",
        b'"x"',
        b'{"records":"many","heads":7}',
        b'{"records":[1,99999999999],"heads":{"n":"1","hash":""},"seen":{}}',
        b'{"records":[-99999999999,99999999999],"heads":{"n":1,"hash":""},"seen":[]}',
        b'{"records":{"a":1},"heads":{"n":99,"hash":""},"seen":{"gw-9":{"seq":1,"hash":""}}}',
        b'{"records":[1.5,2.5],"heads":{"n":1,"hash":""},"seen":{}}',
    ],
)
def test_records_that_only_look_genuine_are_found(kind: str, payload: bytes) -> None:
    """Chained after the last head, where no signature protects: the log's own records have to make sense."""
    files, _ = original()
    name = segments(files)[-1]
    last, prev = audit_format.parse(files[name].split(b"\n")[-2], "gw-0")
    salt = "0" * 32
    covered, _ = audit_format.chained(
        "gw-0", last.seq + 1, prev, last.time, kind=kind, commitment=audit_format.commit(salt, payload)
    )
    report = check({**files, name: files[name] + audit_format.line(covered, payload, salt)})
    assert report.findings
    assert "not signed yet" in " ".join(report.notes)


def test_a_purge_nobody_signed_allows_nothing() -> None:
    files, _ = original()
    name = segments(files)[-1]
    kept = files[name].splitlines(keepends=True)
    victim = next(index for index, raw in enumerate(kept) if b'"kind":"request"' in raw)
    record, _ = audit_format.parse(kept[victim][:-1], "gw-0")
    covered, _ = audit_format.chained(
        "gw-0", record.seq, record.prev, record.time, kind=record.kind, commitment=record.commitment
    )
    kept[victim] = audit_format.line(covered, b"null", None)
    last, prev = audit_format.parse(kept[-1][:-1], "gw-0")
    payload = b'{"client":"x","actor":"x","segment":"x","records":[%d,1]}' % record.seq
    salt = "0" * 32
    covered, _ = audit_format.chained(
        "gw-0", last.seq + 1, prev, last.time, kind="purge", commitment=audit_format.commit(salt, payload)
    )
    report = check({**files, name: b"".join(kept) + audit_format.line(covered, payload, salt)})
    assert [finding.what for finding in report.findings] == ["changed"]
    assert "a purge that is not signed yet" in " ".join(report.notes)
