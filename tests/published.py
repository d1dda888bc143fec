"""Tiny sets in the layouts in which their authors publish them: one function per row of `pipeline.evaluate.registry`, written from
their descriptions (band order, split lists, xml, colours), with pixels that physics allows."""

from __future__ import annotations

import csv
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
from rasterio.io import MemoryFile
from rasterio.transform import Affine

from pipeline.evaluate.readers import aerial
from pipeline.evaluate.readers.boxes import DIOR, FAIR1M

SPECTRUM = {
    "B01": 250, "B02": 300, "B03": 550, "B04": 380, "B05": 900, "B06": 2200, "B07": 2800, "B08": 3000, "B8A": 3100, "B09": 3000,
    "B10": 20, "B11": 1700, "B12": 900,
}  # fmt: skip
SOIL = {
    "B01": 700, "B02": 900, "B03": 1250, "B04": 1700, "B05": 2000, "B06": 2200, "B07": 2350, "B08": 2450, "B8A": 2600, "B09": 2600,
    "B10": 20, "B11": 3200, "B12": 2700,
}  # fmt: skip


def tiff(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiff_bytes(pixels))
    return path


def tiff_bytes(pixels: np.ndarray) -> bytes:
    count, height, width = pixels.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": pixels.dtype.name}
    with MemoryFile() as memory:
        with memory.open(**profile, crs="EPSG:32633", transform=Affine(10, 0, 5e5, 0, -10, 5.3e6)) as raster:
            raster.write(pixels)
        return memory.read()


def picture(path: Path, pixels: np.ndarray, driver: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"QUALITY": 100} if driver == "JPEG" else {}
    with rasterio.open(
        path,
        "w",
        driver=driver,
        count=pixels.shape[0],
        height=pixels.shape[1],
        width=pixels.shape[2],
        dtype="uint8",
        **options,
    ) as raster:
        raster.write(pixels)
    return path


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def rgb(rng: np.random.Generator, side: int) -> np.ndarray:
    return rng.integers(20, 220, (3, side, side)).astype(np.uint8)


def sentinel2(rng: np.random.Generator, bands: tuple[str, ...], side: int) -> np.ndarray:
    share = rng.random((side, side))
    light = rng.normal(1, 0.05, (side, side))
    return np.stack([(share * SPECTRUM[b] + (1 - share) * SOIL[b]) * light for b in bands]).astype(np.uint16)


def radar(rng: np.random.Generator, bands: tuple[str, ...], side: int) -> np.ndarray:
    level = {"VV": -9.0, "VH": -16.0}
    return np.stack([rng.normal(level.get(b, 7.0), 1.0, (side, side)) for b in bands]).astype(np.float32)


def class_folders(root: Path, rng: np.random.Generator) -> None:
    for name in ("Airport", "Beach", "Farm"):
        for i in range(12):
            picture(root / name / f"{name.lower()}_{i}.jpg", rgb(rng, 32), "JPEG")


def oscd(root: Path, rng: np.random.Generator) -> None:
    from pipeline.evaluate.registry import S2_13

    size = {"B01": 11, "B09": 11, "B10": 11, "B05": 32, "B06": 32, "B07": 32, "B8A": 32, "B11": 32, "B12": 32}
    for city in ("paris", "rennes", "milano"):
        for date in (1, 2):
            whole = sentinel2(rng, S2_13, 64)
            for band, pixels in zip(S2_13, whole):
                step = 64 // size.get(band, 64)
                tiff(
                    root
                    / "Onera Satellite Change Detection dataset - Images"
                    / city
                    / f"imgs_{date}"
                    / f"T30TXQ_2017_{band}.tif",
                    pixels[None, ::step, ::step],
                )
        text(
            root / "Onera Satellite Change Detection dataset - Images" / city / "dates.txt",
            "date_1: 20150916",
            "date_2: 20171015",
        )
        part = "Test" if city == "milano" else "Train"
        changed = (rng.random((1, 64, 64)) < 0.2).astype(np.uint8) + 1
        tiff(
            root / f"Onera Satellite Change Detection dataset - {part} Labels" / city / "cm" / f"{city}-cm.tif", changed
        )


def levir_cd(root: Path, rng: np.random.Generator) -> None:
    for split in ("train", "val", "test"):
        for folder in ("A", "B"):
            picture(root / split / folder / f"{split}_1.png", rgb(rng, 40))
        picture(root / split / "label" / f"{split}_1.png", ((rng.random((1, 40, 40)) < 0.2) * 255).astype(np.uint8))


def nwpu(root: Path, rng: np.random.Generator, side: int = 64) -> None:
    for name, numbers in (("train", range(6)), ("val", range(6, 9))):
        content: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 1, "name": "airplane"}, {"id": 2, "name": "ship"}],
        }
        for i in numbers:
            picture(root / "positive image set" / f"{i:03d}.jpg", rgb(rng, side), "JPEG")
            content["images"].append({"id": i, "file_name": f"{i:03d}.jpg", "height": side, "width": side})
            content["annotations"].append(
                {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [side / 6, side / 5, side / 3, side / 4]}
            )
        text(root / f"instances_{name}2017.json", json.dumps(content))


def dior(root: Path, rng: np.random.Generator) -> None:
    flat = "<bndbox><xmin>4</xmin><ymin>5</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
    corners = (("left_top", 4, 10), ("right_top", 20, 4), ("right_bottom", 24, 14), ("left_bottom", 8, 20))
    turned = "".join(f"<x_{name}>{x}</x_{name}><y_{name}>{y}</y_{name}>" for name, x, y in corners)
    for split, stems in (("train", ("00001", "00002")), ("val", ("00003",)), ("test", ("11726",))):
        text(root / "ImageSets" / "Main" / f"{split}.txt", *stems)
        for i, stem in enumerate(stems):
            folder = "JPEGImages-test" if split == "test" else "JPEGImages-trainval"
            picture(root / folder / f"{stem}.jpg", rgb(rng, 48), "JPEG")
            name = "Expressway-Service-area" if i else DIOR[0]
            for kind, box in (("Horizontal", flat), ("Oriented", f"<robndbox>{turned}</robndbox>")):
                text(
                    root / "Annotations" / f"{kind} Bounding Boxes" / f"{stem}.xml",
                    f"<annotation><object><name>{name}</name>{box}</object></annotation>",
                )


def fair1m(root: Path, rng: np.random.Generator) -> None:
    points = "".join(
        f"<point>{x},{y}</point>" for x, y in ((4.0, 10.0), (20.0, 4.0), (24.0, 14.0), (8.0, 20.0), (4.0, 10.0))
    )
    for place, numbers in (("train/part1", range(12)), ("train/part2", range(12, 24)), ("validation", range(3))):
        for i in numbers:
            tiff(root / place / "images" / f"{i}.tif", rgb(rng, 40))
            name = f"<possibleresult><name>{FAIR1M[i % 37]}</name></possibleresult>"
            text(
                root / place / "labelXml" / f"{i}.xml",
                f"<annotation><source><filename>{i}.tif</filename></source><objects><object>{name}<points>{points}</points></object></objects></annotation>",
            )


def isaid(root: Path, rng: np.random.Generator) -> None:
    for split, stems in (("train", ("P0000", "P0001")), ("val", ("P0003",))):
        for stem in stems:
            picture(root / split / "images" / f"{stem}.png", rgb(rng, 50))
            picture(
                root / split / "Semantic_masks" / "images" / f"{stem}_instance_color_RGB.png",
                painted(rng, aerial.ISAID_COLOURS, 50),
            )


def potsdam(root: Path, rng: np.random.Generator) -> None:
    for name in ("2_10", "6_7", "5_15"):
        tiff(root / "4_Ortho_RGBIR" / f"top_potsdam_{name}_RGBIR.tif", np.concatenate([rgb(rng, 50), rgb(rng, 50)[:1]]))
        tiff(root / "5_Labels_all" / f"top_potsdam_{name}_label.tif", painted(rng, aerial.POTSDAM_COLOURS, 50))


def painted(rng: np.random.Generator, colours: tuple[tuple[int, ...], ...], side: int) -> np.ndarray:
    return np.array(colours, np.uint8)[rng.integers(0, len(colours), (side, side))].transpose(2, 0, 1)


def dynamic_earthnet(root: Path, rng: np.random.Generator) -> None:
    from pipeline.evaluate.registry import S2_TEN_FIRST

    for split, cube in (("train", "1311_3077_13"), ("val", "1417_3281_13"), ("test", "2415_3082_13")):
        lines = []
        for month in ("2018-01", "2018-02"):
            planet, label = f"/planet/10N/{cube}/PF-SR", f"/labels/{cube}/Labels/Raster/{cube}-{month}.tif"
            tiff(root / planet.strip("/") / f"{month}-01.tif", sentinel2(rng, ("B02", "B03", "B04", "B08"), 40))
            tiff(root / f"sentinel2/10N/{cube}/{month}.tif", sentinel2(rng, S2_TEN_FIRST, 40))
            classes = rng.integers(0, 7, (40, 40))
            tiff(root / label.strip("/"), (np.arange(7)[:, None, None] == classes).astype(np.uint8) * 255)
            lines.append(f"{planet} {label} {month}")
        text(root / "dynnet_training_splits" / f"{split}.txt", *lines)


def pastis_r(root: Path, rng: np.random.Generator) -> None:
    from pipeline.evaluate.registry import S2_10

    features = []
    for fold in range(1, 6):
        patch = f"{10000 + fold}"
        dates = {"S2": 4, "S1A": 3, "S1D": 2}
        properties: dict[str, Any] = {"ID_PATCH": int(patch), "Fold": fold}
        for name, count in dates.items():
            bands = S2_10 if name == "S2" else ("VV", "VH", "ratio")
            make = sentinel2 if name == "S2" else radar
            pixels = np.stack([make(rng, bands, 16) for _ in range(count)])
            save(root / f"DATA_{name}" / f"{name}_{patch}.npy", pixels.astype(np.int16 if name == "S2" else np.float16))
            properties[f"dates-{name}"] = {str(i): 20180917 + i for i in range(count)}
        save(root / "ANNOTATIONS" / f"TARGET_{patch}.npy", rng.integers(0, 20, (3, 16, 16)).astype(np.uint8))
        features.append({"type": "Feature", "properties": properties, "geometry": None})
    text(root / "metadata.geojson", json.dumps({"type": "FeatureCollection", "features": features}))


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


def bigearthnet_v2(root: Path, rng: np.random.Generator) -> None:
    rows = []
    for i, split in enumerate(("train", "train", "validation", "test", "test")):
        tile, orbit = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP", "S1A_IW_GRDH_1SDV_20170613T165043"
        patch, s1 = f"{tile}_26_{i}", f"{orbit}_33UUP_26_{i}"
        bigearthnet_patch(root / "BigEarthNet-S2" / tile / patch, root / "BigEarthNet-S1" / orbit / s1, rng)
        labels = ["Arable land", "Mixed forest"] if i % 2 else ["Pastures"]
        rows.append({"patch_id": patch, "labels": labels, "split": split, "s1_name": s1, "country": "Austria"})
    pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")


def bigearthnet_v1(root: Path, rng: np.random.Generator) -> None:
    for i, split in enumerate(("train", "val", "test")):
        patch, s1 = f"S2A_MSIL2A_20170613T101031_61_{i}", f"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_61_{i}"
        bigearthnet_patch(root / "BigEarthNet-v1.0" / patch, root / "BigEarthNet-S1-v1.0" / s1, rng)
        note = {
            "labels": ["Continuous urban fabric", "Airports", "Sea and ocean"],
            "acquisition_date": "2017-06-13 10:10:31",
        }
        text(root / "BigEarthNet-v1.0" / patch / f"{patch}_labels_metadata.json", json.dumps(note))
        text(root / f"bigearthnet-{split}.csv", f"{patch},{s1}")


def bigearthnet_patch(s2: Path, s1: Path, rng: np.random.Generator) -> None:
    from pipeline.evaluate.registry import S2_12

    for band, pixels in zip(S2_12, sentinel2(rng, S2_12, 120)):
        step = 6 if band in ("B01", "B09") else 2 if band in ("B05", "B06", "B07", "B8A", "B11", "B12") else 1
        tiff(s2 / f"{s2.name}_{band}.tif", pixels[None, ::step, ::step])
    for band, pixels in zip(("VV", "VH"), radar(rng, ("VV", "VH"), 120)):
        tiff(s1 / f"{s1.name}_{band}.tif", pixels[None])


def fmow_s2(root: Path, rng: np.random.Generator) -> None:
    from pipeline.evaluate.registry import S2_13

    for name, folder in (("train", "train"), ("val", "val"), ("test_gt", "test_gt")):
        rows = [
            {"category": c, "location_id": 3, "image_id": i, "timestamp": "2016-05-01T00:00:00Z"}
            for i, c in enumerate(("airport", "zoo"))
        ]
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text(root / f"{name}.csv", stream.getvalue().strip())
        for row in rows:
            place = f"{row['category']}_{row['location_id']}"
            tiff(
                root / "fmow-sentinel" / folder / str(row["category"]) / place / f"{place}_{row['image_id']}.tif",
                sentinel2(rng, S2_13, 24),
            )


def tortilla(rows: list[dict[str, Any]], payloads: list[bytes]) -> bytes:
    """`#y`, footer offset and length, padding to 200 bytes, payloads, footer: as TACO's tortilla is described."""
    at, table = 200, []
    for row, payload in zip(rows, payloads):
        table.append({**row, "tortilla:offset": at, "tortilla:length": len(payload)})
        at += len(payload)
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(table), stream)
    footer = stream.getvalue()
    return b"#y" + struct.pack("<QQQ", at, len(footer), 1) + b"\0" * (200 - 26) + b"".join(payloads) + footer


def geobench(
    stem: str, facts: dict[str, Any], parts: Callable[[np.random.Generator], list[tuple[str, str, bytes, dict[str, Any]]]]
) -> Callable[[Path, np.random.Generator], None]:  # fmt: skip
    def make(root: Path, rng: np.random.Generator) -> None:
        rows, payloads = [], []
        for i, split in enumerate(("train", "train", "train", "validation", "test", "test")):
            members = parts(rng)
            inner = [{"tortilla:id": name, "tortilla:file_format": kind, **more} for name, kind, _, more in members]
            payloads.append(tortilla(inner, [payload for _, _, payload, _ in members]))
            rows.append(
                {
                    "tortilla:id": f"sample_{i}",
                    "tortilla:file_format": "TORTILLA",
                    "tortilla:data_split": split,
                    **facts,
                }
            )
        root.mkdir(parents=True, exist_ok=True)
        (root / f"geobench_{stem}.tortilla").write_bytes(tortilla(rows, payloads))

    return make


def hdf5(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        file["data"] = values
    return stream.getvalue()


def geobench_sets() -> dict[str, Callable[[Path, np.random.Generator], None]]:
    from pipeline.evaluate.registry import S2_10, S2_12, S2_TEN_FIRST

    time = {"stac:time_start": 1_527_552_000.0}

    def gtiff(name: str, pixels: np.ndarray) -> tuple[str, str, bytes, dict[str, Any]]:
        return name, "GTiff", tiff_bytes(pixels), time

    def series(name: str, pixels: np.ndarray, dates: list[int]) -> tuple[str, str, bytes, dict[str, Any]]:
        return name, "HDF5", hdf5(pixels), {"dates": dates}

    def one_hot(rng: np.random.Generator) -> np.ndarray:
        return (np.arange(7)[:, None, None] == rng.integers(0, 7, (16, 16))).astype(np.uint8) * 255

    return {
        "benv2": geobench("benv2", {"labels": ["Pastures", "Mixed forest"]}, lambda r: [
            gtiff("s1", radar(r, ("VH", "VV"), 120)), gtiff("s2", sentinel2(r, S2_12, 120))]),
        "treesatai": geobench("treesatai", {"species_labels": ["Fagus", "Picea"]}, lambda r: [
            gtiff("aerial", np.concatenate([rgb(r, 304), rgb(r, 304)[:1]])), gtiff("s1", radar(r, ("VV", "VH", "VV/VH"), 6)),
            gtiff("s2", sentinel2(r, S2_TEN_FIRST, 6))]),
        "pastis": geobench("pastis", {"patch_id": "1"}, lambda r: [
            series("s2", np.stack([sentinel2(r, S2_10, 32)] * 3).astype(np.int16), [20180917, 20180922, 20180927]),
            series("s1a", np.stack([radar(r, ("VV", "VH", "x"), 32)] * 3), [20181001, 20181007, 20181013]),
            series("s1d", np.stack([radar(r, ("VV", "VH", "x"), 32)] * 3), [20181006, 20181012, 20181018]),
            series("semantic", r.integers(0, 20, (3, 32, 32)).astype(np.uint8), [])]),
        "flair2": geobench("flair2", {"stac:raster_shape": [64, 64]}, lambda r: [
            gtiff("aerial", np.concatenate([rgb(r, 64), rgb(r, 64)[:2]])), gtiff("mask", r.integers(0, 20, (1, 64, 64)).astype(np.uint8))]),
        "dynamic_earthnet_geobench": geobench("dynamic_earthnet", {"stac:raster_shape": [16, 16]}, lambda r: [
            gtiff("planet_0", sentinel2(r, ("B02", "B03", "B04", "B08"), 16).astype(np.int16)),
            gtiff("planet_1", sentinel2(r, ("B02", "B03", "B04", "B08"), 16).astype(np.int16)),
            gtiff("s2", sentinel2(r, S2_TEN_FIRST, 16).astype(np.int16)), gtiff("label", one_hot(r))]),
    }  # fmt: skip


MAKERS: dict[str, Callable[[Path, np.random.Generator], None]] = {
    **dict.fromkeys(("aid_20", "aid_50", "resisc45_10", "resisc45_20", "eurosat_rgb", "ucmerced"), class_folders),
    **dict.fromkeys(("bigearthnet_s2", "bigearthnet_mm"), bigearthnet_v2),
    **dict.fromkeys(("dynamic_earthnet", "dynamic_earthnet_s2", "dynamic_earthnet_scs", "dynamic_earthnet_mm"), dynamic_earthnet),
    **dict.fromkeys(("dior", "dior_r"), dior),
    "fmow_s2": fmow_s2, "isaid": isaid, "potsdam": potsdam, "fair1m": fair1m, "nwpu_vhr10": nwpu, "levir_cd": levir_cd, "oscd": oscd,
    "pastis_r": pastis_r, **geobench_sets(), "flair2_fine": geobench_sets()["flair2"],
}  # fmt: skip
