"""From an Authorization header to a caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway import auth, keys
from serve_app.gateway.auth import Authenticator, Caller
from serve_app.gateway.config import Auth, Config, Issuer, Key, Limits, Rate, Role
from serve_app.gateway.errors import AuthenticationFailed, GatewayError, Unavailable
from serve_app.gateway.policy import Policy

NOW = 1_800_000_000.0
ALICE, BOB, OLD = keys.generate(), keys.generate(), keys.generate()
SIGNER = ed25519.Ed25519PrivateKey.generate()
PUBLIC = (
    SIGNER.public_key()
    .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    .decode()
)
OF_ROLE, OF_KEY = Limits(concurrency=5), Limits(requests=Rate(limit=7))


def policy(anonymous: str = "", **issuer: Any) -> Policy:
    made = Issuer(issuer="https://id", audience=["llm"], keys=[PUBLIC], **issuer)
    listed = [
        Key(id="alice-1", prefix=ALICE.prefix, hash=ALICE.hash, role="basic", client="alice", tenant="acme"),
        Key(
            id="bob",
            prefix=BOB.prefix,
            hash=BOB.hash,
            role="premium",
            limits=OF_KEY,
            retain=False,
            max_tokens=50,
            operations=["chat", "admin"],
        ),
        Key(id="old", prefix=OLD.prefix, hash=OLD.hash, role="basic", expires="2020-01-01"),
    ]
    roles = {"basic": Role(limits=OF_ROLE), "premium": Role(max_tokens=100), "anyone": Role(models=["free"])}
    return Policy(Config(auth=Auth(issuers=[made], anonymous_role=anonymous), roles=roles, keys=listed))


def who(given_policy: Policy, header: bytes | None, revoked: Container[str] = ()) -> Caller:
    async def scenario() -> Caller:
        authenticator = Authenticator()
        await authenticator.start()
        try:
            return await authenticator.authenticate(given_policy, header, revoked, NOW)
        finally:
            await authenticator.close()

    return asyncio.run(scenario())


def refused(given_policy: Policy, header: bytes | None, revoked: Container[str] = ()) -> AuthenticationFailed:
    with pytest.raises(AuthenticationFailed) as caught:
        who(given_policy, header, revoked)
    assert caught.value.status == 401
    assert caught.value.headers["www-authenticate"].startswith("Bearer")
    return caught.value


def bearer(text: str) -> bytes:
    return b"Bearer " + text.encode()


def token(**claims: object) -> bytes:
    values = {"iss": "https://id", "aud": "llm", "sub": "ann", "exp": NOW + 60, "role": "basic", **claims}
    return bearer(jwt.encode({name: one for name, one in values.items() if one is not ...}, SIGNER, "EdDSA"))


def test_a_key_becomes_its_caller() -> None:
    caller = who(policy(), bearer(ALICE.key))
    assert (caller.id, caller.client, caller.tenant, caller.role_name) == ("alice-1", "alice", "acme", "basic")
    assert caller.key is not None and caller.key.id == "alice-1"
    assert (caller.limits, caller.retain, caller.max_tokens, caller.unrestricted) == (OF_ROLE, True, None, True)
    assert "admin" not in caller.operations


def test_what_a_key_says_of_itself_goes_before_its_role() -> None:
    caller = who(policy(), bearer(BOB.key))
    assert (caller.id, caller.client, caller.tenant) == ("bob", "bob", "default")
    assert (caller.limits, caller.retain, caller.max_tokens) == (OF_KEY, False, 50)
    # `admin` is not the role's: a key narrows only.
    assert caller.operations == {"chat"}
    assert not caller.unrestricted


@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER ", b"Bearer   "])
def test_the_scheme_has_no_case_and_spaces_do_not_matter(scheme: bytes) -> None:
    assert who(policy(), scheme + ALICE.key.encode() + b" ").id == "alice-1"


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        (b"", "invalid_api_key"),
        (b"Bearer", "invalid_api_key"),
        (b"Bearer ", "invalid_api_key"),
        (b"Basic YTpi", "invalid_api_key"),
        (ALICE.key.encode(), "invalid_api_key"),
        (bearer("sk-1234"), "invalid_api_key"),
        (bearer(keys.generate().key), "invalid_api_key"),
        (bearer(ALICE.key[:-1]), "invalid_api_key"),
        (bearer(ALICE.key + "A"), "invalid_api_key"),
        (bearer(ALICE.key[:-1] + "é"), "invalid_api_key"),
        (b"Bearer " + ALICE.key.encode()[:-1] + b"\xff", "invalid_api_key"),
        (b"Bearer " + ALICE.key.encode() + b"\x00", "invalid_api_key"),
        (b"Bearer\t" + ALICE.key.encode(), "invalid_api_key"),
        (bearer(f"{ALICE.key}, Bearer {ALICE.key}"), "invalid_api_key"),
        (bearer(f"{ALICE.key[:16]}{BOB.key[16:]}"), "invalid_api_key"),
        (bearer(ALICE.key.upper()), "invalid_api_key"),
        (bearer(ALICE.hash), "invalid_api_key"),
        (bearer("rp-" + "a" * 100_000), "invalid_api_key"),
        (bearer("a.b.c"), "invalid_token"),
        (bearer(OLD.key), "expired_api_key"),
    ],
    # Keys are made anew each time: a test keeps its name all the same.
    ids=map(str, range(21)),
)
def test_headers_that_are_refused(header: bytes | None, code: str) -> None:
    error = refused(policy(), header)
    assert error.code == code
    assert ALICE.key[16:] not in error.message


@given(st.binary(max_size=120) | st.binary(max_size=80).map(lambda one: b"Bearer rp-" + one))
def test_no_bytes_do_anything_else(header: bytes) -> None:
    refused(policy(), header)


def test_revocation() -> None:
    error = refused(policy(), bearer(ALICE.key), {"alice-1"})
    assert error.code == "revoked_api_key"
    assert who(policy(), bearer(BOB.key), {"alice-1"}).id == "bob"
    assert refused(policy(), token(), {"jwt:https://id#ann"}).code == "revoked_api_key"


def test_a_revocation_counts_for_a_caller_that_is_known_already() -> None:
    async def scenario() -> None:
        authenticator, one = Authenticator(), policy()
        revoked: set[str] = set()
        for header, name in ((bearer(ALICE.key), "alice-1"), (token(), "jwt:https://id#ann")):
            assert (await authenticator.authenticate(one, header, revoked, NOW)).id == name
            revoked.add(name)
            with pytest.raises(AuthenticationFailed):
                await authenticator.authenticate(one, header, revoked, NOW)
            revoked.clear()
            assert (await authenticator.authenticate(one, header, revoked, NOW)).id == name

    asyncio.run(scenario())


def test_callers_are_made_once_for_a_policy() -> None:
    async def scenario() -> None:
        authenticator, first, second = Authenticator(), policy(), policy()
        for header in (bearer(ALICE.key), token(), token(jti="another token of the same subject")):
            one = await authenticator.authenticate(first, header, (), NOW)
            assert await authenticator.authenticate(first, header, (), NOW) is one
            other = await authenticator.authenticate(second, header, (), NOW)
            assert other is not one
            assert other.role is second.config.roles["basic"]

    asyncio.run(scenario())


def test_a_key_expires_also_for_a_caller_that_is_known_already() -> None:
    made = keys.generate()
    ends = keys.moment("2027-01-01")
    one = Policy(
        Config(
            roles={"r": Role()}, keys=[Key(id="k", prefix=made.prefix, hash=made.hash, role="r", expires="2027-01-01")]
        )
    )

    async def scenario() -> None:
        authenticator = Authenticator()
        assert await authenticator.authenticate(one, bearer(made.key), (), ends - 1)
        with pytest.raises(AuthenticationFailed) as caught:
            await authenticator.authenticate(one, bearer(made.key), (), ends)
        assert caught.value.code == "expired_api_key"

    asyncio.run(scenario())


# --- anonymous callers


@pytest.mark.parametrize("header", [None, bearer("EMPTY"), bearer("sk-whatever"), b"Basic YTpi"])
def test_anonymous_callers_where_they_are_allowed(header: bytes | None) -> None:
    caller = who(policy("anyone"), header)
    assert (caller.id, caller.client, caller.role_name, caller.key) == ("anonymous", "anonymous", "anyone", None)
    assert who(policy("anyone"), bearer(ALICE.key)).id == "alice-1"


@pytest.mark.parametrize(
    "header",
    [bearer(keys.generate().key), bearer(OLD.key), bearer("rp-x"), bearer("a.b.c")],
    ids=["other", "old", "short", "token"],
)
def test_a_wrong_key_or_token_is_not_anonymous(header: bytes) -> None:
    refused(policy("anyone"), header)


# --- tokens


def test_a_token_becomes_its_caller() -> None:
    caller = who(policy(), token(tenant="acme", role="premium"))
    assert (caller.id, caller.client, caller.tenant) == ("jwt:https://id#ann", "ann", "acme")
    assert (caller.role_name, caller.key, caller.max_tokens) == ("premium", None, 100)


def test_defaults_of_an_issuer() -> None:
    one = policy(default_role="basic", default_tenant="staff", client_claim="azp")
    caller = who(one, token(role=..., azp="portal"))
    assert (caller.role_name, caller.tenant, caller.client) == ("basic", "staff", "portal")
    assert who(one, token(role=...)).client == "ann"


@pytest.mark.parametrize(
    ("settings", "claims", "role"),
    [
        ({"role_claim": "realm_access.roles"}, {"realm_access": {"roles": ["offline", "premium"]}}, "premium"),
        ({"role_claim": "https://x.y/role"}, {"https://x.y/role": "premium"}, "premium"),
        ({"role_claim": "groups"}, {"groups": ["a", 5, None, "basic", "premium"]}, "basic"),
        ({"role_map": {"staff": "premium"}}, {"role": "staff"}, "premium"),
        ({"role_map": {"staff": "premium"}}, {"role": ["x", "staff"]}, "premium"),
    ],
)
def test_where_the_role_comes_from(settings: dict[str, Any], claims: dict[str, Any], role: str) -> None:
    assert who(policy(**settings), token(**{"role": ..., **claims})).role_name == role


@pytest.mark.parametrize(
    ("settings", "claims"),
    [
        ({}, {"role": ...}),
        ({}, {"role": "nobody"}),
        ({}, {"role": 5}),
        ({}, {"role": {"basic": 1}}),
        ({}, {"role": []}),
        ({}, {"role": [["basic"]]}),
        ({"role_map": {"staff": "premium"}}, {"role": "premium"}),
        ({"default_role": "basic"}, {"role": "nobody"}),
        ({"role_claim": "a.b"}, {"a": "b"}),
        ({"role_claim": "a.b"}, {"a": {"b": {"c": 1}}}),
        ({}, {"tenant": 5}),
        ({}, {"tenant": ""}),
        ({}, {"tenant": "a\nb"}),
        ({}, {"tenant": "x" * 257}),
        ({"client_claim": "azp"}, {"azp": ["x"]}),
    ],
)
def test_tokens_whose_claims_do_not_do(settings: dict[str, Any], claims: dict[str, Any]) -> None:
    assert refused(policy(**settings), token(**claims)).code == "invalid_token"


def test_without_issuers_a_token_is_no_key() -> None:
    one = Policy(Config(roles={"basic": Role()}))
    assert refused(one, token()).code == "invalid_api_key"


def test_a_request_that_waited_leaves_the_callers_of_a_newer_policy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for its issuer's keys while the policy changes has a caller of the old policy."""

    async def scenario() -> None:
        authenticator, old, new = Authenticator(), policy(), policy()
        waiting, check = asyncio.Event(), authenticator.tokens.check

        async def slow(*words: Any) -> Any:
            found = await check(*words)
            await waiting.wait()
            return found

        monkeypatch.setattr(authenticator.tokens, "check", slow)
        late = asyncio.create_task(authenticator.authenticate(old, token(), (), NOW))
        await asyncio.sleep(0)
        # An administrator's reload comes, and somebody's request after it.
        await authenticator.authenticate(new, bearer(ALICE.key), (), NOW)
        waiting.set()
        assert (await late).role is old.config.roles["basic"]
        assert (await authenticator.authenticate(new, token(), (), NOW)).role is new.config.roles["basic"]

    asyncio.run(scenario())


def test_nobody_gets_in_before_it_is_known_who_is_revoked() -> None:
    async def scenario() -> None:
        known: list[bool] = []
        authenticator, one = Authenticator(lambda: bool(known)), policy("anyone")
        for header in (bearer(ALICE.key), token()):
            with pytest.raises(Unavailable) as caught:
                await authenticator.authenticate(one, header, (), NOW)
            assert (caught.value.code, caught.value.headers["Retry-After"]) == ("store_unavailable", "1")
        # Who has no key has none to be revoked; a wrong one is wrong in any case.
        assert (await authenticator.authenticate(one, None, (), NOW)).id == "anonymous"
        with pytest.raises(AuthenticationFailed):
            await authenticator.authenticate(one, bearer(OLD.key), (), NOW)
        known.append(True)
        assert (await authenticator.authenticate(one, bearer(ALICE.key), (), NOW)).id == "alice-1"

    asyncio.run(scenario())


def test_memory_of_subjects_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_SUBJECTS", 10)

    async def scenario() -> None:
        authenticator, one = Authenticator(), policy()
        for number in range(25):
            caller = await authenticator.authenticate(one, token(sub=f"s{number}"), (), NOW)
            assert caller.client == f"s{number}"
        assert len(authenticator._subjects) <= 10

    asyncio.run(scenario())


def test_the_clock_is_the_callers() -> None:
    """`now` is what counts, not this machine's clock."""
    assert abs(time.time() - NOW) > 60
    with pytest.raises(GatewayError):
        asyncio.run(Authenticator().authenticate(policy(), token(), (), NOW + 3600))
