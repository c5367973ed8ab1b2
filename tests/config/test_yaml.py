from __future__ import annotations

import math

import pytest
import yaml as pyyaml

from rlhf_pipeline.config.yaml import dump, parse_value, read_document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("010", 10),
        ("-3", -3),
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("v1", "v1"),
        ("1.2.3", "1.2.3"),
        ("[1, .1, a]", [1, 0.1, "a"]),
        ("{a: 1e3}", {"a": 1000.0}),
        ("'1e-5'", "1e-5"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_nan_and_infinity_are_numbers():
    assert math.isnan(parse_value(".nan"))
    assert parse_value("-.inf") == -math.inf


def test_a_value_that_is_not_yaml_is_refused():
    with pytest.raises(ValueError, match="expected"):
        parse_value("[1, 2")


def test_lines_of_keys_inside_mappings_and_lists(write):
    path = write("a.yaml", "# comment\nseed: 1\nouter:\n  inner: 2\nitems:\n  - {source: x,\n     weight: 2}\n")
    document = read_document(path)
    assert document.values == {"seed": 1, "outer": {"inner": 2}, "items": [{"source": "x", "weight": 2}]}
    assert document.where(("seed",)) == f"{path}:2: seed"
    assert document.where(("outer", "inner")) == f"{path}:4: outer.inner"
    assert document.where(("items", 0, "weight")) == f"{path}:7: items.0.weight"
    assert document.where(("items", 0, "absent")) == f"{path}:6: items.0.absent"
    assert document.where(("absent",)) == f"{path}: absent"


def test_merge_keys_are_overridden_by_own_keys_without_a_fault(write):
    path = write("a.yaml", "base: &base {a: 1, b: 2}\nmerged:\n  <<: *base\n  b: 3\n")
    document = read_document(path)
    assert document.faults == []
    assert document.values["merged"] == {"a": 1, "b": 3}
    assert document.where(("merged", "b")) == f"{path}:4: merged.b"


def test_all_duplicate_keys_are_faults(write):
    path = write("a.yaml", "seed: 1\nbeta: 2\nseed: 3\ninner: {x: 1, x: 2}\n")
    document = read_document(path)
    assert [(fault.where, fault.found) for fault in document.faults] == [
        (f"{path}:3: seed", "given twice, first on line 1"),
        (f"{path}:4: inner.x", "given twice, first on line 4"),
    ]


@pytest.mark.parametrize(
    ("text", "place", "found"),
    [
        ("a: 1\nb: [1\n", ":3", "not YAML"),
        ("- a\n- b\n", ":1", "found a sequence"),
        ("a: 1\n1: b\n", ":2", "'1' is not the name of a key"),
        ("a: 1\n? [x]\n: b\n", ":2", "a key that is a sequence"),
        ("a: !!python/object:os.system {}\n", ":1: a", "a value of the type !!python/object:os.system"),
        ("a: 1\nb: !!binary YWJj\n", ":2: b", "a value of the type !!binary"),
        ("a: 1\nb: !!int abc\n", ":2: b", "'abc' cannot be read as int"),
        ("a: 1\nb: !!bool maybe\n", ":2: b", "'maybe' cannot be read as bool"),
        ("a: 1\nb: " + "9" * 5000 + "\n", ":2: b", "'9999"),
        ('a: 1\nb: ["x\\ud800"]\n', ":2: b.0", "half of a surrogate pair at character 2"),
        ("a: 1\nb: " + "[" * 5000 + "\n", ":2", "nested too deeply"),
        ("a: 1\n---\nb: 2\n", ":2", "not YAML"),
        ("a: 1\nb: \x07\n", ":2", "a character that YAML does not allow"),
        ("a: &x [*x]\n", ":1", "aliases expand"),
    ],
)
def test_what_is_not_a_config_is_a_fault_with_its_line(write, text, place, found):
    path = write("a.yaml", text)
    (fault,) = read_document(path).faults
    assert fault.where == f"{path}{place}"
    assert fault.found.startswith(found)


def test_an_alias_bomb_is_refused_quickly(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (fault,) = read_document(write("a.yaml", "\n".join(lines))).faults
    assert "aliases expand" in fault.found


def test_a_bomb_of_merges_of_nothing_is_refused_quickly(write):
    lines = ["a0: &a0 {}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 10)]
    (fault,) = read_document(write("a.yaml", "\n".join(lines))).faults
    assert "aliases expand" in fault.found


def test_files_that_cannot_be_read(tmp_path, write):
    write("other.yaml", "a: 1")
    (fault,) = read_document(tmp_path / "absent.yaml").faults
    assert (fault.found, fault.fix) == ("there is no such file", f"{tmp_path} has other.yaml")
    (fault,) = read_document(tmp_path).faults
    assert fault.found.startswith("cannot be read")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    (fault,) = read_document(tmp_path / "latin.yaml").faults
    assert fault.found == "byte 4 is not UTF-8"


def test_an_empty_file_and_a_byte_order_mark_are_fine(write):
    assert read_document(write("a.yaml", "")).values == {}
    assert read_document(write("b.yaml", "\ufeffa: 1\n")).values == {"a": 1}


def test_dumped_text_reads_back_here_and_elsewhere(write):
    values = {"a": "1e5", "b": "no", "c": 1e-5, "d": None, "e": ["x", 1], "f": "é: #", "g": "010"}
    text = dump(values)
    assert read_document(write("a.yaml", text)).values == values
    assert pyyaml.safe_load(text) == values
