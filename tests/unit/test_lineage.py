"""Which files a sample came from, which samples an image went into, and a set at a glance."""

from __future__ import annotations

import dataclasses
import io
import json

import matplotlib.image
import numpy as np
import pytest

from cluster.errors import UsageError
from data_prep import build as building
from data_prep.build import build
from data_prep.lineage import about, samples_of
from data_prep.overview import draw_overview, faulty, overview
from data_prep.shards import ShardSet
from data_prep.sources.records import SourceFault
from tests.unit.test_build import World, config


@pytest.fixture
def shards(monkeypatch, tmp_path) -> ShardSet:
    """Twelve sites, of which k_7 cannot be read; k_3's s2 has a date more in the catalog than could be had."""
    world = World()
    world.broken = {"k_7": SourceFault("k_7/s2", "corrupt tile 12")}
    lost = next(a for a in world.records[3].of("s2"))
    lost = dataclasses.replace(lost, id="item_lost/s2", datetime="2022-01-01T00:00:00Z", href="lost.tif")
    world.records[3] = dataclasses.replace(world.records[3], assets=(*world.records[3].assets, lost))
    monkeypatch.setattr(building, "read_catalogs", lambda config: (world.records, []))
    monkeypatch.setattr(building, "read_site", world.read_site)
    build(config(tmp_path / "set", error_budget=0.5))
    return ShardSet.open(f"{tmp_path}/set")


def test_a_sample_names_its_files_and_an_image_its_samples(shards):
    found = about(shards, "k_3")
    assert (found["key"], found["split"]) == ("k_3", shards.index["split"][found["row"]].as_py())
    sources = {source["item"]: source for source in found["sources"]}
    assert len(sources) >= 2
    assert sources["item_lost"] == {
        "modality": "s2", "item": "item_lost", "datetime": "2022-01-01T00:00:00Z", "product_id": sources["item_lost"]["product_id"],
        "href": "lost.tif", "used": False,
    }  # fmt: skip
    own = next(source for source in found["sources"] if source["used"] is not False)
    assert "k_3" in {row["key"] for row in samples_of(shards, own["item"])}
    assert {row["key"] for row in samples_of(shards, "S2_001")} == set(shards.index["key"].to_pylist())  # by product
    assert samples_of(shards, "item_lost") == []
    with pytest.raises(UsageError, match="no sample 'k_7'"):
        about(shards, "k_7")


def test_a_set_at_a_glance(shards):
    found = overview(shards)
    rows = shards.index.to_pylist()
    assert found.placed == len(rows) == 11
    for name, its in found.sensors.items():
        shares = [share for row in rows for share in row[f"{name}_clear"] or ()]
        assert its["samples"] == sum(bool(row[f"{name}_clear"]) for row in rows)
        assert its["clear"] == pytest.approx(np.mean(shares), abs=1e-6)
        assert its["dates"] * its["samples"] == pytest.approx(len(shares))
    assert found.sensors["s1"]["orbits"] == {"ascending": sum(len(row["s1_orbits"]) for row in rows)}
    assert found.column("clear") == pytest.approx([np.mean(row["s2_clear"]) for row in rows], abs=1e-6)
    picture = matplotlib.image.imread(io.BytesIO(draw_overview(found, "set")))
    assert picture.shape[1] > 800


def test_reasons_are_counted(shards):
    assert faulty(shards.url) == {
        "sites": [{"why": "corrupt tile ##", "count": 1, "first": "k_7: k_7/s2"}],
        "dates": [],
    }


def test_the_command_shows_each(shards, tmp_path, capsys):
    from cluster.cli import Parser
    from data_prep.commands import show

    parser = Parser("show")
    show.add_arguments(parser)
    for options in (
        ["--key", "k_3", "--out", f"{tmp_path}/k.png"],
        ["--map", "--out", f"{tmp_path}/m.png"],
        ["--image", "S2_001"],
        ["--faulty"],
    ):
        assert show.main(parser.parse_args([shards.url, *options, "--json"])) == 0
        assert isinstance(json.loads(capsys.readouterr().out.splitlines()[-1]), dict)
    assert (tmp_path / "k.png").stat().st_size > 1000
    assert (tmp_path / "m.png").stat().st_size > 1000
