"""Opening the index of a large set: a made-up one with the real columns, and what happens where it is not the manifest's.

Only the manifest and the mapped columns are made, with the columns of three modalities and their dates; no shard, no pixel.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PER_SHARD = 200
PART = 100_000  # samples made at a time: what bounds memory
LOOK_UPS = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=5_000_000)
    parser.add_argument("--dates", type=int, nargs=2, default=[65, 48], metavar=("S2", "S1"), help="per sample")
    parser.add_argument("--folder", help="where to make it, about 2 kB per sample; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    import tempfile

    from cluster.cli import print_json
    from cluster.errors import UsageError

    if args.samples < 2 * PER_SHARD or args.rounds < 1 or min(args.dates) < 1:
        raise UsageError(f"--samples is at least {2 * PER_SHARD}, --rounds and --dates at least 1")
    with tempfile.TemporaryDirectory(prefix="geoloom-bench-", dir=args.folder) as name:
        large, small = Path(name) / "large", Path(name) / "small"
        for folder, count in ((small, 2 * PER_SHARD), (large, args.samples)):
            make(folder, count, *args.dates)
        figures: dict[str, Any] = {"samples": args.samples, "bytes": (large / "columns.safetensors").stat().st_size}
        figures |= opened(large, args.rounds)
        figures["look_up_us"] = looked_up(large, args.rounds)
        figures["look_up_small_us"] = looked_up(small, args.rounds)
        figures["refused"] = refusals(large, small)
    print(
        f"{figures['samples']:,} samples, {figures['bytes'] / figures['samples']:.0f} bytes each\n"
        f"open: {figures['open_s']:.2f} s, {figures['open_cpu_s']:.2f} s of CPU; memory of the process: "
        f"+{figures['private_mb']:.0f} MB beside the mapped file\n"
        f"look-up of a sample's place and dates: {figures['look_up_us']:.1f} µs, in a set of {2 * PER_SHARD} samples "
        f"{figures['look_up_small_us']:.1f} µs"
    )
    for harm, said in figures["refused"].items():
        print(f"{harm}: {said}")
    if args.json:
        print_json({"index": figures})
    return 0


def make(folder: Path, samples: int, s2_dates: int, s1_dates: int) -> None:
    """The manifest and the columns of a set of so many samples, in memory bounded by PART samples."""
    import json
    import tempfile

    from data_prep import column_file
    from data_prep.schema import MODALITIES, SCHEMA_VERSION

    folder.mkdir()
    shards = -(-samples // PER_SHARD)
    dates = {"hr": 1, "s2": s2_dates, "s1": s1_dates}
    with tempfile.TemporaryDirectory(dir=folder) as spooled:
        with column_file.Spool(Path(spooled)) as spool:
            for first in range(0, samples, PART):
                for name, values in _columns(first, min(first + PART, samples), dates):
                    spool.append(name, values)
        with open(folder / column_file.COLUMNS, "wb") as stream:
            entry = column_file.assemble(stream, spool.columns())
    bands = {m: {"mean": [0.0] * len(spec.bands), "std": [1.0] * len(spec.bands)} for m, spec in MODALITIES.items()}
    (folder / "manifest.json").write_text(json.dumps({
        "schema": SCHEMA_VERSION, "counts": {"samples": samples}, "columns": entry, "index": {"sha256": "0" * 64, "bytes": 0},
        "statistics": bands, "classes": {}, "content_sha256": f"{samples:064x}",
        "shards": [{"name": f"train-{n:06d}.tar", "split": "train", "samples": min(PER_SHARD, samples - n * PER_SHARD),
                    "bytes": 1 << 30, "sha256": f"{n:064x}"} for n in range(shards)],
    }))  # fmt: skip


def _columns(first: int, last: int, dates: dict[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Columns of the samples first … last - 1 (`data_prep.columns` says what each is)."""
    import numpy as np

    number_N = np.arange(first, last)
    count, ends = len(number_N), np.arange(first + (first > 0), last + 1)  # the first batch brings the leading zero
    rng = np.random.default_rng(first)
    keys = np.char.add("433D_629L_", np.char.zfill(number_N.astype("U10"), 10))
    yield "key.bytes", np.frombuffer("".join(keys.tolist()).encode(), np.uint8)
    yield "key.first", ends * 20
    yield "shard", (number_N // PER_SHARD).astype(np.int32)
    start_N = (number_N % PER_SHARD * 5_000_000).astype(np.uint32)
    for place, stem in enumerate(name for m in dates for name in (m, f"{m}.mask")):
        yield f"{stem}.offset", start_N + np.uint32(place * 700_000)
        yield f"{stem}.length", np.full(count, 650_000, np.uint32)
        yield f"{stem}.crc", rng.integers(0, 1 << 32, count, np.uint32)
        yield f"{stem}.kind", np.zeros(count, np.int8)
    for modality, number in dates.items():
        clear_D = rng.choice(np.array([0.0, 0.4, 0.8, 1.0], np.float32), count * number)
        yield f"{modality}.first", ends * number
        yield f"{modality}.whole", (clear_D == 1).reshape(count, number).all(1)
        yield f"{modality}.clear", clear_D
        yield f"{modality}.doy", rng.integers(1, 366, count * number, np.int16)
    for name, side in (("west", -20.0), ("south", 30.0), ("east", -19.99), ("north", 30.01)):
        yield name, side + number_N / last * 40
    yield "width_m", np.full(count, 640.0)
    yield "height_m", np.full(count, 640.0)
    yield "scene", np.full(count, -1, np.int32)
    yield "split", np.zeros(count, np.int8)
    yield "modalities", np.full(count, 7, np.uint8)
    yield "cloud", rng.random(count, np.float32)
    yield "day_first", np.full(count, 18_000, np.int32)
    yield "day_last", np.full(count, 18_364, np.int32)


def opened(folder: Path, rounds: int) -> dict[str, float]:
    """Medians over fresh processes: wall time and CPU time of `table.load`, and its memory beside the mapped file."""
    import json
    import subprocess
    import sys

    found = []
    for _ in range(rounds):
        code = f"from pipeline.bench.index import open_once; open_once({str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return {key: sorted(one[key] for one in found)[rounds // 2] for key in found[0]}


def open_once(folder: str) -> None:
    """Prints what one opening took, as JSON."""
    import json

    from pipeline.config import DataConfig
    from pipeline.reader import table

    before, wall, cpu = _anonymous_bytes(), time.perf_counter(), time.process_time()
    opened_table = table.load(DataConfig(url=folder), ("hr", "s2", "s1"))
    took = {"open_s": time.perf_counter() - wall, "open_cpu_s": time.process_time() - cpu}
    assert len(opened_table)
    print(json.dumps({**took, "private_mb": (_anonymous_bytes() - before) / 1e6}))


def _anonymous_bytes() -> int:
    """Resident memory that no file backs (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def looked_up(folder: Path, rounds: int) -> float:
    """Microseconds of CPU per look-up of a random sample: its row, key, bytes and dates; the least of some rounds."""
    import numpy as np

    from pipeline.config import DataConfig
    from pipeline.reader import table

    modalities = ("hr", "s2", "s1")
    held = table.load(DataConfig(url=str(folder)), modalities)
    rows = held.rows.of(np.random.default_rng(0).integers(0, len(held), LOOK_UPS)).tolist()
    found = []
    for _ in range(rounds):
        began = time.process_time()
        for row in rows:
            held.facts(row, modalities)
            _ = held.keys[row], held.shard_urls[held.shard_N[row]], held.start_N[row], held.stop_N[row]
        found.append((time.process_time() - began) / len(rows) * 1e6)
    return min(found)


def refusals(folder: Path, other: Path) -> dict[str, str]:
    """What opening says of an index that is cut, changed in one byte, or of another state of the set."""
    from cluster.errors import UsageError
    from pipeline.config import DataConfig
    from pipeline.reader import table

    path = folder / "columns.safetensors"

    def said() -> str:
        try:
            table.load(DataConfig(url=str(folder)), ("hr", "s2", "s1"))
        except UsageError as error:
            return str(error)
        return "NOT REFUSED"

    found, size = {}, path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size - 1)
        last = file.read(1)
        file.truncate(size - 1)
        found["truncated"] = said()
        file.seek(size - 1)
        file.write(last)
        file.flush()
        file.seek(size // 2)
        there = file.read(1)
        file.seek(size // 2)
        file.write(bytes([there[0] ^ 1]))
        file.flush()
        found["one bit"] = said()
        file.seek(size // 2)
        file.write(there)
    path.rename(path.with_suffix(".kept"))
    path.symlink_to(other / path.name)
    found["another state"] = said()
    path.unlink()
    path.with_suffix(".kept").rename(path)
    return found
