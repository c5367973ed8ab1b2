"""What stands in front of every request of the page: who may ask, from where, how much, and what a browser may do."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from rlhf_pipeline.errors import Fault

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 64 * 1024
MAX_SECONDS = 15.0
"""For a whole body to arrive."""

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})

EVERY = {
    "0.0.0.0": (socket.AF_INET, "192.0.2.1", "127.0.0.1"),
    "::": (socket.AF_INET6, "2001:db8::1", "::1"),
}
"""Hosts that are every address: their family, a number elsewhere (RFC 5737, RFC 3849), and loopback."""

# Scripts, styles and requests of the page's own server; nothing inline, nothing from elsewhere, no frame around it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The report has its styles and pictures inside and no script."""

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cache-control": "no-store",
}

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]{2,45}\]|[a-z0-9](?:[a-z0-9.-]{0,252}))(?::[0-9]{1,5})?")


def fault_json(kind: str, faults: Sequence[Fault]) -> bytes:
    """One line of JSON that says what is wrong, in the form of a failed command's `--json`."""
    return json.dumps({"error": {"kind": kind, "faults": [fault.as_dict() for fault in faults]}}).encode()


class Forbidden(Exception):
    """A request that is answered without being looked at further: the status, and why."""

    def __init__(self, status: int, fault: Fault):
        super().__init__(str(fault))
        self.status, self.fault = status, fault


def allowed_names(host: str) -> set[str]:
    """The names that a Host header may have for a server that listens on `host`.

    A server on every address (0.0.0.0, ::) cannot know its names: it answers to its numbers and to this machine's name.
    """
    names = set(LOOPBACK)
    if host in EVERY:
        names.add(_bracketed(own_number(host)))
        own = socket.gethostname().lower()
        names |= {own, f"{own}.local", socket.getfqdn().lower()}
        try:
            found = socket.getaddrinfo(own, None)
        except OSError:
            found = []
        names |= {_bracketed(str(info[4][0])) for info in found}
    else:
        names.add(_bracketed(host.lower()))
    return names


def own_number(host: str) -> str:
    """The number by which others reach a server that listens on every address; that of loopback without a network.

    This machine's name often stands for a loopback number alone. So a UDP socket, which sends nothing when it is
    connected, is asked from where it would send to a machine elsewhere (a number that is reserved for documentation).
    """
    family, elsewhere, alone = EVERY[host]
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as asked:
            asked.connect((elsewhere, 9))
            return str(asked.getsockname()[0]).partition("%")[0]
    except OSError:
        return alone


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    return _bracketed(host.lower()) in LOOPBACK


def _bracketed(host: str) -> str:
    return f"[{host.partition('%')[0]}]" if ":" in host and not host.startswith("[") else host


def check_request(method: str, path: str, headers: Iterable[tuple[bytes, bytes]], hosts: set[str]) -> None:
    """Raise Forbidden unless the request comes from this server's own page, or is a first visit to it.

    Host must be one of our names, so that a foreign name that was pointed at this address reaches nothing (DNS
    rebinding). A POST must name our own Origin and be JSON, which no form of another site can send. What a browser says
    of other sites' requests (Sec-Fetch-Site) is believed.
    """
    given: dict[str, list[str]] = {}
    for name, value in headers:
        given.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1").strip())
    host = _one(given, "host").lower()
    match = _HOST.fullmatch(host)
    if not match or match["name"] not in hosts:
        names = ", ".join(sorted(hosts))
        raise Forbidden(421, Fault("Host", repr(host[:80]), f"one of {names}", "open the address that was printed"))
    if method not in ("GET", "HEAD", "POST"):
        raise Forbidden(405, Fault("", f"the method {method[:20]!r}", "GET or POST"))
    if method == "POST" or "origin" in given:
        origin = _one(given, "origin").lower()
        if origin not in (f"http://{host}", f"https://{host}"):
            raise Forbidden(403, Fault("Origin", repr(origin[:80]), f"the page's own, http://{host}"))
    visit = method != "POST" and path == "/"
    if not visit and any(value not in ("same-origin", "none") for value in given.get("sec-fetch-site", [])):
        raise Forbidden(403, Fault("Sec-Fetch-Site", "a request of another site", "the page's own requests"))
    if method == "POST":
        kind = _one(given, "content-type").lower()
        if kind.partition(";")[0].strip() != "application/json" or "content-encoding" in given:
            raise Forbidden(415, Fault("Content-Type", repr(kind[:80]), "application/json, not compressed"))
    lengths = given.get("content-length", [])
    if len(lengths) > 1 or any(not re.fullmatch("[0-9]{1,12}", length) for length in lengths):
        raise Forbidden(400, Fault("Content-Length", repr(lengths)[:80], "one number"))
    if lengths and int(lengths[0]) > MAX_BODY:
        raise _too_large()


def _one(given: dict[str, list[str]], name: str) -> str:
    values = given.get(name, [])
    if len(values) > 1:
        raise Forbidden(400, Fault(name, f"{len(values)} headers of this name", "one"))
    return values[0] if values else ""


def _too_large() -> Forbidden:
    return Forbidden(413, Fault("", "a body that is too large", f"at most {MAX_BODY // 1024} KiB"))


async def read_body(receive: Receive) -> bytes | None:
    """The whole body, at most MAX_BODY bytes; None: the client has gone."""
    parts: list[bytes] = []
    size = 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            return None
        part = event.get("body", b"")
        size += len(part)
        if size > MAX_BODY:
            raise _too_large()
        parts.append(part)
        if not event.get("more_body", False):
            return b"".join(parts)


class Guard:
    """ASGI middleware: checks a request, reads its body within the limits, and adds the headers to every answer."""

    def __init__(self, app: Asgi, hosts: set[str]):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket: the page has none
            await send({"type": "websocket.close", "code": 1008})
            return

        started = False

        async def with_headers(event: Event) -> None:
            nonlocal started
            started = True
            if event["type"] == "http.response.start":
                given = {name.lower() for name, _ in event.get("headers", [])}
                added = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in given]
                event = {**event, "headers": [*event.get("headers", []), *added]}
            await send(event)

        try:
            check_request(scope["method"], scope["path"], scope["headers"], self.hosts)
            body = await asyncio.wait_for(read_body(receive), MAX_SECONDS)
        except (Forbidden, asyncio.TimeoutError) as error:
            if not isinstance(error, Forbidden):
                error = Forbidden(408, Fault("", f"no whole body in {MAX_SECONDS:g} s", "a body"))
            await _answer(with_headers, error.status, fault_json("refused", [error.fault]))
            return
        if body is None:
            return
        left = [{"type": "http.request", "body": body, "more_body": False}]

        async def once() -> Event:
            return left.pop() if left else await receive()

        try:
            await self.app(scope, once, with_headers)
        except Exception:  # a bug: its trace is for the log of the server, not for the client
            logging.getLogger("rlhf.label").exception("%s %r failed", scope["method"], scope["path"][:200])
            if not started:
                await _answer(with_headers, 500, fault_json("bug", [Fault("", "an error in the server")]))


async def _answer(send: Send, status: int, body: bytes) -> None:
    # What the client still sends is not read: the connection ends.
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def is_web(address: str) -> bool:
    """Whether an address in a response may become a link: http, https or mail, without a name and password in it."""
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https", "mailto") and "@" not in parts.netloc
    except ValueError:
        return False
