"""Who calls: an API key or a JSON web token becomes a `Caller`."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from .config import Issuer, Key, Limits, Role
from .errors import Unavailable
from .keys import MARK, refused
from .tokens import TokenVerifier

if TYPE_CHECKING:
    from .policy import Policy

#: The id of callers without a key, where `auth.anonymous_role` allows them.
ANONYMOUS: Final = "anonymous"
#: Longer headers are refused unread.
MAX_HEADER_BYTES: Final = 16 * 1024 + 64
#: Callers of tokens that are remembered.
MAX_SUBJECTS: Final = 10_000
_SHOW_HOW: Final = "Send it in the Authorization header (Authorization: Bearer YOUR_KEY), or in x-api-key or api-key."


@dataclass(frozen=True, slots=True, eq=False)
class Caller:
    """Who sent a request and what holds for them. One object serves all requests of a key under one policy."""

    #: The key's id, or `jwt:<issuer>#<sub>`, or `anonymous`.
    id: str
    #: Whom usage and audit name.
    client: str
    tenant: str
    role_name: str
    role: Role
    #: None for tokens and anonymous callers.
    key: Key | None
    #: The key's own, else the role's.
    limits: Limits
    #: False: nothing of this caller's requests is kept anywhere.
    retain: bool
    #: Role and key together.
    operations: frozenset[str] = field(init=False)
    max_tokens: int | None = field(init=False)
    #: Whether no rule of the role looks into the body.
    unrestricted: bool = field(init=False)
    #: Answers of `authorise.may_use` so far, by model id.
    usable: dict[str, bool] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        operations = frozenset[str](self.role.operations)
        bounds = [] if self.role.max_tokens is None else [self.role.max_tokens]
        if self.key is not None:
            if self.key.operations is not None:
                operations &= frozenset(self.key.operations)
            if self.key.max_tokens is not None:
                bounds.append(self.key.max_tokens)
        max_tokens = min(bounds, default=None)
        unrestricted = max_tokens is None and self.role.allowed_parameters is None and not self.role.denied_parameters
        # The class is frozen for everyone else.
        object.__setattr__(self, "operations", operations)
        object.__setattr__(self, "max_tokens", max_tokens)
        object.__setattr__(self, "unrestricted", unrestricted)
        object.__setattr__(self, "usable", {})


class Authenticator:
    """Turns an Authorization header into a caller. Holds what tokens need: keys of issuers, tokens verified a moment
    ago.

    Args:
        informed: Whether it is known which keys are revoked; until then nobody with a key or token is let in.
    """

    def __init__(self, informed: Callable[[], bool] = lambda: True) -> None:
        self.tokens = TokenVerifier()
        self._informed = informed
        self._policy: Policy | None = None
        self._callers: dict[str, Caller] = {}
        self._subjects: dict[tuple[str, ...], Caller] = {}

    async def start(self) -> None:
        """Nothing is fetched beforehand: an issuer that is away keeps no gateway from starting."""

    async def close(self) -> None:
        """Close connections to issuers."""
        await self.tokens.close()

    async def authenticate(
        self, policy: Policy, authorization: bytes | None, revoked: Container[str], now: float
    ) -> Caller:
        """The caller behind an Authorization header.

        Args:
            policy: The one in force.
            authorization: The header's value; None where there is none.
            revoked: Ids of callers (keys, or `jwt:<issuer>#<sub>`) whose access was taken away at run time.
            now: Seconds since 1970.

        Raises:
            AuthenticationFailed: Without a valid key or token; its code tells which: `missing_api_key`,
                `invalid_api_key`, `expired_api_key`, `revoked_api_key`, `invalid_token`, `expired_token`.
            Unavailable: The token's issuer cannot be reached, and none of its keys is known yet; or nobody knows yet
                which keys are revoked.
        """
        if policy is not self._policy:
            self._policy = policy
            self._callers = {}
            self._subjects = {}
        if authorization is None:
            return self._anonymous(policy, "missing_api_key", f"No API key was given. {_SHOW_HOW}")
        if len(authorization) > MAX_HEADER_BYTES:
            raise refused("The Authorization header is too long.", "invalid_api_key")
        text = authorization.decode("latin-1")
        if text[:7].lower() != "bearer ":
            return self._anonymous(policy, "invalid_api_key", f"The API key is not sent as a bearer token. {_SHOW_HOW}")
        text = text[7:].strip(" ")
        if text.startswith(MARK):
            key = policy.keys.find(text, now)
            if key.id in revoked:
                raise refused("The API key has been revoked.", "revoked_api_key")
            self._require_informed()
            caller = self._callers.get(key.id)
            if caller is None:
                caller = self._callers[key.id] = _of_key(policy, key)
            return caller
        if text.count(".") == 2 and policy.config.auth.issuers:
            issuer, claims = await self.tokens.check(text, policy.config.auth.issuers, now)
            caller = self._of_claims(policy, issuer, claims)
            if caller.id in revoked:
                raise refused("Access of the token's subject has been revoked.", "revoked_api_key")
            self._require_informed()
            return caller
        return self._anonymous(policy, "invalid_api_key", "The API key is not valid.")

    def _require_informed(self) -> None:
        if not self._informed():
            raise Unavailable(
                "Revoked keys cannot be told from good ones yet. Please try again.",
                code="store_unavailable",
                headers={"Retry-After": "1"},
            )

    def _anonymous(self, policy: Policy, code: str, message: str) -> Caller:
        """The caller without credentials of ours, such as the word that OpenAI's clients demand in place of a key."""
        name = policy.config.auth.anonymous_role
        if not name:
            raise refused(message, code)
        # No key has this id: `policy` refuses it.
        caller = self._callers.get(ANONYMOUS)
        if caller is None:
            role = policy.config.roles[name]
            caller = Caller(ANONYMOUS, ANONYMOUS, "default", name, role, None, role.limits, True)
            self._callers[ANONYMOUS] = caller
        return caller

    def _of_claims(self, policy: Policy, issuer: Issuer, claims: dict[str, Any]) -> Caller:
        """A token's caller. Its signature and times are checked already; what it says of role, tenant and client is
        not.
        """
        role_name = _role_of(policy, issuer, claims)
        subject: str = claims["sub"]
        client = _name(_claim(claims, issuer.client_claim), "client", subject)
        tenant = _name(_claim(claims, issuer.tenant_claim), "tenant", issuer.default_tenant)
        which = (issuer.issuer, subject, role_name, client, tenant)
        # A request that waited for its issuer's keys goes on with its own policy when another has come meanwhile, and
        # leaves the new one's callers alone.
        current = policy is self._policy
        caller = self._subjects.get(which) if current else None
        if caller is None:
            role = policy.config.roles[role_name]
            name = f"jwt:{issuer.issuer}#{subject}"
            caller = Caller(name, client, tenant, role_name, role, None, role.limits, True)
            if current:
                if len(self._subjects) >= MAX_SUBJECTS:
                    self._subjects.clear()
                self._subjects[which] = caller
        return caller


def _of_key(policy: Policy, key: Key) -> Caller:
    role = policy.config.roles[key.role]
    limits = role.limits if key.limits is None else key.limits
    return Caller(key.id, key.client or key.id, key.tenant, key.role, role, key, limits, key.retain)


def _role_of(policy: Policy, issuer: Issuer, claims: dict[str, Any]) -> str:
    value = _claim(claims, issuer.role_claim)
    if value is None:
        if issuer.default_role:
            return issuer.default_role
        raise refused("The token names no role.", "invalid_token")
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str):
            # With a map, only what it names counts: a claim's value that happens to be a role's name does not.
            name = issuer.role_map.get(one) if issuer.role_map else one
            if name is not None and name in policy.config.roles:
                return name
    raise refused("The token names no role that is known here.", "invalid_token")


def _claim(claims: dict[str, Any], path: str) -> object:
    """A claim by name, else by its dotted path; None where there is none. A name with dots (a URL) comes first."""
    if path in claims:
        return claims[path]
    value: object = claims
    for part in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def _name(value: object, what: str, default: str) -> str:
    if value is None:
        return default
    if isinstance(value, str) and 0 < len(value) <= 256 and value.isprintable():
        return value
    raise refused(f"The token's {what} is not a name.", "invalid_token")
