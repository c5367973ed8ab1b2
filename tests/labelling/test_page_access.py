"""The page for everyone and against some: axe, screen readers, fingers, light and dark, tokens, hostile texts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.labelling.kinds import Item, Response
from rlhf_pipeline.labelling.store import LabelStore, database
from tests.labelling.browser import Tab, browser, clean, made, needed, served

pytestmark = [pytest.mark.slow, pytest.mark.check]


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    needed()
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def axe() -> Path:
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        pytest.skip("axe-playwright-python is not installed")
    return Path(spec.origin).parent / "axe.min.js"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing_serious(chrome: Any, axe: Path, tmp_path: Path, scheme: str, width: int) -> None:
    with made(tmp_path, 2) as store, served(store) as home:
        tab = Tab(chrome, home, color_scheme=scheme)
        page = tab.page
        page.set_viewport_size({"width": width, "height": 800})
        assert tab.violations(axe) == []
        tab.join("Ada")
        assert tab.violations(axe) == []
        tab.press("12=376")
        page.click(".card:nth-child(1) summary")
        assert tab.violations(axe) == []
        if width < 400:  # nothing sticks out at the side
            assert page.evaluate("document.documentElement.scrollWidth") == width
        for key, shown in {"?": "#keys", "s": "#skipping"}.items():
            tab.press(f"[Escape]{key}")
            assert page.is_visible(shown) and tab.violations(axe) == []
        tab.press("[Escape][Escape]i")
        assert tab.violations(axe) == []
        tab.press("[Escape]4p")
        assert tab.violations(axe) == []
        clean(tab)


def test_a_token_in_the_address_is_enough(chrome: Any, tmp_path: Path) -> None:
    with made(tmp_path, 1) as store, served(store, "the-token") as address:
        home = address.partition("#")[0]
        tab = Tab(chrome, address)
        assert tab.page.url == home  # the token has left the address bar
        assert "labels" not in str(tab.page.text_content("body")) and not tab.page.is_visible("#token")
        tab.join("Ada")
        clean(tab)
        other = Tab(chrome, home)
        other.page.fill("#name", "Eve")
        other.page.fill("#token", "a guess")
        other.page.press("#name", "Enter")
        other.page.wait_for_selector("#fault:not(:empty)")
        assert "token" in str(other.page.text_content("#fault")) and not other.page.query_selector("#item")
        other.page.fill("#token", "the-token")
        other.join("Eve")
        assert len(store.labelers()) == 2 and other.outside == []


def test_a_finger_drags_chips_and_scrolls_responses(chrome: Any, tmp_path: Path) -> None:
    look = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with made(tmp_path, 1, k=9) as store, served(store) as home:
        tab = Tab(chrome, home, **look)
        page = tab.page
        page.set_viewport_size({"width": 360, "height": 740})
        tab.join("Ada")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for _ in range(9):
            page.tap("#pool .chip")
        assert tab.order() == list("123456789")
        touch = page.context.new_cdp_session(page)

        def finger(kind: str, *points: tuple[float, float]) -> None:
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]})

        def middle(selector: str) -> tuple[float, float]:
            box = page.locator(selector).bounding_box()
            return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

        (x, y), (to_x, to_y) = middle("#groups [data-place='8']"), middle("#groups [data-place='1']")
        before = page.evaluate("scrollY")
        finger("touchStart", (x, y))
        for part in range(1, 9):
            finger("touchMove", (x + (to_x - x) * part / 8, y + (to_y - y) * part / 8))
        finger("touchEnd")
        assert tab.order() == ["1", "2=9", "3", "4", "5", "6", "7", "8"]
        assert page.evaluate("scrollY") == before
        clean(tab)


def test_changes_are_spoken_and_focus_follows(chrome: Any, tmp_path: Path) -> None:
    with made(tmp_path, 2) as store, served(store) as home:
        tab = Tab(chrome, home).join("Ada")
        tab.press("3")
        assert tab.page.text_content("#spoken") == "Response 3 is 1st of 4."
        tab.press("=1")
        assert tab.page.text_content("#spoken") == "Response 1 is 1st of 4, tied with Response 3."
        tab.page.focus("#groups [data-place='2']")
        tab.press("[ArrowDown]")
        assert tab.page.text_content("#spoken") == "Response 3 is 2nd of 4."
        assert tab.page.evaluate("document.activeElement.dataset.place") == "2"
        tab.press("24")
        tab.next()
        assert tab.page.evaluate("document.activeElement.id") == "prompt-title"
        clean(tab)


def test_hostile_texts_do_nothing(chrome: Any, tmp_path: Path) -> None:
    from tests.labelling.test_markdown import HOSTILE

    items = [
        Item(
            number=n,
            prompt=[{"role": "<script>hit()</script>", "content": text}, {"role": "user", "content": text}],
            responses=[Response(text=text, source="m"), Response(text=f"{text}\n\n{text}")],
        )
        for n, text in enumerate(HOSTILE)
    ]
    keys = {"responses": "x.jsonl", "instructions": "\n\n".join(HOSTILE), "num": len(items)}
    keys["flags"] = [{"key": "a", "text": "<img src=x onerror=hit()>"}]
    keys["scale"] = {"lowest_word": "<script>hit()</script>", "highest_word": "'\"><img src=x onerror=hit()>"}
    config = LabelConfig.model_validate(keys)
    with LabelStore.create(database(tmp_path, "labels"), config, items) as store, served(store) as home:
        tab = Tab(chrome, home)
        tab.page.add_init_script("window.hits = 0; window.hit = () => { window.hits += 1; };")
        tab.page.goto(home)
        tab.join("Ada")
        for text in HOSTILE:
            tab.page.fill("#note", text.replace("\x00", ""))
            tab.press("[Escape]12")
            tab.page.eval_on_selector_all("main a", "all => all.forEach(a => (a.focus(), a.blur()))")
            if tab.count() == f"Item {len(items)} of {len(items)}":
                break
            assert tab.page.evaluate("window.hits") == 0, text
            tab.next()
        tab.page.reload()
        tab.page.wait_for_selector(".card")
        assert tab.page.evaluate("window.hits") == 0
        assert len(store.judgements()) == len(items) - 1
        clean(tab)
