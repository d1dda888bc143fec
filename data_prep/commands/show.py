"""What a shard set looks like: a contact sheet, a map, one sample with its sources, the samples of an image, what is missing.

The sheet has per sample hr, s2 in true colour over time, s1, masks and label rasters; nodata is magenta.

examples:
  python -m data_prep show demo_out/shards --out sheet.png --samples 12
  python -m data_prep show s3://bucket/set --map --out map.png              # coverage, dates, clear share, orbits
  python -m data_prep show s3://bucket/set --key 33N640_8123_871 --json     # one sample: its dates, and the files they came from
  python -m data_prep show s3://bucket/set --image S2B_MSIL2A_20230714T100559_N0509_R022_T33TWM_20230714T145555
  python -m data_prep show s3://bucket/set --faulty                         # sites and dates that could not be had, by reason
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.shards import ShardSet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="folder of the shard set")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--map", action="store_true", help="where the samples lie, and how good they are")
    what.add_argument("--key", metavar="KEY", help="one sample: what it holds and where that comes from")
    what.add_argument("--image", metavar="ID", help="samples that hold this product (or STAC item)")
    what.add_argument("--faulty", action="store_true", help="faulty sites and lost dates, by reason")
    parser.add_argument("--out", metavar="FILE", help="where the PNG goes (default sheet.png or map.png; --key: none)")
    parser.add_argument(
        "--samples", type=int, default=8, metavar="N", help="rows, spread evenly over the set (default 8)"
    )
    parser.add_argument("--dates", type=int, default=6, metavar="N", help="s2 dates per row (default 6)")
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.errors import RunFailure, UsageError
    from data_prep.shards import ShardSet

    if args.samples < 1 or args.dates < 1:
        raise UsageError("--samples and --dates must be 1 or more")
    shards = ShardSet.open(args.url)
    from data_prep.codec import MemberError

    show = _key if args.key else _image if args.image else _faulty if args.faulty else _map if args.map else _sheet
    try:
        figures = show(shards, args)
    except (MemberError, FileNotFoundError) as error:
        raise RunFailure(f"{error}; python -m data_prep verify {args.url} names every fault") from None
    if args.json:
        print_json(figures)
    return 0


def _sheet(shards: ShardSet, args: argparse.Namespace) -> dict[str, Any]:
    from data_prep.show import sheet

    out = args.out or "sheet.png"
    size = _write(out, sheet(shards, args.samples, args.dates))
    count = min(args.samples, shards.num_samples)
    print(f"{count} of {shards.num_samples} samples: {out}")
    return {"samples": count, "out": out, "bytes": size}


def _map(shards: ShardSet, args: argparse.Namespace) -> dict[str, Any]:
    from data_prep.overview import draw_overview, overview

    found, out = overview(shards), args.out or "map.png"
    size = _write(out, draw_overview(found, args.url))
    print(f"{shards.num_samples} samples ({found.placed} with a place): {out}")
    for name, its in found.sensors.items():
        print(
            f"  {name}: {its['samples']} samples, {its['dates']:.1f} dates each, {its['clear']:.0%} of the pixels clear"
        )
        for orbit, count in list(its["orbits"].items())[:6]:
            print(f"    {count} dates on {orbit}")
    return {"samples": shards.num_samples, "placed": found.placed, "sensors": found.sensors, "out": out, "bytes": size}


def _key(shards: ShardSet, args: argparse.Namespace) -> dict[str, Any]:
    from data_prep.lineage import about
    from data_prep.schema import MODALITIES

    found = about(shards, args.key)
    print(
        f"{found['key']}: row {found['row']}, {found['split']}, cell {found['cell']}, {found['shard']} from byte {found['offset']}"
    )
    for name in found["modalities"]:
        dates, shape = found[f"{name}_datetimes"], "x".join(map(str, found[f"{name}_shape"]))
        print(f"  {name} [{shape}], {found[f'{name}_gsd_m']:g} m")
        orbits = found[f"{name}_orbits"] or [""] * len(dates)
        for date, share, product, orbit in zip(dates, found[f"{name}_clear"], found[f"{name}_product_ids"], orbits):
            print(f"    {date or 'no date':<20} {share:6.1%} clear  {product or '-'}  {orbit}".rstrip())
    used = [s for s in found["sources"] if s["used"] is not False and s["modality"] in MODALITIES]
    print(f"  from {len(used)} files:" if used else "  the plan it was made from is gone: no files are known")
    for source in used:
        print(f"    {source['modality']}  {source['item']}  {source['href']}")
    figures = {name: value for name, value in found.items() if name not in ("geometry", "links", "assets", "members")}
    if args.out:
        from data_prep.show import draw

        site = (shards.read_sample(found["row"]), found["shard"])
        figures |= {"out": args.out, "bytes": _write(args.out, draw([site], args.dates, 3))}
    return figures


def _image(shards: ShardSet, args: argparse.Namespace) -> dict[str, Any]:
    from data_prep.lineage import samples_of

    found = samples_of(shards, args.image)
    print(f"{args.image}: in {len(found)} samples")
    for row in found[:20]:
        print(f"  {row['key']}  {row['split']}  {row['shard']}")
    if len(found) > 20:
        print(f"  … and {len(found) - 20} more (--json names all)")
    return {"image": args.image, "samples": found}


def _faulty(shards: ShardSet, args: argparse.Namespace) -> dict[str, Any]:
    from data_prep.overview import faulty

    found = faulty(shards.url)
    for kind, rows in found.items():
        print(f"{kind}: {sum(row['count'] for row in rows)}")
        for row in rows[:12]:
            print(f"  {row['count']} x {row['why']}  (first: {row['first']})")
    return found


def _write(out: str, png: bytes) -> int:
    from cluster import storage
    from cluster.errors import UsageError

    try:
        storage.write_atomic(out, png)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror or error}") from None
    return len(png)
