"""What cannot be read costs its date or its modality, named; what may pass is tried again."""

from __future__ import annotations

import errno
import json

import pytest
from rasterio.errors import RasterioIOError

from cluster.errors import RunFailure
from data_prep import build as building
from data_prep.build import build
from data_prep.config import BuildConfig, GridConfig, OutputConfig, QualityConfig, SourceConfig
from data_prep.shards import ShardSet
from data_prep.sources import ReadFault, SourceFault, open_catalog, read_site, remote
from data_prep.sources.remote import ATTEMPTS, may_pass, retrying
from tests.scenes import s2_item, s2_pixels, write_items

NATIVE = GridConfig()


def series_of_files(folder, dates=4):
    items = []
    for number in range(dates):
        entry = s2_item(
            folder, f"d{number}", s2_pixels(number, 1, low=30)[0], datetime=f"2021-0{number + 1}-05T10:00:00Z"
        )
        entry["properties"]["geoloom:site"] = "site"
        items.append(entry)
    return write_items(folder / "items", items)


def test_one_broken_file_costs_its_date(tmp_path):
    (record,) = open_catalog(series_of_files(tmp_path))
    whole = read_site(record, NATIVE).series["s2"]
    (tmp_path / "d1_s2.tif").write_bytes((tmp_path / "d1_s2.tif").read_bytes()[:300])
    (tmp_path / "d2_s2.tif").unlink()
    site = read_site(record, NATIVE)
    assert site.series["s2"].datetimes == [whole.datetimes[0], whole.datetimes[3]]
    assert (site.series["s2"].pixels_TCHW == whole.pixels_TCHW[[0, 3]]).all()
    assert [(loss["datetime"], loss["asset"]) for loss in site.losses] == [
        ("2021-02-05T10:00:00Z", "d1/s2"), ("2021-03-05T10:00:00Z", "d2/s2"),
    ]  # fmt: skip
    with pytest.raises(SourceFault, match="d1/s2"):
        read_site(record, NATIVE, QualityConfig(min_dates=3))


def test_a_build_counts_what_it_lost_and_keeps_the_site(tmp_path):
    url = series_of_files(tmp_path)
    (tmp_path / "d2_s2.tif").write_bytes(b"broken")
    config = BuildConfig(source=SourceConfig((url,)), output=OutputConfig(str(tmp_path / "out")), workers=1)
    outcome = build(config)
    assert outcome.faults == []
    assert outcome.manifest["losses"] == {"dates": 1, "sites": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "losses.jsonl").read_text().splitlines()]
    assert [(line["site"], line["modality"], line["datetime"]) for line in lines] == [
        ("site", "s2", "2021-03-05T10:00:00Z")
    ]
    assert "cannot be read as a raster" in lines[0]["why"]
    assert ShardSet.open(str(tmp_path / "out")).read_sample(0).series["s2"].pixels_TCHW.shape[0] == 3


def test_out_of_memory_costs_the_site_not_the_build(tmp_path, monkeypatch):
    url = series_of_files(tmp_path)

    def read(record, grid, **options):
        raise MemoryError

    monkeypatch.setattr(building, "read_site", read)
    with pytest.raises(RunFailure, match="no usable sample in 1 sites"):
        build(BuildConfig(source=SourceConfig((url,)), output=OutputConfig(str(tmp_path / "out")), workers=1))
    (line,) = (tmp_path / "out" / "faults.jsonl").read_text().splitlines()
    assert "out of memory" in json.loads(line)["why"]


def test_what_may_pass_is_tried_again_with_growing_jittered_pauses(monkeypatch):
    pauses, calls = [], []

    def flaky():
        calls.append(1)
        if len(calls) < 4:
            raise ConnectionResetError("reset by peer")
        return 7

    assert retrying(flaky, "https://x/a.tif", pauses.append) == 7
    assert len(pauses) == 3
    assert all(0 <= pause <= remote.FIRST_WAIT_S * 2**number for number, pause in enumerate(pauses))
    calls.clear()

    def broken():
        calls.append(1)
        raise RasterioIOError("HTTP response code: 503")

    with pytest.raises(RasterioIOError):
        retrying(broken, "https://x/a.tif", pauses.append)
    assert len(calls) == ATTEMPTS


@pytest.mark.parametrize(
    ("error", "href", "passes"),
    [
        (RasterioIOError("HTTP response code: 503"), "https://x/a.tif", True),
        (RasterioIOError("HTTP response code: 404"), "https://x/a.tif", False),
        (RasterioIOError("Access Denied"), "s3://x/a.tif", False),
        (ConnectionResetError(), "https://x/a.tif", True),
        (FileNotFoundError(), "https://x/a.tif", False),
        (OSError(errno.EIO, "input/output error"), "/data/a.tif", True),
        (OSError(errno.ESTALE, "stale file handle"), "/data/a.tif", True),
        (OSError(errno.ENOSPC, "no space"), "/data/a.tif", False),
        (RasterioIOError("TIFFReadEncodedTile() failed"), "/data/a.tif", False),
        (MemoryError(), "https://x/a.tif", False),
    ],
)
def test_refusals_and_damage_are_final(error, href, passes):
    assert may_pass(error, href) is passes


def test_a_read_fault_keeps_its_kind_across_processes():
    import pickle

    assert type(pickle.loads(pickle.dumps(ReadFault("a", "b")))) is ReadFault  # noqa: S301


def test_the_mask_of_a_date_that_cannot_be_read_costs_the_date_not_its_clouds(tmp_path):
    """A cloud mask that is gone must not turn into a clear sky."""
    entry = s2_item(tmp_path, "site", s2_pixels(0, 1, low=30)[0])
    entry["assets"]["scl"] = {"href": str(tmp_path / "gone.tif"), "type": "image/tiff", "roles": ["data"]}
    (record,) = open_catalog(write_items(tmp_path / "items", [entry]))
    with pytest.raises(SourceFault, match=r"gone\.tif"):
        read_site(record, NATIVE)
