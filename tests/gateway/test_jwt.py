"""JSON web tokens: good ones of every algorithm, and every way known to forge one."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.gateway import tokens
from serve_app.gateway.config import Issuer
from serve_app.gateway.errors import AuthenticationFailed, GatewayError, Unavailable
from serve_app.gateway.tokens import TokenVerifier, public_key

from .waiting import until

NOW = 1_800_000_000.0
ISS = "https://id.example.com"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
EC_KEYS = {name: ec.generate_private_key(curve) for name, curve in EC.items()}
ED = ed25519.Ed25519PrivateKey.generate()
ALL: list[Any] = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


def private(algorithm: str) -> Any:
    return EC_KEYS.get(algorithm) or (ED if algorithm == "EdDSA" else RSA)


def pem(key: Any) -> str:
    public = key.public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return str(public.public_bytes(serialization.Encoding.PEM, form).decode())


def jwk(key: Any, **more: object) -> dict[str, Any]:
    public = key.public_key()
    if isinstance(key, rsa.RSAPrivateKey):
        kind: Any = jwt.algorithms.RSAAlgorithm
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        kind = jwt.algorithms.ECAlgorithm
    else:
        kind = jwt.algorithms.OKPAlgorithm
    return {**kind.to_jwk(public, as_dict=True), **more}


def claims(**changes: object) -> dict[str, Any]:
    values = {"iss": ISS, "aud": "llm", "sub": "ann", "iat": NOW - 10, "exp": NOW + 600, **changes}
    return {name: value for name, value in values.items() if value is not ...}


def issuer(*keys: Any, **changes: Any) -> Issuer:
    values: dict[str, Any] = {"issuer": ISS, "audience": ["llm"], "algorithms": ALL, "keys": list(keys), **changes}
    return Issuer(**values)


def sign(payload: dict[str, Any], key: Any = RSA, algorithm: str = "RS256", **header: object) -> str:
    return jwt.encode(payload, key, algorithm, headers=header)


def part(value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def by_hand(header: object, payload: object, key: Any = RSA) -> str:
    """A token of any shape, with a right RS256 signature."""
    signed = f"{part(header)}.{part(payload)}"
    signature = jwt.algorithms.RSAAlgorithm(jwt.algorithms.RSAAlgorithm.SHA256).sign(signed.encode(), key)
    return f"{signed}.{part(signature)}"


def check(token: str, *issuers: Issuer, now: float = NOW) -> dict[str, Any]:
    async def scenario() -> dict[str, Any]:
        verifier = TokenVerifier()
        try:
            return await verifier.verify(token, issuers, now)
        finally:
            await verifier.close()

    return asyncio.run(scenario())


def refused(token: str, *issuers: Issuer, now: float = NOW) -> str:
    """The sentence with which a token is refused."""
    with pytest.raises(AuthenticationFailed) as caught:
        check(token, *(issuers or (issuer(pem(RSA)),)), now=now)
    error = caught.value
    assert error.status == 401 and error.headers["www-authenticate"].startswith("Bearer")
    assert error.code in {"invalid_token", "expired_token"}
    assert all(len(one) < 4 or one not in error.message for one in token.split("."))
    assert error.message.endswith(".") and len(error.message) < 100
    return error.message


# --- good tokens


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize("form", ["pem", "jwk"])
def test_every_algorithm(algorithm: str, form: str) -> None:
    key = private(algorithm)
    token = sign(claims(role="basic"), key, algorithm)
    found = check(token, issuer(pem(key) if form == "pem" else jwk(key, kid="a"), algorithms=[algorithm]))
    assert found == claims(role="basic")


def test_the_key_may_be_in_a_certificate() -> None:
    from datetime import UTC, datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "id")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(RSA.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2040, 1, 1, tzinfo=UTC))
        .sign(RSA, hashes.SHA256())
    )
    text = made.public_bytes(serialization.Encoding.PEM).decode()
    assert check(sign(claims()), issuer(text))["sub"] == "ann"


def test_one_of_several_audiences_is_enough() -> None:
    assert check(sign(claims(aud=["other", "llm"])), issuer(pem(RSA)))
    assert check(sign(claims(aud="llm")), issuer(pem(RSA), audience=["a", "llm"]))


def test_the_issuer_with_the_right_audience_is_taken() -> None:
    first, second = issuer(pem(OTHER_RSA), audience=["a"]), issuer(pem(RSA), audience=["b"])
    other = issuer(pem(OTHER_RSA), issuer="https://other.example.com")
    assert check(sign(claims(aud="b")), other, first, second)
    assert refused(sign(claims(aud="a")), other, first, second) == "The token's signature is wrong."


@pytest.mark.parametrize("kind", ["JWT", "jwt", "at+jwt", "application/at+jwt", "application/okta-internal-at+jwt"])
def test_types_of_access_tokens(kind: str) -> None:
    assert check(by_hand({"alg": "RS256", "typ": kind}, claims()), issuer(pem(RSA)))


def test_a_token_without_a_type() -> None:
    assert check(by_hand({"alg": "RS256"}, claims()), issuer(pem(RSA)))


def test_the_leeway_covers_clocks_that_differ() -> None:
    one = issuer(pem(RSA), leeway_s=30)
    assert check(sign(claims(exp=NOW - 29)), one)
    assert check(sign(claims(nbf=NOW + 29, iat=NOW + 29)), one)
    assert refused(sign(claims(exp=NOW - 30)), one) == "The token has expired."
    assert refused(sign(claims(nbf=NOW + 31)), one) == "The token is not valid yet."
    assert refused(sign(claims(iat=NOW + 31)), one) == "The token was issued in the future."


# --- forged and broken tokens


def test_expired_tokens_have_a_code_of_their_own() -> None:
    with pytest.raises(AuthenticationFailed) as caught:
        check(sign(claims(exp=NOW - 100)), issuer(pem(RSA)))
    assert caught.value.code == "expired_token"


@pytest.mark.parametrize(
    "algorithm", ["none", "None", "NONE", "", "HS256", "HS512", "RS1", "ES256K", "rs256", "EdDSA2"]
)
def test_algorithms_that_nobody_listed(algorithm: str) -> None:
    signed = f"{part({'alg': algorithm, 'typ': 'JWT'})}.{part(claims())}"
    for signature in (b"", b"x" * 256, hmac.digest(pem(RSA).encode(), signed.encode(), hashlib.sha256)):
        expected = "The token is malformed." if not signature else "The token's algorithm is not allowed."
        assert refused(f"{signed}.{part(signature)}") == expected


def test_a_public_key_is_no_shared_secret() -> None:
    """The classic confusion: an HMAC made with the public key's text, for a verifier that lets the token choose."""
    signed = f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part(claims())}"
    public = RSA.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.PKCS1)
    for secret in (pem(RSA).encode(), pem(RSA).strip().encode(), public):
        signature = hmac.digest(secret, signed.encode(), hashlib.sha256)
        assert refused(f"{signed}.{part(signature)}") == "The token's algorithm is not allowed."


@pytest.mark.parametrize("made", ALL)
@pytest.mark.parametrize("claimed", ["RS256", "PS256", "ES256", "ES384", "EdDSA"])
def test_an_algorithm_of_another_kind_than_the_key(made: str, claimed: str) -> None:
    if made == claimed:
        return
    token = sign(claims(), private(made), made)
    changed = f"{part({'alg': claimed, 'typ': 'JWT'})}.{token.partition('.')[2]}"
    assert refused(changed, issuer(jwk(private(made)))) in {
        "The token is signed with a key that its issuer does not have.",
        "The token's signature is wrong.",
    }


def test_an_algorithm_that_this_issuer_does_not_use() -> None:
    token = sign(claims(), EC_KEYS["ES256"], "ES256")
    one = issuer(pem(RSA), pem(EC_KEYS["ES256"]), algorithms=["RS256"])
    assert refused(token, one) == "The token's algorithm is not allowed."


def test_a_key_made_for_one_algorithm_does_no_other() -> None:
    token = sign(claims(), RSA, "PS256")
    assert check(token, issuer(jwk(RSA)))
    assert "does not have" in refused(token, issuer(jwk(RSA, alg="RS256")))


def test_any_changed_byte_is_noticed() -> None:
    token = sign(claims())
    one = issuer(pem(RSA))

    async def scenario() -> None:
        verifier = TokenVerifier()
        assert await verifier.verify(token, [one], NOW)
        for place in range(0, len(token), 3):
            other = "A" if token[place] != "A" else "B"
            with pytest.raises(AuthenticationFailed):
                await verifier.verify(token[:place] + other + token[place + 1 :], [one], NOW)

    asyncio.run(scenario())


@pytest.mark.parametrize("header", [{"crit": ["exp"]}, {"crit": []}, {"crit": ["b64"], "b64": False}, {"b64": True}])
def test_extensions_are_refused(header: dict[str, Any]) -> None:
    token = by_hand({"alg": "RS256", **header}, claims())
    assert refused(token) == "The token demands an extension that is not supported."


@pytest.mark.parametrize("kind", ["logout+jwt", "dpop+jwt", "secevent+jwt", "JOSE", "", 5, None, ["JWT"]])
def test_tokens_for_another_purpose(kind: object) -> None:
    token = by_hand({"alg": "RS256", "typ": kind}, claims())
    assert refused(token) == "The token is of another type than an access token."


def test_keys_that_a_token_brings_along_are_not_used() -> None:
    own = jwk(OTHER_RSA, kid="mine")
    header = {"alg": "RS256", "kid": "mine", "jwk": own, "jku": "http://127.0.0.1:9/jwks", "x5u": "http://127.0.0.1:9/"}
    assert "does not have" in refused(by_hand(header, claims(), OTHER_RSA), issuer(jwk(RSA, kid="a")))
    assert refused(by_hand({**header, "kid": "a"}, claims(), OTHER_RSA), issuer(jwk(RSA, kid="a"))) == (
        "The token's signature is wrong."
    )


def test_the_key_id_chooses_the_key() -> None:
    one = issuer(jwk(RSA, kid="a"), jwk(OTHER_RSA, kid="b"))
    assert check(sign(claims(), OTHER_RSA, kid="b"), one)
    assert check(sign(claims(), OTHER_RSA), one)
    assert refused(sign(claims(), OTHER_RSA, kid="a"), one) == "The token's signature is wrong."
    assert "does not have" in refused(sign(claims(), OTHER_RSA, kid="c"), one)
    assert "malformed" in refused(by_hand({"alg": "RS256", "kid": 5}, claims()), one)
    # A key without an id may be any; one with another id may not.
    assert check(sign(claims(), kid="c"), issuer(jwk(OTHER_RSA, kid="b"), pem(RSA)))
    assert "does not have" in refused(by_hand({"alg": "RS256", "kid": "../../etc/passwd\x00"}, claims()), one)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"iss": "https://evil.example.com"}, "The token's issuer is not known here."),
        ({"iss": ISS + "/"}, "The token's issuer is not known here."),
        ({"iss": ...}, "The token's issuer is not known here."),
        ({"iss": [ISS]}, "The token's issuer is not known here."),
        ({"aud": "other"}, "The token is meant for another audience."),
        ({"aud": ["llm2", 5, None]}, "The token is meant for another audience."),
        ({"aud": ...}, "The token is meant for another audience."),
        ({"aud": {"llm": 1}}, "The token is meant for another audience."),
        ({"exp": ...}, "The token has no expiry."),
        ({"exp": None}, "The token is malformed."),
        ({"exp": "never"}, "The token is malformed."),
        ({"exp": str(NOW + 9)}, "The token is malformed."),
        ({"exp": True}, "The token is malformed."),
        ({"exp": 10**400}, "The token is malformed."),
        ({"exp": 1e300}, "The token is malformed."),
        ({"nbf": [1]}, "The token is malformed."),
        ({"iat": "now"}, "The token is malformed."),
        ({"nbf": NOW + 100}, "The token is not valid yet."),
        ({"iat": NOW + 100}, "The token was issued in the future."),
        ({"sub": ...}, "The token names no subject."),
        ({"sub": ""}, "The token names no subject."),
        ({"sub": 7}, "The token names no subject."),
        ({"sub": "a\nb"}, "The token names no subject."),
        ({"sub": "a" * 257}, "The token names no subject."),
    ],
)
def test_claims_that_are_refused(changes: dict[str, Any], sentence: str) -> None:
    assert refused(by_hand({"alg": "RS256"}, claims(**changes))) == sentence


def test_tokens_that_live_too_long() -> None:
    one = issuer(pem(RSA), max_age_s=3600)
    assert check(sign(claims(iat=NOW, exp=NOW + 3600)), one)
    sentence = "The token is valid for longer than is allowed here."
    assert refused(sign(claims(iat=NOW, exp=NOW + 3601)), one) == sentence
    assert refused(sign(claims(iat=..., exp=NOW + 60)), one) == sentence


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "a.b",
        "a.b.c",
        "a.b.c.d",
        f"{part({'alg': 'RS256'})}..{part(b'x')}",
        f"{part([])}.{part({})}.{part(b'x')}",
        f"{part({'alg': 'RS256'})}.{part([])}.{part(b'x')}",
        f"{part({'alg': 5})}.{part({})}.{part(b'x')}",
        f"{part({})}.{part({})}.{part(b'x')}",
        f"{part(b'{')}.{part({})}.{part(b'x')}",
        f"{part(b'[' * 5000)}.{part({})}.{part(b'x')}",
        f"{part({'alg': 'RS256'})}.{part(bytes(range(256)))}.{part(b'x')}",
        f"{part({'alg': 'RS256'})} .{part({})}.{part(b'x')}",
        f"{part({'alg': 'RS256'})}=.{part({})}.{part(b'x')}",
        "\ud800.\ud800.\ud800",
        "é.é.é",
    ],
)
def test_malformed_tokens(token: str) -> None:
    assert refused(token) == "The token is malformed."


def test_one_token_has_one_text() -> None:
    """Other spellings of the same bytes (padding, stray bits, the other alphabet) are not the token."""
    token = sign(claims())
    one = issuer(pem(RSA))
    for other in (
        token + "=",
        token + "==",
        token + "\n",
        " " + token,
        token.replace("_", "/").replace("-", "+") + "+",
    ):
        assert refused(other, one) == "The token is malformed."
    last = token[-1]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    # 256 bytes leave four unused bits in the last character.
    sibling = alphabet[alphabet.index(last) ^ 1]
    assert base64.urlsafe_b64decode(token.split(".")[2][:-1] + sibling + "==") == base64.urlsafe_b64decode(
        token.split(".")[2] + "=="
    )
    assert refused(token[:-1] + sibling, one) == "The token is malformed."


def test_huge_tokens_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    token = sign(claims(padding="x" * 20_000))
    assert len(token) > tokens.MAX_TOKEN

    def decode(_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(tokens.msgspec.json, "decode", decode)
    assert refused(token) == "The token is too long."


def test_a_token_just_small_enough() -> None:
    assert check(sign(claims(padding="x" * 11_000)), issuer(pem(RSA)))


@settings(max_examples=150)
@given(
    st.one_of(
        st.text(max_size=60),
        st.lists(st.binary(max_size=30), min_size=3, max_size=3).map(lambda parts: ".".join(map(part, parts))),
    )
)
def test_any_text_is_refused_in_one_way(token: str) -> None:
    refused(token)


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "role", "x"]),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(max_size=4),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=4,
        ),
    ),
    st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit"]), st.none() | st.integers() | st.text(max_size=5)),
)
def test_any_signed_claims_are_taken_or_refused(changes: dict[str, Any], header: dict[str, Any]) -> None:
    token = by_hand({"alg": "RS256", **header}, claims(**changes))
    try:
        found = check(token, issuer(pem(RSA)))
    except GatewayError as error:
        assert error.status == 401
    else:
        assert found["sub"] and found["exp"] > NOW - 31 and found["iss"] == ISS


# --- keys of the configuration


@pytest.mark.parametrize(
    ("given_key", "reason"),
    [
        ({"kty": "oct", "k": "c2VjcmV0"}, "shared secret"),
        ({**jwt.algorithms.RSAAlgorithm.to_jwk(RSA, as_dict=True)}, "private key"),
        (jwk(RSA, use="enc"), "(use)"),
        (jwk(RSA, key_ops=["sign"]), "(key_ops)"),
        (jwk(RSA, kid=5), "kid"),
        (jwk(RSA, alg="RSA-OAEP"), "no supported algorithm"),
        (jwk(RSA, alg="HS256"), "no supported algorithm"),
        (jwk(rsa.generate_private_key(public_exponent=65537, key_size=1024)), "1024 bits"),
        (jwk(ec.generate_private_key(ec.SECP256K1())), "no supported algorithm"),
        ({"kty": "RSA"}, "well-formed"),
        ({"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}, "well-formed"),
        ({"kty": "RSA", "n": 5, "e": []}, "well-formed"),
        ({"kty": "OKP", "crv": "X25519", "x": "AA"}, "well-formed"),
        ({"kty": ["RSA"]}, "kty"),
        ({}, "kty"),
        ("text", "PEM"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "PEM"),
        ("-----BEGIN PRIVATE KEY-----\nAAAA", "private key"),
    ],
)
def test_keys_that_are_refused(given_key: Any, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        public_key(given_key)
    assert reason in str(caught.value)


def test_algorithms_by_the_kind_of_key() -> None:
    assert public_key(jwk(EC_KEYS["ES384"], kid="x")) == ("x", {"ES384"}, EC_KEYS["ES384"].public_key())
    assert public_key(jwk(ED, alg="Ed25519")).algorithms == {"EdDSA"}
    assert public_key(pem(ed448.Ed448PrivateKey.generate())).algorithms == {"EdDSA"}
    assert public_key(jwk(RSA, use="sig", key_ops=["verify"])).kid == ""


# --- keys of a JWKS address


class KeyServer:
    """An issuer's JWKS address with faults."""

    def __init__(self) -> None:
        self.keys: list[Any] = []
        self.asked = 0
        self.status = 200
        self.body: bytes | None = None
        self.gate: asyncio.Event | None = None
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.status == 302:
            raise web.HTTPFound("/other")
        body = json.dumps({"keys": self.keys}).encode() if self.body is None else self.body
        return web.Response(status=self.status, body=body)

    async def _other(self, request: web.Request) -> web.Response:
        """What a redirect leads to: keys of somebody else."""
        return web.json_response({"keys": [jwk(OTHER_RSA, kid="a")]})

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/other", self._other)
        app.router.add_get("/jwks", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/jwks"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None


class Clock:
    """The monotonic clock of the module under test, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(tokens, "time", made)
    monkeypatch.setattr(tokens, "FETCH_TIMEOUT_S", 60)
    return made


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loopback is reached directly, whatever proxy this machine's environment names; and errors of the loop are not
    lost.
    """
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    logging.getLogger("asyncio").addHandler(handler)
    yield
    logging.getLogger("asyncio").removeHandler(handler)
    assert [one.getMessage() for one in seen if one.levelno >= logging.ERROR] == []


def with_server(scenario: Callable[[KeyServer, TokenVerifier, Issuer], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        server, verifier = KeyServer(), TokenVerifier()
        await server.start()
        one = Issuer(issuer=ISS, audience=["llm"], jwks_url=server.url, jwks_cache_s=100)
        try:
            await scenario(server, verifier, one)
        finally:
            await verifier.close()
            await server.stop()

    asyncio.run(all_of_it())


def token(kid: str | None = "a", key: Any = RSA, **changes: object) -> str:
    """A fresh token: no two are the same, so that none is known already."""
    token.count += 1  # type: ignore[attr-defined]
    header = {} if kid is None else {"kid": kid}
    return sign(claims(jti=str(token.count), **changes), key, **header)  # type: ignore[attr-defined]


token.count = 0  # type: ignore[attr-defined]


@contextmanager
def invalid(sentence: str) -> Iterator[None]:
    with pytest.raises(AuthenticationFailed) as caught:
        yield
    assert caught.value.message == sentence


UNKNOWN = "The token is signed with a key that its issuer does not have."


async def settled(verifier: TokenVerifier) -> None:
    """Until no fetch is under way."""
    await until(lambda: all(one.task is None for one in verifier._sets.values()))


def test_a_key_set_is_fetched_once_for_many(clock: Clock) -> None:
    async def scenario(server: KeyServer, verifier: TokenVerifier, one: Issuer) -> None:
        server.keys = [jwk(RSA, kid="a"), {"kty": "oct", "k": "AA"}, "text", jwk(RSA, kid="e", use="enc")]
        found = await asyncio.gather(*(verifier.verify(token(), [one], NOW) for _ in range(20)))
        assert [one["sub"] for one in found] == ["ann"] * 20
        assert server.asked == 1
        assert verifier.errors == {}

    with_server(scenario)


def test_a_rotated_key_is_fetched_at_once_and_unknown_ids_flood_nobody(clock: Clock) -> None:
    async def scenario(server: KeyServer, verifier: TokenVerifier, one: Issuer) -> None:
        server.keys = [jwk(RSA, kid="a")]
        await verifier.verify(token(), [one], NOW)
        clock.now += 11
        server.keys = [jwk(RSA, kid="a"), jwk(OTHER_RSA, kid="b")]
        assert await verifier.verify(token("b", OTHER_RSA), [one], NOW)
        assert server.asked == 2
        for _ in range(50):
            with invalid(UNKNOWN):
                await verifier.verify(token("c", OTHER_RSA), [one], NOW)
        assert server.asked == 2
        clock.now += 10
        with invalid(UNKNOWN):
            await verifier.verify(token("c", OTHER_RSA), [one], NOW)
        assert server.asked == 3

    with_server(scenario)


def test_rotation_where_keys_have_no_ids(clock: Clock) -> None:
    async def scenario(server: KeyServer, verifier: TokenVerifier, one: Issuer) -> None:
        server.keys = [jwk(RSA)]
        assert await verifier.verify(token(None), [one], NOW)
        assert await verifier.verify(token("any"), [one], NOW)
        clock.now += 11
        server.keys = [jwk(OTHER_RSA)]
        assert await verifier.verify(token(None, OTHER_RSA), [one], NOW)
        with invalid("The token's signature is wrong."):
            await verifier.verify(token(None, RSA), [one], NOW)
        assert server.asked == 2

    with_server(scenario)


def test_a_withdrawn_key_ends_with_the_next_fetch(clock: Clock) -> None:
    async def scenario(server: KeyServer, verifier: TokenVerifier, one: Issuer) -> None:
        server.keys = [jwk(RSA, kid="a"), jwk(OTHER_RSA, kid="b")]
        assert await verifier.verify(token(), [one], NOW)
        server.keys = [jwk(OTHER_RSA, kid="b")]
        clock.now += 101
        # Served from what is at hand, while the fetch runs beside it.
        assert await verifier.verify(token(), [one], NOW)
        await settled(verifier)
        assert server.asked == 2
        with invalid(UNKNOWN):
            await verifier.verify(token(), [one], NOW)
        # Long unused, the keys at hand are not trusted without a look.
        server.keys = [jwk(RSA, kid="a")]
        clock.now += 1000
        assert await verifier.verify(token(), [one], NOW)

    with_server(scenario)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, None),
        (404, None),
        (302, None),
        (200, b"<html>"),
        (200, b"[]"),
        (200, b"{}"),
        (200, b'{"keys": {}}'),
        (200, b'{"keys": []}'),
        (200, b'{"keys": [{"kty": "oct", "k": "AA"}]}'),
        (200, json.dumps({"keys": [jwk(OTHER_RSA, kid="a")], "x": "x" * tokens.MAX_JWKS_BYTES}).encode()),
    ],
)
def test_an_issuer_in_trouble_does_not_take_its_keys_away(clock: Clock, status: int, body: bytes | None) -> None:
    async def scenario(server: KeyServer, verifier: TokenVerifier, one: Issuer) -> None:
        server.keys = [jwk(RSA, kid="a")]
        assert await verifier.verify(token(), [one], NOW)
        server.status, server.body = status, body
        for _ in range(5):
            clock.now += 300
            assert await verifier.verify(token(), [one], NOW)
        assert server.asked == 6
        assert list(verifier.errors) == [server.url]
        server.status, server.body = 200, None
        clock.now += 300
        assert await verifier.verify(token(), [one], NOW)
        assert verifier.errors == {}

    with_server(scenario)


def test_an_issuer_that_is_away_for_long(clock: Clock) -> None:
    async def scenario(server: KeyServer, verifier: TokenVerifier, one: Issuer) -> None:
        server.keys = [jwk(RSA, kid="a")]
        assert await verifier.verify(token(), [one], NOW)
        await server.stop()
        clock.now += 23 * 3600
        assert await verifier.verify(token(), [one], NOW)
        clock.now += 2 * 3600
        with pytest.raises(Unavailable):
            await verifier.verify(token(), [one], NOW)

    with_server(scenario)


def test_an_issuer_that_was_never_there(clock: Clock) -> None:
    async def scenario(server: KeyServer, verifier: TokenVerifier, one: Issuer) -> None:
        server.status = 503
        for _ in range(10):
            with pytest.raises(Unavailable) as caught:
                await verifier.verify(token(), [one], NOW)
        assert (caught.value.status, caught.value.headers["retry-after"]) == (503, "10")
        assert server.url not in caught.value.message
        assert server.asked == 1
        server.status, server.keys = 200, [jwk(RSA, kid="a")]
        clock.now += 10
        assert await verifier.verify(token(), [one], NOW)

    with_server(scenario)


def test_who_gives_up_waiting_ends_no_fetch_for_the_others(clock: Clock) -> None:
    async def scenario(server: KeyServer, verifier: TokenVerifier, one: Issuer) -> None:
        server.keys = [jwk(RSA, kid="a")]
        server.gate = asyncio.Event()
        first = asyncio.create_task(verifier.verify(token(), [one], NOW))
        second = asyncio.create_task(verifier.verify(token(), [one], NOW))
        await until(lambda: server.asked)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        server.gate.set()
        assert (await second)["sub"] == "ann"
        assert first.cancelled()
        assert server.asked == 1

    with_server(scenario)


def test_a_verifier_closed_in_the_middle_of_a_fetch(clock: Clock) -> None:
    async def scenario(server: KeyServer, verifier: TokenVerifier, one: Issuer) -> None:
        server.gate = asyncio.Event()
        waiting = asyncio.create_task(verifier.verify(token(), [one], NOW))
        await until(lambda: server.asked)
        await verifier.close()
        (result,) = await asyncio.gather(waiting, return_exceptions=True)
        assert isinstance(result, (asyncio.CancelledError, Unavailable))
        server.gate.set()

    with_server(scenario)


# --- tokens verified before


def test_a_verified_token_is_remembered_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    verified = 0
    real = tokens._made_by

    def counted(*arguments: Any) -> bool:
        nonlocal verified
        verified += 1
        return real(*arguments)

    monkeypatch.setattr(tokens, "_made_by", counted)
    one = issuer(pem(RSA), leeway_s=0)
    short, long = sign(claims(exp=NOW + 20)), sign(claims(exp=NOW + 600))

    async def scenario() -> None:
        verifier = TokenVerifier()
        for text in (short, long):
            first = await verifier.verify(text, [one], NOW)
            assert await verifier.verify(text, [one], NOW + 19) is first
        assert verified == 2
        with invalid("The token has expired."):
            await verifier.verify(short, [one], NOW + 20)
        assert await verifier.verify(long, [one], NOW + 59)
        count = verified
        assert await verifier.verify(long, [one], NOW + 60)
        assert verified == count + 1

    asyncio.run(scenario())


def test_what_is_remembered_ends_with_the_issuers_settings() -> None:
    text = sign(claims())
    first, second = issuer(pem(RSA)), issuer(pem(OTHER_RSA))

    async def scenario() -> None:
        verifier = TokenVerifier()
        assert await verifier.verify(text, [first], NOW)
        with invalid("The token's signature is wrong."):
            await verifier.verify(text, [second], NOW)
        with invalid("The token's issuer is not known here."):
            await verifier.verify(text, [], NOW)
        assert await verifier.verify(text, [first], NOW)

    asyncio.run(scenario())


def test_memory_is_bounded_and_the_least_used_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_VERIFIED", 10)
    one = issuer(pem(ED))

    async def scenario() -> None:
        verifier = TokenVerifier()
        texts = [sign(claims(jti=str(number)), ED, "EdDSA") for number in range(30)]
        first = await verifier.verify(texts[0], [one], NOW)
        for text in texts[1:]:
            await verifier.verify(text, [one], NOW)
            assert await verifier.verify(texts[0], [one], NOW) is first
        assert len(verifier._verified) == 10

    asyncio.run(scenario())
