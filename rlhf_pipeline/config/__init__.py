"""Configs: strict, frozen, and fully checked before any heavy import."""
