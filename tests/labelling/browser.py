"""A labelling page served in a thread, and a browser that reports what it should not do."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.labelling.kinds import Item, Response
from rlhf_pipeline.labelling.store import LabelStore, database

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
TEXTS = ("Four **words** of `code`.", "```python\nx = 1\n```", "- a\n- b", "plain")


def needed() -> None:
    """Skip where the browser or what drives it is missing."""
    for module in ("fastapi", "playwright.sync_api"):
        pytest.importorskip(module, reason=f"{module.partition('.')[0]} is not installed")
    if BROWSER is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} on the PATH")


def made(home: Path, number: int, k: int = 4, kind: str = "rank", **keys: object) -> LabelStore:
    """The storage of a project of `number` items with k responses each."""
    items = [
        Item(
            number=n,
            kind=kind,
            prompt=f"Prompt {n}",
            responses=[Response(text=TEXTS[i % 4] if i else f"{n}", source=f"m{i}", ended=i != 3) for i in range(k)],
        )
        for n in range(number)
    ]
    config = LabelConfig.model_validate({"responses": "x.jsonl", **keys})
    return LabelStore.create(database(home, "labels"), config, items)


@contextmanager
def served(store: Any, token: str | None = None) -> Iterator[str]:
    """The address of a server of this store; it stops afterwards."""
    import socket

    import uvicorn

    from rlhf_pipeline.labelling.security import allowed_names
    from rlhf_pipeline.labelling.server import make_app
    from rlhf_pipeline.labelling.serving import address

    app = make_app(store, token=token, hosts=allowed_names("127.0.0.1"))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield address("127.0.0.1", listener.getsockname()[1], token)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def browser() -> Iterator[Any]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()


class Tab:
    """A tab, its complaints (console errors, exceptions) and the addresses outside `home` that it asked for."""

    def __init__(self, browser: Any, home: str, **look: Any):
        self.home = home.partition("#")[0]
        self.complaints: list[str] = []
        self.outside: list[str] = []
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}, **look).new_page()
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on(
            "request", lambda r: None if r.url.startswith((self.home, "data:")) else self.outside.append(r.url)
        )
        self.page.goto(home)

    def join(self, name: str) -> Tab:
        self.page.fill("#name", name)
        self.page.press("#name", "Enter")
        self.page.wait_for_selector("#item:not([hidden]) .card, #done:not([hidden])")
        return self

    def press(self, keys: str) -> None:
        """Press keys one after the other; words in brackets name keys: `12[Enter]`."""
        while keys:
            if keys[0] == "[":
                key, _, keys = keys[1:].partition("]")
            else:
                key, keys = keys[0], keys[1:]
            self.page.keyboard.press(key)

    def saved(self) -> None:
        """Wait until nothing is left to send."""
        self.page.wait_for_function("() => document.getElementById('saved').dataset.state === 'saved'")

    def next(self) -> None:
        """Submit by the keyboard, and wait for the next item or the end."""
        before = self.count()
        self.press("[Enter]")
        self.moved_on(before)

    def moved_on(self, before: str) -> None:
        """Wait for another item than the one that counted `before`, or the end."""
        self.page.wait_for_function(
            "before => document.getElementById('count').textContent !== before"
            " && !document.getElementById('item').classList.contains('settling')",
            arg=before,
        )

    def count(self) -> str:
        return str(self.page.text_content("#count"))

    def order(self) -> list[str]:
        """The ranking as the lower edge shows it, as `1=2`, `3`: best first."""
        return list(
            self.page.eval_on_selector_all(
                "#groups li", "all => all.map(li => [...li.children].map(chip => chip.textContent).join('='))"
            )
        )

    def violations(self, axe: Path) -> list[str]:
        """What axe finds of serious and critical kinds on the page as it is."""
        self.page.evaluate(axe.read_text())
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{one['id']}: {node['html'][:200]}"
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]


def clean(tab: Tab) -> None:
    """Assert that nothing went wrong in the tab and nothing was asked for elsewhere."""
    assert tab.complaints == [] and tab.outside == []
