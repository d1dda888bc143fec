"""Builds the installed package `geoloom`: the reader of exported backbones, and of our boxes only the modules that it imports.

The boxes are called cluster, data_prep and model in a checkout: names nobody may take in somebody else's environment. They are installed
as `geoloom.cluster` and so on, their imports rewritten; `model/installed.py` becomes the package's own `__init__.py`. What is needed is
found by reading the imports, from there on.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
FRONT = "model.installed"  # what `import geoloom` gives
BOXES = ("cluster", "data_prep", "model")
IMPORT = re.compile(rf"^(\s*from )((?:{'|'.join(BOXES)})(?:\.\w+)* import )", re.MULTILINE)


def modules_needed(start: str = FRONT) -> list[str]:
    """`start` and our modules that it imports, directly or not, packages included, sorted."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in found or not (path := source_of(name)).exists():
            continue
        found.add(name)
        if "." in name:
            waiting.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in BOXES:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return sorted(found)


def source_of(name: str) -> Path:
    """File of a module or package."""
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def rewritten(text: str) -> str:
    """`from cluster.config import …` → `from geoloom.cluster.config import …`."""
    return IMPORT.sub(r"\1geoloom.\2", text)


class BuildReader(build_py):
    """Builds the rewritten modules, and no folder as it lies."""

    def run(self) -> None:
        for name in modules_needed():
            place = "__init__.py" if name == FRONT else source_of(name).relative_to(ROOT)
            target = Path(self.build_lib, "geoloom", place)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(rewritten(source_of(name).read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildReader})
