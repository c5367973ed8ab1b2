"""Text, numbers and elements of the page; the HTML is well-formed XML.

Everything is escaped by construction: a plain string is text, only `Markup` is markup.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from rlhf_pipeline.errors import UNSEEN
from rlhf_pipeline.report.results import EffectiveBeta, Interval

_ENDS_OF_PLANES = "".join(chr(plane << 16 | end) for plane in range(17) for end in (0xFFFE, 0xFFFF))
_UNFIT = re.compile(f"{UNSEEN.pattern}|[\ufdd0-\ufdef{_ENDS_OF_PLANES}]")
"""Characters that XML 1.0 (section 2.2) does not hold, C1 controls, non-characters and marks that reorder text."""

NOTHING = "–"
"""The text of a cell without a figure."""

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def clean(value: object) -> str:
    """A text that is valid in XML and HTML: newline and tab stay; other control characters are shown by symbols."""
    return _UNFIT.sub(_shown, str(value).replace("\r\n", "\n"))


def _shown(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)  # the control pictures: ␀ ... ␟
    # A mark that reorders text is shown by its code.
    return f"⟨U+{code:04X}⟩" if unicodedata.category(found[0]) == "Cf" else "\N{REPLACEMENT CHARACTER}"


def short(value: object, length: int) -> str:
    """The text on one line, cut to `length` characters."""
    text = " ".join(clean(value).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table, with a true minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{value:,.{0 if abs(value) >= 10000 else digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")  # no minus sign before a zero
    return text.replace("-", "−")


def count(value: float | None) -> str:
    """A whole number with separators."""
    return number(value, 0)


def plain(value: object) -> str:
    """A setting's value in as few digits as possible: 0.1, 2, 1e-05."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return clean(value)
    return f"{value:g}".replace("-", "−", 1 if value < 0 else 0)


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent."""
    return NOTHING if value is None else f"{number(100 * value, digits)} %"


def probability(value: float | None) -> str:
    """A p-value: three decimals, and "< 0.001" below that."""
    return NOTHING if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def scaled(value: float | None, unit: str = "") -> str:
    """A large count with a prefix: 1.20 TFLOP, 3.4 M."""
    if value is None:
        return NOTHING
    size, prefix = _prefix(value)
    shown = number(value / size, 3 - len(str(int(abs(value / size))))) if prefix else f"{value:g}"
    return f"{shown} {prefix}{unit}".strip()


def tick(value: float) -> str:
    """A large number in as few digits as an axis needs: 0, 500, 1.2 T."""
    size, prefix = _prefix(value)
    return f"{value / size:g} {prefix}".strip()


def _prefix(value: float) -> tuple[float, str]:
    return next((unit for unit in UNITS if abs(value) >= unit[0]), (1.0, ""))


def duration(value: float | None) -> str:
    """A duration given in seconds, in suitable units: 42 s, 3 min 20 s, 1 h 12 min."""
    if value is None:
        return NOTHING
    if value < 10:
        return f"{value:.1f} s"
    seconds = round(value)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory(value: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def words(items: list[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def headed(text: str) -> str:
    """A text with a capital first letter; "KL" stays "KL"."""
    return text[:1].upper() + text[1:]


def plural(number_of: int, noun: str) -> str:
    """1 seed, 3 seeds."""
    return f"{number_of:,} {noun}{'' if number_of == 1 else 's'}"


def interval_text(found: Interval, digits: int = 2) -> str:
    """1.23 [1.10, 1.36]."""
    if found.ends is None:
        return number(found.mean, digits)
    return f"{number(found.mean, digits)} [{number(found.low, digits)}, {number(found.high, digits)}]"


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


def facts(pairs: Iterable[tuple[object, object]]) -> Markup:
    """Short facts side by side, as (name, value); values of None are left out."""
    return h("dl", *(h("div", h("dt", what), h("dd", value)) for what, value in pairs if value is not None))


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
