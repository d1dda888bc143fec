"""What an output is doing: shards done, in the making and missing, rate, time left, the worst faults. Lists and reads parts only."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from cluster.errors import UsageError
from data_prep import parts, planfile
from data_prep.shards import MANIFEST

RUNNING_S = 900.0  # a temporary file that has not grown for longer was left by a killed builder


@dataclass
class Status:
    """Attributes:
    state: "finished" (a manifest over all shards), "closed without N shards", "unmerged" or "building".
    running: shards with a tar in the making (seen on file systems only; object stores show nothing of it).
    rate: sites per second since the first part, over the time in which parts appeared; None with fewer than two.
    faults: (what is wrong, how often), the most frequent first.
    """

    state: str
    shards: int
    done: int
    running: list[str]
    sites: int
    sites_done: int
    faulty: int
    slices: int
    slices_done: int
    rate: float | None
    left_s: float | None
    faults: list[tuple[str, int]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def status(url: str, now: float | None = None) -> Status:
    """State of a set in the making, or finished. Raises UsageError if no build of this version has begun there."""
    plan = planfile.read_plan(url)
    if plan is None:
        raise UsageError(
            f"{url} holds no build (no _build/{planfile.PLAN} with slices); begin one with python -m data_prep build"
        )
    state = parts.State.look(url, plan.fingerprints)
    bundles = parts.gather(url, plan.names, plan.fingerprints)
    done = {part["shard"]: part for bundle in bundles for part in bundle.parts}
    faults = [fault for part in done.values() for fault in part["faults"]]
    kinds = Counter(kind_of(fault["why"]) for fault in faults)
    sizes = {name: count for piece in plan.slices for name, count in zip(piece.names, piece.sites)}
    sites_done = sum(sizes[name] for name in done)
    rate, left = _pace(url, [name for bundle in bundles for name in (bundle.name,)], sites_done, plan.num_sites)
    return Status(
        state=_state(url, len(done), len(sizes)), shards=len(sizes), done=len(done), running=_running(url, done, now or time.time()),
        sites=plan.num_sites, sites_done=sites_done, faulty=len(faults) + len(plan.faults), slices=len(plan.slices),
        slices_done=sum(state.is_complete(n, piece.names) for n, piece in enumerate(plan.slices)), rate=rate, left_s=left,
        faults=kinds.most_common(5),
    )  # fmt: skip


def _state(url: str, done: int, shards: int) -> str:
    if not storage.exists(storage.join(url, MANIFEST)):
        return "unmerged" if done == shards else "building"
    return "finished" if done == shards else f"closed without {shards - done} shards"


def kind_of(why: str) -> str:
    """A fault without what is particular to one site: numbers."""
    return "".join("#" if letter.isdigit() else letter for letter in why)[:100]


def _running(url: str, done: dict[str, Any], now: float) -> list[str]:
    fs, path = storage.filesystem(url)
    found = []
    for entry in fs.ls(path, detail=True):
        name = entry["name"].rsplit("/", 1)[-1]
        shard = storage.TEMPORARY.sub("", name)
        if shard != name and shard.endswith(".tar") and shard not in done and now - entry.get("mtime", now) < RUNNING_S:
            found.append(shard)
    return sorted(set(found))


def _pace(url: str, names: list[str], sites_done: int, sites: int) -> tuple[float | None, float | None]:
    """(sites per second, seconds left) from the times of the parts; None where they cannot tell."""
    fs, path = storage.filesystem(storage.join(url, parts.PARTS))
    wanted = {f"{name.removesuffix('.tar')}.json" for name in names}
    times = []
    for entry in fs.ls(path, detail=True):
        if entry["name"].rsplit("/", 1)[-1] in wanted:
            moment = entry.get("mtime") or entry.get("LastModified")
            if moment is not None:
                times.append(moment.timestamp() if hasattr(moment, "timestamp") else float(moment))
    if len(times) < 2 or max(times) <= min(times):
        return None, None
    rate = (
        sites_done * (len(times) - 1) / len(times) / (max(times) - min(times))
    )  # the first part's sites came before the clock
    return rate, (sites - sites_done) / rate
