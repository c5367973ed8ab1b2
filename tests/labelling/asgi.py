"""A browser without a browser: asks the app directly, with any headers, and keeps the cookie and the CSRF token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1:8765"
ORIGIN = f"http://{HOST}"


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(app: Any, method: str, path: str, headers: Sequence[tuple[str, str]], body: Sequence[bytes] = ()) -> Reply:
    """One request; the body may come in several parts."""
    parts = list(body) or [b""]
    sent: list[dict[str, Any]] = []
    events = [
        {"type": "http.request", "body": part, "more_body": index + 1 < len(parts)} for index, part in enumerate(parts)
    ]

    async def receive() -> dict[str, Any]:
        return events.pop(0) if events else {"type": "http.disconnect"}

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path.partition("?")[0],
        "raw_path": path.encode(),
        "query_string": path.partition("?")[2].encode(),
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8765),
    }
    asyncio.run(app(scope, receive, send))
    start, *rest = sent
    given = {name.decode(): value.decode() for name, value in start["headers"]}
    return Reply(start["status"], given, b"".join(event.get("body", b"") for event in rest))


@dataclass
class Visitor:
    """Someone at the page."""

    app: Any
    cookie: str = ""
    csrf: str = ""
    headers: list[tuple[str, str]] = field(default_factory=lambda: [("Host", HOST), ("Origin", ORIGIN)])

    def request(self, method: str, path: str, body: object = None) -> Reply:
        headers = [*self.headers, ("Cookie", self.cookie), ("X-CSRF-Token", self.csrf)]
        if method == "POST":
            headers.append(("Content-Type", "application/json"))
        parts = [body if isinstance(body, bytes) else json.dumps(body).encode()] if method == "POST" else []
        return ask(self.app, method, path, headers, parts)

    def get(self, path: str) -> Reply:
        return self.request("GET", path)

    def post(self, path: str, body: object) -> Reply:
        return self.request("POST", path, body)

    def join(self, name: str, token: str | None = None) -> Reply:
        reply = self.post("/api/session", {"name": name, "token": token})
        if reply.status == 200:
            self.cookie, self.csrf = reply.headers["set-cookie"].partition(";")[0], reply.json["csrf"]
        return reply
