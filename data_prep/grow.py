"""`data_prep append`: new sites into a set that stands. Old shards and splits stay as they are, byte for byte.

The plan gets an addition: slices of its own, whose shards take the next free numbers of their split. So whatever works on a plan works on
it: array tasks, executors, `status`, a second run that continues. The merge then makes one index over old and new.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster import storage
from cluster.errors import UsageError
from data_prep import parts, planfile, planslices
from data_prep.build import Outcome, build_plan
from data_prep.config import BuildConfig
from data_prep.executors import Executor
from data_prep.held import Held
from data_prep.merge import shaping_config
from data_prep.parts import PARTS, State
from data_prep.plan import make_plan, read_catalogs
from data_prep.planfile import Addition, StoredPlan
from data_prep.removed import read_removed
from data_prep.shards import ShardSet


def append(config: BuildConfig, task: int = 0, tasks: int = 1, executor: Executor | None = None) -> Outcome:
    """Builds what the config's catalogs (or prepared plan) have and the set at `output.url` has not, into new shards of it.

    The same config again continues what was begun, or finds it done. Sites that the set holds are left as they are, sites that were
    removed from it stay out.

    Raises:
        UsageError: no finished set there, one made with other settings, another addition that is not finished.
        RunFailure: as `build.build`.
    """
    if not config.output.url:
        raise UsageError("output.url is empty; say which set grows: output.url=PATH or s3://BUCKET/PREFIX")
    return build_plan(config, _find_addition(config), task, tasks, False, executor)


def _find_addition(config: BuildConfig) -> StoredPlan:
    """The stored plan with this config's addition, which one task makes and the others wait for."""
    url, inputs = config.output.url, planfile.inputs_of(config)

    def standing() -> StoredPlan | None:
        held = planfile.read_plan(url)
        return held if held is not None and inputs and any(its.inputs == inputs for its in held.origins) else None

    plan = standing()
    if plan is not None:
        return plan
    if planfile.read_plan(url) is None:
        raise UsageError(
            f"{url} holds no set that can grow (no {PARTS}/{planfile.PLAN}); python -m data_prep build begins one"
        )
    with planfile.lease(url, stands=lambda: standing() is not None) as mine:
        plan = standing()
        if plan is None and mine:
            plan = _add(config, inputs)
    return plan or _find_addition(config)


def _add(config: BuildConfig, inputs: str) -> StoredPlan:
    url = config.output.url
    plan = planfile.read_plan(url)
    assert plan is not None
    _check_same(plan, config)
    base = plan
    if not _complete(url, plan):
        base = _without_last(plan)
        if not plan.added or not _complete(url, base):
            raise UsageError(f"{url} cannot grow now: it is not finished; run its build again, with its own config")
    removed = read_removed(url)
    held = Held.read(ShardSet.open(url), (key for keys in removed.values() for key, why in keys.items() if why))
    added, write = (_prepared if config.prepare.url else _listed)(config, base, held, inputs)
    if base is not plan and added.fingerprint != plan.last_fingerprint:
        raise UsageError(
            f"{url} cannot grow now: another addition is not finished. Run its append again, with its own config (kept in {PARTS}/"
            f"{planfile.PLAN}), or drop what was begun: python -m data_prep remove {url} --unfinished"
        )
    if not added.slices:
        return plan  # nothing new: the set stays what it is
    origin = Addition(added.fingerprint, len(added.slices), added.prepared, inputs, len(added.faults))
    grown = dataclasses.replace(
        base, slices=(*base.slices, *added.slices), added=(*base.added, origin), faults=(*base.faults, *added.faults),
        report={**base.report, "appended": [*base.report.get("appended", []), added.report]},
    )  # fmt: skip
    write()
    storage.write_atomic(storage.join(url, PARTS, planfile.PLAN), planfile.plan_json(grown, config))
    return grown


def _complete(url: str, plan: StoredPlan) -> bool:
    return State.look(url, plan.fingerprints).complete([its.names for its in plan.slices])


def _without_last(plan: StoredPlan) -> StoredPlan:
    """The plan as it was before its last addition; itself if there is none."""
    if not plan.added:
        return plan
    last, report = plan.added[-1], {**plan.report, "appended": plan.report["appended"][:-1]}
    if not report["appended"]:
        del report["appended"]
    return dataclasses.replace(
        plan, slices=plan.slices[: -last.slices], added=plan.added[:-1], report=report, faults=plan.faults[: len(plan.faults) - last.faults]
    )  # fmt: skip


def _check_same(plan: StoredPlan, config: BuildConfig) -> None:
    """Raises UsageError where old and new samples would not be alike."""
    recorded = planfile.recorded_config(config.output.url)
    assert recorded is not None
    old, new = shaping_config(recorded), shaping_config(config)
    for one in (old, new):
        one["source"].pop("bbox")  # says which sites, not what they are
    differing = sorted(_differing(old, new))
    if differing:
        raise UsageError(
            f"{config.output.url} was built with other settings: {', '.join(differing[:6])} differ{'s' * (len(differing) == 1)}; take them "
            "over, or build a set of its own (data.url takes several)"
        )
    if bool(plan.prepared) != bool(config.prepare.url):
        kinds = ("a prepared plan", "catalogs")
        raise UsageError(
            f"{config.output.url} was built from {kinds[not plan.prepared]}, this config names {kinds[bool(plan.prepared)]}: their splits "
            "follow different rules; build a set of its own (data.url takes several)"
        )


def _differing(old: Any, new: Any, name: str = "") -> set[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = {*old, *new}
        return set().union(*(_differing(old.get(k), new.get(k), f"{name}.{k}".lstrip(".")) for k in keys))
    return set() if old == new else {name}


def _taken(plan: StoredPlan) -> Counter[str]:
    """The next free number of each split's shards."""
    taken: Counter[str] = Counter()
    for its in plan.slices:
        taken[its.split] = max(taken[its.split], its.first + len(its.sites))
    return taken


def _listed(config: BuildConfig, plan: StoredPlan, held: Held, inputs: str) -> tuple[StoredPlan, Any]:
    """The addition from catalogs, and what puts its sites in place."""
    records, unplaced = read_catalogs(config)
    whole = make_plan(records, config, unplaced, held)
    slices, groups = planfile.slices_of(whole, _taken(plan))
    mark = hashlib.sha256(f"{plan.last_fingerprint} {whole.fingerprint}".encode()).hexdigest()[:16]

    def write() -> None:
        for number, group in enumerate(groups):
            planslices.write_records(planslices.records_folder(config.output.url, mark), number, group)

    return StoredPlan(tuple(slices), mark, whole.faults, whole.report, "", inputs), write


def _prepared(config: BuildConfig, plan: StoredPlan, held: Held, inputs: str) -> tuple[StoredPlan, Any]:
    """The addition from a prepared plan. Raises UsageError where its splits are not those of the set."""
    chosen: dict[int, list[str]] = {}
    left_out: dict[int, tuple[int, int]] = {}  # slices are read side by side: each has its own entry

    def choose(number: int, places: pa.Table) -> pa.Table:
        for cell, split in zip(places["cell"].to_pylist(), places["split"].to_pylist()):
            if held.cells.get(cell, split) != split:
                raise UsageError(
                    f"{config.prepare.url}: ground cell {cell} is {split} there and {held.cells[cell]} in the set: lay the sites with the "
                    "set's own split.* settings"
                )
        keys = places["key"].to_pylist()
        there = held.has(keys)
        out = pc.is_in(places["key"], pa.array(sorted(held.removed), pa.string())).to_numpy(zero_copy_only=False)
        left_out[number] = int(there.sum()), int((out & ~there).sum())
        keep = ~(there | out)
        chosen[number] = [key for key, its in zip(keys, keep) if its]
        return places.filter(pa.array(keep))

    try:
        found = planfile.plan_prepared(config, inputs, choose, _taken(plan))
    except planfile.NothingToBuild:
        found = StoredPlan((), "", (), {}, config.prepare.url, inputs)
    digest = hashlib.sha256(f"{plan.last_fingerprint} {found.fingerprint}\n".encode())
    for number in sorted(chosen):
        digest.update(" ".join(chosen[number]).encode() + b"\n")
    mark = digest.hexdigest()[:16]

    def write() -> None:
        folder = planslices.records_folder(config.output.url, mark)
        for number in sorted({its.source for its in found.slices}):
            planslices.write_chosen(folder, number, chosen[number])

    counts = {name: sum(its[i] for its in left_out.values()) for i, name in enumerate(("held", "removed"))}
    planned = {"planned": found.num_sites, **found.report.get("sites", {}), **counts}
    report = {**found.report, "sites": planned}
    return dataclasses.replace(found, fingerprint=mark, report=report), write


def drop_unfinished(url: str, dry_run: bool = False) -> list[str]:
    """Drops an addition that is not finished: its plan, and what was made of it. Returns the names of its shards.

    dry_run: only says which.

    Raises UsageError if there is none.
    """
    plan = planfile.read_plan(url)
    if plan is None or not plan.added:
        raise UsageError(f"{url} has no addition to drop")
    state, last = State.look(url, plan.fingerprints), plan.added[-1]
    numbers = range(len(plan.slices) - last.slices, len(plan.slices))
    if all(state.is_complete(number, plan.slices[number].names) for number in numbers):
        raise UsageError(f"{url}: its last addition is finished; remove its sites by key, area or product")
    place = storage.join(url, PARTS, planfile.PLAN)
    config = planfile.recorded_config(url)
    assert config is not None
    names = [name for number in numbers for name in plan.slices[number].names]
    if dry_run:
        return names
    rest = _without_last(plan)
    storage.write_atomic(place, planfile.plan_json(rest, config))
    for number in numbers:
        parts.unroll(url, number)
    for name in names:
        for suffix in parts.SUFFIXES:
            storage.remove(parts.part_url(url, name, suffix))
        storage.remove(storage.join(url, name))
    storage.remove(planslices.records_folder(url, last.fingerprint), recursive=True)
    return names
