"""Models and collected data by name and version: manifests, aliases, lineage, integrity."""
