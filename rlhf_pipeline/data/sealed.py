"""JSON that carries the SHA-256 of its own text: one changed bit anywhere in the file is seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

FORMAT, SEAL = "format", "manifest_sha256"
LATEST = 2
_BLANK = "0" * 64


def seal(fields: Mapping[str, Any]) -> str:
    """Return strict JSON whose last value is the SHA-256 of this very text with that value's digits as zeros."""
    content = {FORMAT: LATEST, **fields, SEAL: _BLANK}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _with(text, _BLANK, sha256(text.encode()).hexdigest())


def unseal(text: str) -> dict[str, Any]:
    """Return what a sealed text holds; one without format and seal was written before there were seals.

    Raises:
        ValueError: it is not strict JSON with an object at the top, or not the text that was sealed.
    """
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError(f"top level: found {type(fields).__name__}, expected an object")
    if FORMAT in fields or SEAL in fields:
        found = fields.get(SEAL)
        blank = _with(text, found, _BLANK) if isinstance(found, str) and len(found) == len(_BLANK) else ""
        # Both words are needed: otherwise a changed bit in the name of one would pass for a file without a seal.
        if FORMAT not in fields or not blank or sha256(blank.encode()).hexdigest() != found:
            raise ValueError(f"its text is not what was written: its SHA-256 is not the one in {SEAL}")
    return fields


def _with(text: str, old: str, new: str) -> str:
    head, found, tail = text.rpartition(f'"{SEAL}": "{old}"')
    return f'{head}"{SEAL}": "{new}"{tail}' if found else ""


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")
