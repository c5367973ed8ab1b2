"""Kill the labelling server at random points while browsers label, and look for what is lost or doubled.

python -m tests.labelling.kill [--kills 50] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_pipeline.labelling.events import Refused
from rlhf_pipeline.labelling.store import LabelStore
from tests.faults import children
from tests.labelling.browsers import Browser, make_project

BROWSERS = 4
ANSWERS = 60
"""Number of requests, at most, that a server has answered when it is killed."""
PAUSE = 0.02
"""Seconds, at most, from then to its death."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def answers(port: int, child: children.Child) -> bool:
    """Wait until a server listens; false if it ends before."""
    while not child.ended():
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.005)
    return False


def kills(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill `count` servers of one project under browsers that go on labelling; a last one lives until they end."""
    import rlhf_pipeline.labelling.serving  # noqa: F401  forked children have it imported

    folder.mkdir(parents=True, exist_ok=True)
    home, stop, noted = folder / "home", folder / "stop", folder / "noted.json"
    path, port, draw = make_project(home, 2000), free_port(), random.Random(seed)
    words = ("--home", str(home), "label", "serve", "labels", "--port", str(port))

    counts = mmap.mmap(-1, 8 * BROWSERS)  # of answered requests, by browser; shared with the child

    def answered(n: int | None = None) -> int:
        """The number of answers of all browsers; of a browser, after one more."""
        found = [int.from_bytes(counts[8 * i : 8 * i + 8], "little") for i in range(BROWSERS)]
        if n is not None:
            counts[8 * n : 8 * n + 8] = (found[n] + 1).to_bytes(8, "little")
        return sum(found)

    def until(number: int, server: children.Child) -> None:
        """Wait until browsers have so many more answers from a server."""
        number += answered()
        while answered() < number and not server.ended() and not crowd.ended():
            time.sleep(0.002)

    def browse() -> int:
        browsers = [
            Browser(port, f"labeler {n}", seed * 100 + n, answered=partial(answered, n)) for n in range(BROWSERS)
        ]
        threads = [threading.Thread(target=browser.work, args=(stop.exists,)) for browser in browsers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        noted.write_text(
            json.dumps(
                {
                    "acknowledged": [browser.acknowledged for browser in browsers],
                    "told": [{task: told.state() for task, told in browser.told.items()} for browser in browsers],
                    "resent": sum(browser.resent for browser in browsers),
                    "faults": [fault for browser in browsers for fault in browser.faults],
                }
            )
        )
        return 0

    crowd = children.fork_to(browse, folder / "browsers")
    hits, faults = 0, []
    for _ in range(count):
        server = children.fork(words, folder / "server")
        if not answers(port, server):
            faults.append(f"the server ended by itself: {server.err.read_text()[-2000:]}")
            break
        until(draw.randint(0, ANSWERS), server)
        time.sleep(draw.uniform(0, PAUSE))
        server.send(signal.SIGKILL)
        hits += server.wait().killed_by == signal.SIGKILL
    last = children.fork(words, folder / "server")
    answers(port, last)
    until(ANSWERS, last)
    stop.touch()
    crowd.wait(timeout=180)
    last.send(signal.SIGTERM)
    last.wait()
    if not noted.exists():
        return {"kills": hits, "failed": [f"the browsers failed: {crowd.err.read_text()[-2000:]}"]}
    said = json.loads(noted.read_text())
    faults += said["faults"] + compare(path, said["acknowledged"], said["told"])
    actions = sum(len(clients) for browser in said["acknowledged"] for clients in browser.values())
    return {"kills": hits, "acknowledged": actions, "resent": said["resent"], "failed": faults}


def compare(path: Path, acknowledged: list[dict[str, list[str]]], told: list[dict[str, Any]]) -> list[str]:
    """What of the acknowledged actions is not in the storage, or is there more than once, or amounts to another state.

    Every action was sent until it was acknowledged; so the storage must have these actions, in this order, and no more.
    """
    db = sqlite3.connect(path)
    faults = [] if db.execute("PRAGMA integrity_check").fetchall() == [("ok",)] else ["the file is damaged"]
    stored: dict[str, list[str]] = {}
    for task, client in db.execute("SELECT task, client FROM events ORDER BY number"):
        if not client.startswith("back-"):
            stored.setdefault(str(task), []).append(client)
    sent: dict[str, list[str]] = {}
    for browser in acknowledged:
        for task, clients in browser.items():
            sent.setdefault(task, []).extend(clients)
    for task in sorted({*stored, *sent}, key=int):
        if stored.get(task, []) != sent.get(task, []):
            lost = [client for client in sent.get(task, []) if client not in stored.get(task, [])]
            more = [
                client
                for client in stored.get(task, [])
                if stored[task].count(client) > sent.get(task, []).count(client)
            ]
            faults.append(
                f"task {task}: {len(lost)} actions lost, {len(more)} that were not acknowledged or are doubled"
            )
    with LabelStore.open(path) as store:
        for browser in told:
            for task, expected in browser.items():
                try:
                    state = store.state(int(task))
                except Refused:
                    faults.append(f"task {task}: lost, and the browser was told {expected}")
                    continue
                found: dict[str, Any] = {"note": state.note, "status": state.status, "actions": state.actions}
                for key in ("ranks", "ratings", "flags"):
                    found[key] = [getattr(state, key)[k] for k in state.shown]
                if found != expected:
                    faults.append(f"task {task}: the storage has {found}, the browser was told {expected}")
        for number, taken in db.execute("SELECT number, taken FROM items"):
            query = "SELECT count(*) FROM tasks WHERE item = ? AND repeat = 0 AND status != 'skipped'"
            (counted,) = db.execute(query, (number,)).fetchone()
            if counted != taken:
                faults.append(f"item {number}: counted as taken {taken} times, found {counted} tasks")
        (free,) = db.execute("SELECT value FROM meta WHERE key = 'free'").fetchone()
        (counted,) = db.execute("SELECT count(*) FROM items WHERE taken < ?", (store.config.overlap,)).fetchone()
        if free != counted:
            faults.append(f"{free} items are counted as free, found {counted}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kills(Path(folder), options.kills, options.seed)
    print(json.dumps(found, indent=1))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
