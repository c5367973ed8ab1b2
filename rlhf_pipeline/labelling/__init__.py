"""Preferences from people: the page, its storage, the quality of the labels, the arena."""
