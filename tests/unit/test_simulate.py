"""Simulated sites: deterministic, on one footprint, physically plausible, and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import zarr

from cluster.errors import UsageError
from data_prep.schema import MODALITIES
from data_prep.simulate import write
from data_prep.simulate.landcover import CELL_PX, SCENES, draw_ground
from data_prep.simulate.optics import observe_s2
from data_prep.simulate.places import MAX_SITES, calendar_of, place_of
from data_prep.simulate.radar import observe_s1
from data_prep.simulate.spectra import BROADLEAF, CLASS_OF_MATERIAL, CONIFER, WATER, greenness, reflectance

SIDE_M = 80


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulate") / "sites"
    write.simulate(str(out), 4, seed=7, side_m=SIDE_M)
    return out


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in (folder / "sites").rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes_other_seed_other_bytes(sites: Path, tmp_path: Path) -> None:
    write.simulate(str(tmp_path / "again"), 4, seed=7, side_m=SIDE_M)
    write.simulate(str(tmp_path / "other"), 4, seed=8, side_m=SIDE_M)
    assert _digests(tmp_path / "again") == _digests(sites)
    pixels = [
        {d for name, d in _digests(f).items() if "data/c/" in name or name.endswith("hr.tif")}
        for f in (sites, tmp_path / "other")
    ]
    assert len(pixels[0]) == 12
    assert not pixels[0] & pixels[1]


def test_every_asset_covers_the_footprint_its_item_states(sites: Path) -> None:
    for path in sites.glob("sites/*/item.json"):
        item = json.loads(path.read_text())
        bounds = item["properties"]["proj:bbox"]
        assert all(value % 10 == 0 for value in bounds)
        for name in ("hr.tif", "landcover.tif"):
            with rasterio.open(path.parent / name) as raster:
                assert list(raster.bounds) == bounds
                assert raster.crs.to_string() == item["properties"]["proj:code"]
        for modality in ("s2", "s1"):
            cube = zarr.open_group(path.parent / f"{modality}.zarr", mode="r")
            a, _, west, _, e, north = cube.attrs["transform"]
            rows, columns = cube["data"].shape[2:]
            assert [west, north + rows * e, west + columns * a, north] == bounds
            assert tuple(cube.attrs["bands"]) == MODALITIES[modality].bands
            assert cube["data"].shape[0] == len(set(cube.attrs["datetimes"]))
            assert list(cube.attrs["datetimes"]) == sorted(cube.attrs["datetimes"])


def test_offset_is_left_in_exactly_where_the_baseline_says_so(sites: Path) -> None:
    for path in sites.glob("sites/*/s2.zarr"):
        attributes = zarr.open_group(path, mode="r").attrs
        for product, baseline, offset in zip(
            attributes["product_ids"], attributes["baselines"], attributes["boa_add_offsets"], strict=True
        ):
            assert f"_N{baseline.replace('.', '')}_" in product
            assert (offset == -1000) == (baseline >= "04.00")
    ground = draw_ground("lake", SIDE_M, np.random.default_rng(0))
    with_offset, clouded = observe_s2(ground, [180], 0, [-1000], np.random.default_rng(1))
    without, _ = observe_s2(ground, [180], 0, [0], np.random.default_rng(1))
    assert with_offset.min() > 1000
    np.testing.assert_array_equal(with_offset - 1000, without)
    assert clouded.shape == without[:, 0].shape


def test_shares_are_the_average_of_the_fine_map_and_landcover_its_majority() -> None:
    ground = draw_ground("village", SIDE_M, np.random.default_rng(3))
    np.testing.assert_allclose(ground.shares_hwM.sum(-1), 1, atol=1e-6)
    block = ground.material_HW[:CELL_PX, CELL_PX : 2 * CELL_PX]
    assert ground.shares_hwM[0, 1, WATER] == pytest.approx((block == WATER).mean())
    counts = np.bincount(CLASS_OF_MATERIAL[block.ravel()])
    assert counts[ground.landcover_hw[0, 1]] == counts.max()


def test_spectra_follow_the_seasons() -> None:
    summer, winter = reflectance(190), reflectance(15)
    ndvi = lambda table, m: (table[m, 6] - table[m, 2]) / (table[m, 6] + table[m, 2])  # noqa: E731
    assert ndvi(summer, BROADLEAF) > 0.8 > 0.5 > ndvi(winter, BROADLEAF)
    assert ndvi(winter, CONIFER) > 0.6
    assert ndvi(summer, WATER) < 0
    assert greenness(100, shift_days=20)[BROADLEAF] < greenness(100)[BROADLEAF]


def test_backscatter_is_in_the_range_of_real_scenes_and_water_is_dark() -> None:
    means = {}
    for scene in ("lake", "conifer-forest", "town"):
        frames = [
            observe_s1(draw_ground(scene, 160, rng), [100, 200], ["ascending", "descending"], 0, rng)
            for rng in map(np.random.default_rng, range(6))
        ]
        means[scene] = np.nanmean(frames, (0, 1, 3, 4))
    assert means["lake"][0] < means["conifer-forest"][0] - 3
    assert all(-24 < vv < -5 and -30 < vh < vv - 3 for vv, vh in means.values())


def test_a_quarter_of_the_pixels_is_clouded_or_missing_but_never_all_dates() -> None:
    bad = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        dn, clouded = observe_s2(draw_ground("pasture", SIDE_M, rng), list(range(10, 370, 30)), 0, [0] * 12, rng)
        bad.append((clouded > 0) | (dn[:, 0] == 0))
        assert ((dn == 0).all(1) == (dn == 0).any(1)).all()
    share = np.mean(bad)
    assert 0.1 < share < 0.5
    assert all(site.all((1, 2)).sum() < 8 for site in bad)


def test_places_are_apart_and_never_repeat() -> None:
    places = [place_of(index, 160, 0) for index in range(40)]
    assert len({place.key for place in places}) == 40
    assert len({(place.zone, place.bounds) for place in places}) == 40
    assert MAX_SITES > 10_000
    calendar = calendar_of(0, places[0], 0, 12, 8)
    assert {"ascending", "descending"} == set(calendar.s1_orbits)


def test_scene_categories_are_balanced(sites: Path) -> None:
    labels = [
        json.loads(p.read_text())["properties"]["geoloom:labels"]["scene"] for p in sites.glob("sites/*/item.json")
    ]
    assert len(set(labels)) == 4 <= len(SCENES)


def test_finished_set_is_found_again_and_other_content_is_refused(sites: Path, tmp_path: Path) -> None:
    before = _digests(sites)
    write.simulate(str(sites), 4, seed=7, side_m=SIDE_M)
    assert _digests(sites) == before
    with pytest.raises(UsageError, match="other arguments"):
        write.simulate(str(sites), 5, seed=7, side_m=SIDE_M)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        write.simulate(str(tmp_path), 4)
    with pytest.raises(UsageError, match="--side-m 45"):
        write.simulate(str(tmp_path / "x"), 4, side_m=45)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "observe_hr", lambda *_: (_ for _ in ()).throw(RuntimeError("disk full")))
    with pytest.raises(RuntimeError):
        write.simulate(str(tmp_path / "out"), 2, side_m=SIDE_M)
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_gets_the_same_files(sites: Path) -> None:
    from cluster import storage

    catalog = write.simulate("memory://simulated/sites", 1, seed=7, side_m=SIDE_M)
    assert storage.exists(catalog)
    key = next(iter(storage.list_names("memory://simulated/sites/sites")))
    remote = storage.read_bytes(f"memory://simulated/sites/sites/{key}/hr.tif")
    assert remote == (sites / "sites" / key / "hr.tif").read_bytes()
