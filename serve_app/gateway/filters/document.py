"""What stands in a text's place, so that a JSON document stays one.

Tool calls' arguments are documents, structured answers are, and prose may hold some: each from a bracket to the one
that closes it. Within a string the replacement is escaped; a number that is replaced becomes a string, or keeps its
length in nines where only a part of it is replaced; quotes, brackets and escapes stay.
"""

from __future__ import annotations

import re

import msgspec

# It begins with a set of characters, which `re` looks for fast.
_TOKEN = re.compile(r'["\[\]{}\n\\](?:(?<=\\)(?:u[0-9a-fA-F]{0,4}|.))?', re.DOTALL)
#: What stands between the strings of a document: the letters are those of true, false and null, or of a part of them.
_BETWEEN = re.compile(r"(?:[\s:,]++|[0-9.eE+-]++|[aeflnrstu]{1,5}+)*+")
_LITERAL = re.compile(r"true|false|null|[0-9.eE+-]+")
_DIGIT = re.compile(r"[0-9]")
_IN_NUMBERS = frozenset("0123456789.eE+-")
_AFTER_VALUES = frozenset(",]} \t\r\n")


class Place:
    """How far a text has come, and where in a document that is.

    Args:
        json: The text is a document.
    """

    __slots__ = ("_depth", "_escape", "_inside", "_last", "_least")

    def __init__(self, json: bool) -> None:
        self._least = self._depth = int(json)
        self._inside = False
        #: The last character that is no space.
        self._last = ""
        #: An escape that has begun.
        self._escape = ""

    def _left(self, text: str, start: int) -> int:
        """How many characters the escape has still."""
        escape = self._escape + text[start : start + 1] if self._escape == "\\" else self._escape
        return _length(escape) - len(self._escape) if escape else 0

    def whole(self, text: str, start: int) -> int:
        """Where the escape ends that `text[:start]` has cut in a document; `start` where it has cut none."""
        return min(len(text), start + self._left(text, start)) if self._depth else start

    def go(self, text: str, start: int, end: int) -> None:
        """Go on over `text[start:end]`."""
        if start == end:
            return
        left = self._left(text, start)
        if left > end - start:
            self._escape += text[start:end]
            return
        self._escape = ""
        inside, depth, one = self._inside, self._depth, ""
        for one in _TOKEN.findall(text, start + left, end):
            if one == '"':
                inside = depth > 0 and not inside
            elif inside:
                # No string of a document has a line's end.
                inside = one != "\n" or self._least > 0
            elif one in "[{":
                depth += 1
            elif one in "]}":
                depth = max(self._least, depth - 1)
        if one[:1] == "\\" and len(one) < _length(one) and text.endswith(one, start, end):
            self._escape = one
        self._inside, self._depth = inside, depth
        self._last = text[start:end].rstrip()[-1:] or self._last

    def put(self, text: str, start: int, end: int, new: str, final: bool) -> tuple[str, int] | None:
        """What stands for `text[start:end]`, and where it ends; `text` has come to `start`.

        None: it takes more text to say.
        """
        if not self._depth:
            return new, end
        at = start + self._left(text, start)
        if at >= end:
            # Digits of an escape.
            return text[start:end], end
        escaped = msgspec.json.encode(new).decode()
        out = [text[start:at]]
        inside = self._inside
        stop = end
        whole = at == start
        for token in _TOKEN.finditer(text, at, end):
            one = token[0]
            if one[0] == "\\" and token.end() == end:
                stop = token.start() + _length(one + text[end : end + 1])
            if one == '"' or (one in "[]{}" and not inside):
                out += (_part(text[at : token.start()], inside, new, escaped), one)
                inside = inside != (one == '"')
                at, whole = token.end(), False
        if not final and stop >= len(text):
            return None
        if whole and not inside:
            out.append(self._value(text, start, end, new, escaped))
        else:
            out.append(_part(text[at:end], inside, new, escaped))
        return "".join(out), min(stop, len(text))

    def _value(self, text: str, start: int, end: int, new: str, escaped: str) -> str:
        """For what begins and ends outside of strings."""
        if not _LITERAL.fullmatch(text, start, end):
            return new
        after = text[end : end + 1]
        begins = self._last in (":", ",", "[") or (self._least and not self._last)
        if begins and (not after or after in _AFTER_VALUES):
            return escaped
        return _DIGIT.sub("9", text[start:end]) if _IN_NUMBERS & {text[start - 1 : start], after} else new


def _length(escape: str) -> int:
    return 6 if escape[1:2] == "u" else 2


def _part(text: str, inside: bool, new: str, escaped: str) -> str:
    if inside:
        return escaped[1:-1] if text else ""
    return _DIGIT.sub("9", text) if _BETWEEN.fullmatch(text) else new
