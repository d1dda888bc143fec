"""`data_prep prepare`: sites × images, one slice at a time; every finished slice is kept, and a second run makes the rest.

A slice (a row group of the sites file) is one idempotent unit of work: it is searched once per sensor, whatever number of sites it has,
and the same items give the same bytes. Dumps and static catalogs are read once, before the first slice (`search.spill`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from cluster import storage
from cluster.config import fingerprint, to_dict
from cluster.errors import UsageError
from cluster.progress import progress
from data_prep.config import BuildConfig
from data_prep.parts import dump
from data_prep.prepare import search, slices
from data_prep.prepare.choose import Choice, choose
from data_prep.schema import MODALITIES


@dataclass(frozen=True)
class SliceJob:
    """One slice to prepare; crosses to a worker process."""

    number: int
    config: BuildConfig


def open_sites(url: str) -> pq.ParquetFile:
    """The sites file, row groups = slices. Raises UsageError."""
    if not url:
        raise UsageError("sites.url is empty; it names the file that python -m data_prep sites wrote")
    try:
        source = storage.local_path(url) if storage.is_local(url) else storage.open_read(url)
        file = pq.ParquetFile(source)
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist; make it with python -m data_prep sites and the same config") from None
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{url} is no sites file: {str(error).splitlines()[0]}") from None
    missing = [name for name in (*slices.PLACE, "geometry") if name not in file.schema_arrow.names]
    if missing:
        raise UsageError(f"{url} is no sites file (no column {missing[0]}); make one with python -m data_prep sites")
    return file


def claim(config: BuildConfig) -> tuple[int, str]:
    """(number of slices, fingerprint) of what is to be prepared; marks prepare.url as its own. Raises UsageError."""
    prepare = config.prepare
    if not prepare.url:
        raise UsageError("prepare.url is empty; say where the plan goes: prepare.url=PATH or s3://BUCKET/PREFIX")
    if not prepare.sensors:
        raise UsageError("prepare.sensors is empty; name at least one, e.g. prepare.sensors.s2.source=https://…")
    with open_sites(config.sites.url) as file:
        number = file.num_row_groups
    tree = to_dict(prepare) | {"url": ""}
    own = {"sites": _sha256(config.sites.url), "prepare": tree}
    content = {"fingerprint": fingerprint(own), "slices": number, **own}
    place = storage.join(prepare.url, slices.PLAN)
    if not storage.create(place, dump(content, indent=1)):
        try:
            held = json.loads(storage.read_bytes(place))["fingerprint"]
        except (ValueError, KeyError):
            held = "damaged"
        if held != content["fingerprint"]:
            raise UsageError(
                f"{prepare.url} holds a plan of other sites or settings (plan {held}, this one is {content['fingerprint']}); choose another "
                "prepare.url, or remove that folder first"
            )
    return number, content["fingerprint"]


def read_dumps(config: BuildConfig) -> None:
    """Reads every dump and static catalog once; what is read already is left alone."""
    wanted = {name: sensor for name, sensor in config.prepare.sensors.items() if not search.is_api(sensor.source)}
    done = [name for name in wanted if storage.exists(storage.join(config.prepare.url, "_items", name, "runs.json"))]
    if len(done) == len(wanted):
        return
    ground = search.Ground()
    with open_sites(config.sites.url) as file:
        for number in range(file.num_row_groups):
            ground.add(number, _boxes(file.read_row_group(number, ["bbox"], use_threads=False)))
    for name, sensor in wanted.items():
        search.spill(config.prepare.url, name, sensor, ground)


def unfinished(config: BuildConfig, number: int) -> list[int]:
    """Slices without their JSON, by one listing."""
    names = set(storage.list_names(config.prepare.url))
    return [i for i in range(number) if f"{i:06d}.json" not in names]


def prepare_slice(job: SliceJob, report: Callable[[Any], None]) -> dict[str, Any]:
    """Chooses the images of one slice's sites and writes the slice. Raises RunFailure if its source cannot be read."""
    config = job.config
    with open_sites(config.sites.url) as file:
        sites = file.read_row_group(job.number, use_threads=False)
    polygons = shapely.from_wkb(sites["geometry"].to_numpy(zero_copy_only=False))
    boxes = _boxes(sites)
    width = (boxes[:, 2] - boxes[:, 0]) % 360
    lon = (boxes[:, 0] + width / 2 + 180) % 360 - 180
    ground = shapely.union_all(search.tiles(boxes))
    choices: dict[str, Choice] = {}
    items: dict[str, pa.Table] = {}
    for name, sensor in sorted(config.prepare.sensors.items(), key=lambda entry: list(MODALITIES).index(entry[0])):
        if search.is_api(sensor.source):
            items[name] = search.search_api(sensor, ground)
        else:
            items[name] = search.spilled(config.prepare.url, name, job.number)
        choices[name] = choose(polygons, lon, items[name], sensor, MODALITIES[name].is_series)
    why = left_out(choices, config.prepare.min_sensors)
    folders = {name: item_folder(config.prepare.sensors[name].source) for name in choices}
    done = slices.write_slice(config.prepare.url, job.number, sites, why, choices, items, folders)
    report(sites.num_rows)
    return done


def left_out(choices: dict[str, Choice], min_sensors: int) -> list[str]:
    """Per site "" or why it is left out. A sensor with fewer dates than its min_dates leaves the site out, unless it asked for none."""
    out = []
    for number in range(len(next(iter(choices.values())).why)):
        short = [f"{name}: {choice.why[number]}" for name, choice in choices.items() if choice.why[number]]
        seen = sum(1 for choice in choices.values() if choice.images[number])
        if not short and seen < min_sensors:
            short = [f"{seen} sensors, min_sensors={min_sensors}"]
        out.append("; ".join(short))
    return out


def item_folder(source: str) -> str:
    """What relative hrefs of a source's items count from."""
    folder = source.rpartition("/")[0] if source.endswith((".parquet", ".geoparquet")) else source.rstrip("/")
    return os.path.abspath(storage.local_path(folder or ".")) if storage.is_local(folder) else folder


def finish(config: BuildConfig, number: int, mark: str) -> dict[str, Any]:
    """Writes and returns `prepared.json` of a plan whose slices are all there."""

    def read(i: int) -> dict[str, Any]:
        return json.loads(storage.read_bytes(slices.slice_url(config.prepare.url, i, "json")))

    with ThreadPoolExecutor(8) as pool, progress(number, "slices") as bar:
        done = []
        for entry in pool.map(read, range(number)):
            done.append(entry)
            bar.advance()
    content = {"fingerprint": mark, "sensors": [n for n in MODALITIES if n in config.prepare.sensors], "slices": done}
    storage.write_atomic(storage.join(config.prepare.url, slices.PREPARED), dump(content))
    return content


def _boxes(sites: pa.Table) -> np.ndarray:
    """[N, 4] west, south, east, north."""
    box = sites["bbox"].combine_chunks()
    return np.column_stack([box.field(side).to_numpy() for side in ("xmin", "ymin", "xmax", "ymax")])


def _sha256(url: str) -> str:
    digest = hashlib.sha256()
    with storage.open_read(url) as stream:
        while block := stream.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()
