"""One request from its first byte to its last: who asks, whether it may, what it costs, who answers, what is kept."""

from __future__ import annotations

import asyncio
import fnmatch
import functools
import math
import time
from typing import Any, Literal

import msgspec

from . import authorise, request
from .auth import ANONYMOUS, Caller
from .bound import default
from .cache import Entry, Lead
from .config import Operation, Route
from .errors import BackendFailed, GatewayError, InvalidRequest, NotFound, PermissionDenied
from .filters.base import About, Blocked, Finding
from .filters.chain import Chain
from .filters.stream import StreamFilter
from .limits import Admission, LimitReached, Used, subjects
from .request import Bodies, ClientGone, Header, Headers, Receive, Scope, Send
from .routing import Answer, Call
from .runtime import Runtime
from .sse import Events, cut_usage, data, error_of, is_done
from .tracing import Trace
from .wire import SCOPE_KEY, WHOLE_KEY, Wire

#: An answer that is read as a whole has at most so many bytes.
MAX_ANSWER = 256 * 1024 * 1024
#: A longer request is hardly ever repeated, and takes longer to compare than it should.
_CACHED_BYTES = 1024 * 1024
#: Larger ones are not copied for a shadow backend.
_SHADOWED_BYTES = 1024 * 1024
_JSON = (b"content-type", b"application/json")
_EVENTS = b"text/event-stream"


class Exchange:
    """One request and its answer."""

    __slots__ = (
        "_answer",
        "_began",
        "_bodies",
        "_bound",
        "_first",
        "_form",
        "_headers",
        "_held",
        "_id",
        "_input",
        "_last",
        "_late",
        "_policy",
        "_receive",
        "_runtime",
        "_scope",
        "_send",
        "_sent",
        "_settled",
        "_silence",
        "_spoke",
        "_started",
        "_trace",
        "_watching",
        "_wire",
        "admission",
        "attempts",
        "backend",
        "cached",
        "caller",
        "code",
        "content",
        "estimated",
        "events",
        "failed",
        "findings",
        "gone",
        "model",
        "operation",
        "reached",
        "retain",
        "route",
        "status",
        "stream",
        "usage",
        "variant",
    )

    def __init__(self, runtime: Runtime, scope: Scope, receive: Receive, send: Send, bodies: Bodies) -> None:
        self._runtime = runtime
        self._policy = runtime.policy
        self._scope = scope
        self._receive = receive
        self._send = send
        self._began = time.perf_counter()
        self._bodies = bodies
        #: The role's bound for a request that states none: a parameter and its value.
        self._bound: tuple[str, int] | None = None
        self._held = 0
        self._first = 0.0
        self._last = 0.0
        #: An answer that began with a comment: nothing was known of it but that it is a stream.
        self._late = False
        self._silence: asyncio.TimerHandle | None = None
        self._spoke = 0.0
        self._form: request.Form | None = None
        self._headers: Headers | None = None
        self._id = ""
        self._input = 0
        self._started = False
        self._settled = False
        self._sent: list[bytes] | None = None
        self._trace: Trace | None = None
        self._answer: Answer | None = None
        self._watching = False
        self._wire: Wire = scope[SCOPE_KEY]
        self.admission: Admission | None = None
        self.attempts = 0
        self.backend = ""
        self.cached = ""
        self.caller: Caller | None = None
        self.code = ""
        self.content: dict[str, Any] | None = None
        self.estimated = False
        self.events = 0
        #: The status of what went wrong after the answer had begun.
        self.failed = 0
        self.findings: list[Finding] = []
        self.gone = False
        self.model = ""
        self.operation: Operation | None = None
        #: A backend has the request: its tokens count even when nobody reads the answer.
        self.reached = False
        self.retain = True
        self.route: Route | None = None
        self.status = 0
        self.stream = False
        self.usage: tuple[int, int] | None = None
        self.variant = ""

    async def run(self) -> None:
        """Answer the request, whatever happens."""
        self._runtime.metrics.entered()
        try:
            await self._handle()
        except GatewayError as error:
            await self._fail(error)
        except ClientGone:
            self.gone = True
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self.gone or task is None:
                raise
            task.uncancel()
        except Exception as error:
            self._runtime.logs.exception("a request failed inside the gateway", error=error, request_id=self._id)
            await self._fail(GatewayError("The gateway failed on this request."))
        finally:
            self._unwatch()
            self._hush()
            try:
                if self._answer is not None:
                    await self._answer.close()
            finally:
                if self._held and self.caller is not None:
                    self._bodies.give(self.caller.id, self._held)
                self._finish()

    # --- from the request to the backend

    async def _handle(self) -> None:
        runtime = self._runtime
        scope = self._scope
        self._id = "req_" + hex(id(self))[2:]
        headers = self._headers = Headers(scope["headers"])
        self._id = request.request_id(headers)
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers.known and self._cors():
            await self._preflight()
            return
        self.operation = operation = request.operation_of(scope["method"], scope["path"])
        runtime.audit.check()
        if runtime.tracing.enabled:
            self._trace = runtime.tracing.begin(scope["method"], scope["path"], headers.known)
        authorization = headers.authorization()
        now = time.time()
        try:
            self.caller = await runtime.authenticator.authenticate(
                self._policy, authorization, runtime.dynamic.revoked, now
            )
        except GatewayError as error:
            runtime.metrics.auth_failure(error.code or "invalid_api_key")
            raise
        if operation == "models":
            await self._models()
            return
        server = self._policy.config.server
        body = await request.read_body(
            self._receive,
            headers,
            server.max_body_bytes,
            server.client_read_timeout_s,
            self._hold,
            whole=scope.get(WHOLE_KEY, False),
        )
        decoded: dict[str, Any] | None = None
        if operation == "files":
            named = headers.text(b"x-rayplane-model") or self._only_route(operation)
        elif operation == "audio" and not scope["path"].endswith("/speech"):
            self._hold(len(body))  # the copy that goes on
            self._form = request.form(headers.known.get(b"content-type", b""), body)
            named = self._form.model
        else:
            self._hold(request.working_bytes(body))
            decoded = request.decode(body)
            named = request.model_of(decoded)
            if not request.one_reading(body):
                # Readers differ in which of two equal names counts, so there is one reading for all.
                body = msgspec.json.encode(decoded)
        await self._ask(body, decoded, named)

    def _hold(self, size: int) -> None:
        """So many bytes more are held for this request, until its end."""
        assert self.caller is not None
        try:
            self._bodies.take(self.caller.id, size)
        except GatewayError:
            self._runtime.metrics.limited("buffered_bytes")
            raise
        self._held += size

    def _only_route(self, operation: Operation) -> str:
        config = self._policy.config
        able = [name for name, route in config.routes.items() if self._opened(operation, route)]
        if len(able) != 1:
            raise InvalidRequest("Name the model whose backend keeps the files: header x-rayplane-model.")
        return able[0]

    def _opened(self, operation: Operation, route: Route) -> bool:
        return operation in route.operations or operation in self._policy.config.open_operations

    async def _ask(self, body: bytes, decoded: dict[str, Any] | None, named: str) -> None:
        runtime, policy, caller, operation, headers = (
            self._runtime,
            self._policy,
            self.caller,
            self.operation,
            self._headers,
        )
        assert caller is not None and operation is not None and headers is not None
        found = policy.route(named)
        if found is None:
            authorise.authorise(caller, operation, named, None, decoded)
            raise _no_model(named)
        model, route = found
        changes = authorise.authorise(caller, operation, model, route, decoded)
        self.model, self.route = model, route
        if not self._opened(operation, route):
            raise PermissionDenied(f"The model {self.model} does not offer {operation}.", code="operation_not_offered")
        rewritten = False
        if decoded is not None and changes:
            # What is set beside stated values is the role's default.
            name = next((name for name in changes if decoded.get(name) is None), "")
            if name:
                self._bound = name, changes.pop(name)
            if changes or name in decoded:
                decoded = {**decoded, **changes}
                decoded.pop(name, None)
                rewritten = True
        self.retain = (
            caller.retain
            and headers.known.get(b"x-rayplane-retain") != b"false"
            and (decoded is None or decoded.get("store") is not False)
        )
        self.stream = decoded is not None and request.flag(decoded, "stream")
        tokens, cost = self._estimate(route, operation, decoded and self._bounded(decoded), body)
        try:
            self.admission = await runtime.limiter.admit(
                subjects(policy, caller, self.model, route), tokens=tokens, cost_micro=cost
            )
        except LimitReached as error:
            runtime.metrics.limited(error.limit)
            raise
        if self.admission.degraded:
            runtime.metrics.degraded_request()
        self._watch_client()
        form = self._form
        chain = runtime.chain(caller.role_name, caller.role) if decoded is not None or form is not None else None
        about = None
        if chain is not None:
            about = About(
                request_id=self._id, client=caller.client, tenant=caller.tenant, model=self.model, retain=self.retain
            )
            if chain.has_input and decoded is not None:
                decoded, rewritten = await self._filter_request(chain, about, decoded, rewritten)
            elif chain.has_input and form is not None:
                given = {"prompt": [text for _, _, text in form.fields]}
                told, changed = await self._filter_request(chain, about, given, False)
                if changed:
                    body = form.replaced(body, told["prompt"])
        if rewritten:
            body = msgspec.json.encode(decoded)
        if runtime.audit.config.enabled and runtime.audit.config.content and self.retain:
            self.content = {"request": decoded}
            self._sent = []
        await self._through_cache(body, decoded, chain, about)

    def _bounded(self, decoded: dict[str, Any]) -> dict[str, Any]:
        """The request with the bound that holds for it."""
        return decoded if self._bound is None else {**decoded, self._bound[0]: self._bound[1]}

    async def _filter_request(
        self, chain: Chain, about: About, decoded: dict[str, Any], rewritten: bool
    ) -> tuple[dict[str, Any], bool]:
        assert self.operation is not None
        try:
            changed, findings = await chain.request(self.operation, decoded, about)
        except Blocked as error:
            self._found(error.findings)
            raise
        self._found(findings)
        return (decoded, rewritten) if changed is None else (changed, True)

    def _found(self, findings: list[Finding]) -> None:
        for finding in findings:
            self._runtime.metrics.finding(finding.filter, finding.action)
        self.findings.extend(findings)

    def _estimate(
        self, route: Route, operation: Operation, decoded: dict[str, Any] | None, body: bytes
    ) -> tuple[int, int]:
        """Tokens and price (millionths) that a request probably takes."""
        if decoded is None:
            return 0, 0
        took = self._input = request.input_tokens(decoded, body)
        gives = request.output_tokens(operation, decoded, route.assumed_output_tokens)
        return took + gives, _price(route, took, gives)

    def _watch_client(self) -> None:
        """Stop working when the caller hangs up."""
        task = asyncio.current_task()
        assert task is not None
        self._watching = True
        if not self._wire.watch(functools.partial(self._left, task)):
            raise ClientGone

    def _left(self, task: asyncio.Task[Any]) -> None:
        if self.gone:
            return
        self.gone = True
        if self._wire.too_slow:
            self.code = "client_too_slow"
        task.cancel()

    async def _through_cache(
        self, body: bytes, decoded: dict[str, Any] | None, chain: Chain | None, about: About | None
    ) -> None:
        runtime, caller, operation = self._runtime, self.caller, self.operation
        assert caller is not None and operation is not None and self._headers is not None
        config = self._policy.config.cache
        asked = self._headers.text(b"x-rayplane-cache")
        call = self._call(body, decoded)
        key = None
        skipped = asked == "skip" and caller.role.choose_backend
        if config.enabled and decoded is not None and self.retain and not skipped and len(body) <= _CACHED_BYTES:
            key = runtime.cache.key_of(
                config,
                caller,
                self.model,
                operation,
                self._bounded(decoded),
                runtime.answers_version,
                asked=asked == "use",
                extra=self._chosen(call),
            )
        if key is None:
            await self._forward(call, chain, about, None)
            return
        found = await runtime.cache.lookup(key)
        if isinstance(found, Entry):
            self.cached = found.how
            self.variant = found.variant
            runtime.metrics.cache(found.how)
            await self._replay(found)
            return
        self.cached = "miss"
        runtime.metrics.cache("miss")
        try:
            await self._forward(call, chain, about, found)
        finally:
            found.release()

    def _chosen(self, call: Call) -> str:
        """What decides about the version that answers, besides the route: those on the canary have answers of their
        own, whether its header or its percentage put them there.
        """
        canary = "canary" if self._runtime.router.on_canary(call) else ""
        return f"{canary}\n{call.backend or ''}" if canary or call.backend else ""

    async def _replay(self, entry: Entry) -> None:
        self.usage = entry.usage
        headers = [(b"content-type", _EVENTS if entry.stream else b"application/json"), *self._own_headers()]
        if not entry.stream:
            headers.append((b"content-length", b"%d" % len(entry.body)))
        await self._start(entry.status, headers)
        for piece in entry.pieces():
            self._time_piece()
            await self._body(piece, more=True)
        await self._body(b"", more=False)

    def _call(self, body: bytes, decoded: dict[str, Any] | None) -> Call:
        caller, operation, route, headers = self.caller, self.operation, self.route, self._headers
        assert caller is not None and operation is not None and route is not None and headers is not None
        return Call(
            route_id=self.model,
            route=route,
            method=self._scope["method"],
            path=self._scope["path"],
            query=self._scope.get("query_string", b""),
            headers=[*headers.forwarded, (b"x-request-id", self._id.encode())],
            body=body,
            decoded=decoded,
            stream=self.stream,
            caller_id=caller.id,
            sticky=headers.text(route.sticky_header.encode()) if route.sticky == "header" else caller.id,
            canary=headers.text(route.canary.header.encode()) if route.canary else None,
            backend=headers.text(b"x-rayplane-backend") or None if caller.role.choose_backend else None,
            request_id=self._id,
            # Files would be kept there (or deleted), and copies under way must not take the callers' memory.
            bound=default(operation, *self._bound, decoded) if self._bound and decoded else None,
            shadow=self.retain and operation != "files" and len(body) <= _SHADOWED_BYTES,
        )

    async def _forward(self, call: Call, chain: Chain | None, about: About | None, lead: Lead | None) -> None:
        runtime, operation, route, decoded = self._runtime, self.operation, self.route, call.decoded
        assert operation is not None and route is not None
        counted = self.stream and operation in request.CHUNKED and decoded is not None
        if counted and decoded is not None:
            backends = self._policy.config.backends
            continuous = all(backends[target.backend].continuous_usage for target in route.backends)
            call.body = request.with_usage(call.body, decoded, continuous)
        if self._trace is not None:
            call.headers = self._trace.onward(call.headers, operation, self.model, decoded and self._bounded(decoded))
        runtime.metrics.overhead(time.perf_counter() - self._began)
        self.reached = True
        if self.stream and self._policy.config.server.stream_comment_s:
            self._spoke = time.perf_counter()
            self._listen()
        try:
            answer = self._answer = await runtime.router.open(call)
        except GatewayError:
            # No backend answered: nothing was generated that could be read.
            self.reached = False
            raise
        self.backend, self.variant, self.attempts = answer.backend, answer.variant, answer.attempts
        kind = _media_type(answer.headers)
        if answer.status != 200 or kind != _EVENTS:
            self._hush()
        # Transcriptions are streamed by a field of their form, which nobody has looked at.
        self.stream = self.stream or (operation == "audio" and kind == _EVENTS)
        if answer.status == 200 and self.stream and kind == _EVENTS:
            await self._relay(
                answer,
                counted,
                wants=request.wants_usage(decoded or {}),
                chain=chain,
                about=about,
                lead=lead,
            )
        elif self._late:
            await self._refusal(answer)
        elif self._form is not None and answer.status == 200 and kind != _JSON[1] and chain and chain.has_output:
            await self._transcript(answer, chain, about)
        elif operation in request.CLOSED and kind != _JSON[1]:
            await self._pass_on(answer)
        else:
            await self._whole(answer, kind, chain, about, lead)

    # --- from the backend to the caller

    async def _whole(
        self, answer: Answer, kind: bytes, chain: Chain | None, about: About | None, lead: Lead | None
    ) -> None:
        assert self.operation is not None
        body = await answer.read(MAX_ANSWER)
        self._first = time.perf_counter()
        filtered = False
        if answer.status == 200:
            if kind == _JSON[1]:
                try:
                    usage = request.usage_of(body)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    raise BackendFailed("The backend's answer is no JSON object.") from None
                self.usage = usage.counts() if usage is not None else self._guess(len(body))
                if chain is not None and chain.has_output and about is not None:
                    changed, findings = await self._filter_answer(chain, about, _decoded(body))
                    filtered = bool(findings)
                    if changed is not None:
                        body = msgspec.json.encode(changed)
            elif self.operation not in request.CLOSED:
                raise BackendFailed("The backend's answer is no JSON.")
        else:
            self.code = "backend_error"
            self.usage = (0, 0)
        headers = [*_returned(answer.headers), *self._own_headers(), (b"content-length", b"%d" % len(body))]
        if lead is not None and answer.status == 200 and not filtered:
            await lead.put(
                Entry(
                    status=200,
                    headers=[_JSON],
                    body=body,
                    stream=False,
                    usage=self.usage or (0, 0),
                    variant=self.variant,
                )
            )
        await self._start(answer.status, headers)
        await self._body(body, more=False)

    async def _refusal(self, answer: Answer) -> None:
        """An answer that is no stream, where a stream has begun."""
        body = await answer.read(MAX_ANSWER)
        if answer.status < 400:
            raise BackendFailed("The backend's answer is no stream.")
        self.code, self.failed, self.usage = "backend_error", answer.status, (0, 0)
        await self._body(b"data: " + msgspec.json.encode(_decoded(body)) + b"\n\n", more=False)

    async def _filter_answer(
        self, chain: Chain, about: About, body: dict[str, Any]
    ) -> tuple[dict[str, Any] | None, list[Finding]]:
        assert self.operation is not None
        try:
            changed, findings = await chain.answer(self.operation, body, about)
        except Blocked as error:
            self._found(error.findings)
            raise
        self._found(findings)
        return changed, findings

    async def _transcript(self, answer: Answer, chain: Chain, about: About | None) -> None:
        """A transcript that is no JSON (a text, subtitles): it is filtered as a whole."""
        assert about is not None
        body = await answer.read(MAX_ANSWER)
        self._first = time.perf_counter()
        self.usage = self._guess(len(body))
        try:
            text = body.decode()
        except UnicodeDecodeError:
            raise BackendFailed("The backend's answer is no text.") from None
        changed, _ = await self._filter_answer(chain, about, {"text": text})
        if changed is not None:
            body = changed["text"].encode()
        headers = [*_returned(answer.headers), *self._own_headers(), (b"content-length", b"%d" % len(body))]
        await self._start(200, headers)
        await self._body(body, more=False)

    async def _pass_on(self, answer: Answer) -> None:
        """Bytes that the gateway does not look into (sound, files)."""
        await self._start(answer.status, [*_returned(answer.headers), *self._own_headers()])
        async for piece in answer.pieces():
            self._time_piece()
            await self._body(piece, more=True)
        await self._body(b"", more=False)

    async def _relay(
        self,
        answer: Answer,
        counted: bool,
        *,
        wants: Literal["none", "last", "all"],
        chain: Chain | None,
        about: About | None,
        lead: Lead | None,
    ) -> None:
        """Server-sent events, piece by piece, as they come."""
        assert self.operation is not None
        events = Events()
        filtered = None
        if chain is not None and chain.has_output and about is not None:
            filtered = chain.stream(self.operation, about)
        kept: list[bytes] | None = [] if lead is not None else None
        size, limit = 0, self._policy.config.cache.max_entry_bytes
        done = False
        await self._start(200, [*_returned(answer.headers), *self._own_headers()])
        if filtered is not None:
            # The first words may be held back for a while; that there is an answer need not be.
            await self._body(b"", more=True)
        async for piece in answer.pieces():
            self._time_piece()
            out: list[bytes] = []
            for event in events.feed(piece):
                failed = error_of(event)
                if failed and not self.failed:
                    self.failed, self.code = failed, "backend_error"
                    answer.failed(failed)
                if is_done(event):
                    done = True
                elif counted:
                    event = self._count(event, wants)  # noqa: PLW2901
                    if not event:
                        continue
                elif b'"usage"' in event:
                    self._usage_event(event)
                else:
                    self.events += 1
                if filtered is None:
                    out.append(event)
                    continue
                out.extend(await self._filter_event(filtered, event, done))
                if filtered.blocked:
                    break
            if filtered is not None and filtered.blocked:
                await self._stop(answer, filtered, out)
                return
            if out:
                text = b"".join(out)
                if kept is not None:
                    size += len(text)
                    kept.append(text)
                    if size > limit:
                        kept = None
                await self._body(text, more=True)
        rest = events.rest()
        if filtered is not None:
            held = [] if done else [_encode(self.operation, one) for one in await filtered.finish()]
            if filtered.blocked:
                await self._stop(answer, filtered, held)
                return
            self._found(filtered.findings)
            rest = b"".join(held)
        if self.usage is None:
            self.usage = self._guess(0)
        if lead is not None and kept is not None and done and not self.failed and not (filtered and filtered.findings):
            await lead.put(
                Entry(
                    status=200,
                    headers=[(b"content-type", _EVENTS)],
                    body=b"".join(kept),
                    stream=True,
                    usage=self.usage,
                    variant=self.variant,
                )
            )
        await self._body(rest, more=False)

    def _count(self, event: bytes, wants: Literal["none", "last", "all"]) -> bytes:
        """Take the usage out of an event that only the gateway asked for; empty: the whole event was ours."""
        self.events += 1
        if b'"usage"' not in event:
            return event
        text, usage = cut_usage(event)
        if usage is not None:
            self.usage = usage.counts()
        final = b'"choices":[]' in event or b'"choices": []' in event
        if final:
            self.events -= 1
            return event if wants != "none" else b""
        # A `"usage":null` is what OpenAI puts there for those who asked.
        return event if wants == "all" or (wants == "last" and usage is None) else text

    def _usage_event(self, event: bytes) -> None:
        """Usage where the API puts it of its own accord (the responses API's last event)."""
        self.events += 1
        text = data(event)
        if text is None:
            return
        try:
            decoded = request.decode(text)
        except InvalidRequest:
            return
        usage = decoded.get("usage") or (decoded.get("response") or {}).get("usage")
        if isinstance(usage, dict):
            try:
                self.usage = msgspec.convert(usage, request.Usage).counts()
            except msgspec.ValidationError:
                return

    async def _stop(self, answer: Answer, filtered: StreamFilter, last: list[bytes]) -> None:
        """End a stream that a filter blocked; the backend need not go on."""
        self.code = "content_filter"
        self._found(filtered.findings)
        await answer.close()
        done = b"data: [DONE]\n\n" if self.operation in request.CHUNKED else b""
        await self._body(b"".join(last) + done, more=False)

    async def _filter_event(self, filtered: StreamFilter, event: bytes, done: bool) -> list[bytes]:
        assert self.operation is not None
        if done:
            held = [_encode(self.operation, one) for one in await filtered.finish()]
            return held if filtered.blocked else [*held, event]
        text = data(event)
        if text is None:
            return [event]
        try:
            chunk = request.decode(text)
        except InvalidRequest:
            raise BackendFailed("The backend sent an event that is no JSON object.") from None
        return [_encode(self.operation, one) for one in await filtered.feed(chunk)]

    def _time_piece(self) -> None:
        now = time.perf_counter()
        if not self._first:
            self._first = now
            self._runtime.metrics.first_token(self.model, now - self._began)
        else:
            self._runtime.metrics.inter_token(self.model, now - self._last)
        self._last = now

    def _listen(self) -> None:
        every = self._policy.config.server.stream_comment_s
        late = self._spoke + every - time.perf_counter()
        if late <= 0:
            if not self._started:
                headers = [(b"content-type", _EVENTS), *self._own_headers(), *self._cors()]
                if self._wire.say({"type": "http.response.start", "status": 200, "headers": headers}):
                    self._late = self._started = True
                    self.status = 200
            if self._started:
                self._wire.say({"type": "http.response.body", "body": b": \n\n", "more_body": True})
            self._spoke = time.perf_counter()
            late = every
        self._silence = asyncio.get_running_loop().call_later(late, self._listen)

    def _hush(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    def _guess(self, size: int) -> tuple[int, int]:
        """Tokens where the backend told none: an event is about a token."""
        self.estimated = True
        return self._input, self.events or size // request.BYTES_PER_TOKEN

    # --- what the caller gets

    def _cors(self) -> list[Header]:
        """What lets a page of the caller's origin read the answer; nothing where it may not."""
        origins = self._policy.config.cors.origins
        origin = self._headers.known.get(b"origin") if origins and self._headers is not None else None
        if origin is None or not any(fnmatch.fnmatchcase(origin.decode("latin-1"), one) for one in origins):
            return []
        return [
            (b"access-control-allow-origin", b"*" if origins == ["*"] else origin),
            (b"access-control-expose-headers", b"*"),
            (b"vary", b"origin"),
        ]

    async def _preflight(self) -> None:
        assert self._headers is not None
        asked = self._headers.known.get(b"access-control-request-headers", b"")
        headers = [
            (b"access-control-allow-methods", b"GET, POST, DELETE"),
            (b"access-control-max-age", b"%d" % self._policy.config.cors.max_age_s),
        ]
        if asked:
            headers.append((b"access-control-allow-headers", asked))
        await self._start(204, headers)
        await self._body(b"", more=False)

    async def _models(self) -> None:
        assert self.caller is not None
        authorise.authorise(self.caller, "models", None, None, None)
        names = authorise.visible_models(self.caller, self._policy)
        created = int(self._runtime.started)
        cards = [{"id": name, "object": "model", "created": created, "owned_by": "rayplane"} for name in names]
        path: str = self._scope["path"]
        if path == "/v1/models":
            body = msgspec.json.encode({"object": "list", "data": cards})
        else:
            asked = path.removeprefix("/v1/models/")
            found = self._policy.route(asked)
            card = next((one for one in cards if found is not None and one["id"] == found[0]), None)
            if card is None:
                raise _no_model(asked)
            body = msgspec.json.encode(card)
        await self._start(200, [_JSON, *self._own_headers(), (b"content-length", b"%d" % len(body))])
        await self._body(body, more=False)

    def _own_headers(self) -> list[Header]:
        headers = [(b"x-request-id", self._id.encode())]
        if self.admission is not None:
            headers += self.admission.headers
            if self.admission.degraded:
                headers.append((b"x-rayplane-limits", b"local"))
        if self.cached:
            headers.append((b"x-rayplane-cache", self.cached.encode()))
        if self.variant == "canary":
            headers.append((b"x-rayplane-variant", b"canary"))
        if self.backend and self.caller is not None and self.caller.role.choose_backend:
            headers.append((b"x-rayplane-backend", self.backend.encode()))
        return headers

    async def _start(self, status: int, headers: list[Header]) -> None:
        if self._late:
            return
        self.status = status
        self._started = True
        headers = [*headers, *self._cors()] if self._policy.config.cors.origins else headers
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _body(self, body: bytes, *, more: bool) -> None:
        if self._sent is not None:
            self._sent.append(body)
        message = {"type": "http.response.body", "body": body, "more_body": more}
        self._spoke = time.perf_counter()
        if not more:
            self._hush()
            # Before the caller can ask again: its next request must find this one's place free.
            self._settle()
            self._unwatch()
        await self._send(message)
        if self._wire.too_slow:
            self.code = "client_too_slow"
            raise ClientGone

    def _unwatch(self) -> None:
        """The end of the answer is not to be taken for the end of the caller."""
        if not self._watching:
            # The connection's next request may have begun.
            return
        self._watching = False
        self._wire.watch(None)

    def _relays(self) -> bool:
        """Whether the answer is one of server-sent events, to which the gateway may add one."""
        answer = self._answer
        relays = answer is not None and answer.status == 200 and self.stream and _media_type(answer.headers) == _EVENTS
        return relays or self._late

    async def _fail(self, error: GatewayError) -> None:
        """Tell the caller, in OpenAI's shape; within a stream as an event, and by a reset within any other answer."""
        self.code = error.code or error.type
        body = error.body()
        if self._started:
            self.failed = error.status
        try:
            if self._started and self._relays():
                await self._body(b"data: " + body + b"\n\n", more=False)
                return
            if self._started:
                # Sound, a file, JSON: with an error at its end it would look like a whole one.
                self._unwatch()
                self._wire.abort()
                return
            named = [(name.encode(), value.encode()) for name, value in error.headers.items()]
            own = self._own_headers()
            given = {name for name, _ in named}
            headers = [
                _JSON,
                *(one for one in own if one[0] not in given),
                *named,
                (b"content-length", b"%d" % len(body)),
            ]
            if error.status == 401 and "www-authenticate" not in error.headers:
                headers.append((b"www-authenticate", b"Bearer"))
            await self._start(error.status, headers)
            await self._body(body, more=False)
        except ClientGone:
            self.gone = True

    # --- what is written down

    def _settle(self) -> None:
        """Tell the limits what the request used. Only the first call counts."""
        runtime, caller, admission = self._runtime, self.caller, self.admission
        if admission is None or caller is None or self._settled:
            return
        self._settled = True
        if self.usage is None:
            if not self.reached:
                runtime.limiter.settle(admission, usage=None)
                return
            self.usage = self._guess(0)
        took, gave = self.usage
        cached = self.cached not in ("", "miss")
        runtime.limiter.settle(
            admission,
            usage=Used(
                caller_id=caller.id,
                client=caller.client,
                tenant=caller.tenant,
                model=self.model,
                input_tokens=took,
                output_tokens=gave,
                cost_micro=_price(self.route, took, gave),
                cached=cached,
                charged=not cached or self._policy.config.cache.count_hits,
                aborted=self.gone,
                estimated=self.estimated,
            ),
        )
        runtime.metrics.tokens(self.model, took, gave, "cache" if cached else "backend")

    def _finish(self) -> None:
        runtime, caller = self._runtime, self.caller
        runtime.metrics.left()
        seconds = time.perf_counter() - self._began
        self._settle()
        took, gave = self.usage or (0, 0)
        if self.gone:
            runtime.metrics.aborted(self.model)
        status = 499 if self.gone and not (self._started and self.status >= 400) else self.status
        operation = self.operation or ""
        runtime.metrics.request(operation, self.model, status if self.gone else self.failed or status, seconds)
        client = caller.client if caller is not None else ""
        record: dict[str, Any] = {
            "request_id": self._id,
            "operation": operation,
            "model": self.model,
            "status": status,
            "success": 200 <= status < 300 and not self.code,
            "client": client,
            "tenant": caller.tenant if caller is not None else "",
            "key": caller.id if caller is not None else "",
            "backend": self.backend,
            "input_tokens": took,
            "output_tokens": gave,
            "latency_ms": round(seconds * 1000, 3),
            "stream": self.stream,
        }
        if self._first:
            record["ttft_ms"] = round((self._first - self._began) * 1000, 3)
        if self.code:
            record["error"] = self.code
        if self.cached:
            record["cache"] = self.cached
        if self.variant == "canary":
            record["variant"] = self.variant
        if self.findings:
            record["findings"] = [
                {"filter": one.filter, "kind": one.kind, "action": one.action} for one in self.findings
            ]
        if self.estimated:
            record["estimated"] = True
        if self._trace is not None:
            record["trace_id"] = self._trace.trace_id
            self._trace.end(record)
        runtime.logs.request(record)
        audit = runtime.audit.config
        if audit.enabled and audit.requests:
            if caller is None and status < 400:
                return  # what a browser may ask
            if caller is None or (caller.id == ANONYMOUS and self.admission is None):
                # Whoever can reach the port can send these: one record each would fill the disk.
                runtime.audit.refused(self.code or "client_gone", (self._scope.get("client") or ("",))[0])
                return
            if self.content is not None and self._sent is not None:
                record = {
                    **record,
                    "content": {**self.content, "answer": b"".join(self._sent).decode("utf-8", "replace")},
                }
            runtime.audit_request(record)


def _price(route: Route | None, took: int, gave: int) -> int:
    """Millionths of the currency: prices are for a million tokens."""
    if route is None:
        return 0
    return math.ceil(took * route.price.input + gave * route.price.output)


def _media_type(headers: list[Header]) -> bytes:
    """A content type without its parameters, or nothing."""
    kind = next((value for name, value in headers if name == b"content-type"), b"")
    return kind.partition(b";")[0].strip().lower()


def _decoded(answer: bytes) -> dict[str, Any]:
    try:
        return request.decode(answer)
    except InvalidRequest:
        raise BackendFailed("The backend's answer is no JSON object.") from None


def _returned(headers: list[Header]) -> list[Header]:
    return [one for one in headers if one[0] in request.RETURNED]


def _encode(operation: Operation, event: dict[str, Any]) -> bytes:
    text = b"data: " + msgspec.json.encode(event) + b"\n\n"
    kind = event.get("type")
    if operation == "responses" and isinstance(kind, str):
        return b"event: " + kind.encode() + b"\n" + text
    return text


def _no_model(named: str) -> NotFound:
    shown = "".join(one if one.isprintable() else "?" for one in named[:128])
    return NotFound(f"The model `{shown}` does not exist or you do not have access to it.", param="model")
