"""Models and collected data by name and version: manifests, aliases, lineage, integrity."""

from rlhf_pipeline.registry.integrity import verify_files
from rlhf_pipeline.registry.manifest import DataEntry, Manifest, Parent
from rlhf_pipeline.registry.references import Reference, Resolved, Version, parse_reference
from rlhf_pipeline.registry.roles import check_role
from rlhf_pipeline.registry.store import RECORDS, Registry

__all__ = [
    "RECORDS",
    "DataEntry",
    "Manifest",
    "Parent",
    "Reference",
    "Registry",
    "Resolved",
    "Version",
    "check_role",
    "parse_reference",
    "verify_files",
]
