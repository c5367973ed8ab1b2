"""The server of the labelling page: who labels, which item comes next, what was done."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from rlhf_pipeline.errors import BadInput, DamagedFile, Fault, RlhfError, faults_of
from rlhf_pipeline.labelling.kinds import MAX_NOTE, TaskState
from rlhf_pipeline.labelling.markdown import NEEDS_LABEL, render
from rlhf_pipeline.labelling.report_page import LivePage
from rlhf_pipeline.labelling.security import REPORT_POLICY, Guard, fault_json
from rlhf_pipeline.labelling.store import LabelStore
from rlhf_pipeline.labelling.wire import Answer, Back, Join, Joined, Sent, numbered, placed, project_of, shown_item

try:
    import jinja2
    from fastapi import FastAPI, Request, Response
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise BadInput(NEEDS_LABEL) from error

Body = TypeVar("Body", bound=BaseModel)

WRONG_TOKEN_PAUSE = 0.5
"""Seconds before the answer to a wrong token."""

REASONS = (
    "I cannot judge this topic",
    "The prompt is unclear",
    "The responses are too alike",
    "I would rather not read this",
)
SHORTCUTS = (
    (("1", "…", "9"), "Rank that response next. Once all are ranked: grade the marked one"),
    (("=",), "Tie: the next response shares the last one's rank, or the marked one joins the rank above it"),
    (("←", "→"), "Move the marked response up or down the ranking, or choose the one to grade"),
    (("⌫",), "Take the marked response out of the ranking"),
    (("r",), "Switch between ranking and grading"),
    (("p",), "Compare two responses at a time"),
    (("f",), "Questions about the marked response; y and n answer them"),
    (("n",), "Write a note"),
    (("m",), "Plain text instead of Markdown"),
    (("z",), "Undo. On a fresh item: open the last one again"),
    (("s",), "Skip the item"),
    (("i",), "Instructions"),
    (("Enter",), "Submit"),
)
_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_NAME = re.compile(r"[^\W_][\w .,'’@+-]{0,63}")


class Declined(Exception):
    """A request that its sender may not make: the status, and why."""

    def __init__(self, status: int, fault: Fault):
        super().__init__(str(fault))
        self.status, self.fault = status, fault


@lru_cache(maxsize=1)
def static_files() -> Mapping[str, tuple[bytes, str]]:
    """The page's scripts, styles and icon by name, with their types: no other file can be asked for."""
    found = (files("rlhf_pipeline.labelling") / "static").iterdir()
    return {f.name: (f.read_bytes(), _TYPES[f.name.rpartition(".")[2]]) for f in found if f.is_file()}


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    found = (files("rlhf_pipeline.labelling") / "templates").iterdir()
    pages = jinja2.DictLoader({f.name: f.read_text("utf-8") for f in found if f.name.endswith(".html")})
    return jinja2.Environment(loader=pages, autoescape=True, undefined=jinja2.StrictUndefined)


def csrf_of(secret: str) -> str:
    """The CSRF token of a session: HMAC-SHA-256 under the session's secret, which scripts cannot read."""
    return hmac.new(secret.encode(), b"csrf", hashlib.sha256).hexdigest()


def _json(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status, media_type="application/json")


def _fault(status: int, kind: str, *faults: Fault) -> Response:
    return Response(fault_json(kind, faults), status, media_type="application/json")


async def _read(request: Request, kind: type[Body]) -> Body:
    return kind.model_validate_json(await request.body())


def make_app(store: LabelStore, *, token: str | None, hosts: set[str]) -> FastAPI:
    """The page of a project.

    Args:
        token: what a browser must give before it sees anything of the project; None: nothing.
        hosts: the names, without port, by which a browser may call this server.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, hosts=hosts)
    known: dict[str, int] = {}  # labelers by the secrets of their sessions; the store has them all
    orders: dict[int, list[int]] = {}  # the responses' order on the page by task, which never changes
    project = store.config.name
    asked = project_of(store.config)
    quality, one_at_a_time = LivePage(store, project), asyncio.Lock()
    instructions = jinja2.filters.Markup(render(store.config.instructions, breaks=False))

    def cookie_name(request: Request) -> str:
        # Cookies know no ports: another project at another port of this machine has another cookie.
        port = request.headers["host"].rpartition(":")[2]
        return f"rlhf-label-{port if port.isdigit() else 80}"

    def cookie(request: Request) -> str:
        return request.cookies.get(cookie_name(request), "")[:200]

    async def labeler_of(secret: str) -> int | None:
        if secret and secret not in known:
            found = await run_in_threadpool(store.session, secret, token)
            if found is None:
                return None
            if len(known) > 10_000:
                known.clear()
            known[secret] = found
        return known.get(secret)

    async def signed_in(request: Request) -> int:
        secret = cookie(request)
        labeler = await labeler_of(secret)
        if labeler is None:
            raise Declined(401, Fault("", "no session", "a name", "open the first page and give your name"))
        if request.method == "POST":
            given = request.headers.get("x-csrf-token", "")
            if not hmac.compare_digest(given.encode(), csrf_of(secret).encode()):
                raise Declined(403, Fault("X-CSRF-Token", "another token", "this session's", "load the page again"))
        return labeler

    async def answer(labeler: int, state: TaskState | None, *, with_item: bool = False) -> Response:
        def made() -> Answer:
            progress = store.progress(labeler)
            if state is None:
                return Answer(state=None, progress=progress)
            item = None
            if with_item:
                earlier = store.previous(labeler, state.task) is not None
                item = shown_item(state, store.item(state.item), earlier=earlier)
            return Answer(state=placed(state), progress=progress, item=item)

        return _json(await run_in_threadpool(made))

    @app.get("/")
    async def home(request: Request) -> Response:
        secret = cookie(request)
        labeler = await labeler_of(secret)
        if labeler is None:
            shown = token is None  # with a token, a stranger sees nothing of the project
            page = _templates().get_template("join.html")
            text = page.render(
                project=project if shown else "", locked=not shown, instructions=instructions if shown else ""
            )
        else:
            page = _templates().get_template("label.html")
            text = page.render(
                project=project,
                name=await run_in_threadpool(store.name, labeler),
                csrf=csrf_of(secret),
                instructions=instructions,
                reasons=REASONS,
                shortcuts=SHORTCUTS,
                max_note=MAX_NOTE,
            )
        return Response(text, media_type="text/html; charset=utf-8")

    @app.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in static_files():
            raise HTTPException(404)
        content, kind = static_files()[name]
        return Response(content, media_type=kind)

    @app.post("/api/session")
    async def join(request: Request) -> Response:
        body = await _read(request, Join)
        if token is not None and not hmac.compare_digest((body.token or "").encode(), token.encode()):
            await asyncio.sleep(WRONG_TOKEN_PAUSE)
            raise Declined(403, Fault("token", "another token", "the one that the server printed when it started"))
        name = " ".join(body.name.split())
        if not _NAME.fullmatch(name):
            found = "no name" if not name else "a name with other characters, or a long one"
            expected = "at most 64 letters, digits, spaces and . , ' @ + - _, a letter or digit first"
            raise Declined(422, Fault("name", found, expected))
        labeler = await run_in_threadpool(store.labeler, name)
        secret = cookie(request)
        if await labeler_of(secret) != labeler:
            secret = await run_in_threadpool(store.new_session, labeler, token)
        made = _json(Joined(csrf=csrf_of(secret), name=await run_in_threadpool(store.name, labeler)))
        made.set_cookie(cookie_name(request), secret, httponly=True, samesite="strict", path="/", max_age=90 * 86400)
        return made

    @app.post("/api/leave")
    async def leave(request: Request) -> Response:
        await signed_in(request)
        secret = cookie(request)
        await run_in_threadpool(store.end_session, secret, token)
        known.pop(secret, None)
        made = Response("{}", media_type="application/json")
        made.delete_cookie(cookie_name(request), path="/", httponly=True, samesite="strict")
        return made

    @app.get("/api/project")
    async def project_asked(request: Request) -> Response:
        await signed_in(request)
        return _json(asked)

    @app.get("/api/task")
    async def task(request: Request) -> Response:
        labeler = await signed_in(request)
        return await answer(labeler, await run_in_threadpool(store.task, labeler), with_item=True)

    @app.post("/api/events")
    async def events(request: Request) -> Response:
        labeler = await signed_in(request)
        sent = await _read(request, Sent)
        if sent.task not in orders:
            if len(orders) > 10_000:
                orders.clear()
            orders[sent.task] = (await run_in_threadpool(store.state, sent.task)).shown
        saved = store.record_soon(labeler, sent.task, numbered(sent.action, orders[sent.task]), sent.client)
        state = await asyncio.wrap_future(saved)
        return await answer(labeler, state)

    @app.post("/api/back")
    async def back(request: Request) -> Response:
        labeler = await signed_in(request)
        sent = await _read(request, Back)
        before = 2**62 if sent.task is None else sent.task
        earlier = await run_in_threadpool(store.previous, labeler, before)
        if earlier is None:
            raise Declined(422, Fault("task", "the first item", "an item before it"))
        return await answer(labeler, await run_in_threadpool(store.back, labeler, earlier), with_item=True)

    @app.get("/report")
    async def report(request: Request) -> Response:
        await signed_in(request)
        async with one_at_a_time:  # it takes seconds: no more than one thread of the pool
            text = await run_in_threadpool(quality.text)
        headers = {"content-security-policy": REPORT_POLICY}
        return Response(text, media_type="text/html; charset=utf-8", headers=headers)

    @app.exception_handler(Declined)
    async def declined(_: Request, error: Declined) -> Response:
        return _fault(error.status, "refused", error.fault)

    @app.exception_handler(HTTPException)
    async def missing(_: Request, error: HTTPException) -> Response:
        return _fault(error.status_code, "refused", Fault("", "no such page", "one of the page's own addresses"))

    @app.exception_handler(ValidationError)
    async def malformed(_: Request, error: ValidationError) -> Response:
        # What was sent is not sent back.
        told = [
            Fault(".".join(map(str, one["loc"])), one["msg"])
            for one in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        return _fault(422, "refused", *told[:5])

    @app.exception_handler(RlhfError)
    async def refused(_: Request, error: RlhfError) -> Response:
        if isinstance(error, BadInput) and not isinstance(error, DamagedFile):
            return _fault(422, error.kind, *faults_of(error))
        logging.getLogger("rlhf.label").error("%s", error)  # with the place of the file, which is not for the client
        found, fix = "the server cannot read or write the labels now", "tell whoever runs it; what was saved is safe"
        return _fault(503, error.kind, Fault("", found, fix=fix))

    return app
