"""Member codecs on real pixels: ratio, and CPU to encode, to decode one date, and to decode one hr tile.

Input: the imagery under GEOLOOM_DATA (or ../shared/data): Sentinel-2 and Sentinel-1 of terramind, majortom and ssl4eo cut into
64 px windows (a window = a date), series of treesatai, aerial images of treesatai and naip. Times are CPU seconds of this process
(a busy machine does not change them), best of several rounds, decoded MB per second on one core.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

DEFAULT_DATA = "../shared/data"
LAYOUTS = ("terramind", "majortom", "treesatai", "ssl4eo", "naip")
WINDOW_PX = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default=os.environ.get("GEOLOOM_DATA", DEFAULT_DATA),
        metavar="FOLDER",
        help="real imagery (default GEOLOOM_DATA)",
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, metavar="S", help="least CPU time per figure (default 0.5)"
    )
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.errors import UsageError

    if not os.path.isdir(args.data):
        raise UsageError(f"{args.data} is no folder of imagery; set GEOLOOM_DATA or --data")
    arrays = real_arrays(args.data)
    if not arrays:
        raise UsageError(f"{args.data} holds none of {', '.join(LAYOUTS)}")
    figures = {kind: measure(array_TCHW, args.seconds) for kind, array_TCHW in arrays.items()}
    for kind, rows in figures.items():
        array = arrays[kind]
        print(f"\n{kind}: {list(array.shape)} {array.dtype}, {array.nbytes / 1e6:.1f} MB")
        print(f"  {'codec':<22}{'ratio':>7}{'encode MB/s':>13}{'date MB/s':>11}{'date µs':>9}{'tile µs':>9}")
        for name, row in rows.items():
            print(
                f"  {name:<22}{row['ratio']:>7.2f}{row['encode_mb_s']:>13.0f}{row['date_mb_s']:>11.0f}"
                f"{row['date_us']:>9.1f}{row['tile_us']:>9.1f}"
            )
    if args.json:
        print_json({"codecs": figures})
    return 0


def real_arrays(folder: str) -> dict[str, np.ndarray]:
    """Harmonised pixels by kind, [T, C, H, W]: `hr`, `s2`, `s1`, `mask`, and `s2 6 px` (a short-sided real series)."""
    import numpy as np

    from data_prep.catalog import scan
    from data_prep.config import GridConfig
    from data_prep.sources import SourceFault, read_site
    from data_prep.sources.sites import group_items, site_record

    found: dict[str, list[np.ndarray]] = {}
    for layout in LAYOUTS:
        path = os.path.join(os.path.abspath(folder), layout)
        if not os.path.isdir(path):
            continue
        for key, items in group_items(scan(path, "geotiff" if layout == "naip" else layout).items):
            try:
                site = read_site(site_record(key, items), GridConfig())
            except SourceFault:
                continue
            for name, series in site.series.items():
                small = min(series.pixels_TCHW.shape[2:]) < WINDOW_PX
                found.setdefault(f"{name} 6 px" if small else name, []).append(series.pixels_TCHW)
                found.setdefault("mask 6 px" if small else "mask", []).append(series.mask_THW[:, None])
    arrays = {}
    for kind, parts in found.items():
        if kind == "hr":
            parts = [part[:, :, :200, :260] for part in parts]
            side = min(part.shape[3] for part in parts)
            arrays[kind] = np.concatenate([part[..., :side] for part in parts])
        elif kind.endswith("px"):
            arrays[kind] = parts[0]
        else:
            arrays[kind] = np.concatenate([windows(part) for part in parts if min(part.shape[2:]) >= WINDOW_PX])
    return {kind: np.ascontiguousarray(arrays[kind]) for kind in sorted(arrays)}


def windows(array_TCHW: np.ndarray) -> np.ndarray:
    """[N, C, 64, 64]: every whole window of every date."""
    t, c, h, w = array_TCHW.shape
    rows, columns = h // WINDOW_PX, w // WINDOW_PX
    cut = array_TCHW[:, :, : rows * WINDOW_PX, : columns * WINDOW_PX]
    cut = cut.reshape(t, c, rows, WINDOW_PX, columns, WINDOW_PX)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(-1, c, WINDOW_PX, WINDOW_PX)


def candidates() -> dict[str, Callable[[np.ndarray], bytes]]:
    """The codecs of the config, and neighbours of theirs that were not chosen."""
    import blosc2

    from data_prep import codec

    def blosc(name: blosc2.Codec, level: int, shuffle: blosc2.Filter) -> Callable[[np.ndarray], bytes]:
        def encode(array_TCHW: np.ndarray) -> bytes:
            chunk = codec.chunk_shape(array_TCHW.shape, 256)
            parameters = {
                "codec": name, "clevel": level, "filters": [shuffle], "typesize": array_TCHW.dtype.itemsize, "nthreads": 1
            }  # fmt: skip
            return blosc2.asarray(
                array_TCHW, chunks=chunk, blocks=chunk, cparams=parameters, contiguous=True
            ).to_cframe()

        return encode

    def ours(name: str) -> Callable[[np.ndarray], bytes]:
        return lambda array_TCHW: codec.encode(array_TCHW, name)

    chosen = {name: ours(name) for name in codec.EXTENSIONS}
    byte, bit = blosc2.Filter.SHUFFLE, blosc2.Filter.BITSHUFFLE
    return chosen | {
        "(lz4-5 byte shuffle)": blosc(blosc2.Codec.LZ4, 5, byte),
        "(lz4-1 bit shuffle)": blosc(blosc2.Codec.LZ4, 1, bit),
        "(zstd-1 bit shuffle)": blosc(blosc2.Codec.ZSTD, 1, bit),
        "(zstd-5 byte shuffle)": blosc(blosc2.Codec.ZSTD, 5, byte),
        "(lz4hc-9 bit shuffle)": blosc(blosc2.Codec.LZ4HC, 9, bit),
    }


def measure(array_TCHW: np.ndarray, seconds: float) -> dict[str, dict[str, float]]:
    """Figures per codec."""
    return {name: figures_of(name, encode, array_TCHW, seconds) for name, encode in candidates().items()}


def figures_of(
    name: str, encode: Callable[[np.ndarray], bytes], array_TCHW: np.ndarray, seconds: float
) -> dict[str, float]:
    """Ratio and CPU of one codec; every decoded byte is compared once."""
    import numpy as np

    from data_prep import codec

    data = encode(array_TCHW)
    member = codec.open_member(data, codec.EXTENSIONS.get(name, "b2nd"))
    if member.read_all().tobytes() != array_TCHW.tobytes():
        raise AssertionError(f"{name} is not lossless")
    out = np.empty(array_TCHW.shape[1:], array_TCHW.dtype)
    side, dates = min(64, *array_TCHW.shape[2:]), range(len(array_TCHW))
    date_s = best(lambda: [member.read_date(t, out) for t in dates], seconds) / len(dates)
    tile_s = best(lambda: [member.read_window(t, 0, side, 0, side) for t in dates], seconds) / len(dates)
    return {
        "ratio": array_TCHW.nbytes / len(data),
        "encode_mb_s": array_TCHW.nbytes / 1e6 / best(lambda: encode(array_TCHW), seconds),
        "date_mb_s": out.nbytes / 1e6 / date_s, "date_us": date_s * 1e6, "tile_us": tile_s * 1e6,
    }  # fmt: skip


def best(work: Callable[[], Any], seconds: float) -> float:
    """Least CPU seconds of one call, over at least `seconds` and three calls."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)
