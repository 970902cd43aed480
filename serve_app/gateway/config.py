"""The shape of the gateway's configuration: what a file may say, with its defaults.

A configuration is YAML or JSON. `serve_app.gateway.policy` reads it, finds every mistake in one pass and works out what
the request path looks up.
Names ending in `_s` are seconds, in `_ms` milliseconds, in `_bytes` bytes.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Operation = Literal[
    "chat", "completions", "responses", "embeddings", "rerank", "score", "models", "audio", "files", "tokenize", "admin"
]
Period = Literal["second", "minute", "hour", "day"]
Action = Literal["block", "redact", "flag"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the configuration; a name that it does not know is a mistake."""


class Server(Section, frozen=True):
    """Where the gateway listens. The admin port also serves probes and metrics, and belongs on no public address."""

    host: str = "127.0.0.1"
    port: int = 8080
    admin_host: str = "127.0.0.1"
    admin_port: int = 9090
    max_body_bytes: int = 10 * 1024 * 1024
    #: Bytes that requests' bodies take at a time (as they came, decoded, and in copies), over all requests; more are
    #: refused with 503. One caller gets half of it. It is about what the process takes for them, beside its own.
    max_buffered_bytes: int = 256 * 1024 * 1024
    #: Seconds that open requests have to finish after SIGTERM.
    drain_s: float = 60.0
    #: Seconds between SIGTERM and the listening socket's end, so that load balancers see the probe fail first.
    drain_delay_s: float = 0.0
    #: A client that takes none of the answer for so long is dropped.
    client_write_timeout_s: float = 60.0
    #: A stream that is silent for so long gets a comment, which clients pass over and load balancers take for a sign of
    #: life (theirs cut off after 60 s, commonly). One that has not begun begins with it. 0: never.
    stream_comment_s: float = 15.0
    #: Seconds that a client's connection stays open between requests: longer than the idle time of a load balancer that
    #: keeps connections, so that it closes first and meets no closed one.
    keep_alive_s: float = 75.0
    #: Seconds that a client has to send a request's line and headers.
    client_head_timeout_s: float = 20.0
    #: Seconds that a client has to send its whole body.
    client_read_timeout_s: float = 30.0
    #: The configuration file is looked at so often.
    reload_interval_s: float = 2.0


class Cors(Section, frozen=True):
    """Pages in browsers that may call the API (https://fetch.spec.whatwg.org/#http-cors-protocol)."""

    #: `https://app.example.com`, patterns (`https://*.example.com`), or `*`. None: no page of another origin may.
    origins: list[str] = msgspec.field(default_factory=list)
    #: Seconds that a browser remembers what it may.
    max_age_s: int = 600


class Store(Section, frozen=True):
    """Redis, shared by all replicas: limits, budgets, revocations, weights, cache. An empty url: this process alone.

    It has to keep what it was given (maxmemory-policy noeviction): a budget that is dropped to make room begins at 0.
    """

    url: str = ""
    #: Environment variable with the password, where the url has none.
    password_env: str = ""
    #: Another Redis for cached answers alone, which may drop them when it is full (allkeys-lru). Empty: the same one.
    cache_url: str = ""
    cache_password_env: str = ""
    prefix: str = "rayplane"
    timeout_ms: int = 250
    #: What happens while Redis is away: refuse (503), or allow this replica a fraction of every limit.
    on_failure: Literal["closed", "local"] = "closed"
    local_fraction: float = 0.25
    #: A replica that starts while Redis is away does not know which keys were revoked by the admin API. False: it is
    #: not ready, and answers keys and tokens with 503, until it has read that once. True (with on_failure local): it
    #: serves all the same.
    start_without_revocations: bool = False


class Rate(Section, frozen=True):
    """A token bucket: `limit` a period, refilled evenly; `burst` is its size (default: limit)."""

    limit: int
    per: Period = "minute"
    burst: int | None = None


class Limits(Section, frozen=True):
    """What one subject may use. Nothing given: no limit. Budgets start anew at midnight UTC and on the first of the
    month.
    """

    requests: Rate | None = None
    tokens: Rate | None = None
    concurrency: int | None = None
    daily_tokens: int | None = None
    monthly_tokens: int | None = None
    #: In the currency of the models' prices.
    daily_cost: float | None = None
    monthly_cost: float | None = None


class Key(Section, frozen=True):
    """An API key: a hash, never the key. `prefix` is its public beginning, by which it is found."""

    id: str
    prefix: str
    #: `sha256:<64 hex digits>` of the whole key.
    hash: str
    role: str
    tenant: str = "default"
    #: Whom usage and audit name; default: the key's id.
    client: str = ""
    #: RFC 3339; empty: never.
    expires: str = ""
    not_before: str = ""
    disabled: bool = False
    #: Narrow (never widen) the role.
    models: list[str] | None = None
    operations: list[Operation] | None = None
    max_tokens: int | None = None
    #: Replace the role's limits of a key.
    limits: Limits | None = None
    #: False: no cache and no flagging store holds anything of this client's requests.
    retain: bool = True


class Issuer(Section, frozen=True):
    """Who may sign JSON web tokens (RFC 7519, RFC 8725)."""

    issuer: str
    audience: list[str]
    #: One of these: where the keys are, or the keys (JWK objects or PEM texts).
    jwks_url: str = ""
    keys: list[dict[str, Any] | str] = msgspec.field(default_factory=list)
    algorithms: list[
        Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
    ] = msgspec.field(default_factory=lambda: ["RS256", "ES256", "EdDSA"])
    leeway_s: float = 30.0
    jwks_cache_s: float = 300.0
    #: Claims, dotted where nested (`realm_access.roles`). A claim that is a list gives the first role known here.
    role_claim: str = "role"
    tenant_claim: str = "tenant"
    client_claim: str = "sub"
    #: Roles by the claim's value; empty: the value is the role.
    role_map: dict[str, str] = msgspec.field(default_factory=dict)
    #: For tokens without the claim; empty: refuse them.
    default_role: str = ""
    default_tenant: str = "default"
    #: A token that lives longer than this (exp - iat) is refused; 0: any.
    max_age_s: float = 0.0


class Auth(Section, frozen=True):
    """How callers prove who they are. `anonymous_role` (empty: none) is for gateways behind other authentication."""

    issuers: list[Issuer] = msgspec.field(default_factory=list)
    anonymous_role: str = ""


class Role(Section, frozen=True):
    """What a caller may do. `models` are ids or patterns (`*`, `llama-*`)."""

    models: list[str] = msgspec.field(default_factory=list)
    operations: list[Operation] = msgspec.field(
        default_factory=lambda: ["chat", "completions", "responses", "embeddings", "rerank", "score", "models"]
    )
    #: Upper bound of max_tokens, max_completion_tokens and max_output_tokens; also the default where a request states
    #: none. It is for all answers to a request together: with `n`, `best_of` or several prompts the default is divided
    #: among them, and a request that asks for more in all is refused. The default yields to the model's context length.
    max_tokens: int | None = None
    #: Refuse larger values instead of lowering them.
    strict_max_tokens: bool = False
    #: May send `chat_template`, a program that makes the prompt in the engine: no filter sees what it will say.
    chat_template: bool = False
    #: Request parameters (names of the JSON body) that alone are allowed, or that are refused.
    allowed_parameters: list[str] | None = None
    denied_parameters: list[str] = msgspec.field(default_factory=list)
    #: Limits of each key (or token subject) with the role.
    limits: Limits = msgspec.field(default_factory=Limits)
    #: Names of filters, in order.
    filters: list[str] = msgspec.field(default_factory=list)
    #: May ask for a backend by header (x-rayplane-backend) and skip the cache.
    choose_backend: bool = False


class Health(Section, frozen=True):
    """Active checks, and ejection of backends by what requests saw (outlier ejection)."""

    path: str = "/v1/models"
    interval_s: float = 5.0
    timeout_s: float = 2.0
    #: Checks in a row that make a backend unhealthy, and healthy again.
    unhealthy_after: int = 2
    healthy_after: int = 1
    #: Failed requests in a row (connection errors, 5xx, time-outs) that eject a backend, and for how long; doubled each
    #: time, up to ten times.
    eject_after: int = 5
    eject_s: float = 10.0
    #: At most this share of a route's backends is ejected at a time.
    max_ejected: float = 0.5


class Timeouts(Section, frozen=True):
    """Seconds: to connect, until the answer's first byte (first token), between pieces of a stream, in all."""

    connect_s: float = 2.0
    first_token_s: float = 120.0
    between_tokens_s: float = 60.0
    total_s: float = 600.0


class Backend(Section, frozen=True):
    """An OpenAI-compatible server."""

    #: Up to and without `/v1`.
    url: str
    #: Its own key: in the environment, or in a file.
    api_key_env: str = ""
    api_key_file: str = ""
    #: The header that takes the key as it is (`api-key`, say); empty: Authorization, as a bearer token.
    api_key_header: str = ""
    #: The model's name there, where it differs from the route's.
    model: str = ""
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    health: Health = msgspec.field(default_factory=Health)
    timeouts: Timeouts = msgspec.field(default_factory=Timeouts)
    #: Idle connections kept, and connections at most (0: no bound).
    keepalive: int = 256
    max_connections: int = 0
    #: Understands vLLM's stream_options.continuous_usage_stats: aborted streams are counted to the token.
    continuous_usage: bool = True
    #: False: certificates are not checked. A path: the CA file.
    verify_tls: bool | str = True


class Target(Section, frozen=True):
    """A backend of a route. Among those of the lowest healthy priority, weights share the traffic."""

    backend: str
    weight: int = 100
    #: 0 first; others take over when no backend of a lower number is healthy (another cluster, another cloud).
    priority: int = 0


class Canary(Section, frozen=True):
    """A second version: it gets a percentage of the callers, and every request with the header's value."""

    backend: str
    percent: float = 0.0
    header: str = "x-rayplane-canary"
    value: str = "always"


class Shadow(Section, frozen=True):
    """A backend that gets a copy of a share of the requests; its answers are measured and thrown away. No copies are
    made of files, of bodies of more than 1 MiB, and of what nobody may retain.
    """

    backend: str
    percent: float = 0.0


class Price(Section, frozen=True):
    """For a million tokens, in the currency of the cost budgets."""

    input: float = 0.0
    output: float = 0.0


class Route(Section, frozen=True):
    """A model as callers name it."""

    backends: list[Target]
    canary: Canary | None = None
    shadow: Shadow | None = None
    #: The same caller (key, or the header's value) keeps its backend while it is healthy.
    sticky: Literal["none", "client", "header"] = "none"
    sticky_header: str = "x-session-id"
    #: More attempts before the first byte, on other backends where there are any.
    retries: int = 2
    operations: list[Operation] = msgspec.field(
        default_factory=lambda: ["chat", "completions", "responses", "embeddings", "rerank", "score"]
    )
    aliases: list[str] = msgspec.field(default_factory=list)
    #: Limits of the model, over all callers.
    limits: Limits = msgspec.field(default_factory=Limits)
    price: Price = msgspec.field(default_factory=Price)
    #: Assumed output of requests that state no maximum, for the first estimate.
    assumed_output_tokens: int = 256


class Cache(Section, frozen=True):
    """Answers kept in Redis. Only requests with temperature 0 (or a seed and temperature 0), or that ask by
    `x-rayplane-cache: use`.
    """

    enabled: bool = False
    ttl_s: float = 300.0
    scope: Literal["tenant", "client", "all"] = "tenant"
    when: Literal["deterministic", "asked"] = "deterministic"
    operations: list[Operation] = msgspec.field(default_factory=lambda: ["chat", "completions", "embeddings"])
    max_entry_bytes: int = 1024 * 1024
    #: A request like one that is under way waits so long for that one's answer, then asks the backend itself.
    wait_s: float = 5.0
    #: Dotted path of a class with the interface of `cache.SemanticIndex`; empty: exact matches only.
    semantic: str = ""
    semantic_options: dict[str, Any] = msgspec.field(default_factory=dict)
    semantic_threshold: float = 0.95
    #: Hits count against token limits and budgets.
    count_hits: bool = False


class Filter(Section, frozen=True):
    """A check on requests, answers or both."""

    type: Literal["injection", "sensitive_data", "words", "webhook"]
    action: Action = "block"
    on: list[Literal["input", "output"]] = msgspec.field(default_factory=lambda: ["input", "output"])
    #: By type: kinds (sensitive_data), words and patterns (words), url, timeout_ms, on_error (webhook), threshold
    #: (injection).
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    #: Characters of a stream held back at most, so that a match across pieces is found.
    hold_back: int = 256
    #: Prompts given as numbers of tokens (or as embeddings) hold no text to look at. Where the filter blocks or redacts
    #: requests they are refused, unless told otherwise.
    unreadable_prompts: Literal["refuse", "allow"] = "refuse"


class Audit(Section, frozen=True):
    """The tamper-evident record."""

    enabled: bool = False
    directory: str = "audit"
    #: File with an Ed25519 private key (PEM) that signs heads.
    signing_key_file: str = ""
    #: A head is signed after so many records or seconds, whichever comes first.
    head_every_records: int = 1000
    head_every_s: float = 10.0
    #: Admin actions always; requests where this is set. Of requests without a valid key or token the number alone: a
    #: record a minute for each error code, so that nobody from outside can fill the disk.
    requests: bool = True
    #: Prompts and answers too. Off by default: they are personal data.
    content: bool = False
    segment_bytes: int = 64 * 1024 * 1024
    retention_days: int = 0
    #: What happens when the disk is full: refuse requests, or go on and count what is lost.
    on_failure: Literal["closed", "open"] = "closed"


class Logging(Section, frozen=True):
    """One JSON object a line, on standard output."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    #: One line a request.
    requests: bool = True


class Tracing(Section, frozen=True):
    """OpenTelemetry, where its packages are installed."""

    enabled: bool = False
    endpoint: str = ""
    sample_ratio: float = 0.1
    service_name: str = "rayplane-gateway"


class Config(Section, frozen=True):
    """The whole file. Everything but `server`, `store`, `logging`, `tracing` and `audit` is taken over while the
    gateway runs.
    """

    server: Server = msgspec.field(default_factory=Server)
    store: Store = msgspec.field(default_factory=Store)
    auth: Auth = msgspec.field(default_factory=Auth)
    roles: dict[str, Role] = msgspec.field(default_factory=dict)
    keys: list[Key] = msgspec.field(default_factory=list)
    #: JSON (or YAML) files with further keys, relative to this one; looked at as often as this one. Behind a name may
    #: stand what has to be in it (`keys.json#sha256=<64 hex digits>`): so files that are replaced one after the other
    #: are taken over together.
    key_files: list[str] = msgspec.field(default_factory=list)
    #: Limits of a tenant by name; `*` is for those not named.
    tenants: dict[str, Limits] = msgspec.field(default_factory=dict)
    backends: dict[str, Backend] = msgspec.field(default_factory=dict)
    routes: dict[str, Route] = msgspec.field(default_factory=dict)
    cors: Cors = msgspec.field(default_factory=Cors)
    cache: Cache = msgspec.field(default_factory=Cache)
    filters: dict[str, Filter] = msgspec.field(default_factory=dict)
    audit: Audit = msgspec.field(default_factory=Audit)
    logging: Logging = msgspec.field(default_factory=Logging)
    tracing: Tracing = msgspec.field(default_factory=Tracing)
    #: Operations that pass through although the gateway knows nothing of their bodies; tokenize and other engine
    #: endpoints are closed else.
    open_operations: list[Operation] = msgspec.field(default_factory=list)
