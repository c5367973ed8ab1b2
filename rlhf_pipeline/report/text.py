"""Text that comes from models, data or configs, and numbers, made fit to be read."""

from __future__ import annotations

import math
from typing import Any

BIDI = frozenset([0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
"""Characters that reorder the text around them: shown by their number, never obeyed."""

NOTHING = "–"
"""Stands in a cell that has no figure."""

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _shown(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)  # the control pictures: ␀ ... ␟
    if code in BIDI:
        return f"⟨U+{code:04X}⟩"
    return "\N{REPLACEMENT CHARACTER}"


def clean(value: Any) -> str:
    """A text that XML, HTML and a reader can hold: newline and tab stay, what cannot be shown is made visible."""
    text = str(value).replace("\r\n", "\n")
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if _allowed(ord(char)) else _shown(ord(char)) for char in text)


def _allowed(code: int) -> bool:
    """Whether XML 1.0 holds the character (section 2.2) and it is neither C1 control, non-character nor reordering."""
    if code < 0x20:
        return code in (0x09, 0x0A)
    if 0x7F <= code <= 0x9F or 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE:
        return False
    return code not in BIDI


def short(value: Any, length: int) -> str:
    """The text on one line, cut to `length` characters."""
    text = " ".join(clean(value).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def finite(value: Any) -> float | None:
    """The number as a float; None where it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, digits: int = 2) -> str:
    """A figure for a table, with a true minus sign; a dash where there is none."""
    found = finite(value)
    if found is None:
        return NOTHING
    if abs(found) >= 10000:
        digits = 0
    text = f"{found:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")  # no minus sign before a zero
    return text.replace("-", "−")


def count(value: Any) -> str:
    """A whole number with separators."""
    return number(value, 0)


def plain(value: Any) -> str:
    """A setting's value, in as few digits as tell it apart: 0.1, 2, 1e-05."""
    found = finite(value)
    return clean(value) if found is None else f"{found:g}".replace("-", "−", 1 if found < 0 else 0)


def percent(value: Any, digits: int = 1) -> str:
    """A share in per cent."""
    found = finite(value)
    return NOTHING if found is None else f"{number(100 * found, digits)} %"


def probability(value: Any) -> str:
    """A p-value: three decimals, and "< 0.001" below that."""
    found = finite(value)
    if found is None:
        return NOTHING
    return "< 0.001" if found < 0.001 else f"{found:.3f}"


def scaled(value: Any, unit: str = "") -> str:
    """A large count with a prefix: 1.20 TFLOP, 3.4 M."""
    found = finite(value)
    if found is None:
        return NOTHING
    for size, prefix in UNITS:
        if abs(found) >= size:
            return f"{number(found / size, 3 - len(str(int(abs(found) / size))))} {prefix}{unit}"
    return f"{found:g} {unit}".strip()


def tick(value: float) -> str:
    """A large number in as few digits as an axis needs: 0, 500, 1.2 T."""
    for size, prefix in UNITS:
        if abs(value) >= size:
            return f"{value / size:g} {prefix}"
    return f"{value:g}"


def duration(value: Any) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 1 h 12 min."""
    found = finite(value)
    if found is None:
        return NOTHING
    if found < 10:
        return f"{found:.1f} s"
    seconds = round(found)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(found / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory(value: Any) -> str:
    """Bytes in MiB or GiB."""
    found = finite(value)
    if found is None:
        return NOTHING
    return f"{found / 2**30:.2f} GiB" if found >= 2**30 else f"{found / 2**20:.0f} MiB"


def words(items: list[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def plural(number_of: int, noun: str) -> str:
    """1 seed, 3 seeds."""
    return f"{number_of:,} {noun}{'' if number_of == 1 else 's'}"
