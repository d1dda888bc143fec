"""Every row reads a tiny set in its published layout; splits, digests, radiometry; bad input is one line that names the file."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio

from cluster.errors import UsageError
from pipeline.evaluate.bands import Bands, to_model
from pipeline.evaluate.frozen import check_pixels
from pipeline.evaluate.items import IGNORE, Boxes, hashed_split, take_share
from pipeline.evaluate.readers import geobench
from pipeline.evaluate.readers.boxes import DIOR
from pipeline.evaluate.registry import REFLECTANCE, ROWS, row_named
from tests import published
from tests.require import require, require_module

PAPER = {
    "AID 20 %", "AID 50 %", "RESISC-45 10 %", "RESISC-45 20 %", "BigEarthNet-S2", "fMoW-S2", "Dyna.-Planet", "Dyna.-S2", "iSAID", "Potsdam",
    "DIOR", "DIOR-R", "FAIR1M", "LEVIR-CD", "OSCD", "Dyna.-S2 SCS", "Dyna.-MM", "PASTIS-MM", "BigEarthNet-MM",
}  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per layout, made once."""
    base, made = tmp_path_factory.mktemp("published"), {}
    for name, make in published.MAKERS.items():
        if make not in made:
            made[make] = base / make.__name__ / name
            make(made[make], np.random.default_rng(len(made)))
    return {name: made[make] for name, make in published.MAKERS.items()}


def test_the_table_has_every_row_of_the_paper_and_each_has_a_tiny_set() -> None:
    assert {row.paper for row in ROWS} - {""} == PAPER
    assert {row.name for row in ROWS} == set(published.MAKERS)
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("name", [row.name for row in ROWS])
def test_row_reads_its_published_layout(name: str, sets: dict[str, Path]) -> None:
    row = row_named(name)
    labelled = row.read(str(sets[name]), row)
    assert labelled.of("train")
    assert labelled.of("test")
    for item in (labelled.of("train")[0], labelled.of("test")[-1]):
        sample = item.read()
        assert set(sample.images) == set(row.sensors)
        for bands in row.bands:
            x, ok = to_model(bands, sample.images[bands.sensor], item.key)
            assert ok.any()
            assert x.shape[0] == sample.images[bands.sensor].shape[0]
        size = next(iter(sample.images.values())).shape[2:]
        target = sample.target
        if row.kind == "class":
            assert 0 <= int(target) < len(labelled.classes)  # type: ignore[arg-type]
        elif row.kind == "labels":
            assert np.asarray(target).shape == (len(labelled.classes),)
            assert np.asarray(target).any()
        elif row.kind == "boxes":
            assert isinstance(target, Boxes)
            assert (target.xyxy[:, 2:] > target.xyxy[:, :2]).all()
            assert (target.corners is not None) == row.oriented
        else:
            assert np.asarray(target).shape == size
            assert IGNORE <= int(np.min(target)) <= int(np.max(target)) < len(labelled.classes)  # type: ignore[arg-type]
            assert (row.kind == "pair") == bool(sample.after)


@pytest.mark.parametrize("name", [row.name for row in ROWS])
def test_digest_is_stable_and_names_the_items(name: str, sets: dict[str, Path]) -> None:
    row = row_named(name)
    labelled = row.read(str(sets[name]), row)
    assert row.read(str(sets[name]), row).digest == labelled.digest
    moved = replace(
        labelled,
        items=(
            replace(labelled.items[0], split="val" if labelled.items[0].split == "test" else "test"),
            *labelled.items[1:],
        ),
    )
    relabelled = replace(labelled, items=(replace(labelled.items[0], label="other"), *labelled.items[1:]))
    assert len({labelled.digest, moved.digest, relabelled.digest}) == 3


def wrongly_declared(bands: Bands) -> list[Bands]:
    """Wrong units, and orders that the pixels contradict (of 8-bit pictures none does: their order is declared only)."""
    if bands.sensor == "hr":
        planet = bands.shown is not None
        return [
            replace(bands, unit="uint8", shown=None) if planet else replace(bands, unit=REFLECTANCE, shown=(0, 3000))
        ]
    other = {"reflectance x 10000": "reflectance", "dB": "linear"}[bands.unit]
    order = list(bands.order)
    if bands.sensor == "s1":
        a, b = order.index("VV"), order.index("VH")
        order[a], order[b] = order[b], order[a]
    else:
        np.random.default_rng(1).shuffle(order)
    return [replace(bands, unit=other), replace(bands, order=tuple(order))]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [row.name for row in ROWS])
def test_row_passes_as_declared_and_refuses_a_wrong_unit_and_a_shuffled_order(name: str, sets: dict[str, Path]) -> None:
    row = row_named(name)
    labelled = row.read(str(sets[name]), row)
    notes = check_pixels(row, labelled.items)
    few = {
        sensor for sensor in row.sensors if any(note.startswith(f"{sensor}: ") and "too few" in note for note in notes)
    }
    assert few == ({"s2", "s1"} if name == "treesatai" else set())  # 6 x 6 pixels an image: named, not checked
    for i, bands in enumerate(row.bands):
        for wrong in wrongly_declared(bands):
            if bands.sensor in few and wrong.order != bands.order:
                continue
            declared = (*row.bands[:i], wrong, *row.bands[i + 1 :])
            with pytest.raises(UsageError, match="declared"):
                check_pixels(replace(row, bands=declared), labelled.items)


def test_bigearthnet_v1_layout_and_the_19_classes(tmp_path: Path) -> None:
    published.bigearthnet_v1(tmp_path, np.random.default_rng(0))
    row = row_named("bigearthnet_mm")
    labelled = row.read(str(tmp_path), row)
    (item,) = labelled.of("test")
    sample = item.read()
    named = [name for name, there in zip(labelled.classes, np.asarray(sample.target)) if there]
    assert named == ["Urban fabric", "Marine waters"]  # airports are none of the 19
    assert sample.images["s2"].shape == (1, 12, 120, 120)
    assert sample.doy["s2"].tolist() == [164]


def test_what_the_readers_make_of_labels(sets: dict[str, Path]) -> None:
    row = row_named("dior_r")
    labelled = row.read(str(sets["dior_r"]), row)
    second = labelled.items[1].read().target
    assert isinstance(second, Boxes)
    assert DIOR[second.labels[0]] == "expressway-service-area"  # the files spell it Expressway-Service-area
    assert second.xyxy.tolist() == [[4, 4, 24, 20]]
    row = row_named("oscd")
    labelled = row.read(str(sets["oscd"]), row)
    assert {item.key.split("/")[0] for item in labelled.of("test")} == {"milano"}  # of the published test list
    sample = labelled.of("train")[0].read()
    assert sample.doy["s2"].tolist() == [259, 288]
    row = row_named("pastis")
    sample = row.read(str(sets["pastis"]), row).items[0].read()
    assert sample.images["s1"].shape[0] == 6
    assert sample.doy["s1"].tolist() == [274, 280, 286, 279, 285, 291]


def test_tile_at_the_edge_reaches_beyond_and_says_so(sets: dict[str, Path]) -> None:
    row = replace(row_named("isaid"), tile_px=32)
    items = row.read(str(sets["isaid"]), row).items
    edge = items[-1].read()
    assert edge.inside == (18, 18)
    target = np.asarray(edge.target)
    assert (target[18:] == IGNORE).all()
    assert (target[:18, :18] != IGNORE).all()


def test_tortilla_members_equal_tacoreader(sets: dict[str, Path]) -> None:
    """Versions from 1.0 on read another container; requirements-evaluate.txt pins the last one that reads tortillas."""
    tacoreader = require_module("tacoreader")
    found = tacoreader.__version__
    require(found.startswith("0."), f"tacoreader 0.5.6 (here is {found}, which reads no tortillas)", "make references")
    path = str(sets["benv2"] / "geobench_benv2.tortilla")
    frame, ours = tacoreader.load(path), geobench.members(path)
    assert [row["tortilla:id"] for row in ours] == list(frame["tortilla:id"])
    inner = frame.read(2)
    for i, member in enumerate(geobench.members(path, ours[2]["tortilla:offset"])):
        with rasterio.open(inner.read(i)) as raster:
            np.testing.assert_array_equal(raster.read(), geobench._pixels(path, member))


def test_sensors_can_be_left_out_and_unknown_rows_are_near() -> None:
    row = row_named("benv2").only(("s1",))
    assert row.sensors == ("s1",)
    with pytest.raises(UsageError, match="benv2 has s2, s1, not hr"):
        row_named("benv2").only(("hr",))
    with pytest.raises(UsageError, match="eurosat_rgb"):
        row_named("eurosat")


def broken(sets: dict[str, Path], name: str, tmp_path: Path) -> Path:
    copy = tmp_path / name
    shutil.copytree(sets[name], copy)
    return copy


def refuse(name: str, root: Path) -> str:
    row = row_named(name)
    with pytest.raises(UsageError) as caught:
        [item.read() for item in row.read(str(root), row).items]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_file_and_an_absent_item_of_a_list(sets: dict[str, Path], tmp_path: Path) -> None:
    root = broken(sets, "dior", tmp_path)
    (root / "JPEGImages-trainval" / "00002.jpg").unlink()
    assert "00002.jpg is missing (train.txt names it)" in refuse("dior", root)
    root = broken(sets, "isaid", tmp_path)
    (root / "val/Semantic_masks/images/P0003_instance_color_RGB.png").unlink()
    assert "P0003_instance_color_RGB.png is missing" in refuse("isaid", root)
    root = broken(sets, "eurosat_rgb", tmp_path)
    published.text(root / "train.txt", "airport_1.jpg", "zoo_9.jpg")
    published.text(root / "test.txt", "beach_1.jpg")
    assert "zoo_9.jpg" in refuse("eurosat_rgb", root)
    assert "check --data" in refuse("oscd", tmp_path / "nowhere")


def test_an_empty_class_and_a_broken_image(sets: dict[str, Path], tmp_path: Path) -> None:
    root = broken(sets, "eurosat_rgb", tmp_path)
    (root / "Airport" / "airport_0.jpg").write_bytes(b"no picture")
    assert "airport_0.jpg" in refuse("eurosat_rgb", root)
    for path in (root / "Beach").iterdir():
        path.unlink()
    assert "Beach" in refuse("eurosat_rgb", root)


def test_boxes_outside_masks_of_another_size_and_unknown_values(sets: dict[str, Path], tmp_path: Path) -> None:
    root = broken(sets, "nwpu_vhr10", tmp_path)
    path = root / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [50.0, 50.0, 30.0, 10.0]
    path.write_text(json.dumps(content))
    assert "box (50, 50, 80, 60) of 006.jpg is empty or outside its 64 x 64 pixels" in refuse("nwpu_vhr10", root)
    root = broken(sets, "levir_cd", tmp_path)
    published.picture(root / "test/label/test_1.png", np.zeros((1, 20, 40), np.uint8))
    assert "20 x 40, its image 40 x 40" in refuse("levir_cd", root)
    root = broken(sets, "potsdam", tmp_path)
    published.tiff(root / "5_Labels_all/top_potsdam_5_15_label.tif", np.full((3, 50, 50), 7, np.uint8))
    assert "colour (7, 7, 7)" in refuse("potsdam", root)
    root = broken(sets, "pastis_r", tmp_path)
    np.save(root / "ANNOTATIONS/TARGET_10005.npy", np.full((3, 16, 16), 77, np.uint8))
    assert "holds 77" in refuse("pastis_r", root)


def test_a_tortilla_cut_short_is_named(sets: dict[str, Path], tmp_path: Path) -> None:
    whole = (sets["benv2"] / "geobench_benv2.tortilla").read_bytes()
    (tmp_path / "a_benv2.tortilla").write_bytes(whole[: len(whole) // 2])
    assert "a_benv2.tortilla is no whole tortilla" in refuse("benv2", tmp_path)


def test_shares_of_labels_are_nested_stratified_and_drawn_by_seed(sets: dict[str, Path]) -> None:
    row = row_named("eurosat_rgb")
    train = row.read(str(sets["eurosat_rgb"]), row).of("train")
    few, more = take_share(train, 0.2, 0), take_share(train, 0.5, 0)
    assert {item.key for item in few} <= {item.key for item in more}
    assert {item.label for item in few} == {item.label for item in train}
    assert take_share(train, 0.5, 1) != more
    assert take_share(train, 1.0, 0) == train
    with pytest.raises(UsageError, match=r"--labels 1\.5"):
        take_share(train, 1.5, 0)
    shares = [hashed_split(str(i), 0.6, 0.2) for i in range(2000)]
    assert [round(shares.count(s) / 2000, 1) for s in ("train", "val", "test")] == [0.6, 0.2, 0.2]
