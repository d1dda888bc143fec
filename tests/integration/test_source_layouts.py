"""Real imagery in every layout → catalog → shards → back, bit for bit; and the same from a real S3 server."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.audit import audit, figures
from data_prep.build import build
from data_prep.catalog import make_catalog
from data_prep.config import BuildConfig, GridConfig, OutputConfig, QualityConfig, SourceConfig
from data_prep.shards import ShardSet
from data_prep.sources import open_catalog, read_site, split_site
from tests.data_folder import real_data
from tests.unit.test_sources_layouts import FOLDERS

pytestmark = pytest.mark.integration


def same(one, other):
    assert (one.key, one.crs, one.footprint, one.cell, one.scalars) == (
        other.key,
        other.crs,
        other.footprint,
        other.cell,
        other.scalars,
    )
    assert set(one.series) == set(other.series)
    for name, series in one.series.items():
        twin = other.series[name]
        assert series.pixels_TCHW.tobytes() == twin.pixels_TCHW.tobytes()
        assert (series.mask_THW == twin.mask_THW).all()
        assert (series.datetimes, series.transform, series.decisions) == (
            twin.datetimes,
            twin.transform,
            twin.decisions,
        )
        assert [o for o in series.orbits if o] == [o for o in twin.orbits if o]
        assert [p for p in series.product_ids if p] == [p for p in twin.product_ids if p]
    for name, raster in one.rasters.items():
        assert (np.squeeze(other.rasters[name]) == raster).all()


CORRECT = QualityConfig(
    on_contradiction="correct"
)  # one of the real scenes contradicts its metadata; it is kept, and flagged


@pytest.mark.parametrize("grid", [GridConfig(), GridConfig(side_m=640, tile=True)], ids=["native", "tiled"])
def test_every_layout_survives_the_shards_bit_for_bit(tmp_path, grid):
    catalogs = []
    for folder, layout in FOLDERS.items():
        catalogs.append(str(tmp_path / f"{folder}.parquet"))
        make_catalog(str(real_data(folder)), catalogs[-1], layout)
    out = str(tmp_path / "shards")
    config = BuildConfig(
        source=SourceConfig(catalog=tuple(catalogs)),
        output=OutputConfig(url=out),
        grid=grid,
        workers=2,
        quality=CORRECT,
    )
    outcome = build(config, 0, 1, False)
    assert not outcome.faults
    shards = ShardSet.open(out)
    expected = {site.key: site for url in catalogs for record in open_catalog(url) for site in split_site(record, grid)}
    keys = shards.index["key"].to_pylist()
    assert sorted(keys) == sorted(expected)
    for number, key in enumerate(keys[:: 1 if grid.side_m is None else 12]):
        row = number if grid.side_m is None else number * 12
        same(read_site(expected[key], grid, CORRECT), shards.read_sample(row))
    flagged = {entry["asset"] for entry in figures(audit(out))["contradictions"]}
    assert flagged
    assert all(asset.startswith("433D_629L_3_1") for asset in flagged)


def test_sources_on_object_storage_read_the_same(tmp_path, s3_url):
    from cluster.storage import filesystem

    fs, path = filesystem(s3_url)
    for folder in ("terramind", "treesatai", "majortom"):
        fs.put(str(real_data(folder)), f"{path}/{folder}", recursive=True)
        make_catalog(f"{s3_url}/{folder}", f"{s3_url}/{folder}.parquet", folder)
        make_catalog(str(real_data(folder)), str(tmp_path / "local.parquet"), folder)
        far, near = open_catalog(f"{s3_url}/{folder}.parquet"), open_catalog(str(tmp_path / "local.parquet"))
        assert [r.key for r in far] == [r.key for r in near]
        assert all(asset.href.startswith("s3://") for record in far for asset in record.assets)
        for one, other in zip(far, near):
            same(read_site(one, GridConfig()), read_site(other, GridConfig()))


def test_cubes_on_object_storage_read_the_same(tmp_path, s3_url):
    from cluster.storage import filesystem
    from data_prep.simulate.write import simulate

    simulate(str(tmp_path / "sites"), 2, 0, 160)
    fs, path = filesystem(s3_url)
    fs.put(str(tmp_path / "sites"), f"{path}/sites", recursive=True)
    far, near = (
        open_catalog(f"{s3_url}/sites/catalog.parquet"),
        open_catalog(str(tmp_path / "sites" / "catalog.parquet")),
    )
    for one, other in zip(far, near):
        same(read_site(one, GridConfig()), read_site(other, GridConfig()))
    assert figures(audit(f"{s3_url}/sites/catalog.parquet"))["contradictions"] == []
