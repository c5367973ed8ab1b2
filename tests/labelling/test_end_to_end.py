"""From sampled responses to a comparison, all labels given in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.labelling.store import LabelStore, database
from rlhf_pipeline.report import load
from tests.conftest import Lab
from tests.labelling.browser import Tab, browser, needed, served

pytestmark = [pytest.mark.slow, pytest.mark.check]

ITEMS = 12


def liking(text: str) -> tuple[int, str]:
    """What the labelers here like: short texts, then those early in the alphabet; the least is the best."""
    return len(text), text


def texts_of(tab: Tab) -> list[str]:
    """The texts of the responses as the page shows them, by place."""
    return [str(box.text_content()) for box in tab.page.query_selector_all(".card .raw")]


def in_order(tab: Tab) -> list[int]:
    """The places, best first."""
    texts = texts_of(tab)
    return sorted(range(len(texts)), key=lambda place: liking(texts[place]))


def by_keyboard(tab: Tab) -> None:
    order = in_order(tab)
    grades = "".join(str(7 - order.index(place)) for place in range(len(order)))
    tab.press("".join(str(place + 1) for place in order) + grades)
    tab.next()


def by_mouse(tab: Tab) -> None:
    page, order, before = tab.page, in_order(tab), tab.count()
    for place in order:
        page.click(f".card:nth-child({place + 1}) .badge")
    for place in range(len(order)):
        page.click(f".card:nth-child({place + 1}) .scale label:nth-child({7 - order.index(place)})")
    page.click("#submit")
    tab.moved_on(before)


def over_a_reload(tab: Tab) -> None:
    best, second, *_ = in_order(tab)
    tab.press(f"{best + 1}{second + 1}")
    tab.saved()
    tab.page.reload()
    tab.page.wait_for_selector("#groups li:nth-child(2)")
    for place in in_order(tab)[2:]:
        tab.press(str(place + 1))
    tab.next()


def over_an_undo(tab: Tab) -> None:
    """Submits the wrong way round, goes back, takes all of it back, and does it right."""
    before = tab.count()
    wrong = in_order(tab)[::-1]
    tab.press("".join(str(place + 1) for place in wrong))
    tab.next()
    after = tab.count()
    tab.press("z")
    tab.moved_on(after)
    assert tab.count() == before
    for _ in wrong:
        left = len(tab.order())
        tab.page.click("#undo")
        tab.page.wait_for_function("left => document.querySelectorAll('#groups li').length < left", arg=left)
    by_keyboard(tab)


def test_from_samples_to_a_comparison(lab: Lab, tmp_path: Path) -> None:
    needed()
    lab.run("dpo", max_steps=2)
    home = ["--home", str(lab.home)]
    sampling = ["--prompts", "world:verdicts", "--no-serve", "max_prompt_length=6", "response_length=4", "use_cpu=true"]
    policies = ["--policies", "sft", "dpo", "--k", "4", "--num", str(ITEMS), "overlap=2", "--name", "helpful"]
    assert main(["label", *policies, *sampling, *home]) == 0
    assert main(["label", "--arena", "sft", "dpo", "--num", "8", "--name", "duel", *sampling, *home]) == 0

    steps: list[Callable[[Tab], None]] = [by_keyboard, by_mouse, over_an_undo, by_keyboard, by_mouse, over_a_reload]
    with browser() as chrome, LabelStore.open(database(lab.home, "helpful")) as store, served(store) as address:
        ada, ben = Tab(chrome, address).join("Ada"), Tab(chrome, address).join("Ben")
        for step in steps * (ITEMS // len(steps)):
            step(ada)
            by_keyboard(ben)
        for tab in (ada, ben):
            assert tab.page.is_visible("#done") and tab.complaints == [] and tab.outside == []
        items, judgements = store.items(), store.judgements()
    assert len(items) == ITEMS and len(judgements) == 2 * ITEMS
    assert {(one.labeler, one.item) for one in judgements} == {(n, item) for n in (1, 2) for item in range(ITEMS)}
    for one in judgements:
        texts = [str(response.text).strip() for response in items[one.item].responses]
        order = sorted(texts, key=liking)
        assert one.ranks == [1 + order.index(text) for text in texts], one

    # A reward model trains on what people said, without conversion.
    assert main(["label", "export", "helpful", "--as", "rankings", "--publish", "people", *home]) == 0
    trained = lab.run("train-rm", output_name="human", dataset_name="collected:people", reward_centering_samples=None)
    (data,) = lab.registry.resolve(trained.model).manifest.data[:1]
    assert data.source == "collected:people@v1" and data.rows > 0

    # The same person at the arena; the comparison has the verdicts.
    with browser() as chrome, LabelStore.open(database(lab.home, "duel")) as store, served(store) as address:
        tab = Tab(chrome, address).join("Ada")
        for _ in store.items():
            one, two = map(len, texts_of(tab))
            tab.press("=" if one == two else "[ArrowLeft]" if one < two else "[ArrowRight]")
            tab.next()
        assert tab.page.is_visible("#done") and tab.complaints == [] and tab.outside == []
        duels = store.items()
        assert len(store.judgements()) == len(duels)
    wins = [
        0.5 * (1 + (lengths["sft@v1"] < lengths["dpo@v1"]) - (lengths["sft@v1"] > lengths["dpo@v1"]))
        for item in duels
        if (lengths := {str(one.source): len(str(one.text).strip()) for one in item.responses})
    ]
    options = ["--baseline", "sft", "--human", "duel", "reward_model=human", "max_prompts=4", "samples=1"]
    assert main(["compare", "dpo", *options, "use_cpu=true", "exact=false", *home]) == 0
    (path,) = (lab.home / "reports").glob("*/results.json")
    human: Any = load(path).human
    (pair,) = human.pairs
    assert (pair.a, pair.b) == ("sft@v1", "dpo@v1")
    assert pair.estimate.mean == pytest.approx(sum(wins) / len(wins))
    assert "score" in {one.figure for one in human.agreement}
    assert "Judged by people" in path.with_name("index.html").read_text()
