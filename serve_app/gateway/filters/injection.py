"""Prompt injection: text that tries to take over what the model was told.

This is a score over signs, not a proof. Signs are turns of phrase (in English, some in German, French and Spanish) that
attacks share; each has a weight, each counts once in a message, and a message whose weights reach the threshold is a
finding. Case, compatibility forms, accents, invisible characters and the common look-alike letters of other alphabets
do not matter, and blocks of base64 in requests are looked into once. It finds what is copied from lists of attacks. It
does not find an attack in other words, in another language, in an image, or spread over several messages, and it may
take a text *about* attacks for one. Give a model no rights that its least trusted reader must not have; use this to see
and to slow down.
"""

from __future__ import annotations

import base64
import binascii
import re
import string
import unicodedata

from .. import config
from .base import FilterError, Options, Phase, Stage, TextFilter
from .scan import cut_escape

#: Characters (folded) that a sign may take.
_REACH = 120

_GAP = r"[\W_]{1,6}"
# Words without the underscore, which is a gap: so there is one way only to tell them apart.
_FILL = rf"(?:[^\W_]{{1,12}}{_GAP}){{0,3}}?"

_FORGET = "(ignore|disregard|forget|override|bypass|skip|neglect)"
_TOLD = (
    "(instructions?|prompts?|rules?|guidelines?|directives?|directions?|constraints?|commands?|training|programming)"
)
_BEFORE = (
    "(previous|prior|above|preceding|earlier|former|foregoing|existing|original|initial|system|safety|security|your)"
)
_SHOW = "(reveal|show|print|repeat|output|display|tell|give|leak|expose|dump|share)"
_HIDDEN = "(system|hidden|initial|original|secret|developer)"
_WANTED = "(conversation|chat history|api keys?|passwords?|credentials|secrets?|system prompt)"
_FREE = "(dan|developer mode|god mode|jailbroken|unrestricted|uncensored|unfiltered|evil)"
_RULES = "(rules|restrictions|guidelines|limits|limitations|filters|policies|censorship)"


def _phrase(text: str) -> str:
    """A sign's source: a space stands for a gap, `...` for up to three words; groups capture nothing."""
    text = text.replace("(", "(?:").replace(" ... ", f"{_GAP}{_FILL}").replace(" ", _GAP)
    return text + r"(?!\w)"


#: Name, weight, pattern. A weight of 1.0: hardly ever innocent; 0.5: needs company.
_SIGNS: tuple[tuple[str, float, str], ...] = (
    ("override", 1.0, _phrase(f"{_FORGET} ... {_BEFORE} ... {_TOLD}")),
    ("override", 1.0, _phrase(f"{_FORGET} (all|any|every|everything) ... {_TOLD}")),
    ("override", 1.0, _phrase(f"{_FORGET} ... (you (were|have been) told|you know|said (before|above))")),
    ("override", 0.5, _phrase(f"(do not|don t|never) (follow|obey|listen to) ... {_TOLD}")),
    (
        "override",
        1.0,
        _phrase("(ignorier|ignoriere|vergiss|missachte) ... (anweisungen|vorgaben|instruktionen|regeln)"),
    ),
    ("override", 1.0, _phrase("(ignore|ignorez|oublie|oubliez) ... (instructions|consignes|regles)")),
    ("override", 1.0, _phrase("(ignora|olvida|omite) ... (instrucciones|indicaciones|reglas)")),
    (
        "new_task",
        0.5,
        _phrase("(new|updated|real|actual) (instructions?|system prompt|task|objective) (are|is|follow)"),
    ),
    ("new_task", 0.5, r"(?:new|updated|real|actual)[\W_]{1,6}(?:instructions?|system prompt|task|objective) ?:"),
    ("new_task", 0.5, _phrase("from now on you (are|will|must|shall|act|have)")),
    ("leak", 0.7, _phrase(f"{_SHOW} ... {_HIDDEN} (prompt|instructions?|message|rules)")),
    ("leak", 0.5, _phrase("(repeat|print|output|say) ... (everything|all|words|text) ... (above|before this)")),
    ("leak", 0.5, _phrase(f"what (are|were|is) your {_HIDDEN} (prompt|instructions?|message|rules)")),
    ("jailbreak", 0.7, _phrase(f"(you are|act as|pretend to be|become|enable|enter|activate) ... {_FREE}")),
    ("jailbreak", 0.7, _phrase("(do anything now|developer mode enabled|jailbreak mode|no longer bound by)")),
    ("jailbreak", 0.5, _phrase(f"without (any )?{_RULES}")),
    ("jailbreak", 0.5, _phrase(f"(pretend|act|respond|behave) ... (no|without|not have) ... {_RULES}")),
    ("forged_role", 0.8, r"<\|(?:im_start|im_end|system|endoftext|start_header_id|eot_id|begin_of_text)\|>"),
    ("forged_role", 0.8, r"<</?sys>>|\[/?inst\]|</?(?:system|assistant|developer)>"),
    ("forged_role", 0.5, r"(?:#{2,6} ?|\n ?)(?:system|developer|assistant)(?: (?:prompt|message|instructions?))? ?:"),
    ("exfiltration", 0.7, _phrase(f"(send|post|upload|transmit|forward|exfiltrate|append) ... {_WANTED} ... to")),
    ("exfiltration", 0.7, r"!\[[^\]\n]{0,30}\]\(https?://[^)\s?]{1,50}\?[^)\s=]{1,16}="),
)
_FIND = re.compile("|".join(f"(?P<s{number}>{source})" for number, (_, _, source) in enumerate(_SIGNS)))
#: With what a sign may begin: the rest of a text without one of these holds no beginning.
_BEGIN = re.compile(
    r"(?<!\w)(?:ignor|disreg|forge|overri|bypas|skip|neglec|do\W|don|never|vergi|missac|oubli|olvid|omit|new|updat|real|actua|from|revea|show|print|repea|outpu"
    r"|displ|tell|give|leak|expos|dump|share|say|what|you|act|prete|becom|enabl|enter|activ|devel|jailb|no\W|withou|respo|behav|send|post|uploa|trans|forwa|exfil|appen)"
    r"|<|\[|#|!|\n"
)
#: A word that is not complete yet, and may become a beginning.
_LAST_WORD = re.compile(r"(?<!\w)\w{1,7}\Z")

#: Letters of other alphabets that look like Latin ones (a selection from Unicode's confusables.txt, UTS 39), in lower
#: case.
_LOOK_ALIKE = {
    like: letter
    for letter, likes in {
        "a": "\u0430\u03b1\u0251",
        "b": "\u0432\u03b2\u044c",
        "c": "\u0441\u03f2",
        "d": "\u0501",
        "e": "\u0435\u03b5\u0454",
        "g": "\u0261",
        "h": "\u04bb\u043d",
        "i": "\u0456\u03b9\u0131\u04cf",
        "j": "\u0458",
        "k": "\u043a\u03ba",
        "l": "\u0142",
        "m": "\u043c",
        "n": "\u03b7\u043f",
        "o": "\u043e\u03bf\u00f8",
        "p": "\u0440\u03c1",
        "q": "\u051b",
        "r": "\u0433",
        "s": "\u0455",
        "t": "\u0442\u03c4",
        "u": "\u03c5",
        "v": "\u03bd",
        "w": "\u051d\u03c9",
        "x": "\u0445\u03c7",
        "y": "\u0443\u03b3",
    }.items()
    for like in likes
}

_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{24,}={0,2}")
_BASE64_LETTERS = string.ascii_letters + string.digits + "+/_-"
_BASE64_MOST = 65536


class _Fold(dict[int, str]):
    """Folds a character: compatibility form, lower case, no accents, Latin for look-alikes, nothing for invisible."""

    def __missing__(self, code: int) -> str:
        folded = []
        for one in unicodedata.normalize("NFKD", chr(code)).lower():
            for part in unicodedata.normalize("NFKD", one):
                category = unicodedata.category(part)
                if category in {"Mn", "Me", "Cf", "Cc"} and part not in "\n\t\r":
                    continue
                folded.append(_LOOK_ALIKE.get(part, part))
        self[code] = "".join(folded)
        return self[code]


_FOLD = _Fold()


def fold(text: str) -> str:
    """`text` as signs see it. Every character is folded by itself, so that a text may be folded in pieces."""
    return text.translate(_FOLD)


def decoded(block: str) -> str:
    """The text that a block of base64 holds; empty where it holds none."""
    block = block.rstrip("=").replace("-", "+").replace("_", "/")
    # A last group of one letter is none; what was cut off before it is worth a look all the same.
    block = block[: len(block) - 1] if len(block) % 4 == 1 else block
    try:
        text = base64.b64decode(block + "=" * (-len(block) % 4)).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return text


class InjectionStage(Stage):
    """Adds up the signs of one message."""

    __slots__ = (
        "_encoded",
        "_flag",
        "_json",
        "_pending",
        "_raw",
        "_score",
        "_seen",
        "_signs",
        "_start",
        "_threshold",
        "_where",
    )

    def __init__(self, threshold: float, action: config.Action, *, look_into: bool, follow: bool, json: bool) -> None:
        super().__init__()
        self._threshold = threshold
        self._flag = action == "flag"
        self._json = json
        self._pending = ""
        self._raw = ""
        self._seen = ""
        self._start = 0
        # Places of the folded characters in `_raw`; None where nobody asks.
        self._where: list[int] | None = [] if follow and not self._flag else None
        self._encoded: str | None = "" if look_into else None
        self._score = 0.0
        self._signs: set[int] = set()

    def feed(self, text: str, final: bool = False) -> str:
        if self.blocked:
            return ""
        out = self._scan(text, final)
        if self._encoded is not None and not self.blocked:
            self._look_into(text, final)
        return text if self._flag else out

    def _add(self, number: int) -> bool:
        """Count a sign; True: the message is a finding now."""
        if number in self._signs:
            return False
        self._signs.add(number)
        name, weight, _ = _SIGNS[number]
        before = self._score
        self._score += weight
        if self._score < self._threshold:
            return False
        if before < self._threshold:
            for one in {_SIGNS[sign][0] for sign in self._signs}:
                self.count(one)
        else:
            self.found.setdefault(name, 1)
        return not self._flag

    def _scan(self, text: str, final: bool) -> str:
        if self._json:
            text = self._pending + text
            cut = len(text) if final else cut_escape(text)
            text, self._pending = text[:cut], text[cut:]
        self._append(text)
        seen, start = self._seen, self._start
        size = len(seen)
        while True:
            begin = _BEGIN.search(seen, start)
            if begin is None:
                partial = None if final else _LAST_WORD.search(seen, max(start, size - 7))
                start = size if partial is None else partial.start()
                break
            start = begin.start()
            if not final and start + _REACH > size:
                break
            match = _FIND.match(seen, start, start + _REACH)
            if match is None:
                start += 1
                continue
            if self._add(int((match.lastgroup or "s0")[1:])):
                self.blocked = True
                out = self._until(start)
                self._raw = self._seen = self._pending = ""
                self._where = None
                return out
            start = match.end()
        out = self._until(start)
        cut = max(0, start - 1)
        self._seen = seen[cut:]
        self._start = start - cut
        if self._where is not None:
            gone = len(out)
            self._where = [place - gone for place in self._where[cut:]]
        return out

    def _append(self, text: str) -> None:
        folded = fold(text)
        if self._where is not None:
            base = len(self._raw)
            if text.isascii() and len(folded) == len(text):
                self._where.extend(range(base, base + len(text)))
            else:
                for place, letter in enumerate(text, base):
                    self._where.extend([place] * len(_FOLD[ord(letter)]))
            self._raw += text
        self._seen += folded

    def _until(self, start: int) -> str:
        """Take what stands before the folded character `start` out of the raw text."""
        if self._where is None:
            return ""
        end = self._where[start] if start < len(self._where) else len(self._raw)
        out, self._raw = self._raw[:end], self._raw[end:]
        return out

    def _look_into(self, text: str, final: bool) -> None:
        """Score what blocks of base64 say, once: a block within a block is not looked into."""
        encoded = (self._encoded or "") + text
        end = len(encoded)
        if not final:
            end = len(encoded.rstrip("=").rstrip(_BASE64_LETTERS))
            if len(encoded) - end > _BASE64_MOST:
                end = len(encoded)
        self._encoded = encoded[end:]
        for match in _BASE64.finditer(encoded, 0, end):
            inner = fold(decoded(match[0]))
            place = 0
            while (begin := _BEGIN.search(inner, place)) is not None:
                place = begin.start()
                sign = _FIND.match(inner, place, place + _REACH)
                place = place + 1 if sign is None else sign.end()
                if sign is not None and self._add(int((sign.lastgroup or "s0")[1:])):
                    self.blocked = True
                    return


class Injection(TextFilter):
    """Finds prompt injection. Its actions are `block` and `flag`: a score has no place that could be taken out.

    Options:
        threshold: The score that makes a message a finding; default: 1.0. Lower finds more, and more that is harmless.
        roles: Whose messages of a chat are looked at; default: user, tool and function. Prompts and documents always
            are.
        base64: Look into blocks of base64 in requests. Default: true.
    """

    joins = True

    def __init__(self, name: str, settings: config.Filter) -> None:
        super().__init__(name, settings)
        options = Options(settings.options)
        self._threshold = options.number("threshold", 1.0, 0.1, 10.0)
        self._base64 = options.flag("base64", True)
        self.roles = frozenset(options.texts("roles", ("user", "tool", "function")))
        if settings.action == "redact":
            options.problems.append(
                "action is 'redact', but a score has no place that could be taken out: use block or flag"
            )
        options.end()
        if self.hold_back < _REACH and self.outputs:
            raise FilterError([f"hold_back is {self.hold_back}: signs may take {_REACH} characters; raise it"])

    def begin(self, phase: Phase, *, json: bool = False) -> Stage:
        return InjectionStage(
            self._threshold,
            self.action,
            look_into=self._base64 and phase == "input",
            follow=phase == "output",
            json=json,
        )
