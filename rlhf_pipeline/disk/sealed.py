"""JSON that contains the SHA-256 of its own text, so that any changed bit is detected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from rlhf_pipeline.disk.decoding import decode_json

FORMAT, SEAL = "format", "manifest_sha256"
LATEST = 2
_BLANK = "0" * 64


def seal(fields: Mapping[str, Any]) -> str:
    """Return strict JSON whose last value is the SHA-256 of the text, computed with zeros in place of this value."""
    content = {FORMAT: LATEST, **fields, SEAL: _BLANK}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _with(text, _BLANK, sha256(text.encode()).hexdigest())


def unseal(text: str) -> dict[str, Any]:
    """Return the fields of a sealed text; a text without format and seal comes from an earlier release.

    Raises:
        ValueError: the text is not a strict JSON object, or was changed after sealing.
    """
    try:
        fields = decode_json(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError(f"top level: found {type(fields).__name__}, expected an object")
    if FORMAT in fields or SEAL in fields:
        found = fields.get(SEAL)
        blank = _with(text, found, _BLANK) if isinstance(found, str) and len(found) == len(_BLANK) else ""
        # Both keys are needed: otherwise a changed bit in one key would look like a file without a seal.
        if FORMAT not in fields or not blank or sha256(blank.encode()).hexdigest() != found:
            raise ValueError(f"its text was changed: its SHA-256 is not the one in {SEAL}")
    return fields


def _with(text: str, old: str, new: str) -> str:
    head, found, tail = text.rpartition(f'"{SEAL}": "{old}"')
    return f'{head}"{SEAL}": "{new}"{tail}' if found else ""
