"""A sensor is one entry of MODALITIES: Landsat and a static elevation layer, added here, go from STAC items to shards and tokens."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep import schema
from data_prep.audit import audit
from data_prep.build import build
from data_prep.config import BuildConfig, OutputConfig, SourceConfig
from data_prep.geo import Grid
from data_prep.schema import CLEAR, NODATA, ModalitySpec
from data_prep.shards import ShardSet
from tests import providers
from tests.scenes import write_items

LANDSAT = ModalitySpec(
    "landsat", ("SR_B2", "SR_B3", "SR_B4", "SR_B5", "SR_B6", "SR_B7"), "uint16", 30.0, True, "surface reflectance x 10000, 0 = nodata",
    ("SR_B4", "SR_B3", "SR_B2"), (1, 3000), "reflectance", level="L2SP", collections=("landsat",),
    aliases={"blue": "SR_B2", "green": "SR_B3", "red": "SR_B4", "nir08": "SR_B5", "swir16": "SR_B6", "swir22": "SR_B7"},
)  # fmt: skip
DEM = ModalitySpec(
    "dem", ("HEIGHT",), "int16", 30.0, False, "metres above the ellipsoid", ("HEIGHT",) * 3, (0, 3000), "continuous", collections=("cop-dem",),
    aliases={"data": "HEIGHT", "elevation": "HEIGHT"},
)  # fmt: skip


@pytest.fixture
def two_more(monkeypatch):
    monkeypatch.setitem(schema.MODALITIES, "landsat", LANDSAT)
    monkeypatch.setitem(schema.MODALITIES, "dem", DEM)


def landsat_item(folder, month, seed):
    """Collection 2 Level 2 as published: an asset per band by common name, scale 0.0000275, offset -0.2, nodata 0."""
    rng = np.random.default_rng(seed)
    grid = providers.grid_of(30)
    assets, truth = {}, []
    for name, band in LANDSAT.aliases.items():
        stored = rng.integers(7500, 20_000, grid.shape).astype(np.uint16)
        stored[0, 0] = 0
        truth.append(np.rint(stored * 0.275 - 2000))
        assets[name] = {
            "href": providers.write(folder / f"{month}_{band}.tif", stored[None], grid, 0), "type": providers.COG, "roles": ["data", "reflectance"],
            "eo:bands": [{"name": f"OLI_{band[3:]}", "common_name": name}],
            "raster:bands": [{"scale": 0.0000275, "offset": -0.2, "nodata": 0, "data_type": "uint16", "spatial_resolution": 30}],
        }  # fmt: skip
    properties = {
        "datetime": f"2023-{month:02d}-03T10:00:00Z",
        "platform": "landsat-8",
        "proj:epsg": 32631,
        "geoloom:site": "here",
    }
    return providers.item(f"LC08_L2SP_{month}", assets, properties, "landsat-c2-l2"), np.stack(truth)


def test_landsat_and_elevation_go_from_items_to_shards(tmp_path, two_more):
    first, truth = landsat_item(tmp_path, 5, 0)
    second, _ = landsat_item(tmp_path, 6, 1)
    degrees = Grid("EPSG:4326", (1 / 3600, 0.0, 4.40, 0.0, -1 / 3600, 52.40), 600, 600)
    height = np.full((1, 600, 600), 612.4, np.float32)
    dem = providers.item("cop", {"data": {"href": providers.write(tmp_path / "dem.tif", height, degrees), "type": providers.COG, "roles": ["data"]}},
                         {"geoloom:site": "here"}, "cop-dem-glo-30")  # fmt: skip
    url = write_items(tmp_path / "items", [first, second, dem])
    assert {row.modality for row in audit(url)} == {"landsat", "dem"}
    config = BuildConfig(source=SourceConfig((url,)), output=OutputConfig(str(tmp_path / "out")), workers=1)
    outcome = build(config)
    assert outcome.faults == []
    shards = ShardSet.open(str(tmp_path / "out"))
    site = shards.read_sample(0)
    series = site.series["landsat"]
    assert series.datetimes == ["2023-05-03T10:00:00Z", "2023-06-03T10:00:00Z"]
    assert series.decisions[0]["gain"] == pytest.approx(0.275)
    # on the 10 m grid of the set a 30 m pixel's centre is a pixel's centre
    centres = series.pixels_TCHW[0][:, 1::3, 1::3]
    valid = series.mask_THW[0, 1::3, 1::3] == CLEAR
    assert valid.sum() == valid.size - 1
    assert abs(centres[:, valid].astype(int) - truth[:, valid]).max() <= 1  # ties of 0.275 x fall either way
    assert series.mask_THW[0, 1, 1] == NODATA
    assert (site.series["dem"].pixels_TCHW == 612).all()
    assert site.series["dem"].pixels_TCHW.shape == (1, 1, 60, 60)
    assert {"landsat", "dem"} <= set(shards.statistics)
    assert shards.index["landsat_shape"].to_pylist()[0][0] == 2


def test_the_tokenizer_follows(two_more):
    import torch

    from model.tokenizers import Tokenizer

    for name, bands in (("landsat", 6), ("dem", 1)):
        images = (torch.ones(2, bands, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool), None)
        assert Tokenizer(name, 8, 4)([images]).shape == (2 * 2 * 2, 8)
