"""The declared band orders of aerial pictures against real pixels of plants: near infrared, green and the blue of the sky's light tell them."""

from pathlib import Path

import numpy as np
import pytest
import rasterio

from data_prep.sources.treesatai import AERIAL_BANDS
from pipeline.evaluate.registry import row_named
from tests.data_folder import real_data


def lights(pixels_FHW: np.ndarray, order: tuple[str, ...]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean of each named band over sunlit plants (upper quarter of the near infrared), and the share of it that is left in shade
    (lowest twentieth)."""
    x = {band: pixels_FHW[order.index(band)].ravel().astype(float) for band in "NRGB"}
    sun, shade = x["N"] >= np.quantile(x["N"], 0.75), x["N"] <= np.quantile(x["N"], 0.05)
    lit = {band: float(values[sun].mean()) for band, values in x.items()}
    return lit, {band: float(values[shade].mean()) / lit[band] for band, values in x.items()}


def contradictions(tiles: list[np.ndarray], order: tuple[str, ...]) -> list[str]:
    """What an order makes of forest that forest is not; means over tiles."""
    lit, left = (
        {band: float(np.mean([one[band] for one in many])) for band in "NRGB"}
        for many in zip(*(lights(tile, order) for tile in tiles))
    )
    ndvi = (lit["N"] - lit["R"]) / (lit["N"] + lit["R"])
    return [
        why
        for why, wrong in {
            "the near infrared is not the brightest band": lit["N"] < 1.3 * max(lit[b] for b in "RGB"),
            "crowns are not green": lit["G"] < max(lit["R"], lit["B"]),
            "shade is not blue": left["B"] < max(left["R"], left["G"]),
            f"NDVI of sunlit crowns is {ndvi:.2f}": ndvi < 0.25,
        }.items()
        if wrong
    ]


ORDERS = (AERIAL_BANDS, ("N", "R", "G", "B"), ("R", "G", "B", "N"), ("N", "B", "G", "R"), ("N", "G", "R", "B"))


def test_treesatai_tile_is_near_infrared_green_blue_red() -> None:
    path: Path = next(real_data("treesatai").glob("*.tif"))
    with rasterio.open(path) as raster:
        pixels = raster.read()
    assert {order for order in ORDERS if not contradictions([pixels], order)} == {AERIAL_BANDS}


def test_geobench_tiles_are_in_the_same_order() -> None:
    root = real_data("labelled") / "geobench2" / "treesatai.tortilla"
    row = row_named("treesatai")
    order = next(bands.order for bands in row.bands if bands.sensor == "hr")
    tiles = [item.read().images["hr"][0] for item in row.read(str(root), row).items]
    assert order == AERIAL_BANDS
    assert {order for order in ORDERS if not contradictions(tiles, order)} == {AERIAL_BANDS}


@pytest.mark.parametrize("order", [order for order in ORDERS if order != AERIAL_BANDS])
def test_every_other_order_is_told_from_made_up_forest(order: tuple[str, ...]) -> None:
    """Without real data: sunlit and shaded crowns as the tiles show them."""
    sun, shade = {"N": 180, "G": 110, "B": 100, "R": 95}, {"N": 80, "G": 48, "B": 60, "R": 42}
    share = np.random.default_rng(0).random((60, 60))
    held = np.stack([shade[band] + share * (sun[band] - shade[band]) for band in AERIAL_BANDS])
    assert contradictions([held], AERIAL_BANDS) == []
    assert contradictions([held], order)
