"""The report in a real browser: no complaint, no request, light and dark, wide and narrow, on paper."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from rlhf_pipeline.report import Results, write_report
from rlhf_pipeline.report.style import DARK, LIGHT
from tests.report.report_fixture import full

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
SCHEMES = {"dark": "0", "light": "1"}  # blink::mojom::PreferredColorScheme

pytestmark = [
    pytest.mark.slow,
    pytest.mark.check,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} on the PATH"),
]

# What a page says of itself once it is laid out; the report itself has no script, its copy for this test has.
PROBE = """
<script>addEventListener('load', () => {
  const root = document.documentElement, box = e => e.getBoundingClientRect();
  const clipped = e => { for (; e; e = e.parentElement) if (getComputedStyle(e).overflowX !== 'visible') return true; };
  parent.postMessage(JSON.stringify({
    page: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    text: getComputedStyle(document.querySelector('.plot text')).fill,
    markers: [...document.querySelectorAll('.plot.wide use')].slice(0, 40).map(e => getComputedStyle(e).fill),
    width: root.scrollWidth, view: root.clientWidth,
    wide: getComputedStyle(document.querySelector('.plot.wide')).display,
    narrow: getComputedStyle(document.querySelector('.plot.narrow')).display,
    outside: [...document.querySelectorAll('main *')].filter(
      e => box(e).right > root.clientWidth + 1 && !clipped(e.parentElement)).map(e => e.tagName + '.' + e.className),
    spilled: [...document.querySelectorAll('.plot')].filter(e => box(e).width).flatMap(
      p => [...p.querySelectorAll('text')].filter(
        e => box(e).left < box(p).left - 1 || box(e).right > box(p).right + 1).map(e => e.textContent)),
  }), '*');
});</script>
"""


def browse(page: Path, folder: Path, *options: str, scheme: str = "light") -> tuple[str, str, list[str]]:
    """Open a page: what the browser printed, its console, and every address that it asked for."""
    log = folder / f"net-{scheme}.json"
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-default-apps",
        "--disable-sync",
        "--no-first-run",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        "--enable-logging=stderr",
        "--v=0",
        f"--log-net-log={log}",
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    console = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return done.stdout, console, requests_of_the_page(log)


def requests_of_the_page(log: Path) -> list[str]:
    """Addresses in a browser's network log that a page asked for; the browser's own errands come from no origin."""
    events = [event.get("params") or {} for event in json.loads(log.read_text(encoding="utf-8"))["events"]]
    asked = [event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"]
    return [url for url in asked if not url.startswith(("file:", "data:"))]


def rgb(colour: str) -> str:
    """#rrggbb as browsers write it."""
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(Results.model_validate(full()), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def probed(report: Path) -> Path:
    """A copy of the report that may run the probe, and nothing else is changed."""
    text = report.read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*/>', text).group(0)
    copy = report.with_name("probed.html")
    copy.write_text(text.replace(policy, "").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    return copy


def measured(probed: Path, folder: Path, width: int, scheme: str) -> dict:
    """What the copy says of itself in a frame of this width: windows do not get as narrow as a telephone."""
    frame = folder / "frame.html"
    frame.write_text(
        "<body style='margin:0'><script>addEventListener('message', e => { document.title = e.data; });</script>"
        f"<iframe src='{probed.as_uri()}' style='width:{width}px;height:900px;border:0'></iframe></body>"
    )
    options = ("--dump-dom", "--window-size=1400,1000", "--virtual-time-budget=20000")
    printed, console, _ = browse(frame, folder, *options, scheme=scheme)
    assert not console
    return json.loads(unescape(re.search(r"<title>(.*?)</title>", printed, re.DOTALL).group(1)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_says_nothing_and_asks_for_nothing(report: Path, tmp_path: Path, scheme: str) -> None:
    printed, console, asked = browse(report, tmp_path, "--dump-dom", scheme=scheme)
    assert console == "" and asked == []
    assert "These distances do not add up" in printed and printed.count("<svg") == report.read_text().count("<svg")


def test_a_page_that_does_is_found_out(tmp_path: Path) -> None:
    """The test above can fail: a page with a picture from elsewhere, and one that a policy stops."""
    page = tmp_path / "bad.html"
    page.write_text('<body><img src="http://example.invalid/x.png"></body>')
    _, _, asked = browse(page, tmp_path, "--dump-dom")
    assert any("example.invalid" in url for url in asked)
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">"
    page.write_text(f"<head>{policy}</head><body><script>alert(1)</script></body>")
    _, console, _ = browse(page, tmp_path, "--dump-dom")
    assert "Content Security Policy" in console


@pytest.mark.parametrize(("scheme", "colours"), [("light", LIGHT), ("dark", DARK)])
def test_light_and_dark_reach_the_figures(probed: Path, tmp_path: Path, scheme: str, colours: dict[str, str]) -> None:
    found = measured(probed, tmp_path, 1280, scheme)
    assert (found["page"], found["ink"]) == (rgb(colours["page"]), rgb(colours["ink"]))
    assert found["text"] in (rgb(colours["ink"]), rgb(colours["muted"]))
    assert {rgb(colours["hue-0"]), rgb(colours["hue-1"])} <= set(found["markers"])


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out(probed: Path, tmp_path: Path, width: int) -> None:
    found = measured(probed, tmp_path, width, "light")
    assert found["view"] == width and found["width"] == width  # the page itself does not scroll sideways
    assert found["outside"] == []
    assert found["spilled"] == []  # labels stay inside of their figures, whatever font the browser has
    assert (found["wide"], found["narrow"]) == (("block", "none") if width > 640 else ("none", "block"))


def test_the_page_prints(report: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.pdf"
    browse(report, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={target}", scheme="dark")
    content = target.read_bytes()
    assert content.startswith(b"%PDF")
    assert 10 <= len(re.findall(rb"/Type\s*/Page[^s]", content)) <= 30
