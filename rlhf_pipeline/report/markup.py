"""HTML that is well-formed XML and escaped by construction: a plain string is text, only `Markup` is markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rlhf_pipeline.report.text import clean

VOID = frozenset({"meta", "br", "hr", "img", "link", "wbr"})


class Markup(str):
    """Text that is markup already; everything else is escaped on its way into the page."""

    __slots__ = ()


def safe(value: Any) -> Markup:
    """Markup as it is; anything else as text, escaped, without characters that XML cannot hold."""
    return value if isinstance(value, Markup) else Markup(escape(clean(value), quote=True))


def join(parts: Iterable[Any], between: str = "") -> Markup:
    """Parts one after the other."""
    return Markup(safe(between).join(safe(part) for part in parts if part is not None))


def h(tag: str, *children: Any, **attributes: Any) -> Markup:
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
    """A column of a table: its header, and whether it holds numbers (set flush right)."""

    title: Any
    numeric: bool = True
    hint: str | None = None


@dataclass(frozen=True)
class Group:
    """Rows of a table under a common header; without a header just rows. The first cell of a row is its header."""

    rows: Sequence[Sequence[Any]]
    header: Any = None
    marked: frozenset[int] = frozenset()  # numbers of rows that stand out


def table(columns: Sequence[Column], groups: Sequence[Group], *, label: str, caption: Any = None) -> Markup:
    """A table in a container of its own that scrolls where the page is too narrow for it."""

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


def details(summary: Any, *children: Any, class_: str | None = None) -> Markup:
    """Something to open."""
    return h("details", h("summary", summary), *children, class_=class_)


def facts(pairs: Iterable[tuple[Any, Any]]) -> Markup:
    """Short facts side by side: what, and its value; values of None are left out."""
    return h("dl", *(h("div", h("dt", what), h("dd", value)) for what, value in pairs if value is not None))
