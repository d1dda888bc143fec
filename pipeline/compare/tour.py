"""A page to leave with after the first hour: the data, how the runs learned, what their features see, what that is worth, what next.

Everything on it was written by other commands (shard set, runs, `data_prep show`); this only puts it in order.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster import storage
from cluster.errors import RunFailure, UsageError
from pipeline.compare.curves import curves_part
from pipeline.compare.figures import Summary, summarise
from pipeline.compare.load import RunData
from pipeline.compare.page import page, picture, table
from pipeline.compare.paired import Pairs
from pipeline.compare.report import settings_part, verdict_part
from pipeline.compare.terminal import difference_rows, figure_rows, interval
from pipeline.compare.verdict import Verdict

PICTURES = {
    "artifacts/features.png": "What the features of {} see: per site its image, and the first three principal components of every "
    "sensor's tokens and of the fused ones, as colours",
    "artifacts/experts.png": "Which experts of {} take the tokens of which sensor",
}  # fmt: skip


def html_tour(
    runs: Sequence[RunData], verdict: Verdict, summaries: Sequence[Summary], pairs: Pairs, sheet: bytes | None = None
) -> str:
    """The page. sheet: the contact sheet of `data_prep show`; the pictures and the shard set are found by the runs."""
    curves, scripts = curves_part(runs)
    shown = [
        picture(data, text.format(run.name))
        for name, text in PICTURES.items() for run in runs if (data := _read(run, name)) is not None
    ]  # fmt: skip
    parts = [
        f"<h1>A tour of {html.escape(', '.join(run.name for run in runs))}</h1>",
        "<p>Made from one shard set by training without labels. Nothing on this page is loaded from elsewhere.</p>",
        "<h2>1. The data</h2>", _data(runs),
        *([picture(sheet, "Contact sheet: per site hr, Sentinel-2 over the year, masks, Sentinel-1")] if sheet else []),
        "<h2>2. How they learned</h2>", *curves,
        "<h2>3. What the features see</h2>", *(shown or ["<p>No picture was drawn: in-loop probes are off.</p>"]),
        "<h2>4. What that is worth</h2>",
        "<p>The labels serve for this alone. Per run the score on test sites with its 95 % interval, and what the same sites give with the "
        "untrained network and with statistics of the pixels, by the same classifier.</p>",
        *(probe_part(run, summarise([run])[0]) for run in runs),  # each at its own end
        "<h2>5. The comparison</h2>", verdict_part(verdict, pairs.notes), settings_part(runs, verdict),
    ]  # fmt: skip
    rows = (
        difference_rows(runs[:1], summaries[:1], pairs) if len(runs) == 1 else difference_rows(runs, summaries, pairs)
    )
    if rows:
        parts += ["<p>Differences, paired over the test sites, 95 % intervals; * = excludes 0. One run each: whether another seed would "
                  "say the same is not decided.</p>",
                  table(["probe", *(run.name for run in runs)], [[key, *cells] for key, cells in rows])]  # fmt: skip
    losses = [[key, *cells] for key, cells in figure_rows(summaries) if not key.startswith(("probe/", "    "))]
    parts += [table(["figure", *(run.name for run in runs)], losses), "<h2>6. What next</h2>", _next(runs)]
    return page(f"Tour of {', '.join(run.name for run in runs)}", parts, scripts)


def probe_part(run: RunData, summary: Summary) -> str:
    """One run's probes: trained, untrained, pixel statistics, and the paired gains over both."""
    rows = []
    for key in sorted(summary.probes):
        beside = [
            f"{summary.rows[row][key]:.3f}" if key in summary.rows[row] else "-" for row in ("untrained", "pixels")
        ]
        gains = [str(summary.over[row][key]) if key in summary.over[row] else "-" for row in ("untrained", "pixels")]
        rows.append([key.removeprefix("probe/"), interval(summary.probes[key]), *beside, *gains])
    if not rows:
        return f"<p>{html.escape(run.name)} was not probed.</p>"
    head = ["probe", "trained", "untrained", "pixels", "trained − untrained", "trained − pixels"]
    return f"<h3>{html.escape(run.name)}</h3>{table(head, rows)}"


def _data(runs: Sequence[RunData]) -> str:
    """The shard sets of the runs, each once."""
    urls = dict.fromkeys(dataset.url for run in runs for dataset in run.facts.datasets)
    parts = []
    for url in urls:
        try:
            manifest = json.loads(storage.read_bytes(storage.join(url, "manifest.json")))
            parts.append(table(["shard set", url], _facts(manifest), numeric=False))
        except (OSError, RunFailure, UsageError, KeyError, ValueError) as error:
            parts.append(f"<p>{html.escape(url)} cannot be read: {html.escape(str(error))}</p>")
    return "".join(parts)


def _facts(manifest: Mapping[str, Any]) -> list[list[str]]:
    counts = manifest["counts"]
    splits = ", ".join(f"{name} {split['samples']:,}" for name, split in sorted(counts["splits"].items()))
    rows = [
        ["samples", f"{counts['samples']:,} ({splits})"],
        ["shards", f"{counts['shards']:,}, {counts['bytes'] / 1e6:,.1f} MB, plain WebDataset tars"],
        ["bands", "; ".join(f"{name}: {', '.join(one['bands'])}" for name, one in manifest["statistics"].items())],
        ["labels that ride along", "; ".join(f"{name}: {', '.join(names)}" for name, names in manifest["classes"].items()) or "none"],
        ["content", f"sha256 {manifest['content_sha256']}"],
    ]  # fmt: skip
    overlap = manifest.get("splits", {}).get("pairs_overlapping")
    return rows + ([["sites of different splits that overlap", str(overlap)]] if overlap is not None else [])


def _next(runs: Sequence[RunData]) -> str:
    """Commands that go on from here, with the names of these runs in them."""
    first, urls = runs[0].folder or "RUN", [dataset.url for dataset in runs[0].facts.datasets]
    data = urls[0] if urls else "SHARDS"
    commands = [
        f"python -m pipeline probe {first}                                  # all classifiers and rows again, more labels, other layers",
        f"python -m pipeline export {first} backbone.safetensors            # one file, read by torch, numpy and safetensors alone",
        f"python -m pipeline ablate CONFIG data.url={data} run.dir=ablations model.prompts=4,0 --seeds 3      # is a difference more than chance?",
        "python -m data_prep catalog SRC OUT.parquet --layout …          # your own imagery; README, \"Your own data\"",
    ]  # fmt: skip
    return f"<pre>{html.escape(chr(10).join(commands))}</pre>"


def _read(run: RunData, name: str) -> bytes | None:
    if run.folder is None:
        return None
    try:
        return storage.read_bytes(storage.join(run.folder, name))
    except (OSError, RunFailure):
        return None
