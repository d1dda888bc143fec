"""Sites that a set does without: what was removed from it (`_build/removed.json`), and a config's own list (`source.skip`).

Both act where a shard is made: the site is left out of *its* shard, nothing else moves, and the part names it under `skipped`.
So a shard that is made again after a removal has the bytes that the removal gave it.
"""

from __future__ import annotations

import functools
import json

from cluster import storage
from cluster.errors import RunFailure, UsageError
from data_prep.parts import PARTS, dump

REMOVED = "removed.json"
Removed = dict[str, dict[str, str]]  # shard → key → why; "": an addition may bring the site back, in a shard of its own


def read_removed(url: str) -> Removed:
    """What was removed from a set, shard by shard. Raises RunFailure for a damaged list: sites would come back unseen."""
    place = storage.join(url, PARTS, REMOVED)
    try:
        found = json.loads(storage.read_bytes(place))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise RunFailure(f"{place} is damaged ({error}): what was removed is not known; restore that file") from None
    return {name: dict(keys) for name, keys in found.items()}


def write_removed(url: str, removed: Removed) -> None:
    content = {name: dict(sorted(keys.items())) for name, keys in sorted(removed.items())}
    storage.write_atomic(storage.join(url, PARTS, REMOVED), dump(content, indent=1))


@functools.lru_cache(maxsize=4)
def skipped_keys(url: str) -> frozenset[str]:
    """Keys of a skip list: a text file, one key per line, `#` begins a comment. Raises UsageError for one that cannot be read."""
    if not url:
        return frozenset()
    try:
        lines = storage.read_bytes(url).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"source.skip: {url} cannot be read: {error}") from None
    return frozenset(key for line in lines if (key := line.partition("#")[0].strip()))
