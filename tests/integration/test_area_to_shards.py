"""From an area to training, against a real STAC API: sites → prepare → build → verify → train, twice, killed, with broken images."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.data_folder import REPOSITORY
from tests.integration.test_build_runs import content, run, start
from tests.stac_archive import COLLECTIONS, make_archive
from tests.stac_server import StacServer, stac_server

pytestmark = pytest.mark.integration
SENSORS = {
    "s2": {"dates": 6, "min_dates": 3, "spares": 3},
    "s1": {"dates": 3, "one_orbit": True, "spares": 1},
    "hr": {},
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Two simulated scenes, side by side, as per-date items, and the area they cover."""
    folder = tmp_path_factory.mktemp("archive")
    items = make_archive(folder, 2, seed=3, side_m=360)
    features = [
        {"type": "Feature", "properties": {}, "geometry": i["geometry"]} for i in items if i["collection"] == "hr"
    ]
    (folder / "area.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return folder, items


@pytest.fixture(scope="module")
def api(archive, tmp_path_factory):
    with stac_server(tmp_path_factory.mktemp("stac")) as server:
        server.load(COLLECTIONS, archive[1])
        yield server


def config(folder: Path, area: Path, source: str, **changes: object) -> str:
    """A config file for the whole way; returns its path."""
    folder.mkdir(exist_ok=True)
    tree = {
        "sites": {"url": f"{folder}/sites.parquet", "area": f"{area}/area.geojson", "sites_per_slice": 5},
        "grid": {"side_m": 120},
        "split": {"fractions": {"train": 1.0}},
        "shards": {"max_samples": 2},
        "prepare": {"url": f"{folder}/plan", "sensors": {n: {"source": source, "collections": [n], **more} for n, more in SENSORS.items()}},
        "output": {"url": f"{folder}/set"},
        "workers": 1,
    } | changes  # fmt: skip
    path = folder / "all.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def plan(folder: Path) -> dict[str, bytes]:
    """Content of a prepared plan, apart from what names its own place."""
    return {name: data for name, data in content(folder / "plan").items() if name not in ("plan.json", "prepared.json")}


@pytest.fixture(scope="module")
def reference(archive, api, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    path = config(folder, archive[0], api.url)
    for command in ("sites", "prepare", "build"):
        run(command, path)
    return folder


def test_one_config_from_area_to_training(reference, tmp_path):
    figures = run("verify", f"{reference}/set", "--decode", "--json")[0]
    assert figures["faults"] == 0
    index = pq.read_table(reference / "set" / "index.parquet")
    assert figures["samples"] == index.num_rows >= 8
    assert {tuple(m) for m in index["modalities"].to_pylist()} == {("hr", "s2", "s1")}
    assert {len(dates) for dates in index["s2_datetimes"].to_pylist()} == {6}
    assert all(len(set(orbits)) == 1 for orbits in index["s1_orbits"].to_pylist())  # one_orbit
    trained = subprocess.run(
        [
            sys.executable, "-m", "pipeline", "train", "pipeline/runs/demo_dense.yaml", f"data.url={reference}/set", f"run.dir={tmp_path}/run",
            "train.steps=20", "train.batch=2", "tracking.uri=none", "--processes", "1",
        ],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr[-2000:]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 20


def test_again_the_same_bytes_and_nothing_searched_twice(archive, api: StacServer, reference, tmp_path):
    before = api.searches
    path = config(tmp_path, archive[0], api.url)
    for command in ("sites", "prepare", "build"):
        run(command, path)
    asked = api.searches - before
    slices = pq.ParquetFile(tmp_path / "sites.parquet").num_row_groups
    assert asked == slices * len(SENSORS)
    assert (tmp_path / "sites.parquet").read_bytes() == (reference / "sites.parquet").read_bytes()
    assert plan(tmp_path) == plan(reference)
    assert content(tmp_path / "set") == content(reference / "set")
    assert run("prepare", path, "--json")[0]["made"] == 0
    assert api.searches - before == asked


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_and_continued_the_same_bytes(archive, api, reference, tmp_path, seed):
    path = config(tmp_path, archive[0], api.url)
    run("sites", path)
    draw = random.Random(seed)
    for command, folder, pattern, full in (
        ("prepare", tmp_path / "plan", "0*.json", len(list((reference / "plan").glob("0*.json")))),
        ("build", tmp_path / "set", "*.tar*", len(list((reference / "set").glob("*.tar")))),
    ):
        done = sorted(draw.sample(range(full), 2))
        for count in done:
            process = start(command, path)
            while process.poll() is None and len(list(folder.glob(pattern))) <= count:
                pass  # killed in the middle of what comes next
            process.send_signal(signal.SIGKILL)
            process.communicate()
        run(command, path)
    assert plan(tmp_path) == plan(reference)
    assert content(tmp_path / "set") == content(reference / "set")


def test_a_dump_and_a_catalog_give_the_plan_of_the_api(archive, reference, tmp_path):
    folder, items = archive
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    from data_prep.catalog import write_items

    for name in COLLECTIONS:
        write_items([item for item in items if item["collection"] == name], f"{tmp_path}/dump/{name}.parquet")
    for kind in ("catalog", "dump"):
        own = tmp_path / kind
        sensors = {
            name: {"source": f"{tmp_path}/items.json" if kind == "catalog" else f"{tmp_path}/dump/{name}.parquet", "collections": [name], **more}
            for name, more in SENSORS.items()
        }  # fmt: skip
        path = config(own, folder, "unused", prepare={"url": f"{own}/plan", "sensors": sensors})
        for command in ("sites", "prepare", "build"):
            run(command, path)
        got, wanted = (
            {name: data for name, data in content(f / "set").items() if name != "manifest.json"}
            for f in (own, reference)
        )
        assert got == wanted, kind


def product_of(item: dict) -> str:
    return item["assets"]["data"]["s2:product_uri"]


def covers(item: dict, row: dict) -> bool:
    """Whether an item lies over the middle of a site."""
    (west, south, east, north), box = item["bbox"], row["bbox"]
    return west < (box["xmin"] + box["xmax"]) / 2 < east and south < (box["ymin"] + box["ymax"]) / 2 < north


def test_broken_images_are_replaced_by_spares(archive, reference, tmp_path):
    _, items = archive
    chosen = pq.read_table(reference / "set" / "index.parquet")
    first = chosen.slice(0, 1).to_pylist()[0]
    victim = next(  # a product may have an image of either scene
        i for i in items if i["collection"] == "s2" and covers(i, first) and product_of(i) in first["s2_product_ids"]
    )
    image = Path(victim["assets"]["data"]["href"])
    kept = tmp_path / "kept.tif"
    shutil.move(image, kept)
    try:
        image.write_bytes(kept.read_bytes()[:500])
        path = str(tmp_path / "all.yaml")
        Path(path).write_text((reference / "all.yaml").read_text().replace(f"{reference}/set", f"{tmp_path}/set"))
        figures, _ = run("build", path, "--json")
    finally:
        shutil.move(kept, image)
    assert figures["faults"] == 0
    index = pq.read_table(tmp_path / "set" / "index.parquet")
    assert index.num_rows == chosen.num_rows
    assert {len(products) for products in index["s2_product_ids"].to_pylist()} == {6}
    for before, after in zip(chosen.to_pylist(), index.to_pylist()):
        assert before["key"] == after["key"]
        if covers(victim, before):
            assert product_of(victim) not in after["s2_product_ids"]
        else:
            assert before["s2_product_ids"] == after["s2_product_ids"]
