"""Which finding changed which shard: every data set of a folder, built by another checkout of this project and by this one, compared.

    python -m tests.between_versions ../before ../shared/data OUT

ends in one Markdown row per data set: equal bit for bit, refused by either (with its reason), or the members and the fields of the samples' JSON
that differ. The other checkout runs in the same interpreter. Layouts stand below; a folder that is not named is read in the layout that the other
checkout recognises.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sample import decode_members
from tests.data_folder import REPOSITORY

KNOWN = {
    "terramind": "terramind", "treesatai": "treesatai", "ssl4eo": "ssl4eo", "majortom": "majortom",
    "bigearthnet": "geotiff", "naip": "geotiff", "labelled/oscd": "geotiff",
}  # fmt: skip
ALSO = {"terramind": ("s2_l1c",), "ssl4eo": ("s2_l1c",), "labelled/oscd": ("s2_l1c",)}  # built only when asked for


def command(checkout: Path, *words: str) -> tuple[bool, str]:
    """Whether `python -m data_prep …` of a checkout went well, and its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", *words], cwd=checkout, capture_output=True, text=True, timeout=1800
    )
    text = done.stdout if done.returncode == 0 else done.stderr or done.stdout
    return done.returncode == 0, ([line for line in text.splitlines() if line.strip()] or [""])[-1]


def recognised(checkout: Path, source: Path) -> tuple[bool, str]:
    """The layout that a checkout takes a folder for; or why for none."""
    code = "import sys; from data_prep.catalog import detect_layout; print(detect_layout(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(source)], cwd=checkout, capture_output=True, text=True)
    text = (done.stdout if done.returncode == 0 else done.stderr).strip()
    return done.returncode == 0, text.splitlines()[-1]


def shards(checkout: Path, source: Path, layout: str, folder: Path, modalities: tuple[str, ...]) -> str:
    """Builds a folder's shards into `folder`; "" or why not."""
    if (folder / "manifest.json").exists():
        return ""
    catalog = folder.with_suffix(".parquet")
    ok, said = command(checkout, "catalog", str(source), str(catalog), "--layout", layout, "--max-faults", "1000")
    if not ok:
        return said
    asked = [f"source.modalities=[{','.join(modalities)}]"] if modalities else []
    ok, said = command(
        checkout, "build", "data_prep/runs/demo.yaml", f"source.catalog=[{catalog}]", f"output.url={folder}",
        "workers=1", "error_budget=1", "split.fractions={train: 1.0}", *asked,
    )  # fmt: skip
    return "" if ok else said


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """The members of every sample of a set, by key."""
    found: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                data = tar.extractfile(member)
                found[key][suffix] = data.read() if data else b""
    return dict(found)


def differing(old: Any, new: Any, name: str = "") -> list[str]:
    """Fields of two JSON trees that differ; of a list's entries only how many."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in sorted({*old, *new}) for line in differing(old.get(key), new.get(key), f"{name}.{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        fields = Counter(line.split(":")[0] for a, b in zip(old, new) for line in differing(a, b, name))
        return [f"{field}: {count} of {len(old)} entries" for field, count in fields.items()]
    if old == new:
        return []
    if isinstance(old, list) and isinstance(new, list):
        return [f"{name}: {len(old)} → {len(new)} entries"]
    if old is None or new is None:
        return [f"{name} {'added' if old is None else 'gone'}"]
    return [f"{name}: {_short(old)} → {_short(new)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def pixels(old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    """What differs between the arrays of two samples, after decoding."""
    sites = [decode_members(its.__getitem__, list(its))[0] for its in (old, new)]
    lines: list[str] = []
    for name in sorted({*sites[0].series, *sites[1].series}):
        a, b = (its.series.get(name) for its in sites)
        if a is None or b is None:
            lines.append(f"{name} {'added' if a is None else 'gone'}")
            continue
        if a.datetimes != b.datetimes:
            lines.append(f"{name}: {len(a.datetimes)} → {len(b.datetimes)} dates")
        both = sorted(set(a.datetimes) & set(b.datetimes))
        places = [[its.datetimes.index(date) for date in both] for its in (a, b)]
        for what in ("pixels_TCHW", "mask_THW"):
            x, y = (getattr(its, what)[own] for its, own in zip((a, b), places))
            if x.shape != y.shape or not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"):
                share = f"{(x != y).mean():.1%}" if x.shape == y.shape else f"{x.shape} → {y.shape}"
                lines.append(f"{name} {what.split('_')[0]} of common dates differ ({share})")
    return lines


def compare(old: Path, new: Path) -> str:
    tars = [{path.name: path.read_bytes() for path in folder.glob("*.tar")} for folder in (old, new)]
    if tars[0] == tars[1]:
        return f"equal bit for bit ({len(tars[0])} tars)"
    before, after = samples(old), samples(new)
    lines: Counter[str] = Counter()
    for key in {*before, *after}:
        if key not in before or key not in after:
            lines[f"samples {'added' if key in after else 'gone'}"] += 1
            continue
        a, b = before[key], after[key]
        if a == b:
            lines["samples equal"] += 1
            continue
        found = {re.sub(r"^\.", "json ", line) for line in differing(json.loads(a["json"]), json.loads(b["json"]))}
        if any(a.get(name) != b.get(name) for name in {*a, *b} - {"json"}):
            found |= set(pixels(a, b))
        lines.update(found)
    return f"of {len({*before, *after})} samples: " + "; ".join(f"{line} ({n})" for line, n in sorted(lines.items()))


def main(other: str, data: str, out: str) -> None:
    root, place = Path(data).resolve(), Path(out).resolve()
    place.mkdir(parents=True, exist_ok=True)
    folders = [its for its in sorted(root.iterdir()) if its.is_dir() and its.name != "labelled"]
    folders += [its for its in sorted((root / "labelled").glob("*")) if its.is_dir()]
    for source in folders:
        name = str(source.relative_to(root))
        known, layout = (True, KNOWN[name]) if name in KNOWN else recognised(Path(other).resolve(), source)
        if not known:
            print(f"| {name} | | before: {layout} |", flush=True)
            continue
        for modalities in ((), *((its,) for its in ALSO.get(name, ()))):
            stem = f"{name.replace('/', '-')}-{layout}{''.join(modalities)}"
            sets = [place / f"{stem}-{when}" for when in ("before", "after")]
            faults = [
                shards(checkout, source, layout, folder, modalities)
                for checkout, folder in zip((Path(other).resolve(), REPOSITORY), sets)
            ]
            said = [f"{when}: {fault}" for when, fault in zip(("before", "after"), faults) if fault]
            found = " · ".join(said) if said else compare(*sets)
            print(f"| {name} | {layout} {' '.join(modalities)} | {found} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])
