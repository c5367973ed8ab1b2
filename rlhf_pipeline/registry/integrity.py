"""Check files against their manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf_pipeline.errors import DamagedFile, Fault
from rlhf_pipeline.registry.digests import CARD, SNAPSHOTS, file_sha256, known_sha256, list_files
from rlhf_pipeline.registry.references import Resolved

Sha256 = Callable[[Path], str]

UNLISTED = "not in manifest.json"
_FIX = "restore it from a copy, or quarantine it with rlhf models verify --repair and create it again"


def verify_files(resolved: Resolved) -> None:
    """Check a model or data set before loading; without a manifest there is nothing to check.

    Raises:
        DamagedFile: a file is missing, changed, or not of this version.
    """
    # The card and the snapshots beside a model are not loaded.
    faults = list(_problems(resolved, known_sha256, skip=(CARD, f"{SNAPSHOTS}/")))
    if faults:
        raise DamagedFile("\n".join(str(fault) for fault in faults))


def problems(resolved: Resolved) -> list[Fault]:
    """Return all differences between a version's files and its manifest."""
    return list(_problems(resolved, file_sha256))


def _problems(resolved: Resolved, sha256: Sha256, skip: tuple[str, ...] = ()) -> Iterator[Fault]:
    if resolved.manifest is None or resolved.path is None:
        return
    fix = _FIX
    if resolved.kind == "directory":
        fix = "restore it, or delete manifest.json to use the folder as a plain model"
    ours = resolved.kind in ("registry", "data")  # folders in the hub's cache consist of links
    try:
        found = list_files(resolved.path, links=ours).items()
        present = {path: file for path, file in found if not path.startswith(skip)}
        listed = {path: entry for path, entry in resolved.files.items() if not path.startswith(skip)}
        for path, entry in sorted(listed.items()):
            where = f"{resolved.label}: {path}"
            file = present.pop(path, None)
            if file is None:
                yield Fault(where, "missing", f"{entry.size} bytes", fix)
            elif ours and file.is_symlink():
                yield Fault(where, "a symbolic link", "a regular file", fix)
            elif (size := file.stat().st_size) != entry.size:
                yield Fault(where, f"{size} bytes", f"{entry.size} bytes (manifest.json)", fix)
            elif (digest := sha256(file)) != entry.sha256:
                yield Fault(where, f"sha256 {digest}", f"sha256 {entry.sha256} (manifest.json)", fix)
        for path in present:
            # An unlisted file, such as an adapter's config, can change what is loaded.
            yield Fault(f"{resolved.label}: {path}", UNLISTED, "", "move it elsewhere")
    except FileNotFoundError as error:  # another process removed it meanwhile
        yield Fault(resolved.label, f"{error.filename} has just been removed", "", "look again")
