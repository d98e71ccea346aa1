"""Judges a request, pins it to the addresses that were judged, and makes it.

Invariants. No connection is made to an address that was not judged for this very request: the name is looked up once,
and the connection goes to the address itself, with the name in Host and in TLS (where the certificate must be for it).
Every redirect is a request of its own, judged anew. What the caller sends beyond a few harmless headers goes to the
origin that the caller named and to no other. Proxies of the environment are not used: they would look names up
themselves. Nothing is sent but GET and HEAD without a body, and there are no cookies; but to servers that the
configuration names (`call`), which get what an engine has for them and whose redirects are not followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import httpx

from llama_orch.clock import new_id
from llama_orch.errors import PolicyDenied, UpstreamFailed
from llama_orch.outbound.decision import Decision, Purpose, Record
from llama_orch.outbound.plugins import Allow, Deny, OutboundRequest, Plugins, Rewrite
from llama_orch.outbound.resolving import Resolve, ResolveError, system_resolve
from llama_orch.policy.addresses import Address
from llama_orch.policy.rules import Rules, Verdict
from llama_orch.policy.urls import BadUrl, Target, follow, parse_target

REDIRECTS = frozenset({301, 302, 303, 307, 308})
# What may go to an origin that the caller did not name.
HARMLESS = frozenset({"accept", "accept-encoding", "accept-language", "user-agent", "range", "if-range"})
OURS = frozenset({"host", "connection", "content-length", "transfer-encoding", "te", "upgrade", "expect"})
USER_AGENT = "llama-orch"


@dataclass(frozen=True)
class Limits:
    """Of one fetch, redirects included. `bytes_max` counts the last answer's body as it comes, before any unpacking;
    `total_s` None leaves the whole unbounded, for a caller that watches the rate itself."""

    bytes_max: int
    total_s: float | None
    idle_s: float = 30.0  # without a byte
    connect_s: float = 10.0  # for one address
    answer_s: float = 60.0  # until the head of one answer is there
    redirects_max: int = 5


class Reply:
    """What the other side answers: `http_status` is never a redirect's. `headers` have lower-case names; of one that
    came several times the values are joined with commas."""

    def __init__(
        self, response: httpx.Response, decision: Decision, target: Target, limits: Limits, *, is_head: bool
    ) -> None:
        self.http_status = response.status_code
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in response.headers.items()}
        self.decision = decision
        self.target = target
        self._response = response
        self._limits = limits
        self._is_head = is_head

    @property
    def audit_id(self) -> str:
        return self.decision.audit_id

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it is on the wire, without transfer encoding and with content encoding. Once. Raises
        UpstreamFailed when it breaks off, stops coming, has another length than was said, or is too large."""
        length = "" if self._is_head else self.headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > self._limits.bytes_max:
            raise self._too_large()
        received = 0
        with _translated(self.target):
            async for chunk in self._response.aiter_raw():
                received += len(chunk)
                if received > self._limits.bytes_max:
                    raise self._too_large()
                yield chunk

    def _too_large(self) -> UpstreamFailed:
        return UpstreamFailed(f"{self.target.host} sends more than {self._limits.bytes_max} bytes")


class Outbound:
    """The door. `record` is told every decision; `tls` is for tests, and None means the usual authorities."""

    def __init__(
        self,
        rules: Rules,
        record: Record,
        *,
        plugins: Plugins | None = None,
        resolve: Resolve = system_resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._rules = rules
        self._record = record
        self._plugins = plugins or Plugins()
        self._resolve = resolve
        self._tls = tls

    async def check(self, url: str, purpose: Purpose = "check") -> Decision:
        """What would be decided now. Looks the name up, and requests nothing."""
        return await self._decide(url, purpose, new_id())

    @contextlib.asynccontextmanager
    async def fetch(
        self,
        url: str,
        *,
        purpose: Purpose,
        limits: Limits,
        method: Literal["GET", "HEAD"] = "GET",
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Reply]:
        """The answer at the end of all redirects, its body still to come; the connection ends with the block.

        Raises PolicyDenied, with the rule as `policy_label`, and UpstreamFailed, both with `audit_id` in `details`. A
        status of 400 and more is an answer like any other. `Range` in `headers` asks for a part of the body.
        """
        audit_id, given = new_id(), _sendable(headers or {})
        async with _named(audit_id), _in_time(limits), contextlib.AsyncExitStack() as stack:
            decision = await self._judged(url, purpose, audit_id)
            first = parse_target(url)  # a plugin may have changed it
            for _ in range(limits.redirects_max + 1):
                target = _target(decision)
                sent = given if target.origin == first.origin else _harmless(given)
                response = await stack.enter_async_context(self._open(method, decision, sent, limits))
                location = response.headers.get("location")
                if response.status_code not in REDIRECTS or location is None:
                    yield Reply(response, decision, target, limits, is_head=method == "HEAD")
                    return
                await response.aclose()
                decision = await self._redirected(decision, location)
            raise UpstreamFailed(f"{first.host} redirects more than {limits.redirects_max} times")

    @contextlib.asynccontextmanager
    async def call(
        self, method: Literal["GET", "POST"], url: str, *, limits: Limits, headers: Mapping[str, str], body: bytes = b""
    ) -> AsyncIterator[Reply]:
        """One request of an engine to a server that the configuration names, at a private address too. A redirect is
        an answer like any other: it could lead elsewhere what was meant for this server. Raises what `fetch` does."""
        audit_id, origin = new_id(), parse_target(url).origin
        async with _named(audit_id), _in_time(limits):
            decision = await self._judged(url, "engine", audit_id, configured=origin)
            target = _target(decision)
            if target.origin != origin:
                raise UpstreamFailed(f"a plugin sends what is for {origin} elsewhere, which is not done")
            async with self._open(method, decision, _sendable(headers), limits, body) as response:
                yield Reply(response, decision, target, limits, is_head=False)

    # -- deciding ------------------------------------------------------------------------------------------------------

    async def _judged(self, url: str, purpose: Purpose, audit_id: str, configured: str | None = None) -> Decision:
        """The decision, when it allows and there is something to connect to. `configured`: an origin that the
        configuration names."""
        decision = await self._decide(url, purpose, audit_id, configured)
        if not decision.is_allowed:
            raise _denied(decision)
        if not decision.addresses:
            raise UpstreamFailed(f"there is nothing to connect to: {decision.reason}")
        return decision

    async def _redirected(self, decision: Decision, location: str) -> Decision:
        """The decision about where a redirect leads. One from https to http is denied: it gives up what TLS gave."""
        origin = _target(decision)
        try:
            target = follow(origin, location)
        except BadUrl as error:
            raise self._denied_redirect(decision, None, Verdict(False, error.rule, error.reason)) from error
        if (origin.scheme, target.scheme) == ("https", "http"):
            reason = f"{origin.host} redirects from https to http"
            raise self._denied_redirect(decision, target, Verdict(False, "downgrade", reason))
        return await self._judged(target.url, decision.purpose, decision.audit_id)

    def _denied_redirect(self, origin: Decision, target: Target | None, verdict: Verdict) -> PolicyDenied:
        return _denied(self._recorded(Decision(*verdict, origin.purpose, target, (), origin.audit_id)))

    async def _decide(self, url: str, purpose: Purpose, audit_id: str, configured: str | None = None) -> Decision:
        """The steps in their order; each may end it with a denial."""
        target: Target | None = None
        addresses: tuple[Address, ...] = ()

        def decided(verdict: Verdict) -> Decision:
            return self._recorded(Decision(*verdict, purpose, target, addresses, audit_id))

        try:
            # 1. Read the URL. 2. The lists, as far as they need no address. 3. The plugins, who may tighten that, or
            # take the place of `allow` and `default`; another URL of theirs is judged as a new one.
            target = parse_target(url)
            verdict = self._rules.by_lists(target, target.known)
            answer = await self._plugins.ask(_request(target, purpose, verdict))
            if isinstance(answer, Rewrite):
                target = parse_target(answer.url)
                verdict = self._rules.by_lists(target, target.known)
                answer = await self._plugins.ask(_request(target, purpose, verdict))
                answer = answer if isinstance(answer, Deny) else None  # it has been rewritten
        except BadUrl as error:
            return decided(Verdict(False, error.rule, error.reason))
        if isinstance(answer, Deny):
            verdict = Verdict(False, "plugin", f"a plugin says: {answer.reason}")
        elif isinstance(answer, Allow) and self._rules.by_deny(target, target.known) is None:
            verdict = Verdict(True, "plugin", f"a plugin says: {answer.reason}")
        if not verdict.is_allowed:
            return decided(verdict)
        # 4. Look the name up. 5. The lists again, now that networks can be compared. 6. Whether the addresses may be.
        try:
            addresses = target.known or tuple(await self._resolve(target.host))
        except ResolveError as error:
            return decided(Verdict(True, verdict.rule, f"{verdict.reason}; but {error}"))
        if not addresses:
            return decided(Verdict(True, verdict.rule, f"{verdict.reason}; but {target.host} has no address"))
        by_plugin = verdict if verdict.rule == "plugin" else None
        verdict = self._rules.by_deny(target, addresses) or by_plugin or self._rules.by_lists(target, addresses)
        if verdict.is_allowed:
            is_configured = target.origin == configured
            verdict = self._rules.by_addresses(target, addresses, is_configured=is_configured) or verdict
        return decided(verdict)

    def _recorded(self, decision: Decision) -> Decision:
        self._record(decision)
        return decision

    # -- requesting ----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _open(
        self, method: str, decision: Decision, headers: Mapping[str, str], limits: Limits, body: bytes = b""
    ) -> AsyncIterator[httpx.Response]:
        """One request to the first of the judged addresses that takes a connection.

        A transport of its own each time: a connection is pinned to an address and verified for one name, so it must
        not be used again for another name at the same address.
        """
        target = _target(decision)
        verify = self._context() if target.scheme == "https" else False
        async with httpx.AsyncHTTPTransport(verify=verify, trust_env=False) as transport:
            with _translated(target):
                async with asyncio.timeout(limits.answer_s):
                    response = await self._first_answer(transport, method, decision, headers, limits, body)
            try:
                yield response
            finally:
                await response.aclose()

    async def _first_answer(
        self,
        transport: httpx.AsyncHTTPTransport,
        method: str,
        decision: Decision,
        headers: Mapping[str, str],
        limits: Limits,
        body: bytes,
    ) -> httpx.Response:
        target = _target(decision)
        *others, last = decision.addresses
        for address in others:
            try:
                return await transport.handle_async_request(_pinned(target, address, method, headers, limits, body))
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await transport.handle_async_request(_pinned(target, last, method, headers, limits, body))

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:  # takes tens of milliseconds, and many services never need it
            self._tls = httpx.create_ssl_context()  # SSL_CERT_FILE may name other authorities
        return self._tls


def _pinned(
    target: Target, address: Address, method: str, headers: Mapping[str, str], limits: Limits, body: bytes
) -> httpx.Request:
    host = f"[{address}]" if address.version == 6 else str(address)
    timeout = httpx.Timeout(limits.idle_s, connect=limits.connect_s).as_dict()
    return httpx.Request(
        method,
        f"{target.scheme}://{host}:{target.port}{target.rest}",
        headers={"Host": target.authority, **headers, "Connection": "close"},
        content=body or None,
        extensions={"timeout": timeout, "sni_hostname": target.host},
    )


def _sendable(headers: Mapping[str, str]) -> dict[str, str]:
    """The caller's headers and ours. Bodies come as they are, so that their size is what is counted."""
    defaults = {"user-agent": USER_AGENT, "accept": "*/*", "accept-encoding": "identity"}
    return defaults | {name.lower(): value for name, value in headers.items() if name.lower() not in OURS}


def _harmless(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name in HARMLESS}


def _target(decision: Decision) -> Target:
    assert decision.target is not None, "an allowed request has a target"
    return decision.target


def _request(target: Target, purpose: Purpose, verdict: Verdict) -> OutboundRequest:
    return OutboundRequest(
        target.url, target.scheme, target.host, target.port, purpose, verdict.is_allowed, verdict.reason
    )


def _denied(decision: Decision) -> PolicyDenied:
    return PolicyDenied(
        f"the outbound policy denies this request: {decision.reason}",
        policy_label=decision.rule,
        details={"audit_id": decision.audit_id},
    )


@contextlib.contextmanager
def _translated(target: Target) -> Iterator[None]:
    """What goes wrong between us and the other side, in our words; none of theirs."""
    try:
        yield
    except (httpx.TimeoutException, TimeoutError) as error:
        raise UpstreamFailed(f"{target.host} did not answer in time") from error
    except (httpx.TransportError, httpx.StreamError, OSError) as error:
        raise UpstreamFailed(f"the exchange with {target.host} failed: {_why(error)}") from error


def _why(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        match cause:
            case ssl.SSLCertVerificationError():
                return "its certificate is not trusted, or is for another name"
            case ConnectionRefusedError():
                return "it refuses connections"
            case httpx.RemoteProtocolError():
                return "what it sends is not HTTP, or breaks off"
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__


@contextlib.asynccontextmanager
async def _named(audit_id: str) -> AsyncIterator[None]:
    """A failure, wherever in the fetch, says where in the log its decisions are."""
    try:
        yield
    except UpstreamFailed as error:
        error.details = {"audit_id": audit_id, **(error.details or {})}
        raise


@contextlib.asynccontextmanager
async def _in_time(limits: Limits) -> AsyncIterator[None]:
    timeout = asyncio.timeout(limits.total_s)
    try:
        async with timeout:
            yield
    except TimeoutError as error:
        if not timeout.expired():  # the caller's own
            raise
        raise UpstreamFailed(f"the fetch took longer than {limits.total_s:g} s") from error
