"""A sensor is one entry of MODALITIES: Landsat and a static elevation layer, added here, go from STAC items to shards and tokens."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep import schema
from data_prep.audit import audit
from data_prep.build import build
from data_prep.config import BuildConfig, OutputConfig, SourceConfig
from data_prep.geo import Grid
from data_prep.schema import CLEAR, CLOUD, NODATA, ModalitySpec
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
    """Collection 2 Level 2 as published: an asset per band by common name, scale 0.0000275, offset -0.2, nodata 0, quality in bits."""
    rng = np.random.default_rng(seed)
    stored = {name: rng.integers(7500, 20_000, (20, 20)).astype(np.uint16) for name in LANDSAT.aliases}
    for values in stored.values():
        values[0, 0] = 0
    quality = np.full((20, 20), 21824, np.uint16)  # clear, low confidence of everything
    quality[0, 0], quality[3, 4], quality[3, 5], quality[3, 6] = (
        1,
        22280,
        23888,
        21826,
    )  # fill, cloud, shadow, dilated cloud
    entry = providers.landsat(folder / str(month), stored, quality)
    entry["id"] = f"LC09_L2SP_{month}"
    entry["properties"] |= {"datetime": f"2023-{month:02d}-03T10:00:00Z", "geoloom:site": "here"}
    truth = [np.rint(values * 0.275 - 2000) for values in stored.values()]
    return entry, np.stack(truth)


def test_landsat_and_elevation_go_from_items_to_shards(tmp_path, two_more):
    first, truth = landsat_item(tmp_path, 5, 0)
    second, _ = landsat_item(tmp_path, 6, 1)
    degrees = Grid("EPSG:4326", (1 / 3600, 0.0, 145.20, 0.0, -1 / 3600, -43.50), 300, 300)
    height = np.full((1, 300, 300), 612.4, np.float32)
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
    assert valid.sum() == valid.size - 4
    assert (series.mask_THW[0, 10:13:3, 13:20:3] == CLOUD).all()
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
