"""Names and numbers as text for the page."""

from __future__ import annotations

import math
import re
import unicodedata

from rlhf_pipeline.config.base import spelled
from rlhf_pipeline.errors import UNSEEN
from rlhf_pipeline.report.figures import Interval

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
        return clean(spelled(value))
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
