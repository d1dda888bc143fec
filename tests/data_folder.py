"""Real imagery for tests: `GEOLOOM_DATA`, or `../shared/data` beside the checkout. Never part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def real_data(subfolder: str = "") -> Path:
    """The folder of real imagery, or a skip that says how to get it."""
    root = Path(os.environ.get("GEOLOOM_DATA", REPOSITORY.parent / "shared" / "data"))
    folder = root / subfolder
    if not folder.is_dir():
        pytest.skip(f"real imagery not found at {folder}: set GEOLOOM_DATA to a folder that holds {subfolder or 'it'}")
    return folder
