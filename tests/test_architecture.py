"""The import law: a room imports only rooms above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import rlhf_pipeline

ROOT = Path(rlhf_pipeline.__file__).parent
ROOMS = (
    "config",
    "algorithms",
    "data",
    "registry",
    "models",
    "rollout",
    "evaluation",
    "training",
    "stages",
    "experiment",
    "cli",
)
HEAVY = ("torch", "transformers", "datasets", "trl", "accelerate", "sklearn", "scipy")
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names of everything of ours that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return {name for name in found if name.startswith("rlhf_pipeline")}


def test_a_room_imports_only_rooms_above_it() -> None:
    upward = []
    for module in MODULES:
        room = module.split("/")[0]
        if room not in ROOMS:
            assert module in ("__init__.py", "errors.py")
            assert not imports(ROOT / module), module
            continue
        allowed = ROOMS[: ROOMS.index(room) + 1]
        for name in imports(ROOT / module):
            parts = name.split(".")
            if len(parts) > 1 and parts[1] != "errors" and parts[1] not in allowed:
                upward.append(f"{module} imports {name}, a room below it")
    assert not upward


def test_every_room_is_listed() -> None:
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ROOMS)


def test_algorithms_import_torch_and_nothing_else_of_ours() -> None:
    for path in (ROOT / "algorithms").glob("*.py"):
        assert all(name.startswith("rlhf_pipeline.algorithms") for name in imports(path))


def test_backward_is_called_in_one_place_only() -> None:
    callers = [module for module in MODULES if ".backward(" in (ROOT / module).read_text()]
    assert callers == ["training/loop.py"]


def test_the_command_line_imports_nothing_heavy() -> None:
    code = f"import sys, rlhf_pipeline.cli.main; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
