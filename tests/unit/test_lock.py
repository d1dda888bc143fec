"""What `make setup` installs is what requirements.txt says, each file known by its hash."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"([A-Za-z0-9._-]+)(?:\[[a-z,]+\])?==([^\s;\\]+)")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Package → version of every line that pins one."""
    return {plain(match[1]): match[2] for match in map(PIN.match, text.splitlines()) if match}


def locked() -> dict[str, str]:
    """Package and version → its block of the lock."""
    blocks = re.split(r"\n(?=[A-Za-z0-9])", (ROOT / "requirements.lock").read_text().partition("\n")[2])
    return {"==".join((plain(match[1]), match[2])): block for block in blocks if (match := PIN.match(block))}


def test_the_lock_is_of_these_requirements_and_hashes_every_package() -> None:
    asked = pins((ROOT / "requirements.txt").read_text())
    blocks = locked()
    assert len(asked) > 40
    missing = {f"{name}=={version}" for name, version in asked.items()} - set(blocks)
    assert not missing, "run `make lock`"
    assert [name for name, block in blocks.items() if not re.search(r"--hash=sha256:[0-9a-f]{64}(\s|$)", block)] == []
