"""`python -m tests.golden`: writes every golden file anew and says what changed."""

from __future__ import annotations

from tests.golden import CASES, read, write

for name in CASES:
    try:
        before = read(name)["steps"][-1]["loss"]
    except FileNotFoundError:
        before = None
    write(name)
    print(f"{name}: last loss {before} -> {read(name)['steps'][-1]['loss']}")
