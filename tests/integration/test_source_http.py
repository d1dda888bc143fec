"""COGs over HTTP: how many requests and bytes it takes, and what broken answers do (nothing)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from data_prep.build import build
from data_prep.config import BuildConfig, GridConfig, OutputConfig, SourceConfig
from data_prep.geo import Grid
from data_prep.schema import MODALITIES
from data_prep.sources import open_catalog, raster, read_site, remote, split_site
from data_prep.sources.items import AssetFields, make_item
from data_prep.sources.records import Asset
from tests.range_server import RangeServer
from tests.scenes import write_items

pytestmark = pytest.mark.integration
BANDS = MODALITIES["s2"].bands
SIDE, BLOCK = 2048, 512


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test opens its files itself, and does not wait long between attempts."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    raster._open_rasters.held.clear()
    yield
    raster._open_rasters.held.clear()


def write_cog(path, seed, side=SIDE, patch=None):
    """A COG of one band with overviews: large enough that its blocks are a small part of it. `patch`: side of what repeats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    patch = patch or side
    pixels = np.random.default_rng(seed).integers(30, 4000, (1, patch, patch)).astype(np.uint16)
    pixels = np.tile(pixels, (1, side // patch, side // patch))
    with rasterio.open(
        path, "w", driver="COG", count=1, height=side, width=side, dtype="uint16", nodata=0, crs="EPSG:32631", compress="deflate",
        transform=Affine(10, 0, 600000, 0, -10, 5800020), blocksize=BLOCK, overview_resampling="nearest",
    ) as dataset:  # fmt: skip
        dataset.write(pixels)
    return pixels[0]


def risen_mb(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` returns, and by how much the peak of this process's resident memory rose over where it stood."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts anew
    before, found = status("VmRSS"), run()
    return found, (status("VmHWM") - before) / 1024


def asset(url, name="x"):
    return Asset(f"i/{name}", "s2", url, bands=("B02",))


def test_opening_takes_few_requests_and_reading_little_more_than_the_blocks(tmp_path):
    truth = write_cog(tmp_path / "a.tif", 0)
    size = (tmp_path / "a.tif").stat().st_size
    with rasterio.open(tmp_path / "a.tif") as local:
        block_bytes = size / (local.width * local.height / BLOCK**2) / 1.33  # the overviews are a third again
    with RangeServer(tmp_path) as server:
        dataset = raster.borrow_raster(asset(f"{server.url}/a.tif"))
        opened = server.requests, server.bytes
        assert server.requests <= 3
        assert server.bytes <= 64 << 10
        server.reset()
        rows = cols = slice(BLOCK, 3 * BLOCK)
        found = raster._read(asset(f"{server.url}/a.tif"), [1], window=((BLOCK, 3 * BLOCK), (BLOCK, 3 * BLOCK)))
        assert (found[0] == truth[rows, cols]).all()
        assert server.bytes <= 1.2 * 4 * block_bytes
        assert server.requests <= 4
        print(
            f"open: {opened[0]} requests, {opened[1]} bytes; four blocks of {block_bytes:.0f}: {server.requests} requests, {server.bytes} bytes"
        )
    assert dataset.count == 1


def scene(folder, url, dates, bands=BANDS, side=1536, moment="2021", patch=64):
    """One site of `dates` acquisitions with a COG per band, hrefs on the server. patch: as in `write_cog`."""
    items = []
    grid = Grid("EPSG:32631", (10.0, 0.0, 600000.0, 0.0, -10.0, 5800020.0), side, side)
    sources = {band: folder / f"{band}.tif" for band in bands}
    for number, (_, path) in enumerate(sources.items()):
        write_cog(path, number, side, patch)
    for date in range(dates):
        assets = {}
        for band, path in sources.items():
            name = f"{date:02d}_{band}.tif"
            if not (folder / name).exists():
                shutil.copy(path, folder / name)
            assets[band] = AssetFields(
                "s2", f"{url}/{name}", bands=(band,), grid=grid, baseline="03.00", scale=1e-4, nodata=0.0,
                datetime=f"{moment}-{1 + date // 28:02d}-{1 + date % 28:02d}T10:00:00Z",
            )  # fmt: skip
        items.append(make_item(f"d{date:02d}", assets, site="site"))
    return write_items(folder / "items", items)


def test_a_long_series_opens_every_file_once(tmp_path):
    with RangeServer(tmp_path) as server:
        url = scene(tmp_path, server.url, 60, (*BANDS, "B01"), side=1280)
        (record,) = open_catalog(url)
        opened: list[str] = []
        plain = raster._as_pixels
        raster._as_pixels = lambda path, **options: (opened.append(path), plain(path, **options))[1]
        try:
            (centre,) = split_site(record, GridConfig(side_m=640))
            site = read_site(centre, GridConfig())
        finally:
            raster._as_pixels = plain
        assert len(site.series["s2"].datetimes) == 60
        assert len(opened) == len(set(opened)) == 600  # ten of the eleven bands are wanted


@pytest.mark.parametrize("seed", [0, 1])
def test_broken_answers_change_no_pixel_and_what_stays_broken_costs_its_date(tmp_path, seed):
    rng = np.random.default_rng(seed)
    faults = rng.choice(["ok", "503", "reset", "truncated"], size=100_000, p=[0.98, 0.01, 0.005, 0.005])
    with RangeServer(tmp_path) as server:
        url = scene(tmp_path, server.url, 6)

        def make(name, **more):
            raster._open_rasters.held.clear()
            config = BuildConfig(
                source=SourceConfig((url,)),
                output=OutputConfig(str(tmp_path / name)),
                workers=1,
                grid=GridConfig(side_m=1280),
                **more,
            )
            return build(config)

        quiet, alone_mb = risen_mb(lambda: make("quiet"))
        server.plan = lambda number: str(faults[number])
        noisy, disturbed_mb = risen_mb(lambda: make("noisy"))
        assert disturbed_mb <= alone_mb + 32, "what was read of broken answers is kept"
        broken = {kind: count for kind, count in server.done.items() if kind != "ok"}
        assert sum(broken.values()) >= 2
        assert noisy.manifest["content_sha256"] == quiet.manifest["content_sha256"]
        assert noisy.manifest["losses"] == {"dates": 0, "sites": 0}
        print(
            f"{broken} of {sum(server.done.values())} requests broken; content {noisy.manifest['content_sha256'][:12]} either way"
        )
        # now one file is cut for good
        server.plan = lambda number: "ok"
        path = tmp_path / "03_B04.tif"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 10])
        left = make("left")
        assert left.faults == []
        (loss,) = [json.loads(line) for line in (tmp_path / "left" / "losses.jsonl").read_text().splitlines()]
        assert loss["asset"] == "d03/B04"
        assert loss["datetime"] == "2021-01-04T10:00:00Z"


def test_a_token_goes_to_the_host_it_is_meant_for_and_to_no_other(tmp_path, monkeypatch):
    write_cog(tmp_path / "a.tif", 0, 512)
    monkeypatch.setenv("EARTHDATA_TOKEN", "secret-of-nasa")
    monkeypatch.setenv("SOURCE_BEARER_TOKEN", "secret-of-somebody")
    with RangeServer(tmp_path) as server:
        raster.open_raster(f"{server.url}/a.tif", "a").close()
        assert not any("authorization" in {key.lower() for key in headers} for headers in server.headers)
        monkeypatch.setenv("SOURCE_BEARER_HOSTS", "127.0.0.1")
        raster.open_raster(f"{server.url}/a.tif?x", "a").close()
        assert any(headers.get("Authorization") == "Bearer secret-of-somebody" for headers in server.headers)
        assert not any("nasa" in str(headers) for headers in server.headers)
    assert remote._bearer("data.asf.alaska.edu") == "secret-of-nasa"
    assert remote._bearer("asf.alaska.edu.evil.example") == ""
