"""What is installed here: name, version and licence of every distribution, as its own metadata says. `make licences`."""

from __future__ import annotations

import importlib.metadata
import sys


def licence(metadata: importlib.metadata.PackageMetadata) -> str:
    """The SPDX expression, else the classifiers, else the first line of the free text."""
    expression = metadata.get("License-Expression")
    if expression:
        return expression
    names = [
        text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier") or () if text.startswith("License ::")
    ]
    free = (metadata.get("License") or "").strip().splitlines()
    return "; ".join(dict.fromkeys(names)) or (free[0][:60] if free else "not said")


def main() -> int:
    rows = {
        (found.metadata["Name"], found.version): licence(found.metadata) for found in importlib.metadata.distributions()
    }
    for (name, version), text in sorted(rows.items(), key=lambda row: row[0][0].lower()):
        print(f"{name:<36} {version:<18} {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
