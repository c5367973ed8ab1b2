"""The server: what a browser asks, and what it gets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `label` is not installed")

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.labelling.kinds import Item, RankAction, Response
from rlhf_pipeline.labelling.security import REPORT_POLICY, allowed_names
from rlhf_pipeline.labelling.server import make_app, static_files
from rlhf_pipeline.labelling.serving import address, bound, serve
from rlhf_pipeline.labelling.store import LabelStore, Refused, database
from rlhf_pipeline.labelling.wire import numbered
from tests.labelling.asgi import Visitor

TEXTS = ("zero", "one", "two")


def made(home: Path, number: int = 3, **keys: object) -> LabelStore:
    items = [
        Item(number=n, prompt=f"prompt {n}", responses=[Response(text=t, source=f"m-{t}") for t in TEXTS])
        for n in range(number)
    ]
    return LabelStore.create(
        database(home, "labels"), LabelConfig.model_validate({"responses": "x.jsonl", **keys}), items
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LabelStore]:
    with made(tmp_path) as store:
        yield store


def visitor(store: LabelStore, name: str | None = "Ada") -> Visitor:
    found = Visitor(make_app(store, token=None, hosts=allowed_names("127.0.0.1")))
    if name:
        assert found.join(name).status == 200
    return found


def act(visitor: Visitor, task: int, client: str, **action: object) -> dict:
    reply = visitor.post("/api/events", {"task": task, "client": client, "action": action})
    assert reply.status == 200, reply.body
    return reply.json


def test_an_item_from_first_sight_to_submit(store: LabelStore) -> None:
    ada = visitor(store)
    first = ada.get("/api/task").json
    task, order = first["item"]["task"], [r["turns"][0]["text"] for r in first["item"]["responses"]]
    assert sorted(order) == sorted(TEXTS)
    assert first["item"]["kind"] == "rank" and not first["item"]["earlier"]
    assert first["progress"] == {"done": 0, "skipped": 0, "left": 3, "seconds_per_item": None}
    assert first["state"]["ranks"] == [None] * 3

    # By place: the second place is best, the others are tied.
    assert act(ada, task, "a", kind="rank", ranks=[2, 1, 2])["state"]["ranks"] == [2, 1, 2]
    assert act(ada, task, "b", kind="rate", response=0, value=6)["state"]["ratings"] == [6, None, None]
    assert act(ada, task, "c", kind="flag", response=2, flag="opinion", value=True)["state"]["flags"] == [
        {},
        {},
        {"opinion": True},
    ]
    assert act(ada, task, "c", kind="flag", response=2, flag="opinion", value=True)["state"]["actions"] == 3
    assert act(ada, task, "d", kind="note", text="n")["state"]["note"] == "n"
    assert act(ada, task, "e", kind="undo")["state"]["note"] == ""
    after = act(ada, task, "f", kind="submit")
    assert after["state"]["status"] == "done" and after["progress"]["done"] == 1

    (judged,) = store.judgements()
    by_text = {TEXTS[k]: (judged.ranks[k], judged.ratings[k], judged.flags[k]) for k in range(3)}
    assert by_text == {
        order[0]: (2, 6, {}),
        order[1]: (1, None, {}),
        order[2]: (2, None, {"opinion": True}),
    }


def test_nothing_on_the_wire_names_a_model_or_a_number(store: LabelStore) -> None:
    ada = visitor(store)
    for reply in (ada.get("/api/task"), ada.get("/"), ada.get("/api/project")):
        for word in (*(f"m-{text}" for text in TEXTS), '"source', '"shown'):
            assert word.encode() not in reply.body, word


def test_back_opens_the_task_before(store: LabelStore) -> None:
    ada = visitor(store)
    first = ada.get("/api/task").json["item"]["task"]
    assert ada.post("/api/back", {"task": first}).status == 422
    act(ada, first, "a", kind="rank", ranks=[1, 2, 3])
    act(ada, first, "b", kind="submit")
    second = ada.get("/api/task").json["item"]
    assert second["task"] != first and second["earlier"]
    for task in (second["task"], None):
        again = ada.post("/api/back", {"task": task}).json
        if task is not None:
            assert again["item"]["task"] == first
            assert (again["state"]["status"], again["state"]["ranks"]) == ("open", [1, 2, 3])
    assert again["item"]["task"] == second["task"]  # the last


def test_nothing_left(tmp_path: Path) -> None:
    with made(tmp_path, 1) as store:
        ada = visitor(store)
        task = ada.get("/api/task").json["item"]["task"]
        act(ada, task, "a", kind="skip", reason="r")
        assert ada.get("/api/task").json == {
            "state": None,
            "item": None,
            "progress": {"done": 0, "skipped": 1, "left": 0, "seconds_per_item": None},
        }


def test_sessions(store: LabelStore) -> None:
    ada = visitor(store)
    cookie, csrf = ada.cookie, ada.csrf
    assert ada.join("  ada ").json == {"csrf": csrf, "name": "Ada"} and ada.cookie == cookie  # the same session
    ben = visitor(store, "Ben")
    assert ben.csrf != csrf and len(store.labelers()) == 2
    again = Visitor(make_app(store, token=None, hosts={"127.0.0.1"}), cookie, csrf)  # a restart of the server
    assert again.get("/api/task").status == 200
    assert ada.post("/api/leave", {}).headers["set-cookie"].startswith('rlhf-label-8765="";')


def test_a_session_for_each_port(store: LabelStore) -> None:
    app = make_app(store, token=None, hosts=allowed_names("127.0.0.1"))
    for host, name in {"localhost:81": "81", "127.0.0.1": "80", "[::1]": "80", "[::1]:8765": "8765"}.items():
        ada = Visitor(app, headers=[("Host", host), ("Origin", f"http://{host}")])
        assert ada.join("Ada").status == 200
        assert ada.cookie.startswith(f"rlhf-label-{name}=") and ada.get("/api/task").status == 200, host


def test_the_first_page_and_the_item_page(store: LabelStore) -> None:
    stranger = visitor(store, None)
    assert b'id="join"' in stranger.get("/").body and b"helpful" in stranger.get("/").body
    ada = visitor(store)
    page = ada.get("/").body.decode()
    assert 'data-name="Ada"' in page and f'data-csrf="{ada.csrf}"' in page
    assert "style=" not in page and "onclick" not in page
    assert not re.findall(r"<script(?![^>]*\bsrc=)", page)  # none inline
    for kind in ("href", "src"):
        for link in re.findall(rf' {kind}="([^"]+)"', page):
            assert link.startswith(("/static/", "#")) or link == "/report", link
            if link.startswith("/static/"):
                assert ada.get(link).status == 200, link


def test_what_the_page_asks(tmp_path: Path) -> None:
    keys = {
        "scale": {"lowest": 0, "highest": 4, "lowest_word": "bad", "highest_word": "good"},
        "flags": [{"key": "rude", "text": "Is it rude?"}],
        "mode": "pairwise",
    }
    with made(tmp_path, **keys) as store:
        assert visitor(store).get("/api/project").json == {
            "scale": {"low": 0, "high": 4, "low_words": "bad", "high_words": "good"},
            "flags": [{"key": "rude", "text": "Is it rude?"}],
            "mode": "pairwise",
        }


@pytest.mark.check
def test_the_quality_page(store: LabelStore) -> None:
    ada = visitor(store)
    task = ada.get("/api/task").json["item"]["task"]
    act(ada, task, "a", kind="rank", ranks=[1, 2, 3])
    act(ada, task, "b", kind="submit")
    page = ada.get("/report")
    assert page.status == 200 and b"Quality of the labels" in page.body and b"<script" not in page.body
    assert page.headers["content-security-policy"] == REPORT_POLICY
    assert b"m-zero" not in page.body and b"Ada" not in page.body
    assert visitor(store, None).get("/report").status == 401


def test_scripts_import_only_each_other() -> None:
    for name, (content, kind) in static_files().items():
        text = content.decode()
        assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text, name
        if kind == "text/javascript":
            for found in re.findall(r'from "([^"]+)"', text):
                assert found.removeprefix("./") in static_files(), (name, found)


def test_places_and_numbers() -> None:
    # Place p shows response shown[p]: places (2, 0, 1) ranked 1, 2, 3 give ranks 2, 3, 1 by number.
    assert numbered(RankAction(ranks=[1, 2, None]), [2, 0, 1]) == RankAction(ranks=[2, None, 1])
    with pytest.raises(Refused, match="found 1; expected 3"):
        numbered(RankAction(ranks=[1]), [2, 0, 1])


class Elsewhere:
    """A socket of a machine whose number is 10.0.0.9, or that has no network."""

    there = True

    def __init__(self, *_: Any) -> None: ...
    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def connect(self, _: Any) -> None:
        if not self.there:
            raise OSError("Network is unreachable")

    def getsockname(self) -> tuple[str, int]:
        return "10.0.0.9", 4711


def test_a_server_on_every_address_answers_to_the_number_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_pipeline.labelling.security.socket.socket", Elsewhere)
    assert address("0.0.0.0", 80, "t") == "http://10.0.0.9:80/#token=t"
    assert "10.0.0.9" in allowed_names("0.0.0.0") and "10.0.0.9" not in allowed_names("127.0.0.1")
    monkeypatch.setattr(Elsewhere, "there", False)
    assert [address(host, 80, "t") for host in ("0.0.0.0", "::")] == [
        "http://127.0.0.1:80/#token=t",
        "http://[::1]:80/#token=t",
    ]


def test_addresses() -> None:
    for (host, token), expected in {
        ("127.0.0.1", None): "http://127.0.0.1:80/",
        ("::1", None): "http://[::1]:80/",
        ("10.0.0.2", "t"): "http://10.0.0.2:80/#token=t",
    }.items():
        assert address(host, 80, token) == expected


def test_other_machines_need_a_token(store: LabelStore) -> None:
    with bound("0.0.0.0", 0) as listener, pytest.raises(BadInput, match=r"'0\.0\.0\.0' without a token"):
        serve(store, listener, host="0.0.0.0", token=None, ready=print)


@pytest.mark.parametrize("host", ["ä..b", "x" * 64 + "..y"])
def test_a_host_that_is_no_name_is_refused(host: str) -> None:
    with pytest.raises(BadInput, match="another host or port"):
        bound(host, 0)


def test_the_size_of_headers_is_limited_whatever_is_installed(
    store: LabelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn

    made: list[Any] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: made.append(self.config))
    serve(store, bound("127.0.0.1", 0), host="127.0.0.1", token=None, ready=lambda _: None)
    (config,) = made
    assert config.http == "h11" and config.h11_max_incomplete_event_size == 16 * 1024
