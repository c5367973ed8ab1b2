from __future__ import annotations

import json

import pytest

from rlhf_pipeline.disk.sealed import seal, unseal
from rlhf_pipeline.registry.manifest import build_manifest, parse_manifest
from tests.faults.flips import flips, trained


@pytest.fixture
def damaged(lab):
    return trained(lab)


def test_every_flipped_bit_and_every_cut_is_seen_and_the_file_named(damaged) -> None:
    found = flips(150, 0, damaged, percents=(0, 50, 99))
    assert found["ok"], found
    assert found["files"] >= 15 and found["cuts"] == 3 * found["files"]


def test_every_bit_of_a_manifest_counts() -> None:
    files = {"model.safetensors": {"size": 3, "sha256": "a" * 64}}
    made = build_manifest(name="demo", version=1, stage="sft", files=files, config={"beta": 1e-05, "word": "\x1b é"})
    content = made.to_json().encode()
    assert parse_manifest(content.decode(), "here").digest == made.digest
    for position in range(8 * len(content)):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        try:
            unseal(changed.decode())
        except ValueError:  # UnicodeDecodeError is one
            continue
        raise AssertionError(f"bit {position}: {bytes(changed[position // 8 - 20 : position // 8 + 20])!r}")


def test_a_seal_is_not_confused_by_what_it_seals() -> None:
    fields = {"text": '"manifest_sha256": "' + "0" * 64 + '"', "nested": {"manifest_sha256": "0" * 64}}
    text = seal(fields)
    assert {key: unseal(text)[key] for key in fields} == fields
    with pytest.raises(ValueError, match="its text was changed"):
        unseal(text.replace("nested", "Nested"))
    for absent in ("format", "manifest_sha256"):
        with pytest.raises(ValueError, match="its text was changed"):
            unseal(json.dumps({key: value for key, value in unseal(text).items() if key != absent}))
