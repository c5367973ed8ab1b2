"""Write docs/config.md: every key of every config, with its type, its default and its description.

python scripts/config_reference.py docs/config.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf_pipeline.config.fields import keys_of
from rlhf_pipeline.config.keys import SCHEMAS

COMMANDS = {"collect": "data collect", "experiment": "run"}
"""Commands of the schemas that have another name."""
INTRODUCTION = """# Config keys

Made by `python scripts/config_reference.py docs/config.md`. The same table in a terminal: `rlhf config keys STAGE`
(`--json` for programs). `rlhf config schema STAGE` prints the JSON schema, with which an editor completes and checks a
YAML file. Commands also read other names of some keys (`torch_dtype`, `beta` in `ppo`), which the schema does not list.
"""


def reference() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for stage in SCHEMAS:
        lines += [
            f"## rlhf {COMMANDS.get(stage, stage)}",
            "",
            "| key | type | default | what it does |",
            "| --- | --- | --- | --- |",
        ]
        for key in keys_of(stage).values():
            default = "required" if key.required else f"`{key.default_text}`"
            description = key.description.replace("|", "\\|")
            lines.append(f"| `{key.name}` | {key.words} | {default} | {description} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: config_reference.py OUT.md")
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
