"""The comparison's page and the tour in headless Chromium: no message on the console, no request outside, curves that zoom, runs that can be
switched off. Screenshots go to $GEOLOOM_SCREENSHOTS where that is set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import storage
from cluster.config import load
from cluster.rundir import RunDir
from pipeline.commands import compare, tour
from pipeline.config import PretrainConfig
from pipeline.tracking import Dataset, RunFacts
from pipeline.tracking.mirror import write_record
from tests.require import require

pytestmark = pytest.mark.integration
STEPS = 60


def make_run(folder: Path, name: str, overrides: list[str], data: str) -> str:
    """A run directory with curves, probes with intervals, and what pixels and the untrained network gave."""
    config = load(PretrainConfig, None, [f"run.dir={folder / name}", f"data.url={data}", *overrides])
    run = RunDir(config.run.dir)
    run.write_resolved(config)
    run.start_metrics(0)
    rng = np.random.default_rng(len(name))
    for step in range(1, STEPS + 1):
        line: dict[str, Any] = {"step": step, "samples": 8 * step, "loss": 10 / step + rng.random(), "lr": 1e-3 * step,
                                "samples_per_s": 4.0, "gpu_hours": step / 100, "moe/entropy/s2": 1.0 + rng.random()}  # fmt: skip
        if step % 20 == 0:
            score = 0.3 + step / 200
            line |= {"probe/knn/fused": score, "probe/knn/fused/low": score - 0.1, "probe/knn/fused/high": score + 0.1,
                     "probe/knn/fused/untrained": 0.2, "probe/knn/fused/pixels": 0.35, "probe/split": 5.0}  # fmt: skip
        run.append_metrics(line)
    write_record(run, "pages", name, RunFacts(2, "2 processes", (Dataset(data, "m" * 64, "s" * 64),)))
    return run.url


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import argparse

    folder = tmp_path_factory.mktemp("pages")
    runs = [
        make_run(folder, "moe", [], str(folder / "set")),
        make_run(folder, "dense", ["model.moe.experts=0"], str(folder / "set")),
    ]
    made = {name: folder / f"{name}.html" for name in ("report", "tour")}
    storage.write_atomic(f"{runs[0]}/artifacts/features.png", PIXEL)
    (folder / "sheet.png").write_bytes(PIXEL)
    compare.run(runs, str(made["report"]))
    args = argparse.Namespace(runs=runs, out=str(made["tour"]), sheet=str(folder / "sheet.png"), uri=None, json=False)
    assert tour.main(args) == 0
    return made


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360f8cf50"
    "0f0003860180347d51a20000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    require(Path("/usr/bin/chromium").exists(), "Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


RANGE = "key => { const s = geoloomPlots.get(key).scales.x; return [s.min, s.max]; }"
SHOWN = "key => geoloomPlots.get(key).series.filter(s => s.show && s.label === 'dense').length"


@pytest.mark.parametrize("name", ["report", "tour"])
def test_a_page_is_quiet_asks_nobody_and_its_curves_zoom(name: str, pages: dict[str, Path], browser: Any) -> None:
    said, asked = [], []
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    plot = page.locator('figure[data-key="loss"] .u-over')
    plot.scroll_into_view_if_needed()
    assert page.evaluate(RANGE, "loss") == [8, 8 * STEPS]

    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 50)  # hover, then drag over the second quarter
    assert "—" not in page.locator('figure[data-key="loss"] .u-legend').inner_text().replace("--", "—")
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 60, steps=5)
    page.mouse.up()
    low, high = page.evaluate(RANGE, "loss")
    assert 100 < low < 150 < 220 < high < 260
    assert page.evaluate(RANGE, "probe/knn/fused") == pytest.approx([low, high])  # all curves follow
    plot.dblclick()
    assert page.evaluate(RANGE, "loss") == [8, 8 * STEPS]

    assert page.evaluate(SHOWN, "loss") == 1
    page.locator("#runs label", has_text="dense").locator("input").uncheck()
    assert page.evaluate(SHOWN, "loss") == 0
    page.locator("#runs label", has_text="dense").locator("input").check()
    page.locator("#axis").select_option("h")
    assert page.evaluate(RANGE, "loss") == pytest.approx([1 / 200, STEPS / 200])
    page.locator("#log").check()
    assert page.evaluate("() => geoloomPlots.get('loss').scales.y.distr") == 3
    page.locator("#log").uncheck()
    page.locator("#axis").select_option("x")
    page.locator('details[data-part="moe"] summary').click()
    page.wait_for_function("() => geoloomPlots.has('moe/entropy/s2')")

    if folder := os.environ.get("GEOLOOM_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []
    assert len([url for url in asked if url.startswith("file://")]) == 1  # the page itself
