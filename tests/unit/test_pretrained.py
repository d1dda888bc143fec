"""The exported model: a plain module, the same features, missing modalities masked; embed and outside labelled sets on top."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import UsageError
from data_prep.config import GridConfig
from data_prep.simulate.write import simulate
from data_prep.sources import open_catalog, read_site
from model.config import ModelConfig, MoEConfig
from model.pretrained import Pretrained, load_backbone, save_backbone
from pipeline.embed import embed, find_site, write_features

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
