"""A small OpenAI-compatible server on this machine."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any] | str
"""What the server answers: the text of a message, or a status and a body."""


class Server:
    """Answers chat completions by a function of the user's message; `requests` are (headers, body) in order."""

    def __init__(self, answer: Callable[[str], Reply]):
        self.answer, self.requests, self.lock = answer, [], threading.Lock()
        self.endpoint = ""

    @property
    def texts(self) -> list[str]:
        return [body["messages"][0]["content"] for _, body in self.requests]


@contextmanager
def serving(answer: Callable[[str], Reply]) -> Iterator[Server]:
    server = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append((dict(self.headers) | {"path": self.path}, body))
            found = server.answer(body["messages"][0]["content"])
            status, content = (200, found) if isinstance(found, str) else found
            headers = content if status in (301, 302, 307) else {}
            if isinstance(content, str) and status == 200:
                content = {"choices": [{"message": {"role": "assistant", "content": content}}]}
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.endpoint = f"http://127.0.0.1:{listening.server_port}/v1"
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


SIDES = re.compile(r"\[Reply A\]\n(.*)\n\n\[Reply B\]\n(.*)\n\nGive your verdict", re.DOTALL)


def longer_wins(text: str) -> str:
    """The verdict of a judge that prefers the reply with more words."""
    found = SIDES.search(text)
    if found is None:
        return "ready"
    first, second = (len(side.split()) for side in found.groups())
    return f"Not [[C]] by habit: [[{'A' if first > second else 'B' if second > first else 'C'}]]"
