"""Real servers that integration tests start: without one a test skips and says how to get it, or fails in CI."""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType

import pytest


def require(condition: object, what: str, how: str = "make system-deps") -> None:
    """Skips unless `condition`; with GEOLOOM_REQUIRE_ALL=1 fails instead."""
    if condition:
        return
    message = f"{what} is not installed; get it with: {how}"
    if os.environ.get("GEOLOOM_REQUIRE_ALL") == "1":
        pytest.fail(message)
    pytest.skip(message)


def require_module(name: str, how: str = "make references") -> ModuleType:
    """The module, for a whole test file or one test; `require` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        message = f"{name} is not installed; get it with: {how}"
        if os.environ.get("GEOLOOM_REQUIRE_ALL") == "1":
            pytest.fail(message)
        pytest.skip(message, allow_module_level=True)


def require_program(*names: str) -> None:
    """`require` for programs on PATH."""
    for name in names:
        require(shutil.which(name), name)
