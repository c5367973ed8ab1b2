"""Names: of models, data sets, aliases and reports (file names on every system), of the hub, and of data files."""

from __future__ import annotations

import re

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
NAME_RULE = (
    "a letter or digit, then up to 63 letters, digits, '.', '_' or '-', not with a '.' at the end and not a device of "
    "Windows such as con or nul"
)
HUB_ID = r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*"
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".gz")
# A home may be copied to Windows, where these names are devices, with any suffix.
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)


def is_name(text: str) -> bool:
    """Return whether a new model, data set, alias or report may have this name."""
    if re.fullmatch(NAME_PATTERN.strip("^$"), text) is None or text.endswith("."):
        return False
    return _DEVICE.fullmatch(text) is None
