"""Names that would leave their folder, upset a terminal, or be something else on another system."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.registry.store import Registry

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal would obey."""

DEVICES = ("con", "PRN", "aux", "NUL", *(f"com{n}" for n in range(10)), *(f"LPT{n}" for n in range(10)))
CONTROLS = [chr(code) for code in [*range(32), 127, 0x80, 0x85, 0x9B, 0xA0, 0xAD]]
INVISIBLE = [
    "\u200b",
    "\u200e",
    "\u200f",
    "\u2028",
    "\u2029",
    "\u202a",
    "\u202e",
    "\u2060",
    "\u2066",
    "\ufeff",
    "\ufffe",
]
LOOKALIKES = [
    "ѕft",  # Cyrillic s
    "sft\u0301",
    "ｓｆｔ",
    "𝓼𝓯𝓽",
    "sﬁ",
    "ſft",
    "s\u2024\u2024ft",
    "\uff0e\uff0e\uff0fsft",
    "..\u2215sft",
    "..\u2044sft",
    "\uff3csft",
    "sft\uff20v1",
    "sft\uff03\uff11",
    "sft@v\u0661",
    "sft@v１",
    "sftⅠ",
    "ﬀ",
    "Ｃ：",
]
CLIMBING = [
    "..",
    ".",
    "/",
    "//",
    "\\",
    "../sft",
    "../../etc/passwd",
    "sft/..",
    "sft/../..",
    "sft/../../canary",
    "sft/v1",
    "sft//v1",
    "./sft/.",
    "/etc",
    "/etc/passwd",
    "/tmp/canary",
    "//host/share",
    "\\\\host\\share",
    "..\\sft",
    "..\\..\\windows",
    "C:",
    "C:\\windows",
    "C:/windows",
    "file:///etc/passwd",
    "~",
    "~/canary",
    "~root",
    "$HOME",
    "${HOME}",
    "%TEMP%",
    "`id`",
    "$(id)",
    "sft;id",
    "sft|id",
    "sft&id",
    "sft>canary",
    "sft<x",
    "*",
    "?",
    "[a-z]",
    "{a,b}",
    "%2e%2e%2fsft",
    "..%2fsft",
    "..%c0%afsft",
    "....//sft",
    ".sft",
    ".hidden",
    ".tmp",
    ".lock",
    ".sft-0123456789ab.tmp",
    "aliases.json/..",
    "v1/../..",
]
DASHES = ["-", "--", "-rf", "--home", "--help", "-sft", "_sft", "--repair=x", "-\n"]
MARKS = [
    "",
    " ",
    "  ",
    " sft x",
    "sft x",
    "a\tb",
    "a\nb",
    "sft\n",
    "\nsft",
    "a\r\nb",
    "a\0b",
    "\x1b[2J",
    "sft\x1b[31m",
    "\x1b]0;title\x07",
    "\x9b31m",
    "sft@@v1",
    "@v1",
    "sft@",
    "sft#",
    "#1",
    "sft##1",
    "sft#1#2",
    "sft@v1@v2",
    "sft@v1#",
    "sft@v1#-1",
    "sft@v1#1.5",
    "sft@v1#0x10",
    "sft@v1#٣",
    "sft@v1#" + "9" * 5000,
    "sft@v" + "9" * 5000,
    "sft@v-1",
    "sft@v1/..",
    "sft@../../x",
    "sft#../../x",
    "sft:x",
    "os:system",
    "a:b:c",
    "!!python/object",
    "{{7*7}}",
    "<script>",
    "\"'",
    "'; DROP TABLE models; --",
    "\ud800",
    "\udcff",
    "é",
    "a" * 65,
    "a" * 300,
    "a" * 5000,
    "a/" * 200,
    "/" + "a" * 5000,
    "sft.",
    "sft..",
    "a.b.",
]
NAMES: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *CLIMBING,
            *DASHES,
            *MARKS,
            *LOOKALIKES,
            *DEVICES,
            *(f"{device}.txt" for device in DEVICES[:6]),
            *(f"a{mark}b" for mark in [*CONTROLS, *INVISIBLE]),
            *(f"sft{mark}" for mark in INVISIBLE),
            *(f"{mark}sft" for mark in INVISIBLE[:6]),
        ]
    )
)


def tree(*folders: Path) -> dict[str, str]:
    """Every file and link of some folders with its content, every folder by name."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink():
                found[str(path)] = f"-> {path.readlink()}"
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = "folder"
    return found


def make_place(folder: Path) -> Path:
    """A home with a model and data within a folder that holds a canary, and an empty working directory."""
    registry = Registry(folder / "home")

    def write(target: Path) -> None:
        (target / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
        (target / "model.safetensors").write_text("weights")

    registry.publish("sft", "sft", write, code={"package": "test"})
    registry.publish_data("pairs", [{"prompt": "a", "chosen": "b", "rejected": "c"}], code={"package": "test"})
    registry.alias("sft", "best")
    (folder / "canary" / "deep").mkdir(parents=True)
    (folder / "canary" / "bird").write_text("sings")
    for name in ("work", "house"):
        (folder / name).mkdir()
    return folder


def with_home(place: Path, words: Sequence[str]) -> list[str]:
    """The words of a command line, told to use the home of a place."""
    at = words.index("--") if "--" in words else len(words)
    return [*words[:at], "--home", str(place / "home"), *words[at:]]


def command(place: Path, *words: str) -> tuple[int, str]:
    """Run the command line in the working directory of a place; returns its exit code and everything it said."""
    said = io.StringIO()
    before = Path.cwd()
    home = os.environ.get("HOME", "")
    os.chdir(place / "work")
    os.environ["HOME"] = str(place / "house")
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(with_home(place, words))
    finally:
        os.chdir(before)
        os.environ["HOME"] = home
    return code, said.getvalue()


def _by_config(place: Path, text: str, *words: str) -> tuple[str, ...]:
    path = place.parent / "config.yaml"
    path.write_text(text)
    return (*words, "--config", str(path))


_COLLECT = "policy: sft\nprompts: world:verdicts\njudge: world\nnum: 4\n"
WAYS: dict[str, Callable[[Path, str], tuple[str, ...]]] = {
    "reference": lambda place, name: ("models", "show", "--", name),
    "version": lambda place, name: ("models", "show", "--", f"sft@{name}"),
    "snapshot": lambda place, name: ("models", "show", "--", f"sft@v1#{name}"),
    "alias": lambda place, name: ("models", "alias", "--", "sft", name),
    "remove": lambda place, name: ("models", "remove", "--force", "--", name),
    "repair": lambda place, name: ("models", "verify", "--repair", "--", f"./{name}"),
    "export": lambda place, name: ("models", "export", "--", name, "out"),
    "collected": lambda place, name: ("data", "preview", "--", f"collected:{name}"),
    "version of data": lambda place, name: ("data", "preview", "--", f"collected:pairs@{name}"),
    "report": lambda place, name: ("report", "--", name),
    # YAML's escapes are JSON's.
    "output name": lambda place, name: _by_config(
        place, f"output_name: {json.dumps(name)}\n{_COLLECT}", "data", "collect"
    ),
    "comparison": lambda place, name: _by_config(
        place, f"name: {json.dumps(name)}\n", "compare", "sft", "--baseline", "sft"
    ),
}


def attack(place: Path, way: str, names: Iterable[str], run: Callable[..., tuple[int, str]] = command) -> list[str]:
    """Use names in one way; returns what went wrong: not refused, not one clear message, or anything touched.

    run: runs the words of a command line in a place, as `command` does.
    """
    failed, before = [], tree(place)
    for name in names:
        code, said = run(place, *WAYS[way](place, name))
        if code != 2 or not said or "Traceback" in said or "unexpected" in said or OBEYED.search(said):
            failed.append(f"{way} {name!r}: exit {code}: {said!r}")
    if tree(place) != before:
        failed.append(f"{way}: something was touched")
    return failed


def hostile_names(folder: Path) -> dict[str, Any]:
    """Use every name in every way; returns how many trials there were and those that failed."""
    place = make_place(folder)
    failed = [failure for way in WAYS for failure in attack(place, way, NAMES)]
    return {
        "names": len(NAMES),
        "ways": len(WAYS),
        "trials": len(NAMES) * len(WAYS),
        "failed": failed,
        "ok": not failed,
    }
