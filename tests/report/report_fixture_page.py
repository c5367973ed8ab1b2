"""How the tests of the report read its page: as XML, as HTML, and for anything that reaches out of it."""

from __future__ import annotations

import csv
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from rlhf_pipeline.report import Results
from rlhf_pipeline.report.page import page
from rlhf_pipeline.report.points import Points

SVG = "{http://www.w3.org/2000/svg}"
# Each section, and what a comparison has where it has nothing to show there; without an entry: always there.
SECTIONS: dict[str, dict[str, Any]] = {
    "verdict": {},
    "fair": {},
    "results": {},
    "frontier": {"frontier": None},
    "curves": {"curves": {}},
    "overoptimisation": {"overoptimisation": None},
    "preferences": {"preferences": None},
    "responses": {},
    "cost": {},
    "ranking": {"ranking": None},
    "exact": {"exact": None},
    "samples": {"samples_shown": []},
    "lineage": {"lineage": []},
    "reproduce": {"command": None, "configs": {}},
    "glossary": {},
}


def page_of(results: dict[str, Any], points: Points | None = None) -> str:
    """The page of what results.json holds."""
    return page(Results.model_validate(results), Points() if points is None else points)


def parsed(text: str) -> ET.Element:
    """The page as XML: raises where it is not well-formed."""
    return ET.fromstring(text)


def sections(text: str) -> set[str]:
    return {item.attrib["id"] for item in parsed(text).iter("section")}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Balance(HTMLParser):
    """Tags as an HTML parser sees them; every one that opens has to close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(text: str) -> list[tuple[str, dict[str, str | None]]]:
    """All tags of a page as an HTML parser finds them."""
    reader = Balance()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader.seen


def check_closed(text: str, directory: Path | None = None) -> None:
    """Nothing in the page loads, runs, submits or embeds anything."""
    assert set(re.findall(r'=["\']?\s*(https?:[^"\']*)', text)) <= {SVG.strip("{}")}
    assert not re.search(r"@import|url\((?!#)", re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1))
    seen = tags(text)
    assert not {tag for tag, _ in seen} & {
        *("script", "img", "link", "iframe", "object", "embed", "form", "base", "video", "audio", "foreignobject"),
        *("image", "animate", "set", "input", "button"),
    }
    for tag, attributes in seen:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        assert "url(" not in (attributes.get("style") or "").replace("url(#", "")
        for name in ("href", "xlink:href"):
            target = attributes.get(name)
            if target is not None:
                assert target.startswith("#") or (tag == "a" and re.fullmatch(r"points/[a-z_]+\.csv", target))
                assert directory is None or target.startswith("#") or (directory / target).is_file()
