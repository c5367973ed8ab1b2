"""Many labelers at once: how long an action takes until it is saved, and whether every one is.

python -m tests.labelling.load [--labelers 50] [--rate 10] [--seconds 60]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sqlite3
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import children
from tests.labelling.browsers import make_project
from tests.labelling.kill import answers, free_port

ON_AN_ITEM = (
    [{"kind": "rank", "ranks": [1, 2, 3, 4]}]
    + [{"kind": "rate", "response": place, "value": place + 2} for place in range(4)]
    + [{"kind": "flag", "response": place, "flag": "opinion", "value": True} for place in range(3)]
    + [{"kind": "note", "text": "a note of a few words on this item"}, {"kind": "submit"}]
)
"""Ten actions; then the labeler asks for the next item."""


@dataclass
class Labeler:
    """One keep-alive connection. waits: seconds from the moment at which an action was due to its answer."""

    port: int
    number: int
    waits: list[float] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        joined = await self.request("POST", "/api/session", {"name": f"labeler {self.number}", "token": None})
        self.headers["X-CSRF-Token"] = joined["csrf"]

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        content = b"" if body is None else json.dumps(body).encode()
        host = f"127.0.0.1:{self.port}"
        given = {"Host": host, "Origin": f"http://{host}", "Content-Type": "application/json"}
        lines = [
            f"{name}: {value}" for name, value in (given | self.headers | {"Content-Length": str(len(content))}).items()
        ]
        self.writer.write(f"{method} {path} HTTP/1.1\r\n".encode() + "\r\n".join([*lines, "", ""]).encode() + content)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        found = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
        answer = await self.reader.readexactly(int(found["content-length"]))
        if head[0].split()[1] != "200":
            raise AssertionError(f"{method} {path} {content!r}: {head[0]} {answer!r}")
        if "set-cookie" in found:
            self.headers["Cookie"] = found["set-cookie"].partition(";")[0]
        return dict(json.loads(answer))

    async def work(self, start: float, rate: float, seconds: float, labelers: int) -> None:
        """Act at fixed times; an action that is late is late, and is not left out."""
        task: int | None = None
        for sent in range(round(rate * seconds)):
            due = start + (sent + self.number / labelers) / rate
            if task is None:
                task = (await self.request("GET", "/api/task"))["state"]["task"]
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            action = ON_AN_ITEM[sent % len(ON_AN_ITEM)]
            await self.request(
                "POST", "/api/events", {"task": task, "client": f"{self.number}-{sent}", "action": action}
            )
            self.waits.append(time.perf_counter() - due)
            task = None if action["kind"] == "submit" else task


def cpu_seconds(pid: int) -> float:
    """CPU time of a process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _crowd(port: int, labelers: int, rate: float, seconds: float) -> list[Labeler]:
    crowd = [Labeler(port, number) for number in range(labelers)]
    for labeler in crowd:
        await labeler.open()
    start = time.perf_counter() + 0.5
    await asyncio.gather(*(labeler.work(start, rate, seconds, labelers) for labeler in crowd))
    return crowd


def load(folder: Path, labelers: int, rate: float, seconds: float) -> dict[str, Any]:
    """Let labelers act at a rate for so many seconds; quantiles of the time to an answer, and what is not stored."""
    folder.mkdir(parents=True, exist_ok=True)
    items = int(labelers * rate * seconds / len(ON_AN_ITEM)) + labelers
    path, port = make_project(folder / "home", items), free_port()
    words = ("--home", str(folder / "home"), "label", "serve", "labels", "--port", str(port))
    server = children.fresh(words, folder / "server")
    try:
        if not answers(port, server):
            return {"failed": [server.err.read_text()[-2000:]]}
        before = cpu_seconds(server.pid)
        crowd = asyncio.run(_crowd(port, labelers, rate, seconds))
        spent = cpu_seconds(server.pid) - before
    finally:
        server.send(signal.SIGTERM)
        server.wait()
    waits = sorted(wait for labeler in crowd for wait in labeler.waits)
    acknowledged = {f"{labeler.number}-{n}" for labeler in crowd for n in range(len(labeler.waits))}
    stored = [client for (client,) in sqlite3.connect(path).execute("SELECT client FROM events")]
    lost, more = acknowledged - set(stored), len(stored) - len(acknowledged)
    failed = [f"{len(lost)} acknowledged actions are not stored"] if lost else []
    failed += [f"{more} events beyond the {len(acknowledged)} acknowledged actions"] if more else []

    def quantile(share: float) -> float:
        return round(1000 * waits[min(len(waits) - 1, int(share * len(waits)))], 1)

    return {
        "labelers": labelers,
        "actions": len(waits),
        "actions_per_second": labelers * rate,
        "p50_ms": quantile(0.5),
        "p99_ms": quantile(0.99),
        "longest_ms": quantile(1.0),
        "server_cpu_ms_per_action": round(1000 * spent / len(waits), 2),
        "failed": failed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--labelers", type=int, default=50)
    parser.add_argument("--rate", type=float, default=10.0, help="actions of each labeler per second")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = load(Path(folder), options.labelers, options.rate, options.seconds)
    print(json.dumps(found, indent=1))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
