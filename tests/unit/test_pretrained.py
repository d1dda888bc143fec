"""The exported model: a plain module, the same features, missing modalities masked; embed and outside labelled sets on top."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from safetensors.torch import save_file

from cluster.errors import UsageError
from data_prep.config import GridConfig
from data_prep.simulate.write import simulate
from data_prep.sources import open_catalog, read_site
from model.config import ModelConfig, MoEConfig
from model.pretrained import Pretrained, load_backbone, save_backbone
from pipeline.config import ProbeConfig, ViewConfig
from pipeline.embed import embed, find_site, write_features
from pipeline.probes.offline import probe_model
from pipeline.probes.outside import list_outside, read_image, split_outside

STATISTICS = {
    "hr": {"mean": [120.0] * 3, "std": [40.0] * 3}, "s2": {"mean": [2000.0] * 10, "std": [900.0] * 10},
    "s1": {"mean": [-12.0, -18.0], "std": [3.0, 3.0]},
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Pretrained:
    torch.manual_seed(0)
    cfg = ModelConfig(size="debug", moe=MoEConfig(experts=2, blocks=1))
    return Pretrained(cfg, STATISTICS, {"run_id": "abc"}).eval()


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> str:
    return simulate(str(tmp_path_factory.mktemp("pretrained") / "sites"), 2, seed=3, side_m=80)


def _images() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hr": torch.randint(0, 255, (2, 3, 64, 64), generator=generator, dtype=torch.uint8),
        "s2": torch.randint(1, 4000, (2, 3, 10, 8, 8), generator=generator).to(torch.float32),
        "s1": -12 + torch.randn(2, 2, 2, 8, 8, generator=generator),
    }


@torch.no_grad()
def test_a_file_gives_back_the_same_features(model: Pretrained, tmp_path: Path) -> None:
    path = str(tmp_path / "m.safetensors")
    save_backbone(path, model.skysense.state_dict(), model.cfg, STATISTICS, {"step": 3})
    again = load_backbone(path)
    assert again.facts == {"step": 3}
    assert again.cfg == model.cfg
    assert torch.equal(again(_images()).fused, model(_images()).fused)


@torch.no_grad()
def test_what_is_missing_changes_nothing_for_the_rest(model: Pretrained) -> None:
    images = _images()
    s2_only = model({"s2": images["s2"]})
    assert not s2_only.dense_valid["hr"].any()
    assert not s2_only.dense_valid["s1"].any()
    torch.testing.assert_close(s2_only.dense["s2"], model(images).dense["s2"], atol=1e-5, rtol=1e-4)
    clouded = dict(
        images, s2=torch.cat([images["s2"], torch.zeros_like(images["s2"][:, :1])], 1)
    )  # a date of nodata more
    torch.testing.assert_close(model({"s2": clouded["s2"]}).fused, s2_only.fused, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_pyramid_has_four_maps_fine_to_coarse(model: Pretrained) -> None:
    maps = model.pyramid("hr", _images()["hr"], gsd_m=0.25)
    assert [tuple(m.shape[1:]) for m in maps] == [(d, s, s) for d, s in zip(model.pyramid_dims, (16, 8, 4, 2))]
    kept = model.pyramid("hr", _images()["hr"], merges=(False, False, False))
    assert [m.shape[-1] for m in kept] == [16, 16, 16, 16]
    assert torch.equal(kept[0], maps[0])


def test_it_trains_as_a_plain_module(model: Pretrained) -> None:
    maps = model.pyramid("s2", _images()["s2"])
    maps[-1].square().mean().backward()
    grads = [p.grad for p in model.skysense.backbone.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)
    model.zero_grad()


def test_odd_chip_sizes_work(model: Pretrained) -> None:
    with torch.no_grad():
        features = model({"s2": torch.full((1, 10, 6, 6), 1000.0)})
    assert features.fused_valid.any()


def test_bad_inputs_and_files_are_one_line(model: Pretrained, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="reads hr, s2, s1; found sar"):
        model({"sar": torch.zeros(1, 2, 8, 8)})
    with pytest.raises(UsageError, match=r"s2 must be \[B, T, 10, H, W\]"):
        model({"s2": torch.zeros(1, 4, 8, 8)})
    with pytest.raises(UsageError, match="does not exist"):
        load_backbone(str(tmp_path / "none.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    with pytest.raises(UsageError, match="not a readable safetensors"):
        load_backbone(str(tmp_path / "bad.safetensors"))
    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(UsageError, match="no exported backbone"):
        load_backbone(str(tmp_path / "other.safetensors"))


def test_embed_places_features_on_the_ground(model: Pretrained, catalog: str, tmp_path: Path) -> None:
    keys = [record.key for record in open_catalog(catalog)]
    site = find_site(catalog, keys[1])
    arrays = embed(model, site)
    assert arrays["hr"].shape == (1, 8, 8, 128)
    assert arrays["s2"].shape[0] == len(arrays["s2_dates"]) == len(site.series["s2"].datetimes)
    assert arrays["side_m"] == 80.0
    assert (arrays["west_m"], arrays["north_m"]) == (site.footprint[0], site.footprint[3])
    with pytest.raises(UsageError, match="choose one with --key"):
        find_site(catalog, None)
    with pytest.raises(UsageError, match="holds no site nowhere"):
        find_site(catalog, "nowhere")
    write_features(str(tmp_path / "x.npz"), arrays, {"step": 1})
    with np.load(tmp_path / "x.npz", allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["fused"], arrays["fused"])
        assert json.loads(str(stored["facts"])) == {"step": 1}


def test_embed_of_a_site_without_hr(model: Pretrained, catalog: str) -> None:
    site = read_site(open_catalog(catalog)[0], GridConfig(), modalities=("s2",))
    arrays = embed(model, site)
    assert "hr" not in arrays
    assert np.isfinite(arrays["fused"]).all()


def _tif(path: Path, pixels: np.ndarray, east: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", width=pixels.shape[2], height=pixels.shape[1], count=len(pixels), dtype=pixels.dtype.name,
        crs="EPSG:32632", transform=from_origin(300_000 + east * 30_000, 5_500_000, 10, 10),
    ) as raster:  # fmt: skip
        raster.write(pixels)


def test_folder_of_classes_is_probed_by_place(model: Pretrained, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(24):
        level = 800 if number % 2 else 3000
        pixels = (level + rng.normal(0, 60, (10, 16, 16))).astype(np.uint16)
        _tif(tmp_path / ("bright" if number % 2 == 0 else "dark") / f"{number}.tif", pixels, number)
    items, classes = list_outside(str(tmp_path))
    assert classes == ["bright", "dark"]
    train, test, digest = split_outside(items)
    assert not {items[i].place for i in train} & {items[i].place for i in test}
    assert digest == split_outside(items)[2]
    result = probe_model(model, str(tmp_path), "linear", ProbeConfig(), ViewConfig())
    assert result.trained["s2"].value == 1.0
    assert "hr" not in result.trained
    with pytest.raises(UsageError, match="cannot serve --task segment"):
        probe_model(model, str(tmp_path), "segment", ProbeConfig(), ViewConfig())


def test_images_with_label_rasters_are_segmented(model: Pretrained, tmp_path: Path) -> None:
    for number in range(12):
        truth = np.zeros((16, 16), np.uint8)
        truth[:, 8:] = 1
        pixels = np.where(truth, 3000, 600)[None].repeat(10, 0).astype(np.uint16)
        _tif(tmp_path / "images" / f"{number}.tif", pixels, number)
        _tif(tmp_path / "labels" / f"{number}.tif", truth[None], number)
    result = probe_model(model, str(tmp_path), "segment", ProbeConfig(), ViewConfig())
    assert result.trained["s2"].value > 0.9
    (tmp_path / "labels" / "3.tif").unlink()
    with pytest.raises(UsageError, match="has no label raster"):
        list_outside(str(tmp_path))


def test_bands_are_told_by_their_number(tmp_path: Path) -> None:
    for count, modality in ((3, "hr"), (13, "s2"), (12, "s2"), (2, "s1")):
        dtype = np.float32 if count == 2 else np.uint16
        _tif(tmp_path / f"{count}.tif", np.arange(count, dtype=dtype)[:, None, None] + np.zeros((1, 4, 4), dtype), 0)
        name, pixels, gsd = read_image(str(tmp_path / f"{count}.tif"))
        assert (name, gsd) == (modality, 10.0)
        if count == 12:
            assert pixels[:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]
    _tif(tmp_path / "5.tif", np.zeros((5, 4, 4), np.uint8), 0)
    with pytest.raises(UsageError, match="has 5 bands"):
        read_image(str(tmp_path / "5.tif"))
