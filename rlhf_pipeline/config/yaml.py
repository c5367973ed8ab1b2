"""YAML with line numbers, and without the surprises of YAML 1.1.

Plain scalars follow YAML 1.2: `1e-5` is a number; `no` and dates are text; `010` is the decimal number 10. A key that
is given twice is a fault, not a silent overwrite.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from rlhf_pipeline.errors import Fault

KeyPath = tuple[str | int, ...]

_MERGE = "tag:yaml.org,2002:merge"
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_PLAIN: dict[str, tuple[re.Pattern[str], str]] = {
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), "~nN\0"),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile(r"^[-+]?[0-9][0-9_]*$"), "-+0123456789"),
    "float": (_FLOAT, "-+0123456789."),
    "merge": (re.compile(r"^<<$"), "<"),
}
# A config has tens of nodes; more than this is an alias bomb.
_MOST_NODES = 20_000
_MOST_BYTES = 1_000_000
_DEEPEST = 50
# The tags of a config's values; no key accepts values with other tags (!!binary, !!set, !!timestamp).
_TYPES: dict[type[yaml.Node], frozenset[str]] = {
    kind: frozenset(f"tag:yaml.org,2002:{name}" for name in names)
    for kind, names in (
        (yaml.ScalarNode, ("str", "int", "float", "bool", "null", "merge")),
        (yaml.SequenceNode, ("seq",)),
        (yaml.MappingNode, ("map",)),
    )
}


class _Loader(yaml.SafeLoader):
    """SafeLoader whose plain scalars follow YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern]]]] = {}  # type: ignore[misc]  # stub errs

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """Read an integer in base ten, with or without leading zeros."""
        return int(self.construct_scalar(node).replace("_", ""))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text that only this loader would read as a number."""


for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, [c.replace("\0", "") for c in _first])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass
class Document:
    """A YAML mapping, the line of each of its keys, and its faults."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def where(self, path: KeyPath) -> str:
        """Return the place of the value at `path`, as `file:line: key`."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.source}:{self.lines[path[:length]]}: {dotted(path)}"
        return f"{self.source}: {dotted(path)}" if path else self.source


def dotted(path: KeyPath) -> str:
    """Return a path as `key.inner.0`."""
    return ".".join(map(str, path))


def parse_value(text: str) -> Any:
    """Return the value of one YAML expression, as in `key=value`.

    Raises:
        ValueError: the text is not YAML.
    """
    document = Document("")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Walk(document).value(node, ())
        if document.faults:
            raise ValueError(document.faults[0].found)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, _TooManyError) as error:
        raise ValueError(getattr(error, "problem", None) or str(error)) from error


def as_index(part: str) -> str | int:
    """Return a part of a dotted key as the index of a list if it can be one."""
    return int(part) if part.isascii() and part.isdigit() and len(part) < 10 else part


def dump(values: dict[str, Any]) -> str:
    """Return YAML text that this module and every other YAML reader read back as `values`."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_document(path: Path) -> Document:
    """Read a YAML file; errors become faults of the document."""
    document = Document(str(path))
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            document.faults.append(Fault(str(path), f"more than {_MOST_BYTES} bytes", "a YAML file of a config"))
            return document
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        document.faults.append(Fault(str(path), "there is no such file", "a YAML file", _neighbours(path)))
    except UnicodeDecodeError as error:
        mark = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        found = "not UTF-8, looks like UTF-16 or UTF-32" if mark else f"byte {error.start + 1} is not UTF-8"
        line = raw.count(b"\n", 0, error.start) + 1
        document.faults.append(Fault(f"{path}:{line}", found, "UTF-8 text"))
    except (OSError, ValueError) as error:  # a ValueError: the path has a NUL
        reason = getattr(error, "strerror", None) or str(error)
        document.faults.append(Fault(str(path), f"cannot be read: {reason}", "a YAML file"))
    else:
        _parse(text, document)
    return document


def parse_document(text: str, source: str) -> Document:
    """Read YAML text; errors become faults of the document, which name `source`."""
    document = Document(source)
    _parse(text, document)
    return document


def _neighbours(path: Path) -> str:
    found = sorted(other.name for other in path.parent.glob("*.y*ml"))[:8] if path.parent.is_dir() else []
    return f"{path.parent} has {', '.join(found)}" if found else ""


def _parse(text: str, document: Document) -> None:
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            found = f"found a {root.id}"  # type: ignore[attr-defined]  # every kind of node has it
            document.faults.append(Fault(f"{document.source}:{_line(root)}", found, "lines of `key: value`"))
            return
        _Walk(document).mapping(root, ())
        if not document.faults:
            document.values = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{document.source}:{mark.line + 1}" if mark else document.source
        problem = " ".join(str(error.problem or error.context).split())
        document.faults.append(Fault(place, f"not YAML: {problem}", "lines of `key: value`"))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"a character that YAML does not allow: {error.reason}"
        document.faults.append(Fault(f"{document.source}:{line}", found))
    except _TooManyError as error:
        document.faults.append(Fault(f"{document.source}:{error.line}", str(error)))
    except RecursionError:
        line = 1 if loader is None else loader.line + 1
        document.faults.append(Fault(f"{document.source}:{line}", "nested too deeply", "lines of `key: value`"))
    except ValueError as error:  # YAML's reader has its own errors for everything else
        document.faults.append(Fault(document.source, f"cannot be read as YAML: {error}"))


class _TooManyError(Exception):
    """The document expands to more nodes than a config may have."""

    def __init__(self, found: str, line: int):
        super().__init__(found)
        self.line = line


@dataclass
class _Walk:
    """Collects the line of each key, and the keys that are given twice."""

    document: Document
    count: int = 0
    reader: _Loader = field(default_factory=lambda: _Loader(""))

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> None:
        """Visit a mapping; merged mappings come first, so that its own keys win."""
        self.visit(node, path)
        for key, value in node.value:
            if key.tag == _MERGE:
                parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for part in parts:
                    if isinstance(part, yaml.MappingNode):
                        self.mapping(part, path)
        first: dict[str, int] = {}
        for name, key, value in self._keys(node, path):
            if name in first:
                found = f"given twice, first on line {first[name]}"
                self.fault(key, (*path, name), found, "each key once", "remove one")
            first.setdefault(name, _line(key))
            self.document.lines[(*path, name)] = _line(key)
            self.value(value, (*path, name))

    def value(self, node: yaml.Node, path: KeyPath) -> None:
        """Visit a value."""
        if isinstance(node, yaml.MappingNode):
            self.mapping(node, path)
            return
        self.visit(node, path)
        if isinstance(node, yaml.ScalarNode):
            self.scalar(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, entry in enumerate(node.value):
                self.document.lines[(*path, index)] = _line(entry)
                self.value(entry, (*path, index))

    def visit(self, node: yaml.Node, path: KeyPath) -> None:
        """Count a node, and check its type."""
        self.count += 1
        if self.count > _MOST_NODES:
            raise _TooManyError(f"aliases expand to more than {_MOST_NODES} values, or to themselves", _line(node))
        if len(path) > _DEEPEST:
            found = f"aliases expand to themselves, or values are nested more than {_DEEPEST} levels deep"
            raise _TooManyError(found, _line(node))
        if node.tag not in _TYPES[type(node)]:
            found = f"a value of the type {node.tag.replace('tag:yaml.org,2002:', '!!')}"
            self.fault(node, path, found, "a plain value", "remove the tag")

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> None:
        """Check that a scalar fits its tag (`!!int abc` and numbers of thousands of digits do not) and can be encoded.

        An escape such as "\\ud800" is half a character; no file, name or message can hold it.
        """
        try:
            node.value.encode()
            self.reader.construct_object(node)
        except UnicodeEncodeError as error:
            self.fault(node, path, f"half of a surrogate pair at character {error.start + 1}", "whole characters")
        except (ValueError, KeyError):
            shown = repr(node.value if len(node.value) <= 40 else f"{node.value[:37]}...")
            self.fault(node, path, f"{shown} cannot be read as {node.tag.rpartition(':')[2]}", "a plain value")

    def fault(self, node: yaml.Node, path: KeyPath, found: str, expected: str, fix: str = "") -> None:
        """Record a fault once; merged mappings are visited once for each place that they are merged into."""
        where = f"{self.document.source}:{_line(node)}" + (f": {dotted(path)}" if path else "")
        fault = Fault(where, found, expected, fix)
        if fault not in self.document.faults:
            self.document.faults.append(fault)

    def _keys(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        for key, value in node.value:
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                self.fault(key, (), f"a key that is a {key.id}", "a name")
            elif not path and not key.tag.endswith(":str"):
                self.fault(key, (), f"{key.value!r} is not the name of a key", "a name")
            elif key.tag not in _TYPES[yaml.ScalarNode]:
                self.visit(key, (*path, key.value))
            else:
                self.scalar(key, (*path, key.value))
                yield key.value, key, value


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
