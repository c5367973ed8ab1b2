"""The keys of a config class in readable form, for command-line options, `rlhf config` and docs/config.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.config.stages import schema_class

_TYPES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_VALUES = {"integer": int, "number": float, "boolean": bool}


@dataclass(frozen=True)
class Key:
    """A key of a config: its type in words, the Python type of its option, and its default in YAML."""

    name: str
    words: str
    value: type
    required: bool
    default: Any
    description: str

    @property
    def default_text(self) -> str:
        """The default as YAML text."""
        if self.required:
            return "required"
        return self.default if isinstance(self.default, str) else json.dumps(self.default)


def schema_of(stage: str) -> dict[str, Any]:
    """Return the JSON schema of a command's config.

    Raises:
        ConfigError: there is no such command.
    """
    return schema_class(stage).model_json_schema()


def keys_of(stage: str) -> dict[str, Key]:
    """Return the keys of a command's config, in order.

    Raises:
        ConfigError: there is no such command.
    """
    schema = schema_of(stage)
    inner, required = schema.get("$defs", {}), schema.get("required", ())
    return {
        name: Key(
            name, _words(field, inner), _value(field), name in required, field.get("default"), field["description"]
        )
        for name, field in schema["properties"].items()
    }


def _value(field: Mapping[str, Any]) -> type:
    """Return the Python type of a field's option; text if values of several types are possible."""
    parts = [part for part in field.get("anyOf", [field]) if part.get("type") != "null"]
    return _VALUES.get(parts[0].get("type", ""), str) if len(parts) == 1 else str


def _words(field: Mapping[str, Any], inner: Mapping[str, Any]) -> str:
    """Return a JSON schema in words: `whole number >= 1 or null`."""
    if "anyOf" in field:
        return " or ".join(_words(part, inner) for part in field["anyOf"])
    if "$ref" in field:
        return f"mapping of {', '.join(inner[field['$ref'].rpartition('/')[2]]['properties'])}"
    if choices := field.get("enum") or ([field["const"]] if "const" in field else []):
        return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
    kind = field.get("type", "any value")
    if kind == "array":
        return f"list ({_words(field['items'], inner)})"
    if kind == "object":
        return "mapping"
    limits = [f"{sign} {field[name]}" for name, sign in _LIMITS.items() if name in field]
    return " ".join([_TYPES.get(kind, kind), *filter(None, [" and ".join(limits)])])
