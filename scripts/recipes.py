"""Count the published recipes that run here: python scripts/recipes.py

The keys and values of the recipes are stored in tests/config/recipes/. Unedited: `rlhf STAGE --config FILE` accepts the
file. Meant: after `rlhf import FILE`, no key that changes what is trained is lost. No model and no data are loaded.
Trackers and optimisers of optional packages count as if the packages were installed (`OPTIONAL`).
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from rlhf_pipeline.config.importing import import_config
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.yaml import dump
from rlhf_pipeline.errors import ConfigError

STORED = Path(__file__).parents[1] / "tests" / "config" / "recipes"
UNEDITED = ("trl", "alignment-handbook")
"""The tools whose keys this package reads itself."""
OPTIONAL = ("bitsandbytes", "tensorboard", "wandb")
DATASET_INFO = STORED / "dataset_info" / "llamafactory.json"


@dataclass(frozen=True)
class Recipe:
    """A stored recipe: its tool, name and source, the command that trains the same, and its keys and values."""

    tool: str
    name: str
    path: str
    stage: str
    keys: Mapping[str, Any]
    arguments: tuple[str, ...] = ()
    program: str = ""

    def write(self, folder: Path) -> Path:
        """Write it at its path below a folder, with LLaMA-Factory's list of data sets beside it."""
        file = folder / self.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.script() if self.program else dump(dict(self.keys)), encoding="utf-8")
        if self.tool == "llamafactory":
            (folder / "data").mkdir(exist_ok=True)
            (folder / "data" / "dataset_info.json").write_bytes(DATASET_INFO.read_bytes())
        return file

    def script(self) -> str:
        """The shell script that starts the program with these flags."""
        words = []
        for key, value in self.keys.items():
            if self.tool == "verl":
                words.append(f"{key}={shlex.quote(str(value))}")
            else:
                words.append(f"--{key}" if value is True else f"--{key} {shlex.quote(str(value))}")
        return " \\\n    ".join([f"python3 -m {self.program}", *words]) + "\n"


def stored() -> Iterator[Recipe]:
    """All stored recipes."""
    for file in sorted(STORED.glob("*.json")):
        for name, entry in json.loads(file.read_text(encoding="utf-8")).items():
            kept = {key: entry[key] for key in ("path", "stage", "keys", "program") if key in entry}
            yield Recipe(file.stem, name, **kept, arguments=tuple(entry.get("arguments", ())))


def refused(recipe: Recipe, folder: Path) -> list[str]:
    """What `rlhf STAGE --config FILE` refuses in the unedited file; empty: it runs."""
    try:
        load_config(recipe.stage, recipe.write(folder), recipe.arguments)
    except ConfigError as error:
        return [f"{fault.key}: {fault.found}" for fault in error.faults]
    return []


def lost(recipe: Recipe, folder: Path) -> list[str]:
    """What changes training and is lost by `rlhf import FILE`; empty: it trains what its authors meant."""
    found = import_config(recipe.write(folder))
    if found.stage != recipe.stage:
        return [f"taken as {found.stage}, not {recipe.stage}"]
    reasons = [f"{loss.key}: {loss.why}" for loss in found.lost if loss.changes_training]
    # A file of the authors is not here: `there is no '/tmp/model'`.
    reasons += [note for note in found.notes if note.startswith("to mend: ") and ": there is no '" not in note]
    total = found.config.get("max_length")
    if total and not {"max_prompt_length", "response_length"} & set(found.config):
        keys = {"model_name_or_path": "m", "dataset_name": "d", "output_name": "n", "max_length": total}
        if load_config("sft", None, extra=keys).config.lengths().response == total // 2:
            reasons.append("max_length alone is halved into prompt and response")
    return reasons


def count(told: bool = False) -> tuple[int, int, int, int]:
    """The number of unedited files that run, of how many, and of all files that train what was meant, of how many."""
    runs = unedited = means = every = 0
    find = importlib.util.find_spec

    def with_optional(name: str, package: str | None = None) -> Any:
        return find("json" if name in OPTIONAL else name, package)

    for recipe in stored():
        with tempfile.TemporaryDirectory() as folder, mock.patch("importlib.util.find_spec", with_optional):
            reasons = lost(recipe, Path(folder))
            faults = refused(recipe, Path(folder)) if recipe.tool in UNEDITED else []
        every, means = every + 1, means + (not reasons)
        runs, unedited = runs + (recipe.tool in UNEDITED and not faults), unedited + (recipe.tool in UNEDITED)
        if told:
            _tell(recipe, "unedited", faults)
            _tell(recipe, "imported", reasons)
    return runs, unedited, means, every


def _tell(recipe: Recipe, how: str, reasons: list[str]) -> None:
    if reasons:
        texts = [reason if len(reason) <= 120 else f"{reason[:117]}..." for reason in dict.fromkeys(reasons)]
        more = f" (and {len(texts) - 3} more)" if len(texts) > 3 else ""
        sys.stdout.write(f"{recipe.tool} {recipe.name}, {how}: {'; '.join(texts[:3])}{more}\n")


def main() -> None:
    """Print a line for each file that does not run or mean the same, and the counts."""
    runs, unedited, means, every = count(told=True)
    sys.stdout.write(f"{runs} of {unedited} files of TRL and alignment-handbook run unedited\n")
    sys.stdout.write(f"{means} of {every} files train what their authors meant after rlhf import\n")


if __name__ == "__main__":
    main()
