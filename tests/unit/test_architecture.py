"""ARCHITECTURE.md against the tree: every module is named, and every file that is named is there."""

from __future__ import annotations

import re
from pathlib import PurePath

from tests.data_folder import REPOSITORY

BOXES = ("cluster", "data_prep", "model", "pipeline")
OF_RUNS = {
    "catalog.parquet",
    "index.parquet",
    "manifest.json",
    "resolved.json",
}  # what a run or a set holds, not the tree
TEXT = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8")
TREE = {
    path.relative_to(REPOSITORY).as_posix()
    for box in (*BOXES, "tests")
    for path in (REPOSITORY / box).rglob("*")
    if path.suffix in (".py", ".yaml", ".js", ".json") and "__pycache__" not in path.parts
} | {path.name for path in REPOSITORY.iterdir() if path.is_file()}


def expanded(text: str) -> list[str]:
    """`data_prep/{grow,held}.py` → data_prep/grow.py, data_prep/held.py."""
    if (found := re.search(r"{([^{}]*)}", text)) is None:
        return [text]
    return [one for part in found[1].split(",") for one in expanded(text[: found.start()] + part + text[found.end() :])]


def named() -> list[str]:
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    return [word for quoted in re.findall(r"`([^`]+)`", prose) for part in quoted.split() for word in expanded(part)]


def test_files_that_are_named_are_there() -> None:
    files = {word for word in named() if re.fullmatch(r"[\w/.-]*\w\.(py|yaml|js|json|parquet)", word)} - OF_RUNS
    assert len(files) > 100
    files = {word for word in files if not word.startswith("_build/")}  # of a set
    assert sorted(word for word in files if not any(f"/{path}".endswith(f"/{word}") for path in TREE)) == []


def test_every_module_is_named() -> None:
    """By its file, or as a word of the part of the text where its folder's modules stand."""
    words = {word.removesuffix(".py") for word in named()} | set(re.findall(r"[a-z_0-9]+", TEXT))
    modules = [path for path in TREE if path.startswith(BOXES) and path.endswith(".py")]
    assert len(modules) > 300
    missing = [path for path in modules if not {"__init__", "__main__", *words} & {PurePath(path).stem}]
    assert sorted(missing) == []
