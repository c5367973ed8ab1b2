"""Write docs/config.md: every key of every config, its default and what it does.

python scripts/config_reference.py docs/config.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic_core import PydanticUndefined

from rlhf_pipeline.config import SCHEMAS

TITLES = {
    "sft": "rlhf sft",
    "train-rm": "rlhf train-rm",
    "ppo": "rlhf ppo",
    "dpo": "rlhf dpo",
    "collect": "rlhf data collect",
    "evaluate": "rlhf evaluate, generate",
    "compare": "rlhf compare",
    "exact": "rlhf exact",
}


def reference() -> str:
    """The whole page."""
    lines = ["# Config keys", "", "Made by `python scripts/config_reference.py docs/config.md`.", ""]
    for stage, title in TITLES.items():
        lines += [f"## {title}", "", "| key | default | what it does |", "| --- | --- | --- |"]
        for name, field in SCHEMAS[stage].model_fields.items():
            default = "required" if field.default is PydanticUndefined else f"`{field.default}`"
            description = (field.description or "").replace("|", "\\|")
            lines.append(f"| `{name}` | {default} | {description} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: config_reference.py OUT.md")
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
