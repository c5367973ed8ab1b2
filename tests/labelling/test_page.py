"""The page in a real browser: by keyboard, by mouse, two labelers, two at a time, an arena."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.labelling.store import LabelStore
from tests.labelling.browser import Tab, browser, clean, made, needed, served

pytestmark = [pytest.mark.slow, pytest.mark.check]


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    needed()
    with browser() as found:
        yield found


def ranks_by_place(store: LabelStore, index: int = -1) -> list[int]:
    judged = store.judgements()[index]
    return [judged.ranks[k] for k in judged.shown]


def test_four_responses_in_nine_key_strokes(chrome: Any, tmp_path: Path) -> None:
    with made(tmp_path, 2) as store, served(store) as home:
        tab = Tab(chrome, home).join("Ada")
        strokes = "2413" + "7654"  # the ranking, best first, then a grade for each place
        tab.press(strokes)
        tab.page.click("#plain")  # after a click, Enter still submits: it does not press that button again
        tab.next()  # the ninth
        assert len(strokes) + 1 == 9
        judged = store.judgements()[0]
        assert ranks_by_place(store) == [3, 1, 4, 2]
        assert [judged.ratings[k] for k in judged.shown] == [7, 6, 5, 4]
        clean(tab)


def test_ties_moves_and_undo_by_keyboard(chrome: Any, tmp_path: Path) -> None:
    with made(tmp_path, 2, flags=[]) as store, served(store) as home:
        tab = Tab(chrome, home).join("Ada")
        tab.press("2=4")
        assert tab.order() == ["2=4"]
        tab.press("1")
        assert tab.order() == ["2=4", "1"]
        tab.press("[ArrowLeft]")
        assert tab.order() == ["1", "2=4"]
        tab.press("[Backspace]")
        assert tab.order() == ["2=4"]
        tab.press("z")
        tab.page.wait_for_function("() => document.querySelectorAll('#groups li').length === 2")
        assert tab.order() == ["1", "2=4"]
        tab.press("3")
        assert tab.order() == ["1", "2=4", "3"]
        assert "How good is 1?" in str(tab.page.text_content("#hint"))
        tab.press("r4[ArrowRight]")  # back to ranking; 4 leaves its tie
        assert tab.order() == ["1", "2", "4", "3"]
        tab.press("=")
        assert tab.order() == ["1", "2=4", "3"]
        tab.press("nA note[Escape]")
        tab.next()
        assert ranks_by_place(store) == [1, 2, 3, 2]
        assert store.judgements()[0].note == "A note"
        tab.press("z")  # nothing done here yet: the item before opens again
        tab.page.wait_for_function("() => document.getElementById('note').value === 'A note'")
        assert tab.order() == ["1", "2=4", "3"] and store.judgements() == []
        clean(tab)


def test_keys_wait_for_an_undo(chrome: Any, tmp_path: Path) -> None:
    """Else they would send the ranks that were taken back again."""
    with made(tmp_path, 1) as store, served(store) as home:
        tab = Tab(chrome, home).join("Ada")
        tab.press("12")
        tab.saved()
        network = tab.page.context.new_cdp_session(tab.page)
        slow = {"offline": False, "latency": 400, "downloadThroughput": -1, "uploadThroughput": -1}
        network.send("Network.emulateNetworkConditions", slow)
        tab.press("z3")
        tab.page.wait_for_function("() => document.querySelectorAll('#groups li').length === 1")
        tab.press("4")
        tab.saved()
        assert tab.order() == ["1", "4"]
        state = store.state(1)
        assert [state.ranks[k] for k in state.shown] == [1, None, None, 2]
        clean(tab)


def test_dragging_and_buttons(chrome: Any, tmp_path: Path) -> None:
    with made(tmp_path, 1) as store, served(store) as home:
        tab = Tab(chrome, home).join("Ada")
        page = tab.page

        def drag(source: str, target: str, share: float) -> None:
            start, end = (page.locator(where).bounding_box() for where in (source, target))
            page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
            page.mouse.down()
            page.mouse.move(end["x"] + end["width"] * share, end["y"] + end["height"] / 2, steps=6)
            page.mouse.up()

        drag(".card:nth-child(3) .badge", "#groups", 0.5)
        assert tab.order() == ["3"]
        drag("#pool [data-place='0']", "#groups [data-place='2']", 0.05)
        assert tab.order() == ["1", "3"]
        drag("#pool [data-place='1']", "#groups [data-place='2']", 0.5)
        assert tab.order() == ["1", "2=3"]
        drag("#groups [data-place='0']", "#groups [data-place='2']", 0.95)
        assert tab.order() == ["2=3", "1"]
        drag("#groups [data-place='0']", "#pool", 0.5)
        assert tab.order() == ["2=3"]
        page.click("#pool [data-place='3']")
        page.click(".card:nth-child(1) .badge")
        assert tab.order() == ["2=3", "4", "1"]
        page.click(".card:nth-child(2) .scale label:nth-child(7)")
        page.click(".card:nth-child(2) summary")
        page.click(".card:nth-child(2) .flag:nth-child(1) label:nth-of-type(1)")
        page.click(".card:nth-child(2) .rest")
        page.click("#submit")
        page.wait_for_selector("#done:not([hidden])")
        judged = store.judgements()[0]
        second = judged.shown[1]
        assert ranks_by_place(store) == [3, 1, 1, 2]
        assert judged.ratings[second] == 7
        assert list(judged.flags[second].values()) == [True] + [False] * 9
        page.click("#reopen")
        page.wait_for_selector("#item:not([hidden])")
        assert tab.order() == ["2=3", "4", "1"]
        clean(tab)


def test_a_reload_and_a_server_away_lose_nothing(chrome: Any, tmp_path: Path) -> None:
    with made(tmp_path, 2) as store, served(store) as home:
        tab = Tab(chrome, home).join("Ada")
        page = tab.page
        tab.press("31")
        tab.saved()
        page.reload()
        page.wait_for_selector("#groups li:nth-child(2)")
        assert tab.order() == ["3", "1"]
        page.route("**/api/events", lambda route: route.abort())
        tab.press("2")
        page.wait_for_selector("#saved[data-state=retrying]")
        tab.press("4")
        assert store.state(1).actions == 2
        page.unroute("**/api/events")
        tab.saved()
        assert tab.order() == ["3", "1", "2", "4"] and store.state(1).actions == 4
        assert all("net::ERR_FAILED" in words for words in tab.complaints) and tab.outside == []


def test_two_labelers_at_the_same_time(chrome: Any, tmp_path: Path) -> None:
    with made(tmp_path, 1, overlap=2) as store, served(store) as home:
        ada, ben = Tab(chrome, home).join("Ada"), Tab(chrome, home).join("Ben")
        ada.press("12")
        ben.press("43")
        ada.press("34")
        ben.press("21")
        for tab in (ada, ben):
            tab.press("[Enter]")
            tab.page.wait_for_selector("#done:not([hidden])")
            clean(tab)
        assert sorted((ranks_by_place(store, 0), ranks_by_place(store, 1))) == [[1, 2, 3, 4], [4, 3, 2, 1]]
        assert {judged.labeler for judged in store.judgements()} == set(store.labelers())


def test_two_at_a_time(chrome: Any, tmp_path: Path) -> None:
    """Binary insertion ranks four responses by at most five verdicts; the answers here are those of a known order."""
    with made(tmp_path, 1, mode="pairwise") as store, served(store) as home:
        tab = Tab(chrome, home).join("Ada")
        value = {"1": 2, "2": 9, "3": 2, "4": 5}  # worth by place: 1 and 3 are the same
        verdicts = 0
        while tab.page.is_visible("#verdicts"):
            left, right = (card.text_content() for card in tab.page.query_selector_all(".card:not([hidden]) .badge"))
            tab.press("=" if value[left] == value[right] else "[ArrowLeft]" if value[left] > value[right] else "2")
            verdicts += 1
            if verdicts == 2:
                tab.saved()
                tab.page.reload()
                tab.page.wait_for_selector(".card:not([hidden])")
        assert tab.order() == ["2", "4", "1=3"] and verdicts <= 5
        tab.press("[Enter]")
        tab.page.wait_for_selector("#done:not([hidden])")
        assert ranks_by_place(store) == [3, 1, 3, 2]
        clean(tab)


def test_an_arena(chrome: Any, tmp_path: Path) -> None:
    with made(tmp_path, 3, k=2, kind="arena") as store, served(store) as home:
        tab = Tab(chrome, home).join("Ada")
        tab.press("[Enter]")
        assert "Say first" in str(tab.page.text_content("#hint"))
        tab.press("[ArrowRight]")
        tab.next()
        tab.press("=")
        tab.next()
        tab.page.click("#first")
        tab.page.click("#submit")
        tab.page.wait_for_selector("#done:not([hidden])")
        assert [ranks_by_place(store, n) for n in range(3)] == [[2, 1], [1, 1], [1, 2]]
        assert not tab.page.query_selector_all(".likert:not([hidden])")
        clean(tab)


def test_skip_keys_and_instructions(chrome: Any, tmp_path: Path) -> None:
    with made(tmp_path, 2) as store, served(store) as home:
        tab = Tab(chrome, home).join("Ada")
        page = tab.page
        tab.press("i")
        assert page.is_visible("#instructions")
        tab.press("[Escape]?")
        assert not page.is_visible("#instructions") and page.is_visible("#keys")
        page.click("#single-keys")
        tab.press("[Escape]12")
        assert tab.order() == []  # single keys are off
        page.click("#show-keys")
        page.click("#single-keys")
        page.click("#keys .close")
        tab.press("s")
        page.check("#skipping [value='The prompt is unclear']")
        page.fill("#why", "no verb")
        page.click("#skipping .primary")
        tab.moved_on("Item 1 of 2")
        assert [(one.skipped, one.reason) for one in store.judgements()] == [(True, "The prompt is unclear: no verb")]
        tab.press("f")
        tab.press("nny")
        tab.saved()
        state = store.state(2)
        assert list(state.flags[state.shown[0]].values()) == [False, False, True]
        clean(tab)
