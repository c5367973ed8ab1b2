"""Pictures of the labelling page for the README: light, dark, on a phone, and an arena.

    python scripts/label_screenshots.py [--output docs/images]

Needs the extra `label`, playwright and a Chromium on the PATH.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.labelling.kinds import Item, Response, Text
from rlhf_pipeline.labelling.store import LabelStore, database

SKY: tuple[Text, tuple[str, ...]] = (
    "Explain to a ten-year-old why the sky is blue, in at most four sentences.",
    (
        "Sunlight looks white, but it is a mix of all the colours of the rainbow. When it comes into the air, it bumps "
        "into tiny bits of gas. **Blue light** bounces around much more than red light, so it reaches your eyes from "
        "every side. That is why the whole sky looks blue!",
        "The sky is blue because it reflects the ocean. Most of the Earth is covered with water, and the light that "
        "comes back from the sea makes the air above it look blue as well.",
        "The cause is Rayleigh scattering:\n\n- short wavelengths scatter **more**\n- long wavelengths scatter "
        "**less**\n\nHence the diffuse radiation of the sky is dominated by the blue end of the visible spectrum.",
        "Think of a bag of marbles in many colours. The blue ones are so small and light that they bounce off "
        "everything, so you see them everywhere you look.",
    ),
)
MEDIAN: tuple[Text, tuple[str, ...]] = (
    "Write a Python function that returns the median of a list of numbers. It must not change the list.",
    (
        "```python\ndef median(numbers):\n    ordered = sorted(numbers)  # a copy\n    middle = len(ordered) // 2\n"
        "    if len(ordered) % 2:\n        return ordered[middle]\n"
        "    return (ordered[middle - 1] + ordered[middle]) / 2\n```\n\n"
        "`sorted` returns a new list, so yours stays as it is.",
        "Sort the list, then take the number in the middle:\n\n```python\ndef median(x):\n    x.sort()\n"
        "    return x[len(x) // 2]\n```",
    ),
)
DEPOSIT: tuple[Text, tuple[str, ...]] = (
    [
        {"role": "user", "content": "My landlord wants to keep my whole deposit because of one scratch on the floor."},
        {"role": "assistant", "content": "That sounds frustrating. In which country do you live?"},
        {"role": "user", "content": "In Scotland."},
    ],
    (
        "In Scotland your deposit must be held by an approved scheme. Ask your landlord in writing for an itemised "
        "list, then raise a dispute with the scheme. It is free, and somebody independent decides.",
        "You could talk to a lawyer about it. Every country has its own laws, so it depends on where you live.",
    ),
)
DONE: tuple[Text, tuple[str, ...]] = ("A prompt", ("One response", "Another response"))


@contextmanager
def served(folder: Path, kind: str, shown: Sequence[tuple[Text, tuple[str, ...]]]) -> Iterator[str]:
    """Serve a project with these items, in this order; yields the address."""
    import uvicorn

    from rlhf_pipeline.labelling.security import LOOPBACK
    from rlhf_pipeline.labelling.server import make_app

    items = [
        Item(number=n, kind=kind, prompt=prompt, responses=[Response(text=text) for text in texts])
        for n, (prompt, texts) in enumerate([*shown, *[DONE] * 30])
    ]
    config = LabelConfig.model_validate({"name": "helpful-answers", "responses": "answers.jsonl"})
    order = [float(-n) for n in range(len(items))]
    with LabelStore.create(database(folder, kind), config, items, order) as store:
        listener = socket.create_server(("127.0.0.1", 0))
        app = make_app(store, token=None, hosts=set(LOOPBACK))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


def take(chrome: Any, address: str, name: str, path: Path, act: Callable[[Any], None], **look: Any) -> None:
    """A picture of the page as it is after a labeler of this name has acted."""
    page = chrome.new_context(**look).new_page()
    page.goto(address)
    page.fill("#name", name)
    page.press("#name", "Enter")
    page.wait_for_selector(".card")
    act(page)
    page.wait_for_function("() => document.getElementById('saved').dataset.state === 'saved'")
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(300)  # what fades has faded
    page.screenshot(path=path)
    print(path)


def press(keys: str) -> Callable[[Any], None]:
    """Press these keys one after the other."""

    def act(page: Any) -> None:
        for key in keys:
            page.keyboard.press(key)

    return act


def main() -> None:
    """Take all pictures."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    wide = {"viewport": {"width": 1280, "height": 980}}
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}

    def by_touch(page: Any) -> None:
        page.tap("#pool .chip:nth-child(2)")
        page.tap("#pool .chip:nth-child(1)")

    def with_questions(page: Any) -> None:
        press("21" + "2")(page)
        page.locator(".card summary").first.click()
        press("f" + "nn")(page)

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        chrome = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with served(Path(folder), "rank", [SKY, MEDIAN, SKY]) as address:
            take(chrome, address, "Ada", output / "label-light.png", press("2=413" + "36"), **wide)
            take(chrome, address, "Ben", output / "label-dark.png", with_questions, color_scheme="dark", **wide)
            take(chrome, address, "Cleo", output / "label-phone.png", by_touch, **phone)
        with served(Path(folder), "arena", [DEPOSIT]) as address:
            take(
                chrome, address, "Ada", output / "label-arena.png", press("1"), viewport={"width": 1280, "height": 640}
            )
        chrome.close()


if __name__ == "__main__":
    main()
