from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_pipeline.errors import UnknownReference
from rlhf_pipeline.registry.references import Reference, Resolved, Version, parse_reference


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sft", {"name": "sft"}),
        ("sft@v12", {"name": "sft", "version": 12}),
        ("sft@best", {"name": "sft", "alias": "best"}),
        ("sft@vega", {"name": "sft", "alias": "vega"}),
        ("sft@v2#100", {"name": "sft", "version": 2, "step": 100}),
        ("a.b-c_D9", {"name": "a.b-c_D9"}),
        ("org/name", {"hub_id": "org/name"}),
        ("org/name@refs/pr/1", {"hub_id": "org/name", "revision": "refs/pr/1"}),
        ("./sft", {}),
        ("/a/b", {}),
        ("a/b/c", {}),
        ("-sft", {}),
        ("x" * 65, {}),
        ("sft@", {}),
        ("sft#x", {}),
    ],
)
def test_readings(text, expected):
    assert parse_reference(text) == Reference(text, **expected)


def test_spaces_around_are_dropped_and_nothing_is_refused():
    assert parse_reference(" sft ") == Reference("sft", name="sft")
    with pytest.raises(UnknownReference, match="empty"):
        parse_reference("  ")


def test_labels_and_locations():
    folder = Path("/x/models/sft/v2/snapshots/step-10")
    snapshot = Version("registry", "sft@v2#10", folder, "sft", 2, 10)
    assert (snapshot.label, snapshot.location) == ("sft@v2#10", str(folder))
    hub = Resolved("hub", "org/name@main", None, "org/name", revision="main")
    assert (hub.label, hub.location, hub.digest) == ("org/name@main", "org/name", None)
    assert hub.taken == "'org/name@main' is the hub's org/name@main"


@pytest.mark.parametrize("text", ["~\ud800", "a\ud800b"])
def test_half_a_surrogate_pair_is_no_reference(text, tmp_path):
    from rlhf_pipeline.registry.store import Registry

    with pytest.raises(UnknownReference, match="surrogate"):
        Registry(tmp_path).resolve(text)
