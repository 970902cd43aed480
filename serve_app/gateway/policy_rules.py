"""Rules across settings, which types cannot express. Each finds all its mistakes; `policy` runs them all before it
refuses a configuration.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from .config import Backend, Config, Issuer, Key, Limits, Operation, Rate, Role, Route
from .keys import HASH, PREFIX, moment
from .policy_shape import Problems, declared, nearest

_ENVIRONMENT_NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,127}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:/+-]{0,127}")
#: An origin as browsers send it, with `*` for any part of the host's name, or any port.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9*._-]+(?::(?:[0-9]{1,5}|\*))?")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[.:][A-Za-z_]\w*")
#: Headers that the gateway or HTTP itself sets.
_OWN_HEADERS: Final = {
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
#: Operations that need no backend of a route.
_NOT_OF_ROUTES: Final = {"admin", "models"}


def check(
    config: Config, raw: Mapping[str, Any], problems: Problems, environment: Mapping[str, str] | None
) -> list[Path]:
    """Check everything but keys.

    Args:
        config: As converted; parts that were wrong are missing in it.
        raw: As written, so that what refers to such a part is not called a mistake too.
        problems: Takes what is found.
        environment: Where variables are looked up; None: not at all.

    Returns:
        Further files that the configuration depends on (backends' keys), to be watched.
    """
    rules = _Rules(config, raw, problems, environment)
    rules.server()
    rules.store()
    rules.auth()
    for name, role in config.roles.items():
        rules.role(f"roles.{name}", role)
    for name, limits in config.tenants.items():
        check_limits(f"tenants.{name}", limits, problems)
    for name, backend in config.backends.items():
        rules.backend(f"backends.{name}", backend)
    rules.routes()
    rules.cors()
    rules.cache()
    rules.filters()
    rules.records()
    return rules.watched


class Known(NamedTuple):
    """What keys are checked against, and where each id and prefix stands so far: a second one is a mistake."""

    roles: Collection[str]
    aliases: Mapping[str, str]
    ids: dict[str, str]
    prefixes: dict[str, str]


def check_key(key: Key, where: str, known: Known, problems: Problems) -> bool:
    """Check one key; a good one is entered into `known`.

    Returns:
        Whether it may be used. A hundred thousand are checked in a row: nothing here is slower than it has to be.
    """
    before = len(problems)
    ids, prefixes = known.ids, known.prefixes
    if not _ID.fullmatch(key.id) or key.id.startswith("jwt:") or key.id == "anonymous":
        problems.say(
            f"{where}.id",
            key.id,
            "is no id for a key",
            "Use letters, digits and `._@:/+-`, beginning with a letter or digit; `jwt:...` and `anonymous` are taken.",
        )
    elif key.id in ids:
        problems.say(
            f"{where}.id",
            key.id,
            f"{ids[key.id]} has the same id",
            "Give every key its own id; `client` may be shared.",
        )
    if not PREFIX.fullmatch(key.prefix):
        problems.say(
            f"{where}.prefix",
            None if len(key.prefix) > 20 else key.prefix,
            "is not the 12 letters and digits between `rp-` and the next `-` of a key",
            "Take the prefix that was shown when the key was issued.",
        )
    elif key.prefix in prefixes:
        problems.say(
            f"{where}.prefix",
            key.prefix,
            f"{prefixes[key.prefix]} has the same prefix",
            "Issue one of the two keys anew.",
        )
    if not HASH.fullmatch(key.hash):
        problems.say(
            f"{where}.hash",
            None,
            "is not `sha256:` and 64 hexadecimal digits in lower case",
            "Give the hash that was shown when the key was issued, never the key.",
        )
    if key.role not in known.roles:
        problems.say(f"{where}.role", key.role, "there is no such role", nearest(key.role, known.roles))
    if key.expires or key.not_before:
        _period(key, where, problems)
    if key.max_tokens is not None and key.max_tokens < 1:
        problems.say(f"{where}.max_tokens", key.max_tokens, "is less than 1", "Give at least 1, or leave it out.")
    if not key.tenant:
        problems.say(f"{where}.tenant", key.tenant, "is empty", "Name the tenant, or leave it out.")
    if key.limits is not None:
        check_limits(f"{where}.limits", key.limits, problems)
    if key.models is not None:
        _patterns(f"{where}.models", key.models, known.aliases, problems)
    if len(problems) > before:
        return False
    ids[key.id] = where
    prefixes[key.prefix] = where
    return True


def _period(key: Key, where: str, problems: Problems) -> None:
    times = []
    for name, text in (("not_before", key.not_before), ("expires", key.expires)):
        try:
            times.append(moment(text) if text else None)
        except ValueError:
            problems.say(
                f"{where}.{name}", text, "is not a time as RFC 3339 writes it", "Write it as 2027-01-31T00:00:00Z."
            )
            return
    begins, ends = times
    if begins is not None and ends is not None and ends <= begins:
        problems.say(f"{where}.expires", key.expires, "is not after not_before", "Give a later time.")


def check_limits(where: str, limits: Limits, problems: Problems) -> None:
    """Every number of a limit is positive: what nobody may do is said by roles, not by a limit of 0."""
    for name in ("requests", "tokens"):
        rate: Rate | None = getattr(limits, name)
        if rate is None:
            continue
        if rate.limit < 1:
            problems.say(
                f"{where}.{name}.limit", rate.limit, "is less than 1", "Give at least 1, or leave the limit out."
            )
        if rate.burst is not None and rate.burst < 1:
            problems.say(f"{where}.{name}.burst", rate.burst, "is less than 1", "Give at least 1, or leave it out.")
    for name in ("concurrency", "daily_tokens", "monthly_tokens"):
        number: int | None = getattr(limits, name)
        if number is not None and number < 1:
            problems.say(f"{where}.{name}", number, "is less than 1", "Give at least 1, or leave the limit out.")
    for name in ("daily_cost", "monthly_cost"):
        cost: float | None = getattr(limits, name)
        if cost is not None and not 0 < cost < 1e9:
            problems.say(f"{where}.{name}", cost, "is not between 0 and 1e9", "Give an amount, or leave the limit out.")


def aliases_of(config: Config) -> dict[str, str]:
    """Models' ids by alias."""
    return {
        alias: name for name, route in config.routes.items() for alias in route.aliases if alias not in config.routes
    }


def _patterns(where: str, patterns: Iterable[str], aliases: Mapping[str, str], problems: Problems) -> None:
    for number, pattern in problems.numbered(where, patterns):
        here = f"{where}[{number}]"
        if not pattern:
            problems.say(here, pattern, "is empty", "Give a model's id or a pattern such as `llama-*`.")
        elif pattern in aliases:
            # It would silently allow nothing: requests are compared by the model's id.
            problems.say(here, pattern, "is an alias", f"Name the model itself: {aliases[pattern]}.")


class _Rules:
    def __init__(
        self, config: Config, raw: Mapping[str, Any], problems: Problems, environment: Mapping[str, str] | None
    ) -> None:
        self.config = config
        self.problems = problems
        self.environment = environment
        self.roles = declared(raw, "roles")
        self.backends = declared(raw, "backends")
        self.filter_names = declared(raw, "filters")
        self.aliases = aliases_of(config)
        self.watched: list[Path] = []

    # --- small rules

    def between(self, where: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high:
            self.problems.say(where, value, f"is not between {low:g} and {high:g}", "Give a number in between.")

    def positive(self, where: str, value: float) -> None:
        if not 0 < value < 1e9:
            self.problems.say(where, value, "is not greater than 0", "Give a positive number.")

    def empty(self, where: str, items: Collection[object]) -> bool:
        """Whether nothing was written into a list; one whose items were all wrong is another mistake."""
        return not items and where not in self.problems.left_out

    def known(self, where: str, name: str, names: Collection[str], what: str) -> None:
        if name not in names:
            self.problems.say(where, name, f"there is no such {what}", nearest(name, names))

    def url(self, where: str, url: str, schemes: Collection[str]) -> bool:
        """Whether it is an address; one with a password in it is never shown."""
        shown = None if "@" in url else url
        try:
            parts = urlsplit(url)
            good = (
                parts.scheme in schemes and (bool(parts.hostname) or parts.scheme == "unix") and (parts.port or 1) > 0
            )
            if not (parts.hostname or "").isascii():
                # As the resolver and the backend are told it.
                (parts.hostname or "").encode("idna")
        except ValueError:
            good = False
        if not good or any(one.isspace() for one in url):
            kinds = " or ".join(f"{one}://" for one in sorted(schemes))
            self.problems.say(where, shown, "is no address", f"Give {kinds}host:port.")
            return False
        return True

    def variable(self, where: str, name: str) -> None:
        """An environment variable that must be set. What is not shaped like a name may be the secret itself, and is not
        shown.
        """
        if not name:
            return
        if not _ENVIRONMENT_NAME.fullmatch(name):
            self.problems.say(
                where, None, "is not the name of an environment variable", "Give its name, in capitals, not the value."
            )
        elif self.environment is not None and not self.environment.get(name):
            self.problems.say(
                where, name, "the environment variable is not set", f"Set {name} for the gateway's process."
            )

    def file(self, where: str, name: str, what: str) -> None:
        if not name:
            return
        file = Path(name)
        self.watched.append(file)
        try:
            empty = not file.read_bytes().strip()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            self.problems.say(where, name, f"cannot be read: {reason}", f"Name a file with {what}.")
        else:
            if empty:
                self.problems.say(where, name, "is empty", f"Name a file with {what}.")

    def header(self, where: str, name: str) -> None:
        if not _HEADER_NAME.fullmatch(name):
            self.problems.say(where, name, "is not the name of a header", "Use letters, digits and dashes.")

    # --- sections

    def server(self) -> None:
        server = self.config.server
        for name in ("port", "admin_port"):
            self.between(f"server.{name}", getattr(server, name), 0, 65535)
        if server.port and server.port == server.admin_port:
            self.problems.say(
                "server.admin_port", server.admin_port, "is server.port too", "Give it a port of its own."
            )
        seconds = ("client_write_timeout_s", "client_head_timeout_s", "client_read_timeout_s", "reload_interval_s")
        for name in ("max_body_bytes", *seconds):
            self.positive(f"server.{name}", getattr(server, name))
        if server.max_buffered_bytes < 8 * server.max_body_bytes:
            self.problems.say(
                "server.max_buffered_bytes",
                server.max_buffered_bytes,
                "is less than eight times server.max_body_bytes",
                "Give more, or lower server.max_body_bytes: a body takes four times its bytes, and a caller gets half.",
            )
        for name in ("drain_s", "drain_delay_s", "stream_comment_s"):
            self.between(f"server.{name}", getattr(server, name), 0, 86400)

    def cors(self) -> None:
        for number, origin in enumerate(self.config.cors.origins):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                self.problems.say(
                    f"cors.origins[{number}]",
                    origin,
                    "is no origin",
                    "Give `*`, or scheme and host in lower case, with no path: https://app.example.com.",
                )
        self.between("cors.max_age_s", self.config.cors.max_age_s, 0, 86400)

    def store(self) -> None:
        store = self.config.store
        if store.url:
            self.url("store.url", store.url, {"redis", "rediss", "unix"})
        if store.cache_url:
            self.url("store.cache_url", store.cache_url, {"redis", "rediss", "unix"})
        self.variable("store.password_env", store.password_env)
        self.variable("store.cache_password_env", store.cache_password_env)
        self.positive("store.timeout_ms", store.timeout_ms)
        if not store.prefix or "{" in store.prefix or any(one.isspace() for one in store.prefix):
            self.problems.say("store.prefix", store.prefix, "is empty, or holds a space or brace", "Give a plain word.")
        if not 0 < store.local_fraction <= 1:
            self.problems.say(
                "store.local_fraction",
                store.local_fraction,
                "is no fraction",
                "Give one divided by the number of replicas.",
            )

    def auth(self) -> None:
        auth = self.config.auth
        if auth.anonymous_role:
            self.known("auth.anonymous_role", auth.anonymous_role, self.roles, "role")
        pairs: set[tuple[str, str]] = set()
        for number, issuer in self.problems.numbered("auth.issuers", auth.issuers):
            where = f"auth.issuers[{number}]"
            self.issuer(where, issuer)
            for audience in issuer.audience:
                if (issuer.issuer, audience) in pairs:
                    self.problems.say(
                        f"{where}.audience",
                        audience,
                        "an issuer above has it already",
                        "Give every pair of issuer and audience once.",
                    )
                pairs.add((issuer.issuer, audience))

    def issuer(self, where: str, issuer: Issuer) -> None:
        say = self.problems.say
        if not issuer.issuer:
            say(f"{where}.issuer", issuer.issuer, "is empty", "Give the value that its tokens have as `iss`.")
        if not all(issuer.audience) or self.empty(f"{where}.audience", issuer.audience):
            say(
                f"{where}.audience",
                issuer.audience,
                "names no audience",
                "Give the value that its tokens for this gateway have as `aud`; without it tokens for others would do.",
            )
        if bool(issuer.jwks_url) == bool(issuer.keys):
            say(where, None, "has to have either jwks_url or keys", "Give one of the two.")
        if issuer.jwks_url:
            self.url(f"{where}.jwks_url", issuer.jwks_url, {"http", "https"})
        else:
            self.public_keys(where, issuer)
        if self.empty(f"{where}.algorithms", issuer.algorithms):
            say(
                f"{where}.algorithms", issuer.algorithms, "is empty", "Name those the issuer signs with, such as RS256."
            )
        self.between(f"{where}.leeway_s", issuer.leeway_s, 0, 600)
        self.positive(f"{where}.jwks_cache_s", issuer.jwks_cache_s)
        self.between(f"{where}.max_age_s", issuer.max_age_s, 0, 1e9)
        for name in ("role_claim", "tenant_claim", "client_claim", "default_tenant"):
            if not getattr(issuer, name):
                say(f"{where}.{name}", "", "is empty", "Leave it out for the default.")
        if issuer.default_role:
            self.known(f"{where}.default_role", issuer.default_role, self.roles, "role")
        for value, role in issuer.role_map.items():
            self.known(f"{where}.role_map.{value}", role, self.roles, "role")

    def public_keys(self, where: str, issuer: Issuer) -> None:
        if not issuer.keys:
            return
        from .tokens import public_key  # noqa: PLC0415  with it comes a library that takes long to import

        fitting: set[str] = set()
        for number, given in self.problems.numbered(f"{where}.keys", issuer.keys):
            try:
                fitting |= public_key(given).algorithms
            except ValueError as error:
                self.problems.say(
                    f"{where}.keys[{number}]",
                    None,
                    str(error),
                    "Give the issuer's public key, as a JWK object or PEM text.",
                )
                return
        useless = [one for one in issuer.algorithms if one not in fitting]
        if len(useless) == len(issuer.algorithms) and useless:
            self.problems.say(
                f"{where}.algorithms",
                issuer.algorithms,
                "none of them fits a key",
                f"The keys do {', '.join(sorted(fitting))}.",
            )

    def role(self, where: str, role: Role) -> None:
        say = self.problems.say
        _patterns(f"{where}.models", role.models, self.aliases, self.problems)
        if role.max_tokens is not None and role.max_tokens < 1:
            say(f"{where}.max_tokens", role.max_tokens, "is less than 1", "Give at least 1, or leave it out.")
        if role.strict_max_tokens and role.max_tokens is None:
            say(
                f"{where}.strict_max_tokens",
                True,
                "there is no max_tokens to be strict about",
                "Give max_tokens, or leave it out.",
            )
        for name in role.denied_parameters:
            if role.allowed_parameters is not None and name in role.allowed_parameters:
                say(f"{where}.denied_parameters", name, "is allowed too", "Take it out of one of the two lists.")
        seen: set[str] = set()
        for number, name in self.problems.numbered(f"{where}.filters", role.filters):
            self.known(f"{where}.filters[{number}]", name, self.filter_names, "filter")
            if name in seen:
                say(f"{where}.filters[{number}]", name, "stands in the list already", "Take it out.")
            seen.add(name)
        check_limits(f"{where}.limits", role.limits, self.problems)

    def backend(self, where: str, backend: Backend) -> None:
        say = self.problems.say
        if self.url(f"{where}.url", backend.url, {"http", "https"}):
            parts = urlsplit(backend.url)
            if parts.path.rstrip("/").endswith("/v1"):
                say(f"{where}.url", None, "ends in /v1", "Leave /v1 away: the gateway adds the path of each request.")
            if parts.query or parts.fragment or "@" in parts.netloc:
                say(f"{where}.url", None, "holds more than an address", "Give credentials by api_key_env or headers.")
        if backend.api_key_env and backend.api_key_file:
            say(where, None, "has both api_key_env and api_key_file", "Give one of the two.")
        if backend.api_key_header:
            self.header(f"{where}.api_key_header", backend.api_key_header)
            if backend.api_key_header.lower() in _OWN_HEADERS:
                say(f"{where}.api_key_header", backend.api_key_header, "is set by HTTP itself", "Name another one.")
        self.variable(f"{where}.api_key_env", backend.api_key_env)
        self.file(f"{where}.api_key_file", backend.api_key_file, "the backend's key")
        for name, value in backend.headers.items():
            here = f"{where}.headers.{name}"
            self.header(here, name)
            if name.lower() in _OWN_HEADERS:
                say(here, None, "is set by HTTP itself", "Take it out.")
            if not value.isascii() or not value.isprintable():
                say(here, None, "has a value that no header can have", "Use printable ASCII characters in one line.")
        health = backend.health
        if not health.path.startswith("/"):
            say(f"{where}.health.path", health.path, "does not begin with /", "Give a path such as /v1/models.")
        for name in ("interval_s", "timeout_s", "unhealthy_after", "healthy_after", "eject_after", "eject_s"):
            self.positive(f"{where}.health.{name}", getattr(health, name))
        self.between(f"{where}.health.max_ejected", health.max_ejected, 0, 1)
        for name in ("connect_s", "first_token_s", "between_tokens_s", "total_s"):
            self.positive(f"{where}.timeouts.{name}", getattr(backend.timeouts, name))
        for name in ("keepalive", "max_connections"):
            self.between(f"{where}.{name}", getattr(backend, name), 0, 1_000_000)
        if isinstance(backend.verify_tls, str):
            self.file(f"{where}.verify_tls", backend.verify_tls or "(empty)", "certificates in PEM")

    def routes(self) -> None:
        names: dict[str, str] = dict.fromkeys(self.config.routes, "")
        for model_id, route in self.config.routes.items():
            where = f"routes.{model_id}"
            if not model_id or len(model_id) > 256 or not model_id.isprintable():
                self.problems.say(where, model_id, "is no name for a model", "Give a printable name.")
            for number, alias in self.problems.numbered(f"{where}.aliases", route.aliases):
                here = f"{where}.aliases[{number}]"
                if not alias:
                    self.problems.say(here, alias, "is empty", "Take it out.")
                elif alias in names:
                    other = f"an alias of {names[alias]}" if names[alias] else "the id of a model"
                    self.problems.say(here, alias, f"is {other} already", "Every name leads to one model.")
                else:
                    names[alias] = model_id
            self.route(where, route)

    def route(self, where: str, route: Route) -> None:
        say = self.problems.say
        if self.empty(f"{where}.backends", route.backends):
            say(f"{where}.backends", None, "is empty", "Name at least one backend.")
        seen: set[str] = set()
        for number, target in self.problems.numbered(f"{where}.backends", route.backends):
            here = f"{where}.backends[{number}]"
            self.known(f"{here}.backend", target.backend, self.backends, "backend")
            if target.backend in seen:
                say(f"{here}.backend", target.backend, "stands in the list already", "Raise its weight instead.")
            seen.add(target.backend)
            self.between(f"{here}.weight", target.weight, 0, 1_000_000)
            self.between(f"{here}.priority", target.priority, 0, 1000)
        if route.backends and all(target.weight == 0 for target in route.backends):
            say(f"{where}.backends", None, "all weights are 0", "Give one of them a weight.")
        if route.canary is not None:
            self.known(f"{where}.canary.backend", route.canary.backend, self.backends, "backend")
            self.between(f"{where}.canary.percent", route.canary.percent, 0, 100)
            self.header(f"{where}.canary.header", route.canary.header)
        if route.shadow is not None:
            self.known(f"{where}.shadow.backend", route.shadow.backend, self.backends, "backend")
            self.between(f"{where}.shadow.percent", route.shadow.percent, 0, 100)
        self.header(f"{where}.sticky_header", route.sticky_header)
        self.between(f"{where}.retries", route.retries, 0, 10)
        self.between(f"{where}.assumed_output_tokens", route.assumed_output_tokens, 0, 10_000_000)
        for name in ("input", "output"):
            self.between(f"{where}.price.{name}", getattr(route.price, name), 0, 1e9)
        self.operations(f"{where}.operations", route.operations)
        check_limits(f"{where}.limits", route.limits, self.problems)

    def operations(self, where: str, operations: Iterable[Operation]) -> None:
        for number, operation in self.problems.numbered(where, operations):
            if operation in _NOT_OF_ROUTES:
                self.problems.say(
                    f"{where}[{number}]",
                    operation,
                    "is no operation of a backend",
                    "Take it out; roles allow or forbid it.",
                )

    def cache(self) -> None:
        cache = self.config.cache
        self.positive("cache.ttl_s", cache.ttl_s)
        self.positive("cache.max_entry_bytes", cache.max_entry_bytes)
        self.between("cache.semantic_threshold", cache.semantic_threshold, 0, 1)
        if cache.semantic and not _DOTTED.fullmatch(cache.semantic):
            self.problems.say(
                "cache.semantic", cache.semantic, "is no dotted path of a class", "Write it as package.module.Class."
            )

    def filters(self) -> None:
        for name, settings in self.config.filters.items():
            where = f"filters.{name}"
            if self.empty(f"{where}.on", settings.on):
                self.problems.say(f"{where}.on", None, "is empty", "Name input, output or both.")
            self.between(f"{where}.hold_back", settings.hold_back, 1, 1_000_000)
            if settings.hold_back >= 1:
                from .filters.base import problems  # noqa: PLC0415  most start-ups have no filter

                for sentence in problems(name, settings):
                    self.problems.say(where, None, sentence, "See the filter's options.")

    def records(self) -> None:
        audit = self.config.audit
        for name in ("head_every_records", "head_every_s", "segment_bytes"):
            self.positive(f"audit.{name}", getattr(audit, name))
        self.between("audit.retention_days", audit.retention_days, 0, 100_000)
        if audit.enabled and not audit.directory:
            self.problems.say("audit.directory", "", "is empty", "Name a folder on a disk that stays.")
        if audit.content and not audit.requests:
            self.problems.say(
                "audit.content", True, "requests are not recorded at all", "Set audit.requests, or leave content out."
            )
        if audit.enabled:
            self.file("audit.signing_key_file", audit.signing_key_file, "an Ed25519 private key in PEM")
        tracing = self.config.tracing
        self.between("tracing.sample_ratio", tracing.sample_ratio, 0, 1)
        if tracing.endpoint:
            self.url("tracing.endpoint", tracing.endpoint, {"http", "https"})
        self.operations("open_operations", self.config.open_operations)
