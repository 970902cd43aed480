"""JSON web tokens (RFC 7519) of configured issuers, checked as RFC 8725 advises.

What a token says of itself decides nothing: its algorithm must be one of the issuer's list *and* fit the kind of the
key, and that key comes from the issuer's configuration or JWKS, never from the token (`jku`, `jwk`, `x5u` and `x5c` are
not read).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from .config import Issuer
from .errors import Unavailable
from .keys import refused

if TYPE_CHECKING:
    import aiohttp

#: Characters of a token at most; a longer one is refused before anything of it is decoded.
MAX_TOKEN: Final = 16 * 1024
#: Seconds for which a verified token is not verified again; never beyond its own end.
VERIFIED_S: Final = 60.0
MAX_VERIFIED: Final = 4096
#: A JWKS is asked for at most so often, in seconds, whatever key ids tokens name.
REFETCH_S: Final = 10.0
FETCH_TIMEOUT_S: Final = 5.0
#: Keys of an issuer that is away serve for so long, in seconds.
STALE_S: Final = 24 * 3600.0
MAX_JWKS_BYTES: Final = 1024 * 1024
MAX_JWKS_KEYS: Final = 100
#: Keys tried for a token that names none.
MAX_TRIED: Final = 8
MIN_RSA_BITS: Final = 2048

_CURVES: Final = {"ES256": "secp256r1", "ES384": "secp384r1", "ES512": "secp521r1"}


class Jwk(NamedTuple):
    """A public key that can verify signatures."""

    #: Empty where the key has none, as PEM texts do.
    kid: str
    #: The algorithms that fit its kind (and its own `alg`, where it states one).
    algorithms: frozenset[str]
    key: Any


def public_key(given: dict[str, Any] | str) -> Jwk:
    """A key of the configuration or a JWKS: a JWK object (RFC 7517), a PEM public key or a PEM certificate.

    Raises:
        ValueError: It is none, holds a private or a shared secret, is too short, or is not for signatures. The message
            holds nothing of the key.
    """
    if isinstance(given, str):
        return Jwk("", *_of_pem(given))
    kind = given.get("kty")
    if kind == "oct":
        raise ValueError("it is a shared secret, and only public keys are accepted")
    if "d" in given:
        raise ValueError("it is a private key, which belongs to the issuer alone")
    if given.get("use", "sig") != "sig":
        raise ValueError("it is not for signatures (use)")
    operations = given.get("key_ops")
    if operations is not None and not (isinstance(operations, list) and "verify" in operations):
        raise ValueError("it is not for signatures (key_ops)")
    kid = given.get("kid", "")
    if not isinstance(kid, str):
        raise ValueError("its kid is no text")
    name = {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise ValueError("its kty is not RSA, EC or OKP")
    try:
        key = _algorithm(name).from_jwk(given)
    except Exception as error:  # a key set is foreign input, and the library raises what it meets in it
        raise ValueError("it is not a well-formed JWK") from error
    fitting = _fitting(key)
    if given.get("alg") is not None:
        fitting &= {"EdDSA" if given["alg"] == "Ed25519" else given["alg"]}
    if not fitting:
        raise ValueError("no supported algorithm fits it")
    return Jwk(kid, fitting, key)


def _of_pem(text: str) -> tuple[frozenset[str], Any]:
    from cryptography import x509  # noqa: PLC0415  start-up: most gateways have no issuer
    from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415

    if "PRIVATE KEY" in text:
        raise ValueError("it is a private key, which belongs to the issuer alone")
    try:
        if "BEGIN CERTIFICATE" in text:
            key: Any = x509.load_pem_x509_certificate(text.encode()).public_key()
        else:
            key = load_pem_public_key(text.encode())
    except Exception as error:  # the library raises errors of several kinds
        raise ValueError("it is not a public key in PEM") from error
    fitting = _fitting(key)
    if not fitting:
        raise ValueError("no supported algorithm fits it")
    return fitting, key


def _fitting(key: Any) -> frozenset[str]:
    """The algorithms that a key's kind permits."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa  # noqa: PLC0415

    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < MIN_RSA_BITS:
            raise ValueError(f"it has {key.key_size} bits; RSA keys need {MIN_RSA_BITS}")
        return frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
    if isinstance(key, ec.EllipticCurvePublicKey):
        return frozenset(name for name, curve in _CURVES.items() if key.curve.name == curve)
    if isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
        return frozenset({"EdDSA"})
    return frozenset()


@functools.cache
def _algorithm(name: str) -> Any:
    from jwt.algorithms import get_default_algorithms  # noqa: PLC0415

    return get_default_algorithms()[name]


def prepare() -> None:
    """Import what verification needs, which takes a tenth of a second, before a request waits for it."""
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: F401, PLC0415

    _algorithm("RS256")


@dataclass(slots=True)
class _Set:
    """What is known of one JWKS address."""

    keys: tuple[Jwk, ...] = ()
    #: Seconds of the monotonic clock: when the keys came, and when they were last asked for.
    fetched: float = float("-inf")
    asked: float = float("-inf")
    task: asyncio.Task[None] | None = None
    error: str = ""


class _Verified(NamedTuple):
    issuer: Issuer
    claims: dict[str, Any]
    until: float


class TokenVerifier:
    """Verifies tokens; remembers issuers' keys, and for a minute what it verified.

    An issuer's JWKS is fetched when first needed and again after `jwks_cache_s`, in the background while the keys at
    hand still serve; for an unknown key id at once, but never more often than every `REFETCH_S`. While the issuer is
    away its last keys serve, for `STALE_S` at most. Proxies of the environment (`HTTPS_PROXY`, `NO_PROXY`) are used,
    because issuers often live outside.
    """

    def __init__(self) -> None:
        self._sets: dict[str, _Set] = {}
        self._static: dict[int, tuple[Issuer, tuple[Jwk, ...]]] = {}
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """End fetches and connections."""
        tasks = [one.task for one in self._sets.values() if one.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def errors(self) -> dict[str, str]:
        """By JWKS address, why its last fetch failed."""
        return {url: one.error for url, one in self._sets.items() if one.error}

    async def verify(self, token: str, issuers: Sequence[Issuer], now: float) -> dict[str, Any]:
        """The claims of a valid token; see `check`."""
        return (await self.check(token, issuers, now))[1]

    async def check(self, token: str, issuers: Sequence[Issuer], now: float) -> tuple[Issuer, dict[str, Any]]:
        """The issuer and the claims of a token whose signature, issuer, audience and times are right.

        Args:
            token: In compact serialization.
            issuers: Those of the policy in force.
            now: Seconds since 1970.

        Raises:
            AuthenticationFailed: `expired_token` or `invalid_token`, with one sentence that holds nothing of the token.
            Unavailable: None of the issuer's keys is known, and it cannot be reached.
        """
        if len(token) > MAX_TOKEN:
            raise refused("The token is too long.", "invalid_token")
        # Surrogates and the like make a token malformed, not the gateway fail.
        raw = token.encode("utf-8", "replace")
        mark = hashlib.sha256(raw).digest()
        seen = self._verified.get(mark)
        if seen is not None and now < seen.until and any(one is seen.issuer for one in issuers):
            self._verified.move_to_end(mark)
            return seen.issuer, seen.claims
        signed, _, signature_text = raw.rpartition(b".")
        header_text, _, payload_text = signed.partition(b".")
        header = _object(header_text)
        claims = _object(payload_text)
        signature = _decoded(signature_text)
        if header is None or claims is None or not signature:
            raise refused("The token is malformed.", "invalid_token")
        algorithm, kid = _header(header)
        issuer = _issuer(claims, issuers)
        if algorithm not in issuer.algorithms:
            raise refused("The token's algorithm is not allowed.", "invalid_token")
        await self._signature(issuer, algorithm, kid, signed, signature)
        until = _claims(claims, issuer, now)
        self._verified[mark] = _Verified(issuer, claims, min(until, now + VERIFIED_S))
        self._verified.move_to_end(mark)
        if len(self._verified) > MAX_VERIFIED:
            self._verified.popitem(last=False)
        return issuer, claims

    async def _signature(
        self, issuer: Issuer, algorithm: str, kid: str | None, signed: bytes, signature: bytes
    ) -> None:
        """Raise unless a key of the issuer made the signature."""
        candidates = _candidates(await self._keys(issuer), algorithm, kid)
        if _made_by(candidates, algorithm, signed, signature):
            return
        # The issuer may have new keys: seen by an id that is unknown, or, where keys have no ids, only by signatures
        # that fail.
        unknown = kid is None or not any(one.kid for one in candidates)
        if unknown and issuer.jwks_url and await self._newer(issuer.jwks_url):
            candidates = _candidates(self._sets[issuer.jwks_url].keys, algorithm, kid)
            if _made_by(candidates, algorithm, signed, signature):
                return
        if not candidates:
            raise refused("The token is signed with a key that its issuer does not have.", "invalid_token")
        raise refused("The token's signature is wrong.", "invalid_token")

    async def _keys(self, issuer: Issuer) -> tuple[Jwk, ...]:
        if not issuer.jwks_url:
            known = self._static.get(id(issuer))
            # The address of an object is taken anew once the object is gone: the entry keeps it, and is compared.
            if known is None or known[0] is not issuer:
                if len(self._static) > 64:
                    self._static.clear()
                known = self._static[id(issuer)] = (issuer, tuple(public_key(one) for one in issuer.keys))
            return known[1]
        one = self._sets.setdefault(issuer.jwks_url, _Set())
        age = time.monotonic() - one.fetched
        if age > issuer.jwks_cache_s:
            # A request waits only where keys are missing or long out of date; else the fetch serves those after it.
            if not one.keys or age > 2 * issuer.jwks_cache_s:
                await self._newer(issuer.jwks_url)
            else:
                self._ask(issuer.jwks_url, one)
        if time.monotonic() - one.fetched > max(STALE_S, 2 * issuer.jwks_cache_s):
            one.keys = ()
        if not one.keys:
            raise Unavailable(
                "The keys of the token's issuer cannot be fetched at the moment.",
                code="issuer_unavailable",
                headers={"retry-after": str(int(REFETCH_S))},
            )
        return one.keys

    def _ask(self, url: str, one: _Set) -> asyncio.Task[None] | None:
        """The fetch under way, or a new one where the last is long enough ago; None where it is not."""
        if one.task is None and time.monotonic() - one.asked >= REFETCH_S:
            one.asked = time.monotonic()
            one.task = asyncio.create_task(self._fetch(url, one))
        return one.task

    async def _newer(self, url: str) -> bool:
        """Wait for a fetch; False where the last one is too recent for another, or failed."""
        one = self._sets[url]
        before = one.fetched
        task = self._ask(url, one)
        if task is not None:
            # A caller that goes away must not end what others wait for.
            await asyncio.shield(task)
        return one.fetched > before

    async def _fetch(self, url: str, one: _Set) -> None:
        import aiohttp  # noqa: PLC0415

        try:
            if self._session is None:
                self._session = aiohttp.ClientSession(
                    timeout=aiohttp.ClientTimeout(total=FETCH_TIMEOUT_S),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    trust_env=True,
                )
            async with self._session.get(url, allow_redirects=False, headers={"accept": "application/json"}) as answer:
                if answer.status != 200:
                    raise ValueError(f"it answered with status {answer.status}")
                body = b""
                async for piece in answer.content.iter_chunked(65536):
                    body += piece
                    if len(body) > MAX_JWKS_BYTES:
                        raise ValueError(f"it is larger than {MAX_JWKS_BYTES} bytes")
            one.keys = _key_set(body)
            one.fetched = time.monotonic()
            one.error = ""
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            one.error = str(error) or type(error).__name__
        finally:
            one.task = None


def _key_set(body: bytes) -> tuple[Jwk, ...]:
    """The usable keys of a JWKS (RFC 7517, section 5: those of kinds not understood are left out)."""
    try:
        keys = msgspec.json.decode(body)["keys"]
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise ValueError("it is not a JWKS") from error
    result: list[Jwk] = []
    for given in keys[:MAX_JWKS_KEYS] if isinstance(keys, list) else []:
        if isinstance(given, dict):
            try:
                result.append(public_key(given))
            except ValueError:
                continue
    if not result:
        raise ValueError("it holds no key that can verify signatures")
    return tuple(result)


def _candidates(keys: Iterable[Jwk], algorithm: str, kid: str | None) -> list[Jwk]:
    """Keys that may have made a signature. A key id, where both have one, must be the same."""
    fitting = [one for one in keys if algorithm in one.algorithms and (kid is None or one.kid in {"", kid})]
    if kid is not None and any(one.kid for one in fitting):
        fitting = [one for one in fitting if one.kid == kid]
    return fitting[:MAX_TRIED]


def _made_by(candidates: Iterable[Jwk], algorithm: str, signed: bytes, signature: bytes) -> bool:
    verifier = _algorithm(algorithm)
    return any(verifier.verify(signed, one.key, signature) for one in candidates)


def _decoded(text: bytes) -> bytes | None:
    """base64url without padding, in its one canonical form; None where it is something else."""
    if not text:
        return None
    try:
        result = binascii.a2b_base64(text.translate(_URL_SAFE) + b"=" * (-len(text) % 4), strict_mode=True)
    except binascii.Error:
        return None
    return result if base64.urlsafe_b64encode(result).rstrip(b"=") == text else None


_URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")


def _object(text: bytes) -> dict[str, Any] | None:
    decoded = _decoded(text)
    if decoded is None:
        return None
    try:
        value = msgspec.json.decode(decoded)
    except (msgspec.DecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _header(header: dict[str, Any]) -> tuple[str, str | None]:
    """Algorithm and key id of a header that asks for nothing unusual."""
    algorithm = header.get("alg")
    kid = header.get("kid")
    if not isinstance(algorithm, str) or not (kid is None or isinstance(kid, str)):
        raise refused("The token is malformed.", "invalid_token")
    if "crit" in header or "b64" in header:
        raise refused("The token demands an extension that is not supported.", "invalid_token")
    # RFC 8725, 3.11: what the same issuer signed for another purpose (a log-out notice, a proof of possession) is no
    # access token.
    kind = header.get("typ", "JWT")
    name = kind.lower().removeprefix("application/") if isinstance(kind, str) else ""
    if name != "jwt" and not name.endswith("at+jwt"):
        raise refused("The token is of another type than an access token.", "invalid_token")
    return algorithm, kid


def _audiences(claims: dict[str, Any]) -> set[str]:
    value = claims.get("aud")
    return {one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)}


def _issuer(claims: dict[str, Any], issuers: Sequence[Issuer]) -> Issuer:
    """Whose token it claims to be: nothing is believed until that issuer's key has verified it."""
    named = [one for one in issuers if one.issuer == claims.get("iss")]
    if not named:
        raise refused("The token's issuer is not known here.", "invalid_token")
    audiences = _audiences(claims)
    for one in named:
        if audiences.intersection(one.audience):
            return one
    raise refused("The token is meant for another audience.", "invalid_token")


def _claims(claims: dict[str, Any], issuer: Issuer, now: float) -> float:
    """Check the times and the subject; returns the moment of expiry."""
    expires = _number(claims, "exp")
    begins = _number(claims, "nbf")
    issued = _number(claims, "iat")
    if expires is None:
        raise refused("The token has no expiry.", "invalid_token")
    if now >= expires + issuer.leeway_s:
        raise refused("The token has expired.", "expired_token")
    if begins is not None and now < begins - issuer.leeway_s:
        raise refused("The token is not valid yet.", "invalid_token")
    if issued is not None and now < issued - issuer.leeway_s:
        raise refused("The token was issued in the future.", "invalid_token")
    if issuer.max_age_s and (issued is None or expires - issued > issuer.max_age_s):
        raise refused("The token is valid for longer than is allowed here.", "invalid_token")
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 0 < len(subject) <= 256 or not subject.isprintable():
        raise refused("The token names no subject.", "invalid_token")
    return expires


def _number(claims: dict[str, Any], name: str) -> float | None:
    """A NumericDate (RFC 7519, section 2) or None; anything else makes the token malformed."""
    if name not in claims:
        return None
    value: Any = claims[name]
    if type(value) not in {int, float} or not -1e15 < value < 1e15:
        raise refused("The token is malformed.", "invalid_token")
    return float(value)
