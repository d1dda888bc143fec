"""Imagery to shards: `python -m data_prep COMMAND …`. The chosen command's module is imported, and no other."""

from __future__ import annotations

from cluster.cli import dispatch

COMMANDS = {
    "simulate": (
        "data_prep.commands.simulate",
        "physically plausible, labelled, multi-modal scenes with a STAC catalog",
    ),
    "catalog": ("data_prep.commands.catalog", "a STAC catalog of a layout people already have"),
    "sites": ("data_prep.commands.sites", "an area to sites on one global lattice, split by place, with a map"),
    "prepare": ("data_prep.commands.prepare", "sites x STAC API, dump or catalog to ranked images per site, in slices"),
    "build": ("data_prep.commands.build", "catalog to tars + index.parquet + manifest.json"),
    "append": ("data_prep.commands.append", "new sites into a set that stands; old shards and splits stay as they are"),
    "remove": ("data_prep.commands.remove", "sites out of a set, by key, area or product; rewrites their shards only"),
    "merge": ("data_prep.commands.merge", "index.parquet and manifest.json from finished shards (array builds)"),
    "status": ("data_prep.commands.status", "what a build is doing: done, running, missing, rate, faults"),
    "verify": ("data_prep.commands.verify", "every checksum, count and offset of a shard set"),
    "audit": ("data_prep.commands.audit", "radiometry: offset, scale, nodata, alignment, per asset"),
    "show": ("data_prep.commands.show", "contact sheet of a shard set"),
    "stats": ("data_prep.commands.stats", "per-band statistics over valid pixels"),
    "bench": ("data_prep.commands.bench", "codec and build throughput"),
}

if __name__ == "__main__":
    dispatch("data_prep", "Imagery to shards.", COMMANDS)
