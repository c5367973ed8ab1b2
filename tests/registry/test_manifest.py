from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from rlhf_pipeline.errors import DamagedFile
from rlhf_pipeline.registry.manifest import build_manifest, parse_manifest, plain, read_manifest

FILES = {"model.safetensors": {"size": 3, "sha256": "a" * 64}}


def manifest(**fields):
    return build_manifest(**{"name": "sft", "version": 1, "stage": "sft", "files": FILES, **fields})


def test_round_trip_keeps_every_field():
    made = manifest(
        parents={"policy": {"ref": "base@v2", "digest": "d"}, "hub": {"ref": "org/name", "digest": None}},
        config={"learning_rate": 1e-5, "nested": {"a": [1, "é"]}},
        data=[
            {
                "source": "x.jsonl",
                "split": "train",
                "digest": "d",
                "rows": 5,
                "dropped": {"null": 1},
                "kept": 4,
            }
        ],
        seed=3,
        metrics={"loss": 0.5},
        cost={"wall_seconds": 1.5, "flops": 10**18},
    )
    assert parse_manifest(made.to_json(), "here") == made
    assert json.loads(made.to_json())["data"][0]["kept"] == 4


def test_values_become_strict_json():
    assert plain({1: (float("nan"), np.float32(0.5), np.arange(2)), "inf": float("inf"), "s": {"b", "a"}}) == {
        "1": [None, 0.5, [0, 1]],
        "inf": None,
        "s": ["a", "b"],
    }
    assert json.loads(manifest(metrics={"loss": float("nan")}).to_json())["metrics"] == {"loss": None}


def unsealed(**changes):
    """The text of a manifest as it was before manifests had a digest of their own, with changes."""
    fields = json.loads(manifest().to_json())
    assert fields.pop("format") == 2 and len(fields.pop("manifest_sha256")) == 64
    return json.dumps({**fields, **changes})


def test_a_manifest_without_a_digest_of_its_own_is_read():
    assert parse_manifest(unsealed(), "here") == manifest()


def test_the_digest_is_that_of_the_text_with_zeros_in_its_place():
    text = manifest(config={"word": "é"}).to_json()
    found = json.loads(text)["manifest_sha256"]
    assert text.count(found) == 1
    assert hashlib.sha256(text.replace(found, "0" * 64).encode()).hexdigest() == found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"seed": 3', '"seed": 2'),
        ('"format"', '"formau"'),
        ('"manifest_sha256"', '"manifest_sha257"'),
        ('"format": 2', '"format": 3'),
        ('"seed": 3,\n', '"seed": 3, \n'),
        ("1e-05", "1E-05"),
    ],
)
def test_any_change_of_the_text_is_seen(old, new):
    text = manifest(seed=3, config={"learning_rate": 1e-5}).to_json()
    assert text.count(old) == 1
    with pytest.raises(DamagedFile, match="its text was changed"):
        parse_manifest(text.replace(old, new), "here")


def test_fields_of_a_newer_release_are_passed_over():
    text = unsealed(signature={"by": "x"})
    assert parse_manifest(text, "here") == manifest()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": "1"}, "version"),
        ({"version": 0}, "version"),
        ({"name": None}, "name"),
        ({"files": {"../x": FILES["model.safetensors"]}}, "not a path within the version"),
        ({"files": {"x\0y": FILES["model.safetensors"]}}, "not a path within the version"),
        ({"files": {"a//b": FILES["model.safetensors"]}}, "not a path within the version"),
        ({"files": {"a\\..\\b": FILES["model.safetensors"]}}, "not a path within the version"),
        ({"files": {"/x": FILES["model.safetensors"]}}, "not a path within the version"),
        ({"files": {"x": {"size": 3, "sha256": "A"}}}, "files.x.sha256"),
    ],
)
def test_wrong_fields_are_named(change, named):
    with pytest.raises(DamagedFile, match=named):
        parse_manifest(unsealed(**change), "here")


@pytest.mark.parametrize("text", ["", "[]", '{"name": ', '{"version": NaN}', "[" * 100_000])
def test_text_that_is_no_manifest_is_damaged(text):
    with pytest.raises(DamagedFile, match="here: not a valid manifest"):
        parse_manifest(text, "here")


def test_missing_or_binary_file_is_damaged(tmp_path):
    with pytest.raises(DamagedFile, match="missing"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DamagedFile, match="not UTF-8"):
        read_manifest(tmp_path)
