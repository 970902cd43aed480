"""Finding matches in a text that comes in pieces, so that the pieces never matter.

A detector's match is a function of its start: of at most `reach` characters from there on, and of a few before. A start
is *decided* once no further text can change what matches there. Text leaves up to the first start that is undecided;
matches are taken at decided starts only, the leftmost first. So the result is the same for every way of cutting the
text, and no more than `reach` characters are ever held back (commonly the last word).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import config
from .base import Stage
from .document import Place

#: Characters that a whole text is looked at in one go; longer ones in parts, so that other requests get their turn.
BLOCK = 8192

#: Finds the leftmost match that starts at `position` or later: (start, end).
Find = Callable[[str, int], tuple[int, int] | None]
#: Says from where on (at or after `position`) starts are undecided, when the text may go on.
Undecided = Callable[[str, int], int]
#: Follows an open-ended match: from (text, position, final), (where it has come to, whether that is its end).
Closing = Callable[[str, int, bool], tuple[int, bool]]

_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,4}|.?)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Detector:
    """A kind of text that can be found.

    Attributes:
        kind: Its name in findings and in replacements.
        find: Where it is.
        closing: How the match goes on, where its length has no bound (a private key after its first line).
    """

    kind: str
    find: Find
    closing: Closing | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """Detectors that work together on a text.

    Attributes:
        detectors: The first wins where two match at the same place.
        undecided: For all of them together.
        reach: Characters from a start that any of them looks at.
        context: Characters before a start that any of them looks at.
        trigger: Text without a match of this holds nothing for any of them; None: always look.
        fold: Makes the text that detectors see; it keeps every length. None: they see the text itself.
    """

    detectors: Sequence[Detector]
    undecided: Undecided
    reach: int
    context: int = 1
    trigger: re.Pattern[str] | None = None
    fold: Callable[[str], str] | None = None


def _blank(match: re.Match[str]) -> str:
    return "\n" * len(match[0])


def cut_escape(piece: str) -> int:
    """Where an escape of JSON that is not complete yet begins at the end of `piece`; its length where there is none."""
    size = len(piece)
    last = piece.rfind("\\")
    if last < 0 or last < size - 6:
        return size
    for match in _ESCAPE.finditer(piece):
        if match.end() == size and (
            size - match.start() == 1 or (piece[match.start() + 1] == "u" and size - match.start() < 6)
        ):
            return match.start()
    return size


class ScanStage(Stage):
    """Takes matches of `rules` out of a text, or stops it at the first, or counts them."""

    __slots__ = (
        "_action",
        "_closing",
        "_json",
        "_pending",
        "_place",
        "_raw",
        "_replacement",
        "_rules",
        "_seen",
        "_start",
    )

    def __init__(self, rules: Rules, action: config.Action, replacement: str, *, json: bool = False) -> None:
        super().__init__()
        self._rules = rules
        self._action = action
        self._replacement = replacement
        self._json = json
        self._place = Place(json)
        self._pending = ""
        # The text from some characters before the first that has not left: as it is, and as detectors see it.
        self._raw = ""
        self._seen = ""
        self._start = 0
        self._closing: Closing | None = None

    def feed(self, text: str, final: bool = False) -> str:
        if self.blocked:
            return ""
        out = self._scan(text, final)
        if self._action == "flag":
            # Nothing changes, so nothing waits.
            return text
        return out

    def _take(self, text: str, final: bool) -> None:
        rules = self._rules
        piece = text
        seen = text
        if self._json:
            piece = self._pending + text
            if "\\" in piece:
                cut = len(piece) if final else cut_escape(piece)
                piece, self._pending = piece[:cut], piece[cut:]
                seen = _ESCAPE.sub(_blank, piece)
            else:
                self._pending = ""
                seen = piece
        self._raw += piece
        self._seen += rules.fold(seen) if rules.fold is not None else seen

    def _scan(self, text: str, final: bool) -> str:
        rules = self._rules
        self._take(text, final)
        raw, seen, start = self._raw, self._seen, self._start
        size = len(seen)
        limit = size if final else rules.undecided(seen, max(start, size - rules.reach))
        out: list[str] = []
        if self._closing is None and (rules.trigger is None or rules.trigger.search(seen, start)):
            nexts = [one.find(seen, start) for one in rules.detectors]
        else:
            nexts = [None] * len(rules.detectors)
        fresh = self._closing is None
        while True:
            if self._closing is not None:
                begun = start
                start, ended = self._closing(seen, start, final)
                self._place.go(raw, begun, start)
                if ended:
                    begun, start = start, self._place.whole(raw, start)
                    self._place.go(raw, begun, start)
                if not ended:
                    break
                self._closing = None
                if not fresh:
                    nexts = [one.find(seen, start) for one in rules.detectors]
                    fresh = True
            best: tuple[int, int] | None = None
            which = 0
            for index in range(len(nexts)):
                found = nexts[index]
                if found is not None and found[0] < start:
                    found = nexts[index] = rules.detectors[index].find(seen, start)
                if found is None:
                    continue
                if best is None or found[0] < best[0]:
                    best, which = found, index
            if best is None or best[0] >= limit:
                if limit > start:
                    out.append(raw[start:limit])
                    self._place.go(raw, start, limit)
                    start = limit
                break
            out.append(raw[start : best[0]])
            self._place.go(raw, start, best[0])
            start = best[0]
            detector = rules.detectors[which]
            if self._action == "redact":
                new = self._replacement.replace("{kind}", detector.kind)
                put = self._place.put(raw, *best, new, final)
                if put is None:
                    break
                out.append(put[0])
                best = start, put[1]
            self.count(detector.kind)
            if self._action == "block":
                self.blocked = True
                self._raw = self._seen = self._pending = ""
                self._start = 0
                return "".join(out)
            self._place.go(raw, *best)
            start = best[1]
            self._closing = detector.closing
        cut = max(0, start - rules.context)
        self._raw, self._seen, self._start = raw[cut:], seen[cut:], start - cut
        return "".join(out)
