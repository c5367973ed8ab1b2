from __future__ import annotations

import hashlib

from rlhf_pipeline.registry.digests import (
    FileEntry,
    file_sha256,
    files_digest,
    folder_files,
    list_files,
    snapshot_files,
    snapshot_steps,
)

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


def test_file_sha256_is_the_published_vector(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == ABC


def test_files_digest_ignores_order_card_and_snapshots_but_not_names():
    a, b = FileEntry(size=3, sha256=ABC), FileEntry(size=0, sha256="0" * 64)
    expected = hashlib.sha256(f"a\0{ABC}\nb\0{'0' * 64}\n".encode()).hexdigest()
    assert files_digest({"b": b, "a": a}) == expected
    assert files_digest({"a": a, "b": b, "README.md": a, "snapshots/step-5/a": b}) == expected
    assert files_digest({"a": b, "b": a}) != expected


def test_snapshot_has_the_digest_of_its_own_files():
    entry = FileEntry(size=3, sha256=ABC)
    files = {"w": entry, "snapshots/step-5/w": entry, "snapshots/step-50/x": entry}
    assert snapshot_files(files, 5) == {"w": entry}
    assert snapshot_files(files, 7) == {}


def test_steps_of_snapshots_are_in_order_of_their_numbers():
    entry = FileEntry(size=3, sha256=ABC)
    paths = (
        "w",
        "snapshots/step-10/w",
        "snapshots/step-9/w",
        "snapshots/step-9/x",
        "snapshots/notes",
        "a/snapshots/step-1/w",
    )
    assert snapshot_steps(dict.fromkeys(paths, entry)) == [9, 10]
    assert snapshot_steps({"w": entry}) == []


def test_listing_leaves_out_manifest_hidden_files_and_what_trainers_leave(tmp_path):
    for path in ("config.json", "manifest.json", ".cache/x", "sub/w", "checkpoint-10/w", "runs/log"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("abc")
    assert set(list_files(tmp_path)) == {"config.json", "sub/w", "checkpoint-10/w", "runs/log"}
    assert set(folder_files(tmp_path)) == {"config.json", "sub/w"}
