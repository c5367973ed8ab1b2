"""Elements of the page; the HTML is well-formed XML.

Everything is escaped by construction: a plain string is text, only `Markup` is markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from rlhf_pipeline.report.figures import EffectiveBeta, Interval
from rlhf_pipeline.report.text import NOTHING, clean, number

VOID = frozenset({"meta", "br", "hr", "img", "link", "wbr"})


class Markup(str):
    """Text that is already markup; all other text is escaped."""

    __slots__ = ()


def safe(value: object) -> Markup:
    """Markup as it is; anything else as text, escaped, without characters that XML cannot hold."""
    return value if isinstance(value, Markup) else Markup(escape(clean(value), quote=True))


def join(parts: Iterable[object], between: str = "") -> Markup:
    """Join parts into one markup."""
    return Markup(safe(between).join(safe(part) for part in parts if part is not None))


def h(tag: str, *children: object, **attributes: object) -> Markup:
    """An element: children in order (None is left out), attributes by keyword (`class_`, `aria_label`; None: none)."""
    words = [tag]
    for name, value in attributes.items():
        if value is not None:
            words.append(f'{name.rstrip("_").replace("_", "-")}="{safe(value)}"')
    if tag in VOID:
        return Markup(f"<{' '.join(words)}/>")
    return Markup(f"<{' '.join(words)}>{join(children)}</{tag}>")


@dataclass(frozen=True)
class Column:
    """A column of a table: its header, and whether it holds numbers (right-aligned)."""

    title: object
    numeric: bool = True
    hint: str | None = None


def columns(alignment: str, *titles: str) -> list[Column]:
    """Columns with these titles; `alignment` has a letter for each: l for text, r for numbers."""
    return [Column(title, letter == "r") for letter, title in zip(alignment, titles, strict=True)]


@dataclass(frozen=True)
class Group:
    """Rows of a table with an optional common header. The first cell of a row is its header."""

    rows: Sequence[Sequence[object]]
    header: object = None
    marked: frozenset[int] = frozenset()  # indices of highlighted rows


def table(columns: Sequence[Column], groups: Sequence[Group], *, label: str, caption: object = None) -> Markup:
    """A table in a container that scrolls if the page is too narrow."""

    def kind(column: Column) -> str | None:
        return "n" if column.numeric else None

    head = [h("th", c.title, scope="col", class_=kind(c), title=c.hint) for c in columns]
    bodies = []
    for group in groups:
        rows = []
        if group.header is not None:
            rows.append(h("tr", h("th", group.header, scope="rowgroup", colspan=len(columns)), class_="group"))
        for index, row in enumerate(group.rows):
            cells = [h("th", row[0], scope="row", class_=kind(columns[0]))]
            cells += [h("td", cell, class_=kind(column)) for cell, column in zip(row[1:], columns[1:], strict=True)]
            rows.append(h("tr", *cells, class_="marked" if index in group.marked else None))
        bodies.append(h("tbody", *rows))
    made = h("table", h("thead", h("tr", *head)), *bodies)
    # A container that scrolls must be reachable from the keyboard.
    scroll = h("div", made, class_="scroll", role="region", aria_label=label, tabindex="0")
    note = h("figcaption", caption) if caption is not None else None
    return h("figure", scroll, note, class_="tabular")


def details(summary: object, *children: object, class_: str | None = None) -> Markup:
    """A folded element with a summary."""
    return h("details", h("summary", summary), *children, class_=class_)


FEW_ROWS = 12
"""A secondary table with more rows is folded."""


def folded(summary: str, rows: int, made: Markup) -> Markup:
    """A table, folded if it is long."""
    return made if rows <= FEW_ROWS else details(summary, made, class_="unfold")


def linked(caption: str, files: Sequence[str]) -> Markup:
    """A caption with links to the CSV files of its figures."""
    links = join([h("a", name, href=name) for name in files], ", ")
    return join([caption, " Points: ", links, "."])


def estimate(found: Interval | EffectiveBeta | None, digits: int = 2) -> Markup:
    """A mean with its interval in smaller type."""
    if found is None or found.mean is None:
        return h("span", NOTHING, class_="none")
    mean = h("b", number(found.mean, digits))
    if found.low is None or found.high is None:
        return mean
    return join([mean, " ", h("span", f"[{number(found.low, digits)}, {number(found.high, digits)}]", class_="ci")])


@dataclass(frozen=True)
class Section:
    """A part of the page with its own heading."""

    ident: str
    title: str
    html: Markup


def section(ident: str, title: str, *body: Markup | None) -> Section | None:
    """A section of the parts that are not None; None if there are none."""
    parts = [part for part in body if part is not None]
    if not parts:
        return None
    heading = h("h2", title, id=f"{ident}-h")
    return Section(ident, title, h("section", heading, *parts, id=ident, aria_labelledby=f"{ident}-h"))
