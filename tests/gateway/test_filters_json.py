"""Documents stay documents when something in them is redacted, whole and in pieces."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.gateway import config
from serve_app.gateway.filters.base import TextFilter, make
from serve_app.gateway.filters.sensitive import luhn

from .test_filters import answer, chain, redacted
from .test_filters_stream import cut, cuts

CARD = 4111111111111111
ENTRIES: dict[str, dict[str, Any]] = {
    "sensitive": {"type": "sensitive_data"},
    "quotes": {"type": "sensitive_data", "options": {"replacement": '"{kind}"\\\n'}},
    "words": {
        "type": "words",
        "options": {
            "patterns": [r"\d{4}", r"\s?x{1,9}", r"true", r'y"[:,] ?"z', r"secret.{0,6}"],
            "words": ["b", "u00"],
            "whole_words": False,
        },
    },
}


def filter_(name: str) -> TextFilter:
    made = make("f", msgspec.convert({"action": "redact", **ENTRIES[name]}, config.Filter))
    assert isinstance(made, TextFilter)
    return made


def filtered(name: str, pieces: Sequence[str], *, arguments: bool) -> str:
    stage = filter_(name).begin("output", json=arguments)
    return "".join([*map(stage.feed, pieces), stage.feed("", True)])


def loaded(text: str) -> Any:
    """The document; members whose names became the same stay several."""
    return json.loads(text, object_pairs_hook=lambda pairs: dict(enumerate(value for _, value in pairs)))


def shape(value: Any) -> Any:
    """A document without what may be redacted."""
    if isinstance(value, dict):
        return [shape(one) for one in value.values()]
    return [shape(one) for one in value] if isinstance(value, list) else None


LEAST = 2221000000000009
numbers = st.sampled_from([CARD, -CARD, CARD * 10 + 1, 1234, 12345.0, 1e22, CARD + 0.5, 0.1234, LEAST])
PIECES = [
    *("a@b.de", str(CARD), "\n", "\t", '"', "\\", "é", "x", "y", "z", "secret", "[", "}", "\u0012", " ", "10.1.2.3"),
    *("aws_secret_access_key", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "-----BEGIN PRIVATE KEY-----", "12345"),
]
strings = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
values = st.recursive(
    st.one_of(st.booleans(), st.none(), numbers, strings),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(strings, inner, max_size=4)),
    max_leaves=12,
)


WAYS: list[dict[str, Any]] = [{}, {"indent": 2}, {"separators": (",", ":"), "ensure_ascii": False}]


@pytest.mark.parametrize("arguments", [False, True])
@pytest.mark.parametrize("name", ENTRIES)
@settings(max_examples=60)
@given(value=values, way=st.sampled_from(WAYS), places=cuts)
@example(value={"aws_secret_access_key": PIECES[-3]}, way={}, places=[])
@example(value={'-----BEGIN PRIVATE KEY-----"': 1}, way={}, places=range(99))
@example(value=["\u0012", "y", "z"], way={}, places=range(99))
def test_a_document_stays_one(
    name: str, arguments: bool, value: Any, way: dict[str, Any], places: Sequence[int]
) -> None:
    text = json.dumps(value if arguments or isinstance(value, (list, dict)) else [value], **way)
    whole = filtered(name, [text], arguments=arguments)
    assert shape(loaded(whole)) == shape(loaded(text))
    assert filtered(name, cut(text, places), arguments=arguments) == whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'{{"id": {CARD}}}', '{"id": "[redacted credit_card]"}'),
        (f"[{CARD},\n {CARD}]", '["[redacted credit_card]",\n "[redacted credit_card]"]'),
        (f'{{"id": -{CARD}, "b": {CARD}.5}}', '{"id": -9999999999999999, "b": 9999999999999999.5}'),
        (f'{{"id": "{CARD}"}}', '{"id": "[redacted credit_card]"}'),
        (f'Here it is:\n```json\n{{"id": {CARD}}}\n```\nCard: {CARD}, thanks', None),
        (f"[1] My card, {CARD}, is lost [sic].", "[1] My card, [redacted credit_card], is lost [sic]."),
        ('{"a": "\\nbob@x.de"}', '{"a": "\\n[redacted email]"}'),
        ('{"aws_secret_key": "' + "aB3/" * 10 + '", "b": 1}', '{"[redacted aws_key]": "[redacted aws_key]", "b": 1}'),
    ],
)
def test_what_stands_in_its_place(text: str, expected: str | None) -> None:
    if expected is None:
        expected = text.replace(f" {CARD}}}", ' "[redacted credit_card]"}').replace(str(CARD), "[redacted credit_card]")
    assert redacted(text) == expected


def test_ids_in_structured_answers_and_calls() -> None:
    made = chain({"type": "sensitive_data", "action": "redact"})
    random_ = random.Random(7)
    ids = [random_.randrange(10**17, 10**18) for _ in range(2000)]
    text = json.dumps({"ids": ids})
    call = {"function": {"name": "f", "arguments": text}}
    changed, _ = answer(made, {"choices": [{"message": {"content": text, "tool_calls": [call]}}]})
    message = changed["choices"][0]["message"] if changed else {"content": text, "tool_calls": [call]}
    for left in (message["content"], message["tool_calls"][0]["function"]["arguments"]):
        kept = json.loads(left)["ids"]
        assert len(kept) == len(ids)
        assert sum(one == old for one, old in zip(kept, ids, strict=True)) > 0.995 * len(ids)


@pytest.mark.parametrize(
    "digits",
    [
        *("4222222222222", "4012888888881881", "5555555555554444", "2221000000000009", "2720990000000007"),
        *("378282246310005", "30569309025904", "38520000023237", "6011111111111117", "6500000000000002"),
        *("6200000000000005", "3530111333300000", "2200000000000004", "6759649826438453", "5018000000000009"),
    ],
)
def test_cards_of_the_networks(digits: str) -> None:
    assert luhn(digits)
    assert redacted(digits) == "[redacted credit_card]"


@pytest.mark.parametrize("digits", ["41111111111114", "411111111111111106", "2121000000000000", "6300000000000002"])
def test_numbers_of_no_network_are_no_cards(digits: str) -> None:
    for last in range(10):
        assert redacted(digits[:-1] + str(last)) == digits[:-1] + str(last)


@pytest.mark.parametrize(
    "text",
    [
        "Update to 1.2.3.4 today",
        "version 10.2.30.4 is out",
        "nginx 1.25.3.1",
        '{"version": "1.2.3.4", "app_version":"2.0.0.1"}',
        "Mozilla/5.0 Chrome/131.0.0.0 Safari/537.36",
        "name==1.2.3.4, other>=1.2.0.4, @scope/name@1.0.0.7",
        "server version 3.1.2.4",
        "serverVersion: 3.1.2.4",
        "See section 4.1.2.3",
        "cafe::add(dead::beef)",
    ],
)
def test_versions_are_no_addresses(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    "around",
    [
        "ping <> now",
        "http://<>/x",
        "<>:8080",
        "<>/24",
        '{"client_ip": "<>", "version": "1.2.3.4"}',
        '{"remoteAddr":"<>"}',
        "Failed password from <> port 22",
        "version 2 runs on host <>",
        "The server is <>.",
    ],
)
def test_addresses_have_something_that_says_so(around: str) -> None:
    assert redacted(around.replace("<>", "203.0.113.7")) == around.replace("<>", "[redacted ip_address]")
