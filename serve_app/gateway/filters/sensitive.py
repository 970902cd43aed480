"""Sensitive data: addresses, numbers and secrets with a form of their own.

What has a check (Luhn's, the IBAN's, the ranges of social security numbers) must pass it. It finds what is written in
the usual ways; whoever wants to get a number past it writes it in words. It is a net against accidents, not against a
determined sender.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable

from .. import config
from .base import FilterError, Options, Phase, Stage, TextFilter
from .scan import Closing, Detector, Find, Rules, ScanStage

#: Kinds by name; all are on unless `options.kinds` lists fewer.
KINDS = (
    "email",
    "phone",
    "credit_card",
    "iban",
    "us_ssn",
    "ip_address",
    "aws_key",
    "private_key",
    "api_key",
    "jwt",
)

_LOCAL = 64
_DOMAIN = 186
#: An email address: the local part, @, the domain, one character more.
_REACH = _LOCAL + 1 + _DOMAIN + 1

_DOMAIN_PART = re.compile(r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}(?:xn--[a-zA-Z0-9-]{2,59}|[^\W\d_]{2,24})")
# Each begins with a set of letters or with a text, which `re` looks for fast; what must not stand before it comes after
# that.
_CARD = re.compile(
    # Not the decimals of a number.
    r"[2-68](?<![0-9].)(?<![0-9]\..)(?:[0-9]{12,18}"
    r"|[0-9]{3}(?:[ .\-\u00a0][0-9]{4}){2}[ .\-\u00a0][0-9]{1,7}"
    r"|[0-9]{3}[ .\-\u00a0][0-9]{6}[ .\-\u00a0][0-9]{4,5})(?![0-9])"
)
# Prefixes and lengths of the networks, as they are in use: Visa, Mastercard, American Express, Diners Club, Discover,
# UnionPay, JCB, Mir, Maestro, RuPay. https://en.wikipedia.org/wiki/Payment_card_number
_NETWORK = re.compile(
    r"4[0-9]{12}(?:[0-9]{3}){0,2}"
    r"|(?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}"
    r"|3[47][0-9]{13}"
    r"|(?:30[0-5][0-9]|3095|3[689][0-9]{2})[0-9]{10}"
    r"|(?:6011|64[4-9][0-9]|65[0-9]{2})[0-9]{12}"
    r"|62[0-9]{14}(?:[0-9]{3})?"
    r"|(?:352[89]|35[3-8][0-9])[0-9]{12}"
    r"|220[0-4][0-9]{12}"
    r"|(?:5018|5020|5038|5893|6304|6759|676[1-3])[0-9]{12}(?:[0-9]{3})?"
    r"|(?:508|60[0-9]|81[0-9]|82[0-9])[0-9]{13}"
)
_PHONE = re.compile(
    r"[+(0-9](?<![\w+].)(?:"
    r"(?<=\+)[1-9](?:[ .()/\-\u00a0]{0,2}[0-9]){7,14}"
    r"|(?:(?<=1)[ .-]\(|(?<=\())[2-9][0-9]{2}\) ?[2-9][0-9]{2}[ .-][0-9]{4}"
    r"|(?:(?<=1)[ .-][2-9]|(?<=[2-9]))[0-9]{2}[ .-][2-9][0-9]{2}[ .-][0-9]{4}"
    r"|(?<![0-9][ -].)(?:(?<=\()0|(?<=0))[1-9][0-9]{1,3}\)?[ /-][0-9]{3,4}(?:[ -]?[0-9]{2,4}){1,2}"
    r")(?![\w]|[.-][0-9])"
)
_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z][0-9]{2}(?:[ \u00a0]?[A-Z0-9]){11,30}")
_SSN = re.compile(r"[0-8](?<![\w-].)(?!(?<=0)00|(?<=6)66)[0-9]{2}([- ])(?!00)[0-9]{2}\1(?!0000)[0-9]{4}(?![\w-])")
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
_IPV4 = re.compile(
    r"[0-9](?<![\w.].)(?:(?<=2)5[0-5]|(?<=2)[0-4][0-9]|(?<=1)[0-9][0-9]|[0-9]?)"
    rf"(?:\.{_OCTET}){{3}}(?!\w|\.[0-9])"
)
#: Characters before four numbers in which the nearest of these words says what they are.
_BEHIND = 48
_SPEAKS = re.compile(
    r"(?<![^\W_])(?:"
    r"(?:v|ver|vers|versions?|versionsnummer|releas\w{1,3}|rel|builds?|rev|revision|tags?|firmware|drivers?|treiber"
    r"|patch\w{0,3}|updat\w{1,3}|(?:up|down)grad\w{1,3}|migrat\w{1,4}|bump\w{0,3}|pinned|install\w{0,4}|requires?"
    r"|packages?|pakete?|librar(?:y|ies)|sdk|section|chapter|abschnitt|kapitel)"
    r"|(?P<address>ips?|ipv4|ipaddr\w{0,6}|addr\w{0,6}|adressen?|hosts?|hostname|servers?|clients?|peers?|gateway|router"
    r"|dns|(?:name)?servers?|resolver|subnet|netmask|network|netzwerk|cidr|proxy|remote|source|src|dst|dest\w{0,7}"
    r"|ping\w{0,3}|ssh|scp|sftp|ftp|telnet|traceroute|nmap|curl|wget|https?|tcp|udp|bind|listen\w{0,3}|connect\w{0,4}"
    r"|verbind\w{1,4}|endpoints?|nodes?|machine|rechner|login|logged|inet|interface|forwarded|firewall|\w{0,6}list"
    r"|block\w{0,3}|banned|routes?|vpn|lan|wan|nat|requests?|access\w{0,3}|visitors?|attack\w{0,3}|user)"
    r")(?![^\W_])",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
#: A path's part, a comparison: `Chrome/131.0.0.0`, `name==1.2.3.4`.
_NO_ADDRESS = re.compile(r"(?:[-@^~<>]|(?<!/)/|[=<>~!]=) ?\Z")
_PRIVATE_NET = re.compile(r"10\.|192\.168\.|172\.(?:1[6-9]|2[0-9]|3[01])\.|169\.254\.")
_PORT = re.compile(r":[0-9]{2,5}(?![0-9.])|/[0-9]{1,2}(?![0-9/.])")
_IPV6 = re.compile(r"[0-9A-Fa-f:](?<![\w:.].)(?=[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:]{2,38}(?:\.[0-9.]{5,11})?(?![\w:])")
_AWS_ID = re.compile(r"A(?<![A-Za-z0-9].)(?:KIA|SIA|ROA|IDA|GPA|NPA|NVA)[A-Z0-9]{16}(?![A-Za-z0-9])")
_AWS_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:[Aa][Ww][Ss]|[Ss]ecret)[\w-]{0,24}[Kk][Ee][Yy][\"'\s:=]{1,8}[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"
)
_AWS_SECRET_GATE = re.compile("[Kk][Ee][Yy]")
_PRIVATE = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_PRIVATE_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_PRIVATE_OUTSIDE = re.compile(r"[^A-Za-z0-9+/=\s\\:,-]")
_PRIVATE_END_LONGEST = 9 + 40 + 11 + 6 + 5
_API = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"sk-(?=[A-Za-z_-]{0,40}[0-9])[A-Za-z0-9_-]{20}"
    r"|rp-[A-Za-z0-9_-]{12}-[A-Za-z0-9_-]{20}"
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{30}|github_pat_[A-Za-z0-9_]{30}|glpat-[A-Za-z0-9_-]{20}"
    r"|hf_[A-Za-z0-9]{30}|xox[abeoprs]-[A-Za-z0-9-]{10}|AIza[A-Za-z0-9_-]{35}"
    r")"
)
_API_GATE = re.compile(r"sk-|rp-|k_live_|k_test_|gh[pousr]_|github_pat_|glpat-|hf_|xox|AIza")
_JWT = re.compile(r"eyJ(?<![A-Za-z0-9]...)[A-Za-z0-9_-]{8,200}\.eyJ[A-Za-z0-9_-]{4}")
_OUTSIDE_TOKEN = re.compile(r"[^A-Za-z0-9_-]")
_OUTSIDE_JWT = re.compile(r"[^A-Za-z0-9_.-]")

#: Lengths of IBANs by country, from SWIFT's IBAN registry.
_IBAN_LENGTHS = {
    code: int(length)
    for length, codes in {
        "15": "NO",
        "16": "BE",
        "18": "DK FO FI GL NL SD FK",
        "19": "MK SI",
        "20": "AT BA EE KZ LT LU XK MN",
        "21": "HR LV LI CH",
        "22": "BG BH CR GE DE IE ME RS GB VA",
        "23": "GI IL IQ TL AE OM SO",
        "24": "AD CZ MD PK RO SA SK ES SE TN VG",
        "25": "LY PT ST",
        "26": "IS TR",
        "27": "FR GR IT MR MC SM BI DJ",
        "28": "AL AZ BY CY DO GT HU LB NI PL SV",
        "29": "BR EG PS QA UA",
        "30": "JO KW MU YE",
        "31": "MT SC",
        "32": "LC",
        "33": "RU",
    }.items()
    for code in codes.split()
}

#: Every machine has these two (:: and ::1); they tell nothing of anybody.
_EVERYWHERE = (bytes(16), bytes(15) + b"\x01")

_DOUBLED = bytes(
    ord("0") + (2 * (one - 48) if one < 53 else 2 * (one - 48) - 9) if 48 <= one < 58 else one for one in range(256)
)
_NO_SEPARATORS = str.maketrans("", "", " .-\u00a0")
_BASE_36 = {ord(letter): str(number) for number, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 10)}


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    code = digits.encode("ascii")
    total = sum(code[-1::-2]) + sum(code[-2::-2].translate(_DOUBLED)) - 48 * len(code)
    return total % 10 == 0


def iban(text: str) -> bool:
    """Whether the check digits are right (ISO 13616, MOD 97-10 of ISO/IEC 7064). `text` holds no spaces."""
    return int((text[4:] + text[:4]).translate(_BASE_36)) % 97 == 1


def _local(text: str, at: int, low: int) -> int:
    """Where the local part that ends at the @ begins."""
    low = max(low, at - _LOCAL)
    start = at
    while start > low and (text[start - 1].isalnum() or text[start - 1] in "._%+-'"):
        start -= 1
    while start < at and text[start] in ".'":
        start += 1
    return start


def _find_email(text: str, position: int) -> tuple[int, int] | None:
    at = text.find("@", position)
    while at >= 0:
        # An address whose beginning was taken by another match before is none.
        if at > position:
            domain = _DOMAIN_PART.match(text, at + 1, at + 1 + _DOMAIN)
            if domain is not None:
                start = _local(text, at, position)
                if start < at:
                    return start, domain.end()
        at = text.find("@", at + 1)
    return None


def _card(text: str, match: re.Match[str]) -> int:
    digits = match[0].translate(_NO_SEPARATORS)
    return match.end() if _NETWORK.fullmatch(digits) and luhn(digits) else -1


def _iban(text: str, match: re.Match[str]) -> int:
    length = _IBAN_LENGTHS.get(text[match.start() : match.start() + 2])
    if length is None:
        return -1
    taken = 0
    end = match.start()
    while taken < length and end < match.end():
        taken += text[end] not in " \u00a0"
        end += 1
    if taken < length or text[end : end + 1].isalnum():
        return -1
    return end if iban(text[match.start() : end].translate(_NO_SEPARATORS)) else -1


def _ipv6(text: str, match: re.Match[str]) -> int:
    candidate = match[0].rstrip(".")
    if candidate.endswith(":") and not candidate.endswith("::"):
        candidate = candidate[:-1]
    # Without a digit it is a name with its scope.
    if candidate.count(":") < 2 or not any(map(str.isdigit, candidate)):
        return -1
    try:
        packed = socket.inet_pton(socket.AF_INET6, candidate)
    except OSError:
        return -1
    return -1 if packed in _EVERYWHERE else match.start() + len(candidate)


def _ipv4(text: str, match: re.Match[str]) -> int:
    """Four numbers are an address where something says so, for versions look the same."""
    start, end = match.span()
    before = text[max(0, start - _BEHIND) : start]
    if match[0].startswith("127.") or match[0] == "0.0.0.0" or _NO_ADDRESS.search(before):  # noqa: S104
        return -1
    words = list(_SPEAKS.finditer(_CAMEL.sub("_", before)))
    if words:
        found = words[-1]["address"] is not None
    else:
        found = bool(_PRIVATE_NET.match(match[0]) or _PORT.match(text, end) or before.endswith(("//", "from ")))
    return end if found else -1


def _plain(pattern: re.Pattern[str]) -> Find:
    search = pattern.search

    def find(text: str, position: int) -> tuple[int, int] | None:
        match = search(text, position)
        return None if match is None else match.span()

    return find


def _checked(pattern: re.Pattern[str], check: Callable[[str, re.Match[str]], int]) -> Find:
    search = pattern.search

    def find(text: str, position: int) -> tuple[int, int] | None:
        match = search(text, position)
        while match is not None:
            end = check(text, match)
            if end >= 0:
                return match.start(), end
            match = search(text, match.start() + 1)
        return None

    return find


def _gated(gate: re.Pattern[str], back: int, find: Find) -> Find:
    """`find`, where `gate` stands within every match, at most `back` characters after its beginning."""
    search = gate.search

    def gated(text: str, position: int) -> tuple[int, int] | None:
        first = search(text, position)
        return None if first is None else find(text, max(position, first.start() - back))

    return gated


def _run(outside: re.Pattern[str]) -> Closing:
    def closing(text: str, position: int, final: bool) -> tuple[int, bool]:
        match = outside.search(text, position)
        return (len(text), final) if match is None else (match.start(), True)

    return closing


def _private_closing(text: str, position: int, final: bool) -> tuple[int, bool]:
    """A private key ends with its END line, or before the first character that no key holds."""
    outside = _PRIVATE_OUTSIDE.search(text, position)
    stop = len(text) if outside is None else outside.start()
    end = _PRIVATE_END.search(text, position, stop)
    if end is not None:
        return end.end(), True
    if outside is not None or final:
        return stop, True
    return max(position, stop - _PRIVATE_END_LONGEST), False


# What may begin a match and is not decided at the end of a text: the last word; the last digits with what may stand
# between digits; an IBAN; the name of a secret; the first line of a private key. Every match of a kind, and what it
# looks at behind it, lies within such a run or ends before the run's end.
_WORD_TAIL = r"[\w.%+@:'-]+"
_NUMBER_TAIL = r"[+(0-9][0-9 ().\-/+\u00a0]*"
_ADDRESS_TAIL = r"[0-9][0-9.]{6,14}(?:[:/][0-9]{0,5})?"
_IBAN_TAIL = r"[A-Z](?:[A-Z](?:[0-9](?:[0-9][A-Z0-9 \u00a0]*)?)?)?"
_AWS_TAIL = r"(?<![A-Za-z0-9])(?:[Aa][Ww][Ss]|[Ss]ecret)[\w-]{0,24}[Kk][Ee][Yy][\"'\s:=]+[A-Za-z0-9/+=]*"
_PRIVATE_TAIL = r"-[A-Z0-9 -]*"

_NUMBERS = r"[0-9]"
_BY_KIND: dict[str, tuple[tuple[Detector, ...], tuple[str, ...], str, int]] = {
    # Detectors, tails, trigger, reach.
    "private_key": ((Detector("private_key", _plain(_PRIVATE), _private_closing),), (_PRIVATE_TAIL,), "-----BEGIN", 80),
    "jwt": ((Detector("jwt", _plain(_JWT), _run(_OUTSIDE_JWT)),), (_WORD_TAIL,), "eyJ", 212),
    "api_key": (
        (Detector("api_key", _gated(_API_GATE, 1, _plain(_API)), _run(_OUTSIDE_TOKEN)),),
        (_WORD_TAIL,),
        _API_GATE.pattern,
        48,
    ),
    "aws_key": (
        (Detector("aws_key", _plain(_AWS_ID)), Detector("aws_key", _gated(_AWS_SECRET_GATE, 30, _plain(_AWS_SECRET)))),
        (_WORD_TAIL, _AWS_TAIL),
        r"A[KSRIGN][IODPV]A|[Kk][Ee][Yy]",
        90,
    ),
    "email": ((Detector("email", _find_email),), (_WORD_TAIL,), "@", _REACH),
    "iban": ((Detector("iban", _checked(_IBAN, _iban)),), (_IBAN_TAIL,), _NUMBERS, 68),
    "credit_card": ((Detector("credit_card", _checked(_CARD, _card)),), (_NUMBER_TAIL,), _NUMBERS, 26),
    "us_ssn": ((Detector("us_ssn", _plain(_SSN)),), (_NUMBER_TAIL, _WORD_TAIL), _NUMBERS, 13),
    "ip_address": (
        (
            Detector("ip_address", _gated(re.compile(r"[0-9]\.[0-9]"), 2, _checked(_IPV4, _ipv4))),
            Detector("ip_address", _gated(re.compile(":"), 4, _checked(_IPV6, _ipv6))),
        ),
        (_WORD_TAIL, _ADDRESS_TAIL),
        r"[0-9]\.[0-9]|:",
        56,
    ),
    "phone": ((Detector("phone", _plain(_PHONE)),), (_NUMBER_TAIL,), _NUMBERS, 52),
}


def rules(kinds: list[str]) -> Rules:
    """What finds these kinds."""
    chosen = [_BY_KIND[kind] for kind in _BY_KIND if kind in kinds]
    tail = re.compile("(?:" + "|".join(dict.fromkeys(one for _, tails, _, _ in chosen for one in tails)) + r")\Z")
    search = tail.search

    def undecided(text: str, position: int) -> int:
        match = search(text, position)
        return len(text) if match is None else match.start()

    return Rules(
        detectors=tuple(detector for detectors, _, _, _ in chosen for detector in detectors),
        undecided=undecided,
        reach=max(reach for _, _, _, reach in chosen),
        context=_BEHIND + 1,
        trigger=re.compile("|".join(dict.fromkeys(trigger for _, _, trigger, _ in chosen))),
    )


class SensitiveData(TextFilter):
    """Finds sensitive data.

    Options:
        kinds: Which; default: all of `KINDS`.
        except_kinds: All but these.
        replacement: What stands in its place with action `redact`; `{kind}` becomes the kind's name.
    """

    def __init__(self, name: str, settings: config.Filter) -> None:
        super().__init__(name, settings)
        options = Options(settings.options)
        kinds = options.texts("kinds", KINDS)
        without = options.texts("except_kinds", ())
        unknown = [kind for kind in [*kinds, *without] if kind not in KINDS]
        if unknown:
            options.problems.append(f"kinds {', '.join(unknown)} are not known: there are {', '.join(KINDS)}")
        self._replacement = options.text("replacement", "[redacted {kind}]")
        chosen = [kind for kind in kinds if kind in KINDS and kind not in without]
        if not chosen and not unknown:
            options.problems.append("no kind is left to look for")
        options.end()
        self._rules = rules(chosen)
        if self._rules.reach > self.hold_back:
            longest = max(chosen, key=lambda kind: _BY_KIND[kind][3])
            raise FilterError(
                [
                    f"hold_back is {self.hold_back}: {longest} may take {self._rules.reach} characters; "
                    "raise it or leave that kind out"
                ]
            )

    def begin(self, phase: Phase, *, json: bool = False) -> Stage:
        return ScanStage(self._rules, self.action, self._replacement, json=json)
