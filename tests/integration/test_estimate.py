"""`build --dry-run` against what the build then does, counted by the server it reads from."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cluster.errors import UsageError
from data_prep.build import build
from data_prep.commands.build import prices_of
from data_prep.config import BuildConfig, GridConfig, OutputConfig, ShardsConfig, SourceConfig
from data_prep.estimate import Prices, estimate
from data_prep.sources import raster
from tests.integration.test_build_runs import run
from tests.integration.test_source_http import BLOCK, fresh, scene
from tests.range_server import RangeServer

pytestmark = pytest.mark.integration
__all__ = ["fresh"]
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")


def near(found: float, truth: float) -> bool:
    print(f"said {found:.0f}, was {truth:.0f}: {found / truth - 1:+.1%}")
    return abs(found - truth) <= 0.1 * truth


@pytest.mark.parametrize(("side_m", "patch"), [(640.0, BLOCK), (1280.0, BLOCK), (2560.0, BLOCK), (2560.0, 64)])
def test_bytes_and_requests_are_those_of_the_build(tmp_path, side_m, patch):
    """529, 121 or 25 sites share blocks (of 450 kB, or 14 kB where a patch repeats) and files; nine of them are read beforehand."""
    with RangeServer(tmp_path) as server:
        url = scene(tmp_path, server.url, 2, BANDS, patch=patch)
        config = BuildConfig(
            source=SourceConfig((url,)), output=OutputConfig(str(tmp_path / "set")), grid=GridConfig(side_m=side_m, tile=True),
            shards=ShardsConfig(max_samples=12), workers=1,
        )  # fmt: skip
        server.reset()
        said = estimate(config, 9, 1, 1, Prices(read_gb=1.0))
        assert server.requests > 20
        assert not (tmp_path / "set").exists()
        raster._open_rasters.held.clear()
        server.reset()
        outcome = build(config)
        assert outcome.faults == []
        assert said["sites"] == said["samples"] == outcome.manifest["counts"]["samples"]
        assert said["shards"] == outcome.manifest["counts"]["shards"]
        assert near(said["read_requests"], server.requests)
        assert near(said["read_bytes"], server.bytes)
        assert near(said["written_bytes"], outcome.manifest["counts"]["bytes"])
        assert said["cost"]["total"] == pytest.approx(said["read_bytes"] / 1e9)


def test_the_command_says_it_and_writes_nothing(tmp_path):
    run("simulate", str(tmp_path / "scenes"), "--sites", "6", "--seed", "3")
    demo = [
        "data_prep/runs/demo.yaml",
        f"source.catalog=[{tmp_path}/scenes/catalog.parquet]",
        f"output.url={tmp_path}/set",
    ]
    figures, _ = run("build", *demo, "--dry-run", "--sample", "2", "--prices", "hour=2,write_gb=1", "--json")
    assert figures["sites"] == 6
    assert figures["sampled_sites"] == 2
    assert figures["read_requests"] == 0  # local files
    assert figures["cost"]["total"] > 0
    assert not (tmp_path / "set").exists()
    _, err = run("build", *demo, "--dry-run", "--prices", "egress=1", code=2)
    assert "egress is none of" in err


def test_prices_are_read_strictly():
    assert prices_of("read_gb=0.09,hour=2") == dataclasses.replace(Prices(), read_gb=0.09, hour=2.0)
    with pytest.raises(UsageError, match="not a number"):
        prices_of("hour=cheap")


def test_submit_still_learns_the_config(tmp_path):
    figures, _ = run("build", "data_prep/runs/demo.yaml", "--resolve", "--json")
    assert figures["resolved"]["output"]["url"] == "demo_out/shards"
    assert json.dumps(figures["fingerprint"])


def test_of_a_large_plan_some_runs_of_slices_stand_for_all(tmp_path, monkeypatch):
    """Files that every site shares are opened once, however many sites are not counted."""
    with RangeServer(tmp_path) as server:
        url = scene(tmp_path, server.url, 2, BANDS, patch=BLOCK)
        config = BuildConfig(
            source=SourceConfig((url,)), output=OutputConfig(str(tmp_path / "set")), grid=GridConfig(side_m=640.0, tile=True),
            shards=ShardsConfig(max_samples=12),
        )  # fmt: skip
        whole = estimate(config, 9, 1, 1, Prices())
        monkeypatch.setattr("data_prep.estimate.COUNTED_SITES", whole["sites"] // 2)
        half = estimate(config, 9, 1, 1, Prices())
        assert half["files_opened"] == whole["files_opened"] == 40
        assert half["sites"] == whole["sites"]
        assert near(half["written_bytes"], whole["written_bytes"])
        assert whole["read_requests"] <= half["read_requests"] <= 1.5 * whole["read_requests"]
