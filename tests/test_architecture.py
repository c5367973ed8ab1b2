"""The import law: a room imports only rooms above it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import rlhf_pipeline

ROOT = Path(rlhf_pipeline.__file__).parent
ROOMS = (
    "foreign",
    "config",
    "disk",
    "algorithms",
    "data",
    "registry",
    "models",
    "rollout",
    "evaluation",
    "health",
    "training",
    "stages",
    "report",
    "labelling",
    "measure",
    "compare",
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


def module_name(path: Path) -> str:
    """The dotted name of a file of the package; of `__init__.py` that of its folder."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def links(source: str, known: Collection[str]) -> dict[str, bool]:
    """The modules of `known` that a source imports, wherever in it, and whether for TYPE_CHECKING alone.

    `from package import module` is an import of the module, any other `from` one of what stands behind it.
    """
    found: dict[str, bool] = {}

    def walk(node: ast.AST, annotation: bool) -> None:
        for child in ast.iter_child_nodes(node):
            hidden = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and child in node.body
            names = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                full = [f"{child.module}.{alias.name}" for alias in child.names]
                names = [name if name in known else str(child.module) for name in full]
            for name in names:
                if name in known:
                    found[name] = found.get(name, True) and (annotation or hidden)
            walk(child, annotation or hidden)

    walk(ast.parse(source), False)
    return found


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The modules of an import circle, the first one again at the end; empty without one."""
    done: set[str] = set()
    path: list[str] = []

    def search(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for imported in sorted(graph[module]):
            if found := search(imported):
                return found
        path.pop()
        done.add(module)
        return []

    for start in sorted(graph):
        if found := search(start):
            return found
    return []


def test_a_circle_is_found_wherever_its_imports_stand() -> None:
    known = ("p.a", "p.b", "p.c")
    assert links("import p.b\nif x:\n    from p import c", known) == {"p.b": False, "p.c": False}
    assert links("def f():\n    from p.b import name", known) == {"p.b": False}
    assert links("if TYPE_CHECKING:\n    from p.b import Name\nelse:\n    import p.c", known) == {
        "p.b": True,
        "p.c": False,
    }
    assert links("from p.b import name\nif TYPE_CHECKING:\n    from p.b import Name", known) == {"p.b": False}
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"], "d": []}) == ["b", "c", "b"]
    assert circle({"a": ["a"]}) == ["a", "a"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_no_import_circle() -> None:
    """Neither when modules run, nor for the sake of annotations: two modules that know each other are one."""
    # Without the package itself, which Python imports before any of its modules.
    paths = {module_name(ROOT / module): ROOT / module for module in MODULES if module != "__init__.py"}
    graph = {name: links(path.read_text(), paths) for name, path in paths.items()}
    found = circle(graph)
    assert not found, f"an import circle: {' -> '.join(found)}"


def test_a_room_imports_only_rooms_above_it() -> None:
    upward = []
    for module in MODULES:
        room = module.split("/")[0]
        if module == "errors.py":
            assert not imports(ROOT / module), module
            continue
        if room not in ROOMS:  # the Python API imports every room but the command line, which imports the API
            assert module in ("__init__.py", "api.py")
            allowed = (*ROOMS[:-1], "api")
        else:
            allowed = (*ROOMS[: ROOMS.index(room) + 1], *(["api"] if room == "cli" else []))
        for name in imports(ROOT / module):
            parts = name.split(".")
            if len(parts) > 1 and parts[1] != "errors" and parts[1] not in allowed:
                upward.append(f"{module} imports {name}, a room below it")
    assert not upward


LARGEST = 0.15
"""The share of the package's lines that a room may have."""


def test_no_room_is_larger_than_an_idea() -> None:
    lines = {module: len((ROOT / module).read_text().splitlines()) for module in MODULES}
    total = sum(lines.values())
    shares = {room: sum(n for m, n in lines.items() if m.startswith(f"{room}/")) / total for room in ROOMS}
    assert {room: round(share, 3) for room, share in shares.items() if share > LARGEST} == {}


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


def test_the_walk_from_yaml_to_report_names_files_that_are_there() -> None:
    """docs/architecture.md: one pair from YAML to report in at most 40 files per arm."""
    text = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    walk = text.partition("## A walk")[2].partition("\n## ")[0]
    dpo, _, ppo = walk.partition("For PPO")
    shared, own = (re.findall(r"^\|(?: \d+ \|)? `([\w/]+\.py)` \|", part, re.MULTILINE) for part in (dpo, ppo))
    missing = [name for name in [*shared, *own] if not (ROOT / name).is_file()]
    assert not missing and len(set(shared)) == len(shared) <= 40
    assert len(shared) - 5 - 3 + len(own) <= 40  # five files are DPO's own, three say nothing new of PPO
