"""`data_prep remove`: sites out of a set. Only their shards are rewritten; the pixels that stay are copied, not made again.

    1. `_build/removed.json` says what goes from which shard: from now on every build of these shards leaves it out
    2. per slice of the plan: the new parts under `_build/next-…`, then in place, then the shards
    3. the merge, over all parts

After a kill at any moment the same command (or any `remove`) does what is missing. A shard without the removed sites has the bytes
that a build with the same sites under `source.skip` gives it. A run that reads the set meanwhile meets shards that are not its
manifest's any more, and stops.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import shapely

from cluster import storage
from cluster.errors import RunFailure, UsageError
from data_prep import index, parts, planfile
from data_prep.build import finish
from data_prep.codec import MemberError
from data_prep.commit import check_written, commit, storage_failure, temporary
from data_prep.config import BuildConfig
from data_prep.executors import Executor, run_units
from data_prep.parts import SUFFIXES, State, checked, dump, part_url, read_part, read_slice, slice_name, table_bytes
from data_prep.planfile import StoredPlan
from data_prep.removed import Removed, read_removed, write_removed
from data_prep.sample import decode_members
from data_prep.shards import ShardSet, ShardWriter
from data_prep.statistics import Histograms
from data_prep.tar import samples
from data_prep.verify import HashingReader

NEXT = "next-"


@dataclass(frozen=True)
class Wanted:
    """What is to go. keys: sites; ground: in degrees, every site that meets it; products: every site with an image of one of them.

    again: a later `append` may bring the sites back.
    """

    keys: frozenset[str] = frozenset()
    ground: shapely.Geometry | None = None
    products: frozenset[str] = frozenset()
    why: str = ""
    again: bool = False


def find(shardset: ShardSet, wanted: Wanted) -> Removed:
    """The sites to remove, by shard. Raises UsageError for a key or a product that the set does not have."""
    found: Removed = {}
    keys, products = set(wanted.keys), set(wanted.products)
    for batch in shardset.index_batches(["key", "shard", "bbox", "geometry", "product_ids"]):
        names = batch["key"].to_pylist()
        hit = {i for i, key in enumerate(names) if key in wanted.keys}
        if wanted.ground is not None:
            shapes = shapely.from_wkb(batch["geometry"].to_numpy(zero_copy_only=False))
            hit |= {int(i) for i in shapely.STRtree(shapes).query(wanted.ground, predicate="intersects")}
        if wanted.products:
            for i, its in enumerate(batch["product_ids"].to_pylist()):
                if own := wanted.products & set(its or ()):
                    hit.add(i)
                    products -= own
        keys -= set(names)
        for i in sorted(hit):
            found.setdefault(batch["shard"][i].as_py(), {})[names[i]] = "" if wanted.again else wanted.why or "removed"
    if keys or products:
        kind, missing = ("key", keys) if keys else ("product", products)
        known = {key for its in read_removed(shardset.url).values() for key in its}
        if missing - known or kind == "product":
            raise UsageError(
                f"{shardset.url} has no {kind} {sorted(missing - known or missing)[0]!r}; nothing was removed"
            )
    return found


def remove(
    url: str, wanted: Wanted, executor: Executor | None = None, on_slices: Callable[[int, int], None] = lambda n, all_: None
) -> tuple[Removed, dict[str, Any]]:  # fmt: skip
    """Takes sites out of a set; returns them by shard, and the new manifest. What an earlier removal left undone is done first.

    Raises:
        UsageError: no finished set, an unknown key or product.
        RunFailure: nothing would be left, a shard that cannot be read.
    """
    plan, config = planfile.read_plan(url), planfile.recorded_config(url)
    if plan is None or config is None:
        raise UsageError(f"{url} holds no set that can be changed (no {parts.PARTS}/{planfile.PLAN} with slices)")
    removed, executor = read_removed(url), executor or Executor(workers=config.workers)
    if _pending(url, plan, config, removed):
        _apply(url, plan, config, removed, executor, on_slices)
    shardset = ShardSet.open(url)
    found = find(shardset, wanted)
    if sum(map(len, found.values())) == shardset.num_samples:
        raise RunFailure(f"{url}: nothing would be left of it; remove the folder instead")
    for name, keys in found.items():
        removed[name] = removed.get(name, {}) | keys
    if found:
        write_removed(url, removed)
        return found, _apply(url, plan, config, removed, executor, on_slices)
    return found, shardset.manifest


@dataclass(frozen=True)
class Job:
    """Shards of one slice to rewrite; crosses to a worker process. shards: (name, every key that is to be out of it)."""

    url: str
    number: int
    config: BuildConfig
    shards: tuple[tuple[str, frozenset[str]], ...]


def _pending(url: str, plan: StoredPlan, config: BuildConfig, removed: Removed) -> list[Job]:
    """What is not yet as the list of removals says."""
    state, jobs = State.look(url, plan.fingerprints), []
    for number, piece in enumerate(plan.slices):
        listed = [name for name in piece.names if name in removed]
        if not listed:
            continue
        logged = any(f"{NEXT}{stem}.json" in state.names for stem in _stems(number, listed))
        todo = []
        for name in listed:
            part, keys = _part(url, number, name), frozenset(removed[name])
            if part is None:
                continue  # not made yet: the build leaves the sites out
            stands = state.sizes.get(name, 0) == part["bytes"]  # 0: without a sample there is no tar
            if logged or not stands or keys - set(part.get("skipped", ())):
                todo.append((name, keys))
        if todo:
            jobs.append(Job(url, number, config, tuple(todo)))
    return jobs


def _apply(
    url: str, plan: StoredPlan, config: BuildConfig, removed: Removed, executor: Executor, on_slices: Callable[[int, int], None]
) -> dict[str, Any]:  # fmt: skip
    jobs = _pending(url, plan, config, removed)
    names = [f"slice {job.number}" for job in jobs]
    for _ in run_units(rewrite, jobs, names, executor, lambda _: None):
        on_slices(1, len(jobs))
    return finish(config, plan)


def rewrite(job: Job, report: Callable[[Any], None]) -> int:
    """Rewrites the shards of a job; returns how many. Raises RunFailure for one that cannot be read or written."""
    url, number = job.url, job.number
    for stem in _stems(number, [name for name, _ in job.shards]):
        _promote(url, stem)
    for name, keys in job.shards:
        part = _part(url, number, name)
        assert part is not None
        try:
            with temporary(url, name, job.config.output.scratch) as local:
                kept = _copy(url, part, keys, local, job.config)
                if keys - set(part.get("skipped", ())):
                    _swap_parts(url, number, part, kept, keys)
                elif kept.sha256 != part["sha256"] and kept.writer.rows:
                    raise RunFailure(f"{url}/{name} is damaged: run python -m data_prep verify {url} --repair")
                if kept.writer.rows:
                    commit(local, storage.join(url, name))
                else:
                    storage.remove(storage.join(url, name))
        except OSError as error:
            raise storage_failure(url, error) from None
        report(1)
    return len(job.shards)


@dataclass(frozen=True)
class _Kept:
    """A shard without what goes: its writer and sha256, and the statistics of what went."""

    writer: ShardWriter
    sha256: str
    gone: Histograms
    left_out: list[str]


def _copy(url: str, part: dict[str, Any], keys: frozenset[str], local: str, config: BuildConfig) -> _Kept:
    """Copies the members of the samples that stay to a local tar. Raises RunFailure for a shard that is not what its part says."""
    name, gone, left_out = part["shard"], Histograms(), []
    try:
        with storage.open_read(storage.join(url, name)) as source, open(local, "wb") as stream:
            reading, writer = HashingReader(source), ShardWriter(stream, name, part["split"], config.codecs)
            for key, _, data in samples(reading):
                site, _ = decode_members(data.__getitem__, list(data))
                if key in keys:
                    gone.add(site)
                    left_out.append(key)
                else:
                    writer.add(site, list(data.items()))
            reading.drain()
            sha256, crc32c = writer.close()
            stream.flush()
            os.fsync(stream.fileno())
    except (MemberError, ValueError, KeyError, FileNotFoundError) as error:
        raise RunFailure(f"{url}/{name}: {error}: run python -m data_prep verify {url} --repair") from None
    if keys - set(part.get("skipped", ())) and reading.digest.hexdigest() != part["sha256"]:
        raise RunFailure(f"{url}/{name} is damaged: run python -m data_prep verify {url} --repair")
    check_written(local, crc32c)
    writer.classes = {label: names for label, names in part["classes"].items() if label in writer.labels}
    return _Kept(writer, sha256, gone, left_out)


def _swap_parts(url: str, number: int, part: dict[str, Any], kept: _Kept, keys: frozenset[str]) -> None:
    """The shard's new part, or its slice's, in place of the old: whole under other names first, so that a kill leaves one of both."""
    name, rows = part["shard"], index.table_of(kept.writer.rows)
    skipped = sorted({*part.get("skipped", ()), *keys})
    facts = parts.facts_of(name, part["split"], kept.writer, kept.sha256, part["faults"], part["plan"], skipped)
    entry = read_slice(url, number)
    stem = name if entry is None else slice_name(number)
    if entry is None:
        table, statistics, content = rows, kept.writer.histograms, facts
    else:
        held = index.read_parquet(checked(url, stem, entry, "index.parquet")).combine_chunks()
        statistics = Histograms.from_bytes(checked(url, stem, entry, "stats.parquet"))
        statistics.take_out(kept.gone)
        whole, pieces, start = [], [], 0
        for its in entry["parts"]:
            own, start = held.slice(start, its["samples"]), start + its["samples"]
            pieces.append(rows if its["shard"] == name else own)
            whole.append({**its, **facts} if its["shard"] == name else its)
        labels = index.schema(sorted({label for its in whole for label in its["labels"]}))
        table = pa.concat_tables([index.conform(its, labels, 0) for its in pieces])
        content = {**entry, "parts": whole}
    data = {"index.parquet": table_bytes(table), "stats.parquet": statistics.to_bytes()}
    hashes = {f"{suffix.partition('.')[0]}_sha256": hashlib.sha256(its).hexdigest() for suffix, its in data.items()}
    for suffix, its in data.items():
        storage.write_atomic(part_url(url, NEXT + stem, suffix), its)
    storage.write_atomic(part_url(url, NEXT + stem, "json"), dump({**content, **hashes}))
    _promote(url, stem)


def _promote(url: str, stem: str) -> None:
    """Puts a complete next part in place, also one that a killed removal left; an incomplete one is dropped."""
    if storage.exists(part_url(url, NEXT + stem, "json")):
        for suffix in reversed(SUFFIXES):  # the JSON last
            storage.write_atomic(part_url(url, stem, suffix), storage.read_bytes(part_url(url, NEXT + stem, suffix)))
    for suffix in SUFFIXES:  # the JSON first
        storage.remove(part_url(url, NEXT + stem, suffix))


def _part(url: str, number: int, name: str) -> dict[str, Any] | None:
    """A shard's part, its own or in its slice's."""
    entry = read_slice(url, number) or {"parts": []}
    return next((its for its in entry["parts"] if its["shard"] == name), None) or read_part(url, name)


def _stems(number: int, names: Sequence[str]) -> list[str]:
    return [slice_name(number), *(name.removesuffix(".tar") for name in names)]
