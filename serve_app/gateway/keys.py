"""API keys: how one is made, what of it is stored, and how a presented one is found.

A key is `rp-<prefix>-<secret>`: 12 public characters by which it is found, and 32 random bytes in base64url (43
characters). Stored is `sha256:<hex>` of the whole key. A slow, salted hash (scrypt, Argon2) protects what people
choose: passwords, which can be guessed. Of 256 random bits nothing can be guessed and no table can be made, so a fast
hash gives the same protection, and costs a microsecond a request instead of a tenth of a second (which, on a public
port, would also be a way to exhaust the gateway).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Final, NamedTuple

from .config import Key
from .errors import AuthenticationFailed

PREFIX_LENGTH: Final = 12
#: How every key begins.
MARK: Final = "rp-"
PREFIX = re.compile(r"[A-Za-z0-9]{12}")
HASH = re.compile(r"sha256:[0-9a-f]{64}")
#: What in a text looks like a whole key: for masks of messages.
LOOKS_LIKE_A_KEY = re.compile(r"rp-([A-Za-z0-9]{12})-[A-Za-z0-9_-]{8,}")

#: What an unknown prefix is compared with, so that it takes the same work; no text has this hash.
_NOBODY: Final = "0" * 64


class NewKey(NamedTuple):
    """A key just made. `key` is shown to its owner once; `prefix` and `hash` go into the configuration."""

    key: str
    prefix: str
    hash: str


def generate() -> NewKey:
    """A new random key. Its prefix begins with a letter, so that YAML never reads it as a number."""
    prefix = secrets.choice(string.ascii_lowercase) + "".join(
        secrets.choice(string.ascii_lowercase + string.digits) for _ in range(PREFIX_LENGTH - 1)
    )
    key = f"{MARK}{prefix}-{secrets.token_urlsafe(32)}"
    return NewKey(key, prefix, digest(key))


def digest(key: str) -> str:
    """What is stored of a key: `sha256:` and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def masked(text: str) -> str:
    """The text with every key in it cut down to its public prefix."""
    return LOOKS_LIKE_A_KEY.sub(r"rp-\1-...", text)


def moment(text: str) -> float:
    """Seconds since 1970 of an RFC 3339 time; a date alone is its midnight UTC.

    Raises:
        ValueError: It is neither, or a time without `Z` or an offset, which would mean another moment on every machine.
    """
    parsed = datetime.fromisoformat(text)
    if parsed.tzinfo is None:
        if len(text) > 10:
            raise ValueError("it has no time zone")
        parsed = parsed.replace(tzinfo=UTC)
    return parsed.timestamp()


def refused(message: str, code: str) -> AuthenticationFailed:
    """A 401 with the challenge that RFC 6750 demands of it."""
    return AuthenticationFailed(message, code=code, headers={"www-authenticate": 'Bearer realm="rayplane"'})


class KeyRing:
    """The keys of a policy, found by prefix.

    Args:
        keys: Checked keys: prefixes and ids unique, hashes and times well formed.
    """

    __slots__ = ("_by_id", "_by_prefix")

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        # Nothing but keys: a tuple or object for each would have to be visited by the garbage collector, which for a
        # hundred thousand keys would stop the process for tens of milliseconds.
        self._by_prefix: dict[str, Key] = {}
        self._by_id: dict[str, Key] = {}
        for key in keys:
            self.add(key)

    def add(self, key: Key) -> None:
        """Take in one more key, while the ring is built."""
        self._by_prefix[key.prefix] = key
        self._by_id[key.id] = key

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._by_id.values())

    def get(self, key_id: str) -> Key | None:
        """The key with this id."""
        return self._by_id.get(key_id)

    def find(self, presented: str, now: float) -> Key:
        """The entry of a key that a caller presents.

        Unknown prefixes take the same work as known ones, and the comparison's time depends on no byte.

        Args:
            presented: The whole key.
            now: Seconds since 1970.

        Raises:
            AuthenticationFailed: `invalid_api_key` (unknown, disabled, not valid yet) or `expired_api_key`.
        """
        key = self._by_prefix.get(presented[3:15])
        stored = bytes.fromhex(_NOBODY if key is None else key.hash[7:])
        try:
            shown = hashlib.sha256(presented.encode("ascii")).digest()
        except UnicodeEncodeError:
            shown = b""
        if not hmac.compare_digest(shown, stored) or key is None:
            raise refused("The API key is not valid.", "invalid_api_key")
        if key.disabled:
            raise refused("The API key is disabled.", "invalid_api_key")
        if key.not_before and now < moment(key.not_before):
            raise refused("The API key is not valid yet.", "invalid_api_key")
        if key.expires and now >= moment(key.expires):
            raise refused("The API key has expired.", "expired_api_key")
        return key

    def dissolve(self) -> None:
        """Empty the ring piece by piece, for another thread than the loop's.

        A hundred thousand entries freed at once hold the interpreter for tens of milliseconds, in which no request is
        served.
        """
        for one in (self._by_prefix, self._by_id):
            while one:
                for _ in range(min(500, len(one))):
                    one.popitem()
                time.sleep(0)
