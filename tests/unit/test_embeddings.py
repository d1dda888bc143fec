"""GeoParquet of embeddings: every site or image once, with its place, the very vectors that the network gives; nothing half-written."""

import argparse
import json
from pathlib import Path

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cluster.errors import UsageError
from data_prep.build import build
from data_prep.config import BuildConfig, OutputConfig, SourceConfig
from data_prep.shards import ShardSet
from data_prep.simulate.write import simulate
from pipeline.commands import embed as command
from pipeline.config import ViewConfig
from pipeline.embeddings import embed_row, embed_shards
from pipeline.evaluate.encode import make_batch
from pipeline.evaluate.registry import row_named
from pipeline.probes.features import network
from tests import published
from tests.unit.test_evaluate_run import tiny_model


def test_every_site_of_a_shard_set_lies_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = simulate(str(tmp_path / "sites"), 7, seed=1, side_m=80)
    build(BuildConfig(SourceConfig((catalog,)), OutputConfig(str(tmp_path / "shards")), workers=1))
    shards = ShardSet.open(str(tmp_path / "shards"))
    monkeypatch.setattr("pipeline.embeddings.CHUNK", 3)  # three row groups
    model, out = tiny_model(), str(tmp_path / "sites.parquet")
    assert embed_shards(model, shards, out, ViewConfig(64, 8, 3, 2)) == 7
    frame, index = geopandas.read_parquet(out), shards.read_index(["key", "geometry", "label_scene"]).to_pandas()
    assert list(frame["key"]) == list(index["key"])
    assert [shape.wkb for shape in frame.geometry] == list(index["geometry"])
    assert list(frame["label_scene"]) == list(index["label_scene"])
    assert pq.ParquetFile(out).num_row_groups == 3
    assert {len(vector) for vector in frame["fused"]} == {model.fused_dim}
    assert len({tuple(vector) for vector in frame["fused"]}) == 7
    told = json.loads(pq.read_schema(out).metadata[b"geoloom"])
    assert (told["step"], told["pool"]) == (7, "mean")


@pytest.mark.parametrize(("name", "lines"), [("benv2", 6), ("flair2", 6), ("oscd", 6), ("eurosat_rgb", 36)])
def test_every_image_of_a_row(name: str, lines: int, tmp_path: Path) -> None:
    published.MAKERS[name](tmp_path / "set", np.random.default_rng(0))
    model, row, out = tiny_model(), row_named(name), str(tmp_path / "row.parquet")
    assert embed_row(model, row, str(tmp_path / "set"), out) == lines
    held, items = pq.read_table(out).to_pylist(), row.read(str(tmp_path / "set"), row).items
    views = ["before", "after"] if row.kind == "pair" else [None]
    assert sorted((one["key"], str(one["view"])) for one in held) == sorted(
        (item.key, str(view)) for item in items for view in views
    )
    first = make_batch(model, row, [items[0].read()]).views[0]
    with torch.no_grad():
        expected = network(model.skysense, "mean")(first, None, 0)
    (found,) = (one for one in held if (one["key"], one["view"]) == (items[0].key, views[0]))
    for sensor in (*row.sensors, "fused"):
        np.testing.assert_allclose(found[sensor], expected[f"pooled:{sensor}"][0].numpy(), atol=1e-5)
    assert all(found[sensor] is None for sensor in set(model.cfg.modalities) - set(row.sensors))
    assert (found["label"] is not None) == (row.kind in ("class", "labels"))
    frame = geopandas.read_parquet(out)
    assert frame.geometry.notna().all() == (name == "oscd")  # the only one of these whose files say a place
    assert frame.crs.to_epsg() in (4326, None)


def test_places_are_the_files(tmp_path: Path) -> None:
    """A polygon where a set says its grid, a tile's own part of it, a point where only the centre is known, null of pictures."""
    from pipeline.embeddings import _place
    from pipeline.evaluate.items import footprint_of_tile
    from pipeline.evaluate.readers.geobench import _footprint

    grid = {
        "stac:crs": "EPSG:32634",
        "stac:geotransform": [580380.0, 10.0, 0.0, 4792800.0, 0.0, -10.0],
        "stac:raster_shape": [120, 100],
    }
    whole = _footprint(grid)
    assert whole == ("EPSG:32634", (580380.0, 4791600.0, 581380.0, 4792800.0))
    assert footprint_of_tile(whole, (120, 100), 64, 64, 64) == (
        "EPSG:32634",
        (581020.0, 4791600.0, 581380.0, 4792160.0),
    )
    wkb, box = _place(whole)
    assert box is not None
    assert geopandas.GeoSeries.from_wkb([wkb]).iloc[0].bounds == pytest.approx(tuple(box.values()), abs=1e-4)
    assert (box["xmin"], box["ymin"]) == pytest.approx((21.9918, 43.2728), abs=2e-3)
    point, _ = _place(_footprint({"lon": 5.5, "lat": 44.1}))
    assert geopandas.GeoSeries.from_wkb([point]).iloc[0].wkt == "POINT (5.5 44.1)"
    assert _place(_footprint({})) == (None, None)


def arguments(**change: object) -> argparse.Namespace:
    plain = {
        "checkpoint": "none",
        "input": "nowhere",
        "key": None,
        "task": None,
        "sensors": None,
        "pool": "mean",
        "stage": "last",
        "json": False,
    }
    return argparse.Namespace(**plain | change)


def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    out = str(tmp_path / "x.parquet")
    for change, says in (
        ({"out": out}, "nowhere is no shard set"), ({"out": out, "key": "a"}, "--key is for one site"),
        ({"out": out, "task": "benv"}, "near it: benv2"), ({"out": "x.npz", "task": "benv2"}, "must end in .parquet"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            command.main(arguments(**change))
    published.MAKERS["eurosat_rgb"](tmp_path / "set", np.random.default_rng(0))
    (tmp_path / "set" / "Farm" / "farm_2.jpg").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"farm_2\.jpg"):
        embed_row(tiny_model(), row_named("eurosat_rgb"), str(tmp_path / "set"), out)
    assert not Path(out).exists()
