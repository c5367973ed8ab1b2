"""The tables of all tools, and what one of their keys means."""

from __future__ import annotations

from rlhf_pipeline.foreign import axolotl, llamafactory, open_instruct, openrlhf, torchtune, verl
from rlhf_pipeline.foreign.table import Tool

TOOLS: dict[str, Tool] = {
    module.TOOL.name: module.TOOL for module in (llamafactory, axolotl, openrlhf, torchtune, verl, open_instruct)
}


def meaning(key: str) -> str:
    """Return what a key of other tools means here, and what to do; an empty string for any other key."""
    known = {name: tool.entries[key] for name, tool in TOOLS.items() if key in tool.entries}
    if not known:
        return ""
    owners = f"a key of {', '.join(known)}"
    ours = {entry.ours for entry in known.values()} - {""}
    reasons = [entry.why for entry in known.values() if entry.why]
    if len(ours) == 1 and key not in ours:
        return f"{owners}: use {ours.pop()}, or translate the file with `rlhf import FILE`"
    if reasons and not ours:
        return f"{owners}: {reasons[0]}; remove it"
    return f"{owners}: translate the file with `rlhf import FILE`"
