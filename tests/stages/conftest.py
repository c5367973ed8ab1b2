"""Reward functions by name, and the log of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], str]:
    """Make a function importable, and return the name `module:function` that a config gives it."""

    def register(body: Callable) -> str:
        module = ModuleType("judges_of_a_test")
        module.judge = body
        monkeypatch.setitem(sys.modules, "judges_of_a_test", module)
        return "judges_of_a_test:judge"

    return register
