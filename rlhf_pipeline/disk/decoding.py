"""Decode bytes to text and JSON values, and describe what cannot be decoded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from rlhf_pipeline.errors import DataError, Fault

UTF8_MARK = b"\xef\xbb\xbf"
# The marks of UTF-32 first: that of UTF-16, little-endian, begins them.
_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_LOOKED_AT = 400  # bytes at the start of a file that show its encoding
_EVERY_OTHER = ([True, False, True, False], [False, True, False, True])


class BadJsonError(ValueError):
    """A value that is not valid JSON, or not usable; `reason` is the short name of the row's fault."""

    def __init__(self, reason: str, found: str, expected: str = "one JSON object"):
        super().__init__(found)
        self.reason, self.found, self.expected = reason, found, expected


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise BadJsonError("duplicate_key", f"{_short(key)} is given twice", "each key once")
        seen.add(key)
    return values


def _constant(name: str) -> None:
    raise BadJsonError("bad_json", f"{name}, which is not JSON", "a number or null")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
_LOOSE = json.JSONDecoder()  # finds the end of a value that the strict decoder refuses
decode_json = _STRICT.decode
"""Return the value of a JSON text; duplicate keys, NaN and Infinity raise `BadJsonError`, bad syntax ValueError."""


def bad_json(error: Exception, text: str = "") -> BadJsonError:
    """Describe what is wrong with a JSON text that raised `error`."""
    if isinstance(error, BadJsonError):
        return error
    if isinstance(error, RecursionError):
        return BadJsonError("bad_json", "nested too deeply")
    if isinstance(error, json.JSONDecodeError):
        if "\0" in text:
            return BadJsonError("bad_json", f"a NUL byte at column {text.index(chr(0)) + 1}")
        return BadJsonError("bad_json", f"{_syntax(error)} at column {error.colno}")
    return BadJsonError("bad_json", "a number with too many digits", "a number")


def elements(texts: Iterable[str], name: str) -> Iterator[tuple[int, Any]]:
    """Yield each element of a JSON array with its line, which `json.loads` does not report.

    An element that can be read but not used is yielded as a `BadJsonError`.

    Args:
        texts: the parts of the text, the first with the opening bracket; no more of them are held than an element has.

    Raises:
        DataError: bad syntax; the rest cannot be separated into rows, so the whole file is refused.
    """
    parts = iter(texts)
    text = next(parts)
    place = text.index("[") + 1  # where the next element is looked for, and its line
    line, wanted = text.count("\n", 0, place) + 1, 1
    while True:
        try:
            start, value, end = _element(text, place)
            if value is _END:
                rest = [text[end:], *parts]
                if any(_skip_space(part, 0) != len(part) for part in rest):
                    raise json.JSONDecodeError("more text after the array", text, start)
                return
        except (ValueError, RecursionError) as error:
            if added := "".join(islice(parts, wanted)):  # perhaps the element only goes on
                text, place, wanted = text[place:] + added, 0, 2 * wanted
                continue
            if isinstance(error, json.JSONDecodeError):
                at, found = error.pos, _syntax(error)
            else:
                at, found = _skip_space(text, place), bad_json(error).found
            line += text.count("\n", place, at)
            raise DataError(Fault(f"{name}:{line}", f"bad_json: {found}", "an array of objects")) from error
        line += text.count("\n", place, start)
        yield line, value
        line += text.count("\n", start, end)
        place, wanted = end, 1


_END = object()


def _element(text: str, place: int) -> tuple[int, Any, int]:
    """Return where the next element of an array begins, its value, and the place behind it and its comma.

    The value is `_END`, and the place behind the bracket, where the array ends.

    Raises:
        JSONDecodeError: bad syntax, or the text ends before it is clear that the element does.
    """
    start = _skip_space(text, place)
    if text[start : start + 1] == "]":
        return start, _END, start + 1
    try:
        value, end = _STRICT.raw_decode(text, start)
    except BadJsonError as error:
        value, end = error, _LOOSE.raw_decode(text, start)[1]
    end = _skip_space(text, end)
    if text[end : end + 1] not in (",", "]"):
        missing = "',' or ']' missing" if end < len(text) else "the file ends within the array"
        raise json.JSONDecodeError(missing, text, end)
    return start, value, end + (text[end] == ",")


def _skip_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


_SPACE = re.compile(r"[ \t\r\n]*")


def refuse_encoding(content: bytes, name: str) -> None:
    """Refuse a UTF-16 or UTF-32 file, recognised by its byte order mark or NUL bytes.

    Raises:
        DataError: names the encoding.
    """
    found = next((f"{said} (byte order mark)" for mark, said in _MARKS.items() if content.startswith(mark)), None)
    if found is None and b"\0" in content[:_LOOKED_AT]:
        # ASCII text has NUL bytes at every second place in UTF-16, at three of four in UTF-32.
        places = [content[first:_LOOKED_AT:4] for first in range(4)]
        nul = [2 * place.count(0) > len(place) for place in places]
        found = "UTF-16 (every other byte is NUL)" if nul in _EVERY_OTHER else found
        found = "UTF-32 (three of four bytes are NUL)" if sum(nul) == 3 else found
    if found is not None:
        encoding = found.split()[0]
        fix = f"convert it: iconv -f {encoding} -t UTF-8"
        raise DataError(Fault(f"{name}:1", f"not_utf8: not UTF-8, looks like {found}", "UTF-8", fix))


def not_utf8(raw: bytes, start: int, before: int = 0) -> str:
    """Describe the byte that is not UTF-8, and its Latin-1 character. before: the bytes in front of `raw`."""
    byte = raw[start]
    guess = f", {bytes([byte]).decode('latin-1')!r} in Latin-1" if byte >= 0xA0 else ""
    return f"byte {before + start + 1} (0x{byte:02x}{guess}) is not UTF-8"


def lone_surrogate(text: str, start: int) -> str:
    """Describe the character at `start`, which UTF-8 cannot hold: an invalid byte, or half a surrogate pair."""
    code = ord(text[start])
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
        return f"is not UTF-8 at character {start + 1} (byte 0x{code - 0xDC00:02x})"
    return f"is not UTF-8 at character {start + 1} (U+{code:04X}, half of a surrogate pair)"


def _syntax(error: json.JSONDecodeError) -> str:
    """Return the library's message on bad syntax without a final "at"."""
    return error.msg.removesuffix(" at")


def _short(key: str) -> str:
    shown = repr(key)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
