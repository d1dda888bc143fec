"""Labelled folders from outside: declared or told by the file, never guessed; the same rows and classifiers as everywhere."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image as Pillow
from rasterio.transform import from_origin

from cluster.errors import UsageError
from data_prep.schema import MODALITIES
from model.config import ModelConfig, MoEConfig
from model.pretrained import Pretrained
from pipeline.commands import probe as command
from pipeline.config import ProbeConfig, ViewConfig
from pipeline.probes.offline import ProbeResult, prepare, probe_model
from pipeline.probes.outside import Declared, list_outside, read_image, split_outside
from tests.data_folder import real_data

S2 = MODALITIES["s2"].bands
S2_DECLARED = Declared("s2", S2, 10.0, "reflectance10000")
STATISTICS = {
    "hr": {"mean": [120.0] * 3, "std": [40.0] * 3}, "s2": {"mean": [2000.0] * 10, "std": [900.0] * 10},
    "s1": {"mean": [-12.0, -18.0], "std": [3.0, 3.0]},
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Pretrained:
    torch.manual_seed(0)
    return Pretrained(ModelConfig(size="debug", moe=MoEConfig(experts=0)), STATISTICS).eval()


def _tif(path: Path, pixels: np.ndarray, east: int = 0, gsd_m: float = 10.0, names: tuple[str, ...] = ()) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", width=pixels.shape[2], height=pixels.shape[1], count=len(pixels), dtype=pixels.dtype.name,
        crs="EPSG:32632", transform=from_origin(300_000 + east * 30_000, 5_500_000, gsd_m, gsd_m),
    ) as raster:  # fmt: skip
        raster.write(pixels)
        for number, name in enumerate(names):
            raster.set_band_description(number + 1, name)
    return str(path)


def _jpg(path: Path, level: int, size: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(level)
    pixels = np.clip(level + rng.normal(0, 4, (size, size, 3)), 0, 255).astype(np.uint8)
    Pillow.fromarray(pixels).save(path, quality=95)


def _probe(
    model: Pretrained, url: Path, declared: Declared | None, *tasks: str, **settings: object
) -> list[ProbeResult]:
    probe = ProbeConfig(tasks=tasks, **settings)  # type: ignore[arg-type]
    return probe_model(prepare(model, str(url), probe, ViewConfig(), "cpu", declared))


def test_folder_of_classes_is_probed_by_place_beside_both_rows(model: Pretrained, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(24):
        pixels = ((800 if number % 2 else 3000) + rng.normal(0, 60, (10, 16, 16))).astype(np.uint16)
        _tif(tmp_path / ("bright" if number % 2 == 0 else "dark") / f"{number}.tif", pixels, number)
    items, classes = list_outside(str(tmp_path))
    assert classes == ["bright", "dark"]
    train, test, digest = split_outside(items)
    assert not {items[i].place for i in train} & {items[i].place for i in test}
    assert digest == split_outside(items)[2]
    knn, linear = _probe(model, tmp_path, S2_DECLARED, "knn", "linear")
    for result in (knn, linear):
        assert set(result.trained) == {"s2", "fused"}
        assert result.rows["pixels"]["s2"].value == result.rows["pixels"]["fused"].value == 1.0
        told = result.to_json()
        assert (told["task"], told["pixels"], told["untrained"]) == (
            result.task,
            1.0,
            result.rows["untrained"]["fused"].value,
        )
        assert told["score"] == told["trained"]["fused"]["value"]
        assert told["baseline"]["s2"]["value"] == result.rows["untrained"]["s2"].value
        assert told["over_pixels"] == pytest.approx(told["score"] - 1.0)
        assert told["over_pixels_low"] <= told["over_pixels"] <= told["over_pixels_high"]
    assert linear.trained["s2"].value == 1.0
    with pytest.raises(UsageError, match="cannot serve --task segment"):
        _probe(model, tmp_path, S2_DECLARED, "segment")
    other = _probe(model, tmp_path, Declared("s2", S2, 20.0, "reflectance10000"), "knn")[0]
    assert other.outcomes.split != knn.outcomes.split  # another look at the same files


def test_images_with_label_rasters_are_segmented(model: Pretrained, tmp_path: Path) -> None:
    for number in range(12):
        size = 16 if number % 3 else 12  # label rasters of several sizes
        truth = np.zeros((size, size), np.uint8)
        truth[:, size // 2 :] = 1
        pixels = np.where(truth, 3000, 600)[None].repeat(10, 0).astype(np.uint16)
        _tif(tmp_path / "images" / f"{number}.tif", pixels, number)
        _tif(tmp_path / "labels" / f"{number}.tif", truth[None], number)
    result = _probe(model, tmp_path, S2_DECLARED, "segment")[0]
    assert result.trained["s2"].value > 0.8
    assert result.rows["pixels"]["s2"].value == result.rows["pixels"]["fused"].value == 1.0
    with pytest.raises(UsageError, match="cannot serve --task knn or linear"):
        _probe(model, tmp_path, S2_DECLARED, "knn")
    (tmp_path / "labels" / "3.tif").unlink()
    with pytest.raises(UsageError, match="has no label raster"):
        list_outside(str(tmp_path))


def test_rgb_at_10_m_goes_through_the_hr_tokenizer_if_declared(model: Pretrained, tmp_path: Path) -> None:
    for number in range(20):
        _jpg(tmp_path / ("bright" if number % 2 else "dark") / f"{number}.jpg", 180 if number % 2 else 60)
    with pytest.raises(UsageError, match=r"pixels of unknown size.*declare them.*--sensor hr --bands R,G,B --gsd"):
        _probe(model, tmp_path, None, "knn")
    with pytest.raises(UsageError, match="does not say how large its pixels are; declare --gsd"):
        _probe(model, tmp_path, Declared("hr"), "knn")
    found = read_image(next(iter((tmp_path / "dark").iterdir())).as_posix(), Declared("hr", (), 10.0))
    assert (found.sensor, found.gsd_m, found.pixels.shape) == ("hr", 10.0, (3, 32, 32))
    result = _probe(model, tmp_path, Declared("hr", ("R", "G", "B"), 10.0, "uint8"), "knn", stage="all")[0]
    assert result.rows["pixels"]["hr"].value == 1.0
    assert result.trained["hr"].sites == 4


def test_only_what_a_file_says_itself_is_taken_undeclared(tmp_path: Path) -> None:
    rgb = np.arange(3 * 16, dtype=np.uint8).reshape(3, 4, 4)
    found = read_image(_tif(tmp_path / "hr.tif", rgb, gsd_m=0.5))
    assert (found.sensor, found.gsd_m) == ("hr", 0.5)
    np.testing.assert_array_equal(found.pixels, rgb)
    for name, pixels, gsd_m in (
        ("coarse", rgb, 10.0), ("deep", rgb.astype(np.uint16), 0.5), ("thirteen", np.ones((13, 4, 4), np.uint16), 10.0),
        ("two", -np.ones((2, 4, 4), np.float32), 10.0),
    ):  # fmt: skip
        url = _tif(tmp_path / f"{name}.tif", pixels, gsd_m=gsd_m)
        with pytest.raises(UsageError, match="cannot be told; declare them"):
            read_image(url)


def test_bands_are_taken_by_name_and_units_converted(tmp_path: Path) -> None:
    eurosat = (
        "B01",
        "B02",
        "B03",
        "B04",
        "B05",
        "B06",
        "B07",
        "B08",
        "B09",
        "B10",
        "B11",
        "B12",
        "B8A",
    )  # B8A is last there
    pixels = (1000 + 10 * np.arange(13, dtype=np.uint16))[:, None, None] + np.zeros((1, 4, 4), np.uint16)
    url = _tif(tmp_path / "x.tif", pixels)
    found = read_image(url, Declared("s2", eurosat, None, "reflectance10000"))
    assert found.gsd_m == 10.0
    assert found.pixels[:, 0, 0].tolist() == [1000.0 + 10 * eurosat.index(band) for band in S2]
    shifted = read_image(url, Declared("s2", eurosat, None, "reflectance10000+1000"))
    np.testing.assert_array_equal(shifted.pixels, np.maximum(found.pixels - 1000, 1))
    named = _tif(tmp_path / "named.tif", pixels, names=eurosat)
    np.testing.assert_array_equal(read_image(named, Declared("s2", unit="reflectance10000")).pixels, found.pixels)
    share = _tif(tmp_path / "share.tif", (pixels[:10] / 10_000).astype(np.float32))
    np.testing.assert_allclose(
        read_image(share, Declared("s2", S2, 10.0, "reflectance")).pixels, pixels[:10], rtol=1e-4
    )
    power = _tif(
        tmp_path / "power.tif", np.array([0.1, 0.0], np.float32)[:, None, None] + np.zeros((1, 4, 4), np.float32)
    )
    db = read_image(power, Declared("s1", ("VV", "VH"), 10.0, "power")).pixels
    np.testing.assert_allclose(db[0], -10.0, rtol=1e-5)
    assert np.isnan(db[1]).all()


@pytest.mark.parametrize(
    ("declared", "why"),
    [
        (Declared("s2", unit="reflectance10000"), "does not name its bands"),
        (Declared("s2", S2), "what its numbers .uint16. mean is not known"),
        (Declared("s2", (*S2, "extra"), unit="reflectance10000"), "has 10 bands, declared are 11"),
        (Declared("s2", S2, unit="reflectance"), "declared as reflectance, but its numbers run from 2000 to 2000"),
    ],
)
def test_what_contradicts_the_file_is_refused(tmp_path: Path, declared: Declared, why: str) -> None:
    url = _tif(tmp_path / "x.tif", np.full((10, 4, 4), 2000, np.uint16))
    with pytest.raises(UsageError, match=why):
        read_image(url, declared)


def _arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["checkpoint", *words])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--bands", "R,G,B"], "--bands needs --sensor"),
        (["--gsd", "10"], "--gsd needs --sensor"),
        (["--sensor", "sar"], "none of hr, s2, s1"),
        (["--sensor", "s2", "--bands", "B02,B03,B04"], "lacks B05, B06, .*none is filled with zeros"),
        (["--sensor", "hr", "--bands", "R,G,B,B"], "names a band twice"),
        (["--sensor", "hr", "--unit", "db"], "'db' is none of uint8"),
        (["--sensor", "hr", "--gsd", "-1"], "no pixel size"),
    ],
)
def test_declarations_that_cannot_be_are_refused(words: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        command.declaration(_arguments(*words))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--finetune"], "needs --labels-per-class"),
        (["--labels-per-class", "1"], "at least 2"),
        (["--samples", "0"], "at least 1"),
        (["--draws", "0"], "at least 1"),
        (["--supervised", "--labels-per-class", "5"], "uses all labels"),
        (["--supervised", "--task", "segment"], "scalar labels"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        command.check(_arguments(*words))


def test_the_command_line_overrides_what_the_run_probed() -> None:
    from pipeline.config import PretrainConfig

    config = PretrainConfig(probe=ProbeConfig(samples=77, label="biome", pool="mean", tasks=("segment",)))
    probe = command.settings(_arguments("--stage", "3"), config)
    assert (probe.samples, probe.label, probe.pool, probe.stage, probe.tasks) == (
        77,
        "biome",
        "mean",
        3,
        ("knn", "linear"),
    )
    probe = command.settings(_arguments("--task", "segment", "--label", "cover", "--pool", "mean_std"), None)
    assert (probe.samples, probe.label, probe.raster, probe.pool, probe.tasks) == (
        512,
        "scene",
        "cover",
        "mean_std",
        ("segment",),
    )


@pytest.mark.parametrize(
    ("folder", "gsd_m", "per_class", "least"), [("ucmerced", 0.3, 12, 0.3), ("eurosat_rgb/2750", 10.0, 12, 0.4)]
)
def test_real_rgb_folders_are_probed(
    model: Pretrained, tmp_path: Path, folder: str, gsd_m: float, per_class: int, least: float
) -> None:
    root = real_data(f"labelled/{folder}")
    for place in sorted(root.iterdir())[:4]:
        (tmp_path / place.name).mkdir()
        for image in sorted(place.iterdir())[:per_class]:
            (tmp_path / place.name / image.name).symlink_to(image)
    result = _probe(model, tmp_path, Declared("hr", ("R", "G", "B"), gsd_m, "uint8"), "knn")[0]
    assert result.rows["pixels"]["hr"].value > least > result.trained["hr"].chance
