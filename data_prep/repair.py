"""Mending a shard set from its intact tars; see `data_prep.verify` for what is promised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from cluster import config as settings
from cluster import storage
from cluster.errors import RunFailure, UsageError
from data_prep import merge, parts, planfile
from data_prep.codec import MemberError
from data_prep.config import SPLITS, BuildConfig
from data_prep.index import row_of
from data_prep.sample import decode_members, load_json
from data_prep.shards import FAULTS, MANIFEST, ShardWriter, cloud_share, count_radiometry, losses_of
from data_prep.tar import samples
from data_prep.verify import HashingReader

QUARANTINE = "quarantine"
LOST_PLAN = "unknown"


def repair(url: str, say: Callable[[str], None]) -> list[str]:
    """Makes parts, index and manifest agree with the intact tars; returns the names of shards that are not intact.

    Raises RunFailure if nothing intact is left.
    """
    old = _json(url, MANIFEST)
    plan = _json(url, f"{merge.PARTS}/{planfile.PLAN}")
    listed = {shard["name"]: shard for shard in old.get("shards", []) if isinstance(shard, dict) and "name" in shard}
    tars = [name for name in storage.list_names(url) if name.endswith(".tar")]
    names = list(dict.fromkeys([*plan.get("shards", []), *listed])) or list(tars)
    for name in tars:
        if name not in names:  # no record names it: it may repeat samples of others
            _quarantine(url, name)
            say(f"{name}: belongs to no plan or manifest, moved to {merge.PARTS}/{QUARANTINE}")
    names.sort(key=lambda name: (_split_of(name), name))
    fingerprint = plan.get("plan") or old.get("plan") or LOST_PLAN
    config = _config(plan, old)
    stored = planfile.read_plan(url)
    marks = {} if stored is None else stored.marks
    rolled = _sound_slices(url, say)
    intact, lost = [], []
    for name in names:
        if name in rolled:
            intact.append(name)
            continue
        part = merge.read_part(url, name)
        if part is not None and part["samples"] == 0:
            intact.append(name)
            continue
        why = _mend_shard(url, name, part, listed.get(name), old, config, marks.get(name, fingerprint), say)
        if why is None:
            intact.append(name)
        else:
            lost.append(name)
            say(f"{name}: {why}")
            storage.remove(merge.part_url(url, name, "json"))
    if not intact:
        raise RunFailure(f"{url}: no intact shard is left; build it again")
    if not plan:
        _restore_plan(url, names, fingerprint, config, old)
    extra = plan.get("report") or {key: old[key] for key in ("sites", "splits") if key in old}
    missing = {"missing": lost} if lost else {}
    last, accepted = (fingerprint, None) if stored is None else (stored.last_fingerprint, stored.fingerprints)
    merge.merge_parts(url, intact, config, last, {**extra, **missing}, plan.get("faults", ()), accepted=accepted)
    say(f"index and manifest made again from {len(intact)} intact shards")
    return lost


def _sound_slices(url: str, say: Callable[[str], None]) -> set[str]:
    """Shards of rolled-up slices of which nothing is wrong. Any other slice becomes its shards' own parts again, to be mended
    one by one."""
    sound: set[str] = set()
    for entry in storage.list_names(storage.join(url, merge.PARTS)):
        if not entry.startswith("slice-") or not entry.endswith(".json"):
            continue
        number = int(entry[6:12])
        found = parts.read_slice(url, number)
        if found is not None and all(
            _stands(url, parts.slice_name(number), found, kind) for kind in ("index", "stats")
        ):
            tars = {part["shard"]: part["sha256"] for part in found["parts"] if part["samples"]}
            if all(
                storage.exists(storage.join(url, name)) and _sha256(storage.join(url, name)) == own
                for name, own in tars.items()
            ):
                sound |= {part["shard"] for part in found["parts"]}
                continue
        say(f"{entry}: its shards are mended one by one")
        for part in found["parts"] if found is not None else ():
            storage.write_atomic(parts.part_url(url, part["shard"], "json"), parts.dump(part))
        parts.unroll(url, number)
    return sound


def _mend_shard(
    url: str, name: str, part: dict[str, Any] | None, listed: dict[str, Any] | None, old: dict[str, Any], config: BuildConfig,
    fingerprint: str, say: Callable[[str], None],
) -> str | None:  # fmt: skip
    """None if the shard is intact and its parts stand (again); else what is wrong, with the tar in quarantine."""
    if not storage.exists(storage.join(url, name)):
        return "is missing; build makes it again"
    known = part or listed
    found = _sha256(storage.join(url, name))
    if known is not None and known["sha256"] != found:
        _quarantine(url, name)
        return (
            f"is damaged (sha256 {found[:12]}…, committed {known['sha256'][:12]}…), moved to {merge.PARTS}/{QUARANTINE}"
        )
    if (
        part is not None
        and part["plan"] == fingerprint
        and all(_stands(url, name, part, kind) for kind in ("index", "stats"))
    ):
        return None
    try:
        writer = rescan(url, name, config)
    except (MemberError, ValueError, KeyError, TypeError) as error:
        _quarantine(url, name)
        return f"is damaged ({error}), moved to {merge.PARTS}/{QUARANTINE}"
    classes = (part or {}).get("classes") or old.get("classes", {})
    labels = {name for row in writer.rows for name in row["scalars"]} | {
        r for row in writer.rows for r in row["rasters"]
    }
    writer.classes = {label: classes[label] for label in classes if label in labels}
    faults = part["faults"] if part is not None else _old_faults(url, name)
    merge.commit_shard(
        url, name, _split_name(name), writer, found, faults, fingerprint, (part or {}).get("skipped", ())
    )
    say(f"{name}: intact; its parts are made again")
    return None


def rescan(url: str, name: str, config: BuildConfig) -> ShardWriter:
    """A writer in the state it had after making this tar: rows, statistics, radiometry. Decodes every member.

    Raises codec.MemberError, ValueError, KeyError or TypeError for a tar that is not intact.
    """
    with storage.open_read(storage.join(url, name)) as stream:
        reading = HashingReader(stream)
        writer = ShardWriter(_Nowhere(), name, _split_name(name), config.codecs)
        for key, entries, data in samples(reading):
            site, split = decode_members(data.__getitem__, list(data))
            if site.key != key or split != _split_name(name):
                raise ValueError(f"{key}: its JSON says {site.key}, split {split}")
            info = load_json(data["json"])
            writer.rows.append(row_of(info, cloud_share(site), name, entries))
            writer.rows[-1]["scalars"] = list(site.scalars)
            writer.histograms.add(site)
            writer.losses += losses_of(info)
            count_radiometry(writer.radiometry, info)
        reading.drain()
    writer.bytes_written = reading.position
    return writer


class _Nowhere:
    """A stream that takes nothing: a rescan writes no tar."""

    def write(self, data: bytes) -> int:
        raise ValueError("a rescan writes nothing")


def _quarantine(url: str, name: str) -> None:
    fs, source = storage.filesystem(storage.join(url, name))
    _, target = storage.filesystem(storage.join(url, merge.PARTS, QUARANTINE, name))
    fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
    fs.mv(source, target)


def _stands(url: str, name: str, hashes: dict[str, Any], kind: str) -> bool:
    """Whether the index or stats table of a part is the one its JSON vouches for."""
    try:
        data = storage.read_bytes(merge.part_url(url, name, f"{kind}.parquet"))
    except FileNotFoundError:
        return False
    return hashlib.sha256(data).hexdigest() == hashes[f"{kind}_sha256"]


def _sha256(url: str) -> str:
    digest = hashlib.sha256()
    with storage.open_read(url) as stream:
        while block := stream.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def _json(url: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(storage.read_bytes(storage.join(url, name)))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _config(plan: dict[str, Any], manifest: dict[str, Any]) -> BuildConfig:
    """The config of the build, as far as a record of it is left."""
    for tree in (plan.get("config"), manifest.get("config")):
        if tree:
            try:
                return settings.from_dict(BuildConfig, tree, "recorded config")
            except UsageError:
                continue
    return BuildConfig()


def _restore_plan(url: str, names: list[str], fingerprint: str, config: BuildConfig, old: dict[str, Any]) -> None:
    content = {
        "plan": fingerprint, "shards": names, "report": {key: old[key] for key in ("sites", "splits") if key in old},
        "faults": [], "config": settings.to_dict(config),
    }  # fmt: skip
    storage.write_atomic(storage.join(url, merge.PARTS, planfile.PLAN), merge.dump(content))


def _old_faults(url: str, name: str) -> list[dict[str, Any]]:
    try:
        lines = storage.read_bytes(storage.join(url, FAULTS)).splitlines()
        return [fault for fault in map(json.loads, lines) if fault.get("shard") == name]
    except (OSError, ValueError):
        return []


def _split_name(name: str) -> str:
    return name.rpartition("-")[0]


def _split_of(name: str) -> int:
    split = _split_name(name)
    return SPLITS.index(split) if split in SPLITS else len(SPLITS)
