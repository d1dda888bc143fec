"""Patches without georeference: what is declared decides, what is not is refused, and nobody can take them for places."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from PIL import Image

from cluster.errors import RunFailure, UsageError
from data_prep.audit import audit, figures
from data_prep.build import build
from data_prep.catalog import make_catalog
from data_prep.config import BuildConfig, GridConfig, OutputConfig, SourceConfig, SplitConfig
from data_prep.geo import has_place, no_place_crs
from data_prep.schema import MODALITIES
from data_prep.shards import ShardSet
from data_prep.sources import open_catalog, read_site, split_site
from data_prep.sources.patches import declaration
from data_prep.split import assign
from data_prep.verify import verify
from pipeline.config import DataConfig, ViewConfig
from pipeline.reader.views import SiteFacts, plan
from pipeline.reader.whole import WholeSites
from tests.data_folder import real_data

L2A = "B01,B02,B03,B04,B05,B06,B07,B08,B8A,B09,B11,B12"
S2 = MODALITIES["s2"].bands


def patches(count=6, channels=12, side=16, seed=0):
    return np.random.default_rng(seed).integers(50, 6000, (count, channels, side, side)).astype(np.uint16)


def images(root, names, side=(40, 50), seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)).save(path)
    return str(root)


def catalogued(source, tmp_path, declared, name="catalog.parquet"):
    out = str(tmp_path / name)
    found = make_catalog(str(source), out, "patches", declared=declared)
    return open_catalog(out), found, out


def s2(unit="dn", bands=L2A, gsd=10.0, **more):
    return declaration("s2", unit, bands, gsd, **more)


def hr(gsd=0.3, bands="", **more):
    return declaration("hr", "uint8", bands, gsd, **more)


@pytest.mark.parametrize("kind", ["npz", "npy"])
@pytest.mark.parametrize(
    ("unit", "made"),
    [
        ("dn", lambda x: x),
        ("dn-offset", lambda x: x + 1000),
        ("reflectance", lambda x: (x / 10_000).astype(np.float32)),
    ],
)
def test_declared_units_and_band_orders_give_the_same_reflectance(tmp_path, kind, unit, made):
    truth = patches(channels=10)
    order = np.random.default_rng(1).permutation(10)
    extra = np.concatenate([made(truth[:, order]), made(truth[:, :1])], axis=1)  # a band we do not store, at the end
    path = tmp_path / f"tiles.{kind}"
    np.savez(path, x=extra, y=np.arange(6)) if kind == "npz" else np.save(path, extra)
    records, found, _ = catalogued(path, tmp_path, s2(unit, ",".join([*(S2[i] for i in order), "B01"])))
    assert found.notes == ["bands dropped, s2 does not store them: B01"]
    assert len(records) == len(truth)
    for record, wanted in zip(records, truth):
        site = read_site(record, GridConfig())
        assert (site.series["s2"].pixels_TCHW[0] == wanted).all()
        assert site.series["s2"].datetimes == [""]
        assert not has_place(site.crs)
        assert site.series["s2"].decisions[0]["flags"] == []
        assert "made up" in site.series["s2"].decisions[0]["position"]


def test_images_keep_their_pixels_and_their_folder_as_label(tmp_path):
    root = images(tmp_path / "in", ["Forest/a.png", "Beach/a.png", "Beach/b.jpg"], side=(40, 50))
    records, _, out = catalogued(root, tmp_path, hr())
    assert [record.key for record in records] == ["Beach_a", "Beach_b", "Forest_a"]
    assert [record.scalars["scene"] for record in records] == [0, 0, 1]
    assert records[0].classes == {"scene": ["Beach", "Forest"]}
    for record in records:
        site = read_site(record, GridConfig())
        with rasterio.open(record.assets[0].href) as dataset:
            assert (site.series["hr"].pixels_TCHW[0] == dataset.read()).all()
        assert site.series["hr"].gsd_m == pytest.approx(0.3)
        width, height = (site.footprint[2] - site.footprint[0], site.footprint[3] - site.footprint[1])
        assert (width, height) == pytest.approx((15.0, 12.0))
    assert not [row for row in audit(out) if row.verdict != "ok"]
    unlabelled, _, _ = catalogued(root, tmp_path, hr(labels=False), "plain.parquet")
    assert all(record.scalars == {} and record.classes == {} for record in unlabelled)


def test_an_alpha_channel_is_the_mask(tmp_path):
    rgba = np.random.default_rng(0).integers(1, 256, (20, 20, 4), dtype=np.uint8)
    rgba[..., 3] = 255
    rgba[:5, :, 3] = 0
    Image.fromarray(rgba, "RGBA").save(tmp_path / "a.png")
    records, _, _ = catalogued(tmp_path / "a.png", tmp_path, hr())
    series = read_site(records[0], GridConfig()).series["hr"]
    assert (series.mask_THW[0] == 1).sum() == 15 * 20
    assert (series.pixels_TCHW[0, :, 5:] == rgba[5:, :, :3].transpose(2, 0, 1)).all()


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"sensor": ""}, "--sensor"), ({"unit": ""}, "--unit dn or"), ({"unit": "uint8"}, "--unit dn or"), ({"gsd_m": 0}, "--gsd"),
        ({"bands": "B02,B03"}, "B04 is missing"), ({"bands": L2A + ",B02"}, "B02 stands twice"), ({"group": "(x"}, "--group"),
        ({"group": "x"}, "parentheses"), ({"sensor": "hr", "bands": "R,G,B"}, "--unit uint8"),
    ],
)  # fmt: skip
def test_what_is_not_declared_is_refused_by_the_option_that_is_missing(fields, names):
    told = {"sensor": "s2", "unit": "dn", "bands": L2A, "gsd_m": 10.0} | fields
    with pytest.raises(UsageError, match=names) as error:
        declaration(**told)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("array", "declared", "why"),
    [
        (patches(), s2(bands=",".join(S2)), r"wanted \[N, 10, H, W\]"),
        (patches().transpose(0, 2, 3, 1), s2(), "transpose it"),
        (patches(), s2("reflectance"), "declare --unit dn"),
        ((patches() / 10_000).astype(np.float32), s2("dn"), "declare --unit reflectance"),
        (patches(channels=3), hr(bands="R,G,B"), "wanted uint8"),
        (np.array([[[[{}]]]], dtype=object), hr(bands="R,G,B"), "cannot be read as arrays"),
    ],
)
def test_numbers_that_contradict_the_declaration_are_refused(tmp_path, array, declared, why):
    np.savez(tmp_path / "x.npz", x=array)
    with pytest.raises(RunFailure, match=why):
        catalogued(tmp_path / "x.npz", tmp_path, declared)
    assert not (tmp_path / "catalog.parquet").exists()


def test_several_arrays_need_a_name(tmp_path):
    np.savez(tmp_path / "x.npz", a=patches(), b=patches(3, seed=1))
    with pytest.raises(RunFailure, match="--array"):
        catalogued(tmp_path / "x.npz", tmp_path, s2())
    records, _, _ = catalogued(tmp_path / "x.npz", tmp_path, s2(array="b"))
    assert len(records) == 3


def test_arrays_and_tiffs_need_bands_and_a_georeference_belongs_elsewhere(tmp_path):
    np.savez(tmp_path / "x.npz", x=patches())
    with pytest.raises(UsageError, match="--bands"):
        catalogued(tmp_path / "x.npz", tmp_path, s2(bands=""))
    placed = tmp_path / "placed"
    placed.mkdir()
    with rasterio.open(
        placed / "a.tif", "w", driver="GTiff", width=8, height=8, count=3, dtype="uint8", crs="EPSG:32633",
        transform=rasterio.Affine(0.3, 0, 5e5, 0, -0.3, 5e6),
    ) as dataset:  # fmt: skip
        dataset.write(np.ones((3, 8, 8), np.uint8))
    with pytest.raises(UsageError, match="--bands"):
        catalogued(placed, tmp_path, hr())
    with pytest.raises(RunFailure, match="--layout geotiff"):
        catalogued(placed, tmp_path, hr(bands="R,G,B"))


def test_splits_follow_the_group_and_nothing_else(tmp_path):
    names = [f"scene{n}_{k}.png" for n in range(30) for k in range(3)]
    config = SplitConfig(fractions={"train": 0.5, "val": 0.25, "probe": 0.25}, buffer_m=1e6, cell_m=50_000)
    one, _, _ = catalogued(images(tmp_path / "one", names), tmp_path, hr(group=r"^(.+)_\d+$"), "a.parquet")
    found = assign(one, config)
    by_scene: dict[str, set[str]] = {}
    for record, split in zip(one, found.splits):
        by_scene.setdefault(record.key.partition("_")[0], set()).add(split)
    assert all(len(splits) == 1 for splits in by_scene.values())
    assert set().union(*by_scene.values()) == {"train", "val", "probe"}  # made-up neighbours are no neighbours
    two, _, _ = catalogued(images(tmp_path / "two", names[:45]), tmp_path, hr(group=r"^(.+)_\d+$"), "b.parquet")
    drawn = {record.key: split for record, split in zip(one, found.splits)}
    again = {record.key: split for record, split in zip(two, assign(two, config).splits)}
    assert again.items() <= drawn.items()  # what else is there, and where it lies, decides nothing


def test_keys_are_unique_whatever_the_names(tmp_path):
    long = "x" * 90
    names = ["a/b.png", "a_b.png", "a b.png", f"{long}1.png", f"{long}2.png", "é.png"]
    records, _, _ = catalogued(images(tmp_path / "in", names), tmp_path, hr(labels=False))
    keys = [record.key for record in records]
    assert len(set(keys)) == len(names)
    assert all(len(key) <= 80 for key in keys)


def test_listed_files_only(tmp_path):
    root = images(tmp_path / "in", ["a.png", "b.png", "c.png"])
    records, _, _ = catalogued(root, tmp_path, hr(files=("c.png", "a.png")))
    assert [record.key for record in records] == ["a", "c"]
    with pytest.raises(UsageError, match=r"no file d\.png"):
        catalogued(root, tmp_path, hr(files=("d.png",)))


def test_a_set_of_patches_builds_verifies_and_says_it_has_no_place(tmp_path):
    images(tmp_path / "in", [f"K{n % 2}/{n}.png" for n in range(12)], side=(227, 227))
    _, _, catalog = catalogued(tmp_path / "in", tmp_path, hr())
    url = str(tmp_path / "shards")
    build(BuildConfig(SourceConfig((catalog,)), OutputConfig(url), split=SplitConfig(min_cells=0), workers=1))
    assert verify(url, decode=True) == []
    assert figures(audit(url))["contradictions"] == []
    index = ShardSet.open(url).read_index(["place", "crs", "cell"])
    assert set(index["place"].to_pylist()) == {"none"}
    assert set(index["crs"].to_pylist()) == {no_place_crs()}
    boxed = BuildConfig(
        SourceConfig((catalog,), bbox=(-10, -10, 10, 10)), OutputConfig(str(tmp_path / "none")), workers=1
    )
    with pytest.raises(UsageError, match=r"outside source\.bbox"):
        build(boxed)
    sites = WholeSites(url, "", ("hr",), ViewConfig(96, 6, 1, 1))  # 68.1 m sites, views of 60 m
    view = sites.batch(range(4)).u.modalities["hr"]
    sites.close()
    assert view.valid_BTHW.all()


def test_images_that_are_no_multiple_of_10_m_have_many_crops():
    data = DataConfig(views_global=ViewConfig(96, 6, 1, 1), views_local=ViewConfig(48, 3, 1, 1), scale=(0.5, 1.0))
    alone = SiteFacts(68.1, 68.1, {"hr": np.ones(1)})
    views = [view for n in range(200) for view in plan(alone, data, 0, 0, f"site{n}")]
    for view in views:
        crop = view.crop
        assert crop.side_m.is_integer()
        assert min(crop.x0_m, crop.y0_m) >= 0
        assert max(crop.x0_m, crop.y0_m) + crop.side_m <= 68.1 + 1e-9
    assert len({view.crop.x0_m for view in views}) > 20
    assert len({view.crop.side_m for view in views}) > 20
    both = SiteFacts(70.0, 70.0, {"hr": np.ones(1), "s2": np.ones(2)})
    for view in plan(both, data, 0, 0, "site"):
        assert all(value % 10 == 0 for value in (view.crop.x0_m, view.crop.y0_m, view.crop.side_m))


def test_real_tiles_and_images_become_sites(tmp_path):
    tiles = real_data("unlabelled") / "s2_l2a_500.npz"
    records, _, out = catalogued(tiles, tmp_path, s2())
    with np.load(tiles) as file:
        raw = file["x"][7]
    assert len(records) == 500
    kept = [L2A.split(",").index(band) for band in S2]
    assert (read_site(records[7], GridConfig()).series["s2"].pixels_TCHW[0] == raw[kept]).all()
    assert figures(audit(out))["contradictions"] == []


def test_real_aerial_images_are_cut_into_sites(tmp_path):
    root = real_data("labelled/nwpu_vhr10/positive image set")
    first = sorted(path.name for path in root.glob("*.jpg"))[:3]
    records, _, _ = catalogued(root, tmp_path, hr(gsd=0.5, files=tuple(first)))
    parts = [part for record in records for part in split_site(record, GridConfig(side_m=130, tile=True))]
    assert len(parts) > len(records)
    assert {part.cell for part in parts} == {record.cell for record in records}
    site = read_site(parts[0], GridConfig(side_m=130, tile=True))
    with rasterio.open(root / first[0]) as dataset:
        assert (site.series["hr"].pixels_TCHW[0] == dataset.read()[:, :260, :260]).all()
