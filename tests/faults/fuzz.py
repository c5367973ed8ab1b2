"""Random input for everything that reads what a user writes: only errors of ours may come out of it.

`fuzz` runs for a time budget; `tests/faults/test_fuzz.py` runs a few hundred fixed examples.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from rlhf_pipeline.config.experiment import load_experiment
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.stages import SCHEMAS
from rlhf_pipeline.config.yaml import dump, read_document
from rlhf_pipeline.data import formats
from rlhf_pipeline.data.check import describe
from rlhf_pipeline.data.files import read_file
from rlhf_pipeline.data.sources import local_path
from rlhf_pipeline.errors import RlhfError
from rlhf_pipeline.registry.references import parse_reference
from rlhf_pipeline.registry.store import Registry

COLUMNS = [
    *sorted({column for schema in formats.SCHEMAS for column in (*schema.columns, *schema.also)}),
    "split", "label", "tools", "chat_template_kwargs", "content", "from", "value", "name", "tool_calls",
]  # fmt: skip
KEYS = {stage: sorted(schema.model_fields) for stage, schema in SCHEMAS.items()}
STAGES = tuple(SCHEMAS)

# Characters that have broken parsers: controls, marks of order and of bytes, half pairs, digits that `int` refuses.
awkward = st.sampled_from(
    ["\0", "\ufeff", "\u2028", "\x85", "\ud800", "\udce9", "²", "٣", "\r", "\n\n", "~", "é", "😀"]
)
text = st.lists(st.one_of(st.text(max_size=8), awkward, st.sampled_from(COLUMNS)), max_size=4).map("".join)
words = st.sampled_from(
    ["", "user", "assistant", "system", "human", "gpt", "train", "test", "\n\nHuman: a\n\nAssistant: b", "sft", "world",
     "world:verdicts", "collected:x", "./x", "~nobody/x", "x" * 300, "1e999", "v1", "sft@v1#3", "org/name@main"]
)  # fmt: skip
numbers = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.none(), st.sampled_from([0, 1, -1, 10**30, 2**63, 1e-400, 0.5])
)
scalars = st.one_of(text, words, numbers)
names = st.one_of(st.sampled_from(COLUMNS), text)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=8,
)
turns = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": scalars, "content": values, "from": scalars, "value": scalars, "x": values}
    ),
    max_size=3,
)
rows = st.one_of(
    st.dictionaries(st.sampled_from(COLUMNS), st.one_of(values, turns), max_size=6),
    *(
        st.fixed_dictionaries(
            {column: st.one_of(text, words, turns, values) for column in schema.columns},
            optional=dict.fromkeys({"label", "tools", "split", *schema.also} - {*schema.columns}, values),
        )
        for schema in formats.SCHEMAS
    ),
)


@st.composite
def damaged(draw: Any, content: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a few of them cut out, put in or changed."""
    found = bytearray(draw(content))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(found)))
        act = draw(st.sampled_from(["cut", "put", "change", "end"]))
        if act == "cut":
            del found[place : place + draw(st.integers(1, 5))]
        elif act == "put":
            found[place:place] = draw(
                st.one_of(st.binary(max_size=4), st.sampled_from([b'"', b"[", b"\n", b"\xff\xfe", b","]))
            )
        elif act == "change" and place < len(found):
            found[place] = draw(st.integers(0, 255))
        elif act == "end":
            del found[place:]
    return bytes(found)


def _lines(found: list[Any]) -> bytes:
    return "\n".join(json.dumps(row, default=str) for row in found).encode(errors="surrogateescape")


def _table(found: list[list[str]]) -> bytes:
    return "\n".join(",".join(cells) for cells in found).encode(errors="surrogatepass")


cells = st.one_of(
    text, words, st.sampled_from(COLUMNS), values.map(lambda v: '"' + json.dumps(v).replace('"', '""') + '"')
)
json_lines = damaged(st.lists(st.one_of(rows, values), max_size=5).map(_lines))
json_arrays = damaged(st.lists(st.one_of(rows, values), max_size=5).map(lambda found: json.dumps(found).encode()))
tables = damaged(st.lists(st.lists(cells, min_size=1, max_size=5), max_size=5).map(_table))
files = st.one_of(
    st.tuples(st.just(".jsonl"), json_lines),
    st.tuples(st.just(".json"), st.one_of(json_arrays, json_lines)),
    st.tuples(st.just(".csv"), tables),
    st.tuples(st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"]), st.binary(max_size=200)),
)
stages = st.sampled_from(STAGES)
configs = stages.flatmap(
    lambda stage: st.tuples(
        st.just(stage),
        st.dictionaries(st.one_of(st.sampled_from(KEYS[stage]), text), values, max_size=6),
        st.lists(st.one_of(text, st.tuples(st.sampled_from(KEYS[stage]), text).map(".=".join), st.tuples(
            st.sampled_from(KEYS[stage]), scalars.map(str)).map("=".join)), max_size=3),
    )
)  # fmt: skip
yaml_signs = st.sampled_from(
    ["\n", ": ", "- ", "  ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "!!int ", "!!set ", "!x ", "|\n", "? ", "---\n",
     "...\n", "%YAML 1.1\n", "#", "'", '"', "\t", "1e5", "0x1", "~", "name", "stages"]
)  # fmt: skip
keys = st.sampled_from(sorted({key for keys in KEYS.values() for key in keys}))
yaml_pieces = st.lists(st.one_of(text, yaml_signs, keys), max_size=12).map("".join)
yaml_bytes = damaged(
    st.one_of(
        yaml_pieces.map(lambda found: found.encode(errors="surrogatepass")),
        st.dictionaries(st.sampled_from(KEYS["experiment"]), values, max_size=5).map(
            lambda found: json.dumps(found).encode()
        ),
        configs.map(lambda found: dump(json.loads(json.dumps(found[1]))).encode(errors="surrogatepass")),
    )
)
references = st.one_of(
    text, words, st.lists(st.one_of(words, st.sampled_from(["@", "#", "/", "v9" * 20, ":"])), max_size=4).map("".join)
)


def read_yaml(folder: Path, found: tuple[str, bytes]) -> None:
    """The YAML reader, then the config of a stage and an experiment."""
    stage, content = found
    path = folder / "fuzz.yaml"
    path.write_bytes(content)
    document = read_document(path)
    assert document.values == {} or not document.faults
    for load in (lambda: load_config(stage, path), lambda: load_experiment(path)):
        try:
            load()
        except RlhfError as error:
            str(error).encode()


def read_values(folder: Path, found: tuple[str, dict[str, Any], list[str]]) -> None:
    """Values and overrides of a stage's config."""
    stage, given_values, overrides = found
    try:
        load_config(stage, None, overrides, extra=given_values)
    except RlhfError as error:
        str(error)


def read_rows(folder: Path, found: tuple[str, bytes]) -> None:
    """A data file: its rows, its records, and what is said of them."""
    suffix, content = found
    path = folder / f"fuzz{suffix}"
    path.write_bytes(content)
    try:
        read, faults = read_file(path)
        parsed = formats.parse(read, path.name)
        for item in (*faults, *parsed.faults):
            str(item.fault).encode()
        if parsed.records:
            json.dumps(describe(parsed)).encode()
    except RlhfError as error:
        str(error)


def read_reference(folder: Path, found: str) -> None:
    """A reference to a model, collected data or a file."""
    registry = Registry(folder / "home")
    for look in (parse_reference, registry.resolve, registry.resolve_data, local_path):
        try:
            look(found)
        except RlhfError as error:
            str(error)


TARGETS: dict[str, tuple[Callable[[Path, Any], None], st.SearchStrategy]] = {
    "yaml": (read_yaml, st.tuples(stages, yaml_bytes)),
    "values": (read_values, configs),
    "rows": (read_rows, files),
    "references": (read_reference, references),
}


def examine(name: str, folder: Path, examples: int, *, seed: int | None = None) -> int:
    """Run examples of one target; without `seed` always the same ones. Returns how many were run.

    Raises:
        Exception: whatever came out that is no error of ours, with hypothesis' smallest example.
    """
    target, strategy = TARGETS[name]
    count = 0

    @settings(
        max_examples=examples,
        derandomize=seed is None,
        database=None,
        deadline=None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(found: Any) -> None:
        nonlocal count
        count += 1
        target(folder, found)

    (one if seed is None else seeded(seed)(one))()
    return count


def fuzz(seconds: float, seed: int = 0, *, examples: int = 200) -> dict[str, Any]:
    """Fuzz all targets in turn until the time is over: {examples, by_target, seconds, failures}."""
    began = time.perf_counter()
    run = dict.fromkeys(TARGETS, 0)
    failures: list[dict[str, str]] = []
    number = seed
    with tempfile.TemporaryDirectory() as folder:
        while time.perf_counter() - began < seconds:
            for name in TARGETS:
                number += 1
                try:
                    run[name] += examine(name, Path(folder), examples, seed=number)
                except Exception as error:
                    notes = " ".join(getattr(error, "__notes__", ()))
                    failures.append({"target": name, "seed": str(number), "error": f"{error!r} {notes}"[:2000]})
                if time.perf_counter() - began >= seconds:
                    break
    return {
        "examples": sum(run.values()),
        "by_target": run,
        "seconds": round(time.perf_counter() - began, 1),
        "failures": failures,
    }
