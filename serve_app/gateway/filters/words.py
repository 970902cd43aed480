"""Words and patterns of one's own."""

from __future__ import annotations

import importlib
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

from .. import config
from .base import FilterError, Options, Phase, Stage, TextFilter
from .scan import Detector, Find, Rules, ScanStage, Undecided

_LONGEST_WORD = 128
_MOST_WORDS = 50_000
#: Ways in which a pattern's repeats may share out a text; more is a pattern that can take for ever.
_MOST_WAYS = 1_000_000

# The parser of `re` itself: what a pattern may match at most is known to nobody else.
_parser: Any = importlib.import_module("re._parser")


class _Lower(dict[int, int]):
    """Lower case letter by letter, so that lengths stay and neighbours (of a Greek sigma) never matter."""

    def __missing__(self, code: int) -> int:
        lower = chr(code).lower()
        self[code] = ord(lower) if len(lower) == 1 else code
        return self[code]


_LOWER = _Lower()


def lower(text: str) -> str:
    """`text` in lower case, of the same length."""
    return text.lower() if text.isascii() else text.translate(_LOWER)


def _trie(words: Iterable[str]) -> str:
    """A regular expression that matches the longest of `words`, in time that does not grow with their number."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = word
    return _source(root)


def _source(node: dict[str, Any]) -> str:
    prefix: list[str] = []
    while len(node) == 1 and "" not in node:
        ((letter, node),) = node.items()
        prefix.append(_letter(letter))
    branches = [_letter(letter) + _source(below) for letter, below in node.items() if letter]
    if "" in node:
        word = node[""]
        branches.append(r"(?!\w)" if _is_word(word[-1]) else "")
    tail = branches[0] if len(branches) == 1 else "(?:" + "|".join(branches) + ")"
    return "".join(prefix) + tail


def _letter(letter: str) -> str:
    return r"\s" if letter == " " else re.escape(letter)


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _literals(words: Sequence[str], whole: bool) -> tuple[Find, Undecided, int]:
    """What finds `words`, what may begin one at the end of a text, and the most that it looks at."""
    spaces = {ord(one): " " for one in string.whitespace}
    inside = sorted({" ".join(word.split()) for word in words})
    starts: dict[str, list[str]] = {r"(?<!\w)": [], "": []}
    begins: set[str] = set()
    for word in inside:
        starts[r"(?<!\w)" if whole and _is_word(word[0]) else ""].append(word)
        begins.update(word[:size] for size in range(1, len(word)))
        begins.add(word)
    groups = [(look, chosen) for look, chosen in starts.items() if chosen]
    if whole:
        source = "|".join(look + "(?:" + _trie(chosen) + ")" for look, chosen in groups)
    else:
        source = "|".join(look + "(?:" + _trie(chosen).replace(r"(?!\w)", "") + ")" for look, chosen in groups)
    search = re.compile(source).search
    first = re.compile(
        "|".join(look + "[" + "".join(sorted({re.escape(w[0]) for w in chosen})) + "]" for look, chosen in groups)
    )
    longest = max(map(len, inside))

    def find(text: str, position: int) -> tuple[int, int] | None:
        match = search(text, position)
        return None if match is None else match.span()

    def undecided(text: str, position: int) -> int:
        size = len(text)
        for match in first.finditer(text, max(position, size - longest)):
            start = match.start()
            tail = text[start:]
            if tail in begins or tail.translate(spaces) in begins:
                return start
        return size

    return find, undecided, longest + 1


class _Measure:
    """What a parsed pattern may look at, and in how many ways it may try."""

    def __init__(self) -> None:
        self.ahead = 0
        self.behind = 0
        self.ways = 1

    def walk(self, items: Any) -> int:
        """Ways in which `items` may share out a text; `ahead` and `behind` grow on the way."""
        ways = 1
        for name, value in items:
            ways = min(ways * self._ways(str(name), value), _MOST_WAYS * 2)
            self.ways = max(self.ways, ways)
        return ways

    def _ways(self, name: str, value: Any) -> int:
        if name in {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}:
            low, high, inner = value
            low, high = min(int(low), _MOST_WAYS), min(int(high), _MOST_WAYS)
            once = self.walk(inner)
            if name == "POSSESSIVE_REPEAT":
                return 1
            ways = high - low + 1
            return ways if once == 1 else min(once ** min(high, 32) * ways, _MOST_WAYS * 2)
        if name == "BRANCH":
            return sum(self.walk(one) for one in value[1])
        if name == "SUBPATTERN":
            return self.walk(value[3])
        if name == "ATOMIC_GROUP":
            self.walk(value)
            return 1
        if name in {"ASSERT", "ASSERT_NOT"}:
            direction, inner = value
            width = int(inner.getwidth()[1])
            if direction > 0:
                self.ahead += width
            else:
                self.behind = max(self.behind, width)
            self.walk(inner)
            return 1
        if name == "GROUPREF_EXISTS":
            return sum(self.walk(one) for one in value[1:] if one is not None)
        return 1


def _lead(items: Any) -> str:
    """The letters with which every match of a parsed pattern begins."""
    letters = []
    for name, value in items:
        if str(name) == "LITERAL":
            letters.append(chr(value))
        elif not (str(name) == "AT" and not letters):
            break
    return "".join(letters)


def _pattern(source: str, flags: int, hold_back: int) -> tuple[Find, Undecided, int, int]:
    """What finds a pattern, what may begin one, the most that it looks at from its start on, and before it.

    Raises:
        FilterError: It cannot be used on text that comes in pieces.
    """
    try:
        compiled = re.compile(source, flags)
        parsed = _parser.parse(source, flags)
    except (re.error, OverflowError, RecursionError) as error:
        raise FilterError([f"pattern {source!r} cannot be read: {error}"]) from error
    least, most = (int(one) for one in parsed.getwidth())
    measure = _Measure()
    measure.walk(parsed)
    if least == 0:
        raise FilterError([f"pattern {source!r} matches nothing at all too: let it have at least one character"])
    # Two more: a character to look at for \b, and a line's end after it for $.
    reach = most + measure.ahead + 2
    if reach > hold_back:
        bound = "any number of" if reach > 1_000_000 else str(reach)
        raise FilterError(
            [
                f"pattern {source!r} may look at {bound} characters, and hold_back is {hold_back}: "
                "bound its repeats ({1,50}) or raise hold_back"
            ]
        )
    if measure.ways > _MOST_WAYS:
        raise FilterError(
            [f"pattern {source!r} may try more than {_MOST_WAYS} ways at one place: use possessive repeats (x*+)"]
        )
    folded = bool(flags & re.IGNORECASE)
    lead = "" if compiled.flags & re.IGNORECASE and not folded else _lead(parsed)
    lead = lower(lead) if folded else lead
    if not all(one.isascii() for one in lead):
        # Letters outside of ASCII have several forms that match each other where case does not count.
        lead = ""
    search = compiled.search
    if folded:
        # Likewise two letters of ASCII: k matches the sign of Kelvin, s the long s.
        lead = re.split("[ks]", lead, maxsplit=1)[0]

    def find(text: str, position: int) -> tuple[int, int] | None:
        match = search(text, position)
        return None if match is None else match.span()

    def undecided(text: str, position: int) -> int:
        size = len(text)
        start = max(position, size - reach + 1)
        if not lead:
            return min(start, size)
        found = text.find(lead, start)
        if found >= 0:
            return found
        for length in range(min(len(lead) - 1, size - start), 0, -1):
            if text.endswith(lead[:length]):
                return size - length
        return size

    return find, undecided, reach, measure.behind + 1


class Words(TextFilter):
    """Finds words, phrases and regular expressions.

    Options:
        words: Words and phrases; a space in one stands for any one white space.
        patterns: Regular expressions of Python; each must have a bound (`hold_back`) of what it looks at.
        case_sensitive: Default: false.
        whole_words: A word is not found within a longer one. Default: true.
        replacement: What stands in its place with action `redact`; default: `[redacted]`. `{kind}` becomes `word` or
            `pattern`.
    """

    def __init__(self, name: str, settings: config.Filter) -> None:
        super().__init__(name, settings)
        options = Options(settings.options)
        words = options.texts("words", ())
        patterns = options.texts("patterns", ())
        exact = options.flag("case_sensitive", False)
        whole = options.flag("whole_words", True)
        self._replacement = options.text("replacement", "[redacted]")
        if not words and not patterns:
            options.problems.append("options.words and options.patterns are empty: give one of them")
        if len(words) > _MOST_WORDS:
            options.problems.append(f"options.words holds {len(words)} words: give at most {_MOST_WORDS}")
        longest = min(_LONGEST_WORD, self.hold_back - 1)
        options.problems += [
            f"options.words: {word!r} has more than {longest} characters" for word in words if len(word) > longest
        ]
        options.problems += [f"options.words: {word!r} is white space" for word in words if not word.strip()]
        detectors: list[Detector] = []
        tails: list[Undecided] = []
        reach, context = 1, 1
        if words and not options.problems:
            find, tail, reach = _literals([word if exact else lower(word) for word in words], whole)
            detectors.append(Detector("word", find))
            tails.append(tail)
        for source in patterns:
            try:
                find, tail, far, behind = _pattern(source, 0 if exact else re.IGNORECASE, self.hold_back)
            except FilterError as error:
                options.problems += error.problems
                continue
            detectors.append(Detector("pattern", find))
            tails.append(tail)
            reach, context = max(reach, far), max(context, behind)
        options.end()

        def undecided(text: str, position: int) -> int:
            return min(tail(text, position) for tail in tails)

        self._rules = Rules(tuple(detectors), undecided, reach, context, fold=None if exact else lower)

    def begin(self, phase: Phase, *, json: bool = False) -> Stage:
        return ScanStage(self._rules, self.action, self._replacement, json=json)
