from __future__ import annotations

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


def test_fields_of_a_newer_release_are_passed_over():
    text = json.dumps({**json.loads(manifest().to_json()), "signature": {"by": "x"}})
    assert parse_manifest(text, "here") == manifest()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": "1"}, "version"),
        ({"version": 0}, "version"),
        ({"name": None}, "name"),
        ({"files": {"../x": FILES["model.safetensors"]}}, "not a path within the version"),
        ({"files": {"/x": FILES["model.safetensors"]}}, "not a path within the version"),
        ({"files": {"x": {"size": 3, "sha256": "A"}}}, "files.x.sha256"),
    ],
)
def test_wrong_fields_are_named(change, named):
    text = json.dumps({**json.loads(manifest().to_json()), **change})
    with pytest.raises(DamagedFile, match=named):
        parse_manifest(text, "here")


@pytest.mark.parametrize("text", ["", "[]", '{"name": ', '{"version": NaN}'])
def test_text_that_is_no_manifest_is_damaged(text):
    with pytest.raises(DamagedFile, match="here: not a valid manifest"):
        parse_manifest(text, "here")


def test_missing_or_binary_file_is_damaged(tmp_path):
    with pytest.raises(DamagedFile, match="missing"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DamagedFile, match="not UTF-8"):
        read_manifest(tmp_path)
