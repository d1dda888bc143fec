"""Names are shown literally: what looks like markup of the terminal library is part of a run's name."""

from __future__ import annotations

import re
from pathlib import Path

from tests.data_folder import REPOSITORY


def test_no_console_of_ours_interprets_markup() -> None:
    consoles = [
        (path.name, match[0])
        for box in ("cluster", "data_prep", "model", "pipeline") for path in Path(REPOSITORY, box).rglob("*.py")
        for match in re.finditer(r"Console\([^)]*\)", path.read_text())
    ]  # fmt: skip
    assert len(consoles) >= 3
    assert [entry for entry in consoles if "markup=False" not in entry[1] or "emoji=False" not in entry[1]] == []
