"""Training on a set that grew, or on a set of sets, is training on one built at once: the same views of the same sites; only their order differs."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch

from data_prep import build as building
from data_prep import grow
from data_prep.build import build
from data_prep.config import SourceConfig, SplitConfig
from data_prep.grow import append
from pipeline.reader.buffers import tensors
from pipeline.reader.reader import Reader
from tests.unit.test_build import World, config
from tests.unit.test_reader import MODEL, settings_of


def views(url: str) -> tuple[dict[str, str], list[str], dict]:
    """Of one epoch over the training sites: per key a hash of all its views, the keys in order, and the statistics."""
    found: dict[str, str] = {}
    data = dataclasses.replace(settings_of(url.split(",")[0]), url=url if "," not in url else tuple(url.split(",")))
    with Reader(data, MODEL, seed=7, batch_per_rank=2, epochs=1) as reader:
        for batch in reader:
            still = dataclasses.replace(batch, position_B=torch.zeros_like(batch.position_B))
            for i, key in enumerate(batch.keys):
                if key:
                    digest = hashlib.sha256()
                    for tensor in tensors(still):
                        digest.update(tensor[i].numpy().tobytes())
                    found[key] = digest.hexdigest()
        return found, list(found), reader.statistics


@pytest.fixture
def sets(monkeypatch, tmp_path) -> dict[str, str]:
    """once: twelve sites built at once; grown: eleven, and one appended; two: the same as sets of their own."""
    world = World()
    for module in (building, grow):
        monkeypatch.setattr(module, "read_catalogs", lambda config: (world.records, []))
    monkeypatch.setattr(building, "read_site", world.read_site)
    everything = list(world.records)

    def own(name: str, catalog: str = "all"):
        (tmp_path / f"{catalog}.parquet").write_bytes(catalog.encode())
        split = SplitConfig({"train": 0.6, "val": 0.2, "probe": 0.2}, min_cells=1)
        return dataclasses.replace(
            config(tmp_path / name), split=split, source=SourceConfig((f"{tmp_path}/{catalog}.parquet",))
        )

    build(own("once"))
    world.records = everything[:9]
    build(own("grown", "old"))
    build(own("old", "old"))
    world.records = everything
    append(own("grown", "all"))
    world.records = everything[9:]
    build(own("new", "new"))
    return {"once": f"{tmp_path}/once", "grown": f"{tmp_path}/grown", "two": f"{tmp_path}/old,{tmp_path}/new"}


def test_the_same_views_of_the_same_sites(sets):
    found = {name: views(url) for name, url in sets.items()}
    once, order, statistics = found["once"]
    assert len(once) >= 4
    for name in ("grown", "two"):
        own, own_order, own_statistics = found[name]
        assert own == once, name
        assert sorted(own_order) == sorted(order)
        for sensor, entry in statistics.items():
            assert own_statistics[sensor].count == entry.count
            assert own_statistics[sensor].mean == pytest.approx(entry.mean, rel=1e-12)
            assert own_statistics[sensor].std == pytest.approx(entry.std, rel=1e-9)
    assert found["grown"][2] == statistics  # whole numbers were added: nothing is rounded, percentiles included
