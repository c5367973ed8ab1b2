"""Scripted browsers: what the labelling page sends, from threads, and what every answer must say."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.labelling import FLAGS, LabelConfig
from rlhf_pipeline.labelling.kinds import Item, Response
from rlhf_pipeline.labelling.store import LabelStore, database

PATIENCE = 60.0
"""Seconds for which a browser sends the same request again."""


def make_project(home: Path, items: int, *, overlap: int = 1) -> Path:
    """A project of items with four responses; returns its file."""
    config = LabelConfig(policies=("model",), prompts="prompts", overlap=overlap, seed=7)
    made = [
        Item(number=n, prompt=f"Prompt {n}", responses=[Response(text=f"Response {n}.{k}") for k in range(4)])
        for n in range(items)
    ]
    path = database(home, "labels")
    LabelStore.create(path, config, made).close()
    return path


@dataclass
class Told:
    """What the actions that stand on a task amount to, by place on the page; written apart from the package's fold."""

    size: int
    stack: list[dict[str, Any]] = field(default_factory=list)

    def add(self, action: dict[str, Any]) -> None:
        if action["kind"] == "undo":
            self.stack.pop()
        else:
            self.stack.append(action)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {"ranks": [None] * self.size, "ratings": [None] * self.size, "note": ""}
        found |= {"flags": [{} for _ in range(self.size)], "status": "open", "actions": len(self.stack)}
        for action in self.stack:
            kind = action["kind"]
            if kind == "rank":
                found["ranks"] = action["ranks"]
            elif kind == "rate":
                found["ratings"][action["response"]] = action["value"]
            elif kind == "flag":
                found["flags"][action["response"]][action["flag"]] = action["value"]
            elif kind == "note":
                found["note"] = action["text"]
            else:
                found["status"] = {"submit": "done", "skip": "skipped"}[kind]
        return found


def next_action(draw: random.Random, told: Told) -> dict[str, Any]:
    """What a labeler might do next; an item takes about eight actions."""
    kind = draw.choices(("rank", "rate", "flag", "note", "undo", "submit", "skip"), (4, 4, 3, 2, 2, 2, 0.3))[0]
    place = draw.randrange(told.size)
    if kind == "undo" and not told.stack:
        kind = "rate"
    if kind == "submit" and None in told.state()["ranks"]:
        kind = "rank"
    made: dict[str, dict[str, Any]] = {
        "rank": {"ranks": [draw.randint(1, told.size) for _ in range(told.size)]},
        "rate": {"response": place, "value": draw.randint(1, 7)},
        "flag": {"response": place, "flag": draw.choice(FLAGS).key, "value": draw.random() < 0.5},
        "note": {"text": f"note {draw.random()}"},
        "skip": {"reason": "too hard"},
    }
    return {"kind": kind, **made.get(kind, {})}


@dataclass
class Browser:
    """A labeler's browser. acknowledged: the ids of its actions that the server has answered, by task, in order."""

    port: int
    name: str
    seed: int
    acknowledged: dict[int, list[str]] = field(default_factory=dict)
    told: dict[int, Told] = field(default_factory=dict)
    resent: int = 0
    answered: Callable[[], None] = lambda: None
    faults: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    _connection: http.client.HTTPConnection | None = None

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request until the server answers it."""
        until = time.monotonic() + PATIENCE
        text = None if body is None else json.dumps(body)
        for attempt in range(10**6):
            try:
                if self._connection is None:
                    self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
                headers = {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/json"}
                self._connection.request(method, path, text, headers | self.headers)
                answer = self._connection.getresponse()
                content = answer.read()
                if answer.status == 503:  # it is about to end
                    raise ConnectionError("503")
            except (OSError, http.client.HTTPException):
                if self._connection is not None:
                    self._connection.close()
                self._connection = None
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
                continue
            self.resent += attempt > 0
            self.answered()
            if answer.status != 200:
                raise AssertionError(f"{method} {path} {text}: {answer.status} {content[:500]!r}")
            if cookie := answer.getheader("Set-Cookie"):
                self.headers["Cookie"] = cookie.partition(";")[0]
            return dict(json.loads(content))
        raise AssertionError("unreachable")

    def work(self, ended: Callable[[], bool]) -> None:
        """Label until `ended`, or until nothing is left; the last action is answered before the end."""
        draw = random.Random(self.seed)
        try:
            joined = self.request("POST", "/api/session", {"name": self.name, "token": None})
            self.headers["X-CSRF-Token"] = joined["csrf"]
            while not ended():
                state = self.request("GET", "/api/task")["state"]
                if state is None:
                    return
                self._label(state, draw, ended)
                if draw.random() < 0.2:
                    last = state["task"]
                    earlier = self.request("POST", "/api/back", {"task": last + 1})["state"]
                    told = self.told[earlier["task"]]
                    if told.state()["status"] != "open":
                        told.stack.pop()
                    self._compare(earlier, told)
        except Exception as error:
            self.faults.append(f"{self.name}: {type(error).__name__}: {error}")
        finally:
            with contextlib.suppress(Exception):
                if self._connection is not None:
                    self._connection.close()

    def _label(self, state: dict[str, Any], draw: random.Random, ended: Callable[[], bool]) -> None:
        task = state["task"]
        told = self.told.setdefault(task, Told(len(state["ranks"])))
        self._compare(state, told)
        while told.state()["status"] == "open" and not ended():
            action, client = next_action(draw, told), uuid.UUID(int=draw.getrandbits(128)).hex
            answer = self.request("POST", "/api/events", {"task": task, "client": client, "action": action})
            self.acknowledged.setdefault(task, []).append(client)
            told.add(action)
            self._compare(answer["state"], told)

    def _compare(self, state: dict[str, Any], told: Told) -> None:
        expected = told.state()
        found = {key: state[key] for key in expected}
        if found != expected:
            self.faults.append(f"{self.name}: task {state['task']}: found {found}, expected {expected}")
