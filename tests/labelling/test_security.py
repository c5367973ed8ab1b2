"""Hostile requests: none is accepted, none changes anything."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `label` is not installed")

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.errors import DamagedFile, RunFailed
from rlhf_pipeline.labelling.kinds import Item, Response
from rlhf_pipeline.labelling.security import MAX_BODY, POLICY, allowed_names, is_loopback
from rlhf_pipeline.labelling.server import make_app
from rlhf_pipeline.labelling.store import LabelStore, database
from tests.labelling.asgi import HOST, ORIGIN, Reply, Visitor, ask

TOKEN = "the-right-token"
JSON = ("Content-Type", "application/json")
RANK = {"kind": "rank", "ranks": [1, 2, 2]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStore]:
    home = tmp_path_factory.mktemp("home")
    items = [
        Item(number=n, prompt=f"secret {n}", responses=[Response(text=t, source=f"model-{t}") for t in "abc"])
        for n in range(4)
    ]
    config = LabelConfig.model_validate({"responses": "x.jsonl", "instructions": "secret"})
    with LabelStore.create(database(home, "labels"), config, items) as made:
        yield made


@pytest.fixture(scope="module")
def ada(store: LabelStore) -> Visitor:
    ada = Visitor(make_app(store, token=TOKEN, hosts=allowed_names("127.0.0.1")))
    assert ada.join("Ada", TOKEN).status == 200
    return ada


def task_of(visitor: Visitor) -> int:
    return int(visitor.get("/api/task").json["item"]["task"])


def event(ada: Visitor, **keys: object) -> dict[str, object]:
    return {"task": task_of(ada), "client": "hostile", "action": RANK, **keys}


def unchanged(store: LabelStore, ada: Visitor, reply: Reply) -> None:
    """Refused in one line of JSON that shows nothing of the inside, with all headers; and nothing was written."""
    assert 400 <= reply.status < 500, reply
    assert set(reply.json) == {"error"}
    assert b"\n" not in reply.body and b"Traceback" not in reply.body and b".py" not in reply.body
    assert b"secret" not in reply.body and b"model-" not in reply.body
    assert reply.headers["content-security-policy"] == POLICY
    assert "set-cookie" not in reply.headers
    state = ada.get("/api/task").json["state"]
    assert (state["actions"], state["note"], state["ranks"]) == (0, "", [None] * 3)
    assert store.judgements() == []
    assert len(store.labelers()) == 1


FORGED_HEADERS = {
    "host of another site": [("Host", "evil.example"), ("Origin", "http://evil.example")],
    "host that begins like ours": [("Host", "127.0.0.1.evil.example"), ("Origin", "http://127.0.0.1.evil.example")],
    "host that ends like ours": [("Host", "evil-localhost"), ("Origin", "http://evil-localhost")],
    "host with a user": [("Host", "127.0.0.1@evil.example"), ("Origin", ORIGIN)],
    "host with a path": [("Host", "127.0.0.1/evil"), ("Origin", ORIGIN)],
    "another number of this machine": [("Host", "0.0.0.0:8765"), ("Origin", "http://0.0.0.0:8765")],
    "no host": [("Origin", ORIGIN)],
    "two hosts": [("Host", HOST), ("Host", "evil.example"), ("Origin", ORIGIN)],
    "host with two ports": [("Host", "127.0.0.1:8765:80"), ("Origin", ORIGIN)],
    "origin of another site": [("Host", HOST), ("Origin", "http://evil.example")],
    "origin of another port": [("Host", HOST), ("Origin", "http://127.0.0.1:9999")],
    "origin of another name of ours": [("Host", HOST), ("Origin", "http://localhost:8765")],
    "origin of a sandboxed frame": [("Host", HOST), ("Origin", "null")],
    "origin that begins like ours": [("Host", HOST), ("Origin", f"{ORIGIN}.evil.example")],
    "origin of an extension": [("Host", HOST), ("Origin", f"chrome-extension://{HOST}")],
    "no origin": [("Host", HOST)],
    "two origins": [("Host", HOST), ("Origin", ORIGIN), ("Origin", "http://evil.example")],
    "a request that the browser calls cross-site": [
        ("Host", HOST),
        ("Origin", ORIGIN),
        ("Sec-Fetch-Site", "cross-site"),
    ],
    "a request that the browser calls same-site": [("Host", HOST), ("Origin", ORIGIN), ("Sec-Fetch-Site", "same-site")],
    "a body said to be huge": [("Host", HOST), ("Origin", ORIGIN), ("Content-Length", str(MAX_BODY + 1))],
    "two lengths": [("Host", HOST), ("Origin", ORIGIN), ("Content-Length", "1"), ("Content-Length", "2")],
    "a negative length": [("Host", HOST), ("Origin", ORIGIN), ("Content-Length", "-1")],
    "a compressed body": [("Host", HOST), ("Origin", ORIGIN), ("Content-Encoding", "gzip")],
}
WRONG_TYPES = {
    "a form": "application/x-www-form-urlencoded",
    "a form with files": "multipart/form-data; boundary=x",
    "plain text, as a form of another site can send JSON": "text/plain",
    "no type": "",
}
WRONG_BODIES: dict[str, bytes | dict[str, object]] = {
    "too much": b'{"task": 1, "client": "' + b"a" * MAX_BODY + b'"}',
    "nothing": b"",
    "no JSON": b"task=1",
    "JSON with an end missing": b'{"task": 1',
    "a tower of lists": b"[" * 60_000,
    "half of a surrogate pair": b'{"task": 1, "client": "\\ud800", "action": {"kind": "undo"}}',
    "bytes that are no text": b'{"task": 1, "client": "\xff\xfe", "action": {"kind": "undo"}}',
    "a task that is no number": {"task": "1; DROP TABLE events"},
    "a task of someone else": {"task": 10_000},
    "a huge task": {"task": 2**64},
    "an unknown key": {"labeler": 2},
    "an unknown action": {"action": {"kind": "drop"}},
    "an unknown key of an action": {"action": {"kind": "submit", "labeler": 2}},
    "a client id with a path": {"client": "../../etc/passwd"},
    "a client id with a script": {"client": "<script>"},
    "an endless client id": {"client": "a" * 1000},
    "a rank below one": {"action": {"kind": "rank", "ranks": [0, 1, 2]}},
    "too few ranks": {"action": {"kind": "rank", "ranks": [1]}},
    "too many ranks": {"action": {"kind": "rank", "ranks": [1, 2, 3, 4]}},
    "a response that is not there": {"action": {"kind": "rate", "response": 3, "value": 1}},
    "a response before the first": {"action": {"kind": "rate", "response": -1, "value": 1}},
    "a grade outside the scale": {"action": {"kind": "rate", "response": 0, "value": 8}},
    "an unknown question": {"action": {"kind": "flag", "response": 0, "flag": "<script>", "value": True}},
    "an endless note": {"action": {"kind": "note", "text": "a" * 5000}},
    "a submit without ranks": {"action": {"kind": "submit"}},
    "a skip without a reason": {"action": {"kind": "skip", "reason": ""}},
    "an undo of nothing": {"action": {"kind": "undo"}},
}
PATHS = (
    "/static/../server.py",
    "/static/..%2fserver.py",
    "/static/%2e%2e/%2e%2e/errors.py",
    "/static/....//server.py",
    "/static/..\\server.py",
    "/static//etc/passwd",
    "/static/label.js%00.css",
    "/static/",
    "/templates/label.html",
    "/labels.sqlite",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/api/../static/label.js",
    "/.git/config",
)
NAMES = (
    "<script>hit()</script>",
    "",
    " ",
    "a" * 65,
    "../../root",
    "a\nb\x00",
    "‮ada",
    "'; DROP TABLE labelers; --",
    "{{7*7}}",
)
METHODS = ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND")


@pytest.mark.parametrize("what", FORGED_HEADERS)
def test_forged_headers(store: LabelStore, ada: Visitor, what: str) -> None:
    headers = [*FORGED_HEADERS[what], JSON, ("Cookie", ada.cookie), ("X-CSRF-Token", ada.csrf)]
    body = [json.dumps(event(ada)).encode()]
    unchanged(store, ada, ask(ada.app, "POST", "/api/events", headers, body))


@pytest.mark.parametrize("what", WRONG_TYPES)
def test_wrong_types(store: LabelStore, ada: Visitor, what: str) -> None:
    headers = [*ada.headers, ("Cookie", ada.cookie), ("X-CSRF-Token", ada.csrf)]
    headers += [("Content-Type", WRONG_TYPES[what])] if WRONG_TYPES[what] else []
    unchanged(store, ada, ask(ada.app, "POST", "/api/events", headers, [json.dumps(event(ada)).encode()]))


@pytest.mark.parametrize("what", WRONG_BODIES)
def test_wrong_bodies(store: LabelStore, ada: Visitor, what: str) -> None:
    given = WRONG_BODIES[what]
    body = given if isinstance(given, bytes) else event(ada, **given)
    unchanged(store, ada, ada.post("/api/events", body))


@pytest.mark.parametrize("path", PATHS)
def test_wrong_paths(store: LabelStore, ada: Visitor, path: str) -> None:
    unchanged(store, ada, ada.get(path))


@pytest.mark.parametrize("method", METHODS)
def test_wrong_methods(store: LabelStore, ada: Visitor, method: str) -> None:
    unchanged(store, ada, ada.request(method, "/api/events"))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_names(store: LabelStore, ada: Visitor, name: str) -> None:
    unchanged(store, ada, Visitor(ada.app).join(name, TOKEN))


@pytest.mark.parametrize("csrf", ["", "0" * 64, "é"])
def test_wrong_csrf_tokens(store: LabelStore, ada: Visitor, csrf: str) -> None:
    forged = Visitor(ada.app, ada.cookie, csrf)
    unchanged(store, ada, forged.post("/api/events", event(ada)))
    unchanged(store, ada, forged.post("/api/back", {"task": None}))
    unchanged(store, ada, forged.post("/api/leave", {}))


@pytest.mark.parametrize("token", [None, "", "the-right-toke", "the-right-token ", "é"])
def test_wrong_tokens(store: LabelStore, ada: Visitor, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_pipeline.labelling.server.WRONG_TOKEN_PAUSE", 0.0)
    stranger = Visitor(ada.app)
    unchanged(store, ada, stranger.join("Eve", token))
    for path in ("/api/task", "/api/project", "/report"):
        unchanged(store, ada, stranger.get(path))
    assert b"secret" not in stranger.get("/").body  # the first page shows nothing of the project


@pytest.mark.parametrize("cookie", ["", "rlhf-label-8765=x", "rlhf-label-8765=" + "a" * 5000, "rlhf-label-8765=\xe9"])
def test_wrong_sessions(store: LabelStore, ada: Visitor, cookie: str) -> None:
    unchanged(store, ada, Visitor(ada.app, cookie, ada.csrf).post("/api/events", event(ada)))


def test_a_body_that_grows_is_cut_off(store: LabelStore, ada: Visitor) -> None:
    headers = [*ada.headers, JSON, ("Cookie", ada.cookie), ("X-CSRF-Token", ada.csrf)]
    unchanged(store, ada, ask(ada.app, "POST", "/api/events", headers, [b" " * 1024] * 65))


def test_a_task_of_another_labeler_is_refused(tmp_path: Path) -> None:
    items = [Item(number=n, prompt="p", responses=[Response(text=t) for t in "abc"]) for n in range(2)]
    config = LabelConfig.model_validate({"responses": "x.jsonl"})
    with LabelStore.create(database(tmp_path, "labels"), config, items) as store:
        app = make_app(store, token=None, hosts=allowed_names("127.0.0.1"))
        ada, eve = Visitor(app), Visitor(app)
        ada.join("Ada")
        eve.join("Eve")
        reply = eve.post("/api/events", event(ada))
        assert reply.status == 422
        assert ada.get("/api/task").json["state"]["actions"] == 0


def test_an_error_in_the_server_shows_no_trace(
    ada: Visitor, store: LabelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(labeler: int) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(store, "task", broken)
    reply = ada.get("/api/task")
    assert reply.status == 500
    assert reply.json == {
        "error": {
            "kind": "bug",
            "faults": [{"where": "", "key": "", "found": "an error in the server", "expected": "", "fix": ""}],
        }
    }
    assert reply.headers["content-security-policy"] == POLICY


def test_the_policy_lets_nothing_in() -> None:
    for part in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"):
        assert part in POLICY
    assert "unsafe" not in POLICY and "http" not in POLICY and "data:" not in POLICY


def test_the_cookie_is_for_this_page_alone(ada: Visitor) -> None:
    reply = Visitor(ada.app).join("Ada", TOKEN)
    assert {"httponly", "samesite=strict", "path=/"} <= {
        part.strip().lower() for part in reply.headers["set-cookie"].split(";")
    }


def test_names_of_a_server() -> None:
    assert allowed_names("127.0.0.1") == {"127.0.0.1", "localhost", "[::1]"}
    assert "10.1.2.3" in allowed_names("10.1.2.3") and "[fe80::1]" in allowed_names("fe80::1%eth0")
    for host, local in {"127.0.0.1": True, "localhost": True, "::1": True, "0.0.0.0": False, "::": False}.items():
        assert is_loopback(host) is local, host


def test_a_session_ends_with_the_token_and_when_its_labeler_leaves(tmp_path: Path) -> None:
    items = [Item(number=0, prompt="p", responses=[Response(text=t) for t in "ab"])]
    with LabelStore.create(database(tmp_path, "labels"), LabelConfig(responses="x.jsonl"), items) as store:
        names = allowed_names("127.0.0.1")
        ada = Visitor(make_app(store, token="old", hosts=names))
        ada.join("Ada", "old")

        def status(token: str | None) -> int:
            return Visitor(make_app(store, token=token, hosts=names), ada.cookie, ada.csrf).get("/api/task").status

        assert [status(token) for token in ("old", "new", None)] == [200, 401, 401]
        assert ada.post("/api/leave", {}).status == 200
        assert ada.get("/api/task").status == 401 and status("old") == 401


def test_the_log_has_one_line_for_a_path_with_several(ada: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError

    records: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("rlhf.label"), "handle", records.append)
    monkeypatch.setattr("rlhf_pipeline.labelling.server.static_files", broken)
    assert ada.get("/static/a\nERROR all labels are lost\x1b[2J").status == 500
    (line,) = (record.getMessage() for record in records)
    assert "\n" not in line and "\x1b" not in line


@pytest.mark.parametrize("error", [DamagedFile("/home/ada/labels.sqlite: bad"), RunFailed("/home/ada: disk full")])
def test_a_storage_that_fails_does_not_say_where_it_is(
    ada: Visitor, store: LabelStore, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(labeler: int) -> None:
        raise error

    monkeypatch.setattr(store, "task", broken)
    reply = ada.get("/api/task")
    assert reply.status == 503 and b"ada" not in reply.body
    assert b"what was saved is safe" in reply.body
