"""Events keep their bytes, wherever the stream is cut; usage is taken out and nothing else."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway.errors import BackendFailed
from serve_app.gateway.sse import Events, cut_usage, data, is_done

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
CHUNK = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":%s},"logprobs":null,"finish_reason":null}]'
)
COUNTS = b'"usage":{"prompt_tokens":9,"total_tokens":11,"completion_tokens":2}'


def split(text: bytes, cuts: list[int]) -> list[bytes]:
    """The text in pieces, some of them perhaps empty."""
    places = sorted(cut % (len(text) + 1) for cut in cuts)
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


def events_of(pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    reader = Events()
    events = [event for piece in pieces for event in reader.feed(piece)]
    return events, reader.rest()


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@given(texts=st.lists(TEXTS, min_size=1, max_size=6), cuts=st.lists(st.integers(0, 10_000), max_size=20))
def test_events_are_the_same_for_every_split(newline: bytes, texts: list[str], cuts: list[int]) -> None:
    whole = [b"data: " + json.dumps(text, ensure_ascii=False).encode() + newline * 2 for text in texts]
    events, rest = events_of(split(b"".join(whole), cuts))
    assert b"".join(events) + rest == b"".join(whole)
    assert [json.loads(data(event) or b"null") for event in [*events, rest] if event.strip()] == texts


@pytest.mark.parametrize("newline", [b"\n", b"\r"])
@given(texts=st.lists(TEXTS, min_size=1, max_size=6))
def test_an_event_is_given_out_with_its_last_byte(newline: bytes, texts: list[str]) -> None:
    reader = Events()
    for text in texts:
        event = b"data: " + json.dumps(text).encode() + newline * 2
        assert reader.feed(event[:-1]) == []
        assert reader.feed(event[-1:]) == [event]


def test_crlf_events_byte_by_byte() -> None:
    stream = b"event: a\r\ndata: 1\r\n\r\n: ping\r\n\r\ndata: 2\r\ndata: 3\r\n\r\n"
    events, rest = events_of([bytes([one]) for one in stream])
    assert events == [b"event: a\r\ndata: 1\r\n\r\n", b": ping\r\n\r\n", b"data: 2\r\ndata: 3\r\n\r\n"]
    assert rest == b""
    assert [data(event) for event in events] == [b"1", None, b"2\n3"]


def test_an_unfinished_event_is_the_rest() -> None:
    assert events_of([b"data: 1\n\ndata: 2\n"]) == ([b"data: 1\n\n"], b"data: 2\n")


def test_rest_empties_the_buffer() -> None:
    reader = Events()
    reader.feed(b"data: 1")
    assert reader.rest() == b"data: 1"
    assert reader.rest() == b""
    assert reader.feed(b"data: 2\n\n") == [b"data: 2\n\n"]


def test_an_endless_event_is_refused() -> None:
    reader = Events(limit=1000)
    with pytest.raises(BackendFailed, match="more than 1000 bytes"):
        for _ in range(2000):
            reader.feed(b"x")


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (b"data: one\n\n", b"one"),
        (b"data:one\n\n", b"one"),
        (b"data:  one\n\n", b" one"),
        (b"data\n\n", b""),
        (b"data: one\rdata: two\r\r", b"one\ntwo"),
        (b"id: 7\ndata: one\n\n", b"one"),
        (b": comment\n\n", None),
        (b"database: one\n\n", None),
        (b"\n", None),
    ],
)
def test_data(event: bytes, expected: bytes | None) -> None:
    assert data(event) == expected


@pytest.mark.parametrize("event", [b"data: [DONE]\n\n", b"data:[DONE]\r\n\r\n", b"data: [DONE] \n\n"])
def test_is_done(event: bytes) -> None:
    assert is_done(event)


@pytest.mark.parametrize("event", [b'data: "[DONE]"\n\n', b": [DONE]\n\n", b"data: [DONE]x\n\n", b"data: 1\n\n"])
def test_is_not_done(event: bytes) -> None:
    assert not is_done(event)


@given(
    text=TEXTS,
    tail=st.sampled_from([b"", b',"prompt_token_ids":null', b',"obfuscation":"a\\"}b"', b',"ids":[1,2]']),
    newline=st.sampled_from([b"\n", b"\r\n", b"\r"]),
)
def test_usage_is_cut_and_no_other_byte(text: str, tail: bytes, newline: bytes) -> None:
    chunk = CHUNK % msgspec.json.encode(text)
    end = b"}" + newline * 2
    cut, usage = cut_usage(chunk + b"," + COUNTS + tail + end)
    assert cut == chunk + tail + end
    assert usage is not None
    assert usage.counts() == (9, 2)


def test_usage_with_details_is_cut() -> None:
    chunk = CHUNK % b'"a"'
    usage = (
        b'"usage":{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":4},"cost":"1.5"}'
    )
    cut, counts = cut_usage(chunk + b"," + usage + b"}\n\n")
    assert cut == chunk + b"}\n\n"
    assert counts is not None
    assert counts.counts() == (9, 2)


def test_usage_null_is_cut_without_counts() -> None:
    chunk = CHUNK % b'"a"'
    assert cut_usage(chunk + b',"usage":null}\n\n') == (chunk + b"}\n\n", None)


def test_spaces_are_understood() -> None:
    event = b'data: {"id": "c", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n'
    cut, usage = cut_usage(event)
    assert cut == b'data: {"id": "c", "choices": []}\n\n'
    assert usage is not None
    assert usage.counts() == (3, 4)


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"usage":{"prompt_tokens":9,"completion_tokens":2},"id":"c","choices":[{"index":0}]}\n\n',
        b'data: {"id":"c","usage":{"prompt_tokens":9,"completion_tokens":2},"choices":[{"index":0}]}\n\n',
    ],
)
def test_usage_at_an_unusual_place_is_cut_by_encoding_anew(event: bytes) -> None:
    cut, usage = cut_usage(event)
    assert cut == b'data: {"id":"c","choices":[{"index":0}]}\n\n'
    assert usage is not None
    assert usage.counts() == (9, 2)


def test_other_lines_of_the_event_stay_when_it_is_encoded_anew() -> None:
    cut, _ = cut_usage(b'id: 4\ndata: {"usage":null,"a":1}\n\n')
    assert cut == b'id: 4\ndata: {"a":1}\n\n'


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"id":"c"}\n\n',
        b'data: {"choices":[{"delta":{"content":"x,\\"usage\\":{}"}}]}\n\n',
        b'data: {"choices":[{"index":0,"usage":{"prompt_tokens":1}}]}\n\n',
        b'data: {"object":"usage"}\n\n',
        b'data: {"id":"c","usage":{"prompt_tokens":"many"}}\n\n',
        b'data: {"id":"c","usage":{"prompt_tokens":1}\n\n',
        b'data: [1,{"usage":null}]\n\n',
        b': "usage"\n\n',
        b'data: {"id":"\xff","usage":{"prompt_tokens":"\xff"}}\n\n',
    ],
)
def test_what_is_no_usage_stays(event: bytes) -> None:
    assert cut_usage(event) == (event, None)


def test_hostile_event_is_handled_in_linear_steps() -> None:
    # The pattern would take hours here if it could match one text in two ways.
    event = b'data: {"a":1,"usage":{' + b'"a":"b",' * 200_000 + b"\n\n"
    assert cut_usage(event) == (event, None)
    event = b'data: {"a":1,"usage":null' + b',"a":1' * 200_000 + b"\n\n"
    assert cut_usage(event) == (event, None)
