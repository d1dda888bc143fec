"""The table of rows: data set → reader → bands → task → metric → split. One entry is one row of a results table. No torch.

A row is never guessed from the data: order and unit of the bands stand here, with where they are documented.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.errors import UsageError
from data_prep.sources.treesatai import AERIAL_BANDS
from pipeline.evaluate.bands import Bands, Unit
from pipeline.evaluate.items import Kind, LabelledSet
from pipeline.evaluate.readers import aerial, boxes, change, folders, geobench, patches, series

S2_12 = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
S2_13 = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
S2_10 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
S2_TEN_FIRST = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09")
REFLECTANCE: Unit = "reflectance x 10000"
TOA = "top-of-atmosphere reflectance (L1C); pretraining saw surface reflectance"


def rgb(gsd_m: float, note: str = "") -> Bands:
    """Pictures of three bands, 0-255."""
    return Bands("hr", ("R", "G", "B"), "uint8", gsd_m, note=note)


PLANET = Bands(
    "hr", ("B", "G", "R", "N"), REFLECTANCE, 3.0, shown=(0, 3000), note="reflectance 0-0.3 shown as 0-255"
)  # aysim/dynnet
BENV2_S2 = Bands("s2", S2_12, REFLECTANCE, 10.0)
BENV2_S1 = Bands("s1", ("VV", "VH"), "dB", 10.0)
PASTIS_S2 = Bands("s2", S2_10, REFLECTANCE, 10.0)
PASTIS_S1 = Bands("s1", ("VV", "VH", "VV-VH"), "dB", 10.0)


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: what `--task` takes. data_set: what its authors call it.
        kind: class, labels (multi-label), dense, pair or boxes; metric: see `metrics.METRICS`.
        read: reader of the published layout. needs: that layout, in words.
        bands: one per sensor, all of the same ground.
        shares: train and validation shares of a split by hashed name, for sets published without lists.
        published_px: side of the published images; another one found is named in the result (0: they vary).
        tile_px: dense and pair: side of the tiles that large images are cut into.
        max_dates: of a series; merges: Adaptive Patch Merging of hr at the three transitions (None: as trained).
        oriented: boxes have an angle; their corners are read and the overlap is that of turned boxes. paper: the paper's row that it stands for.
    """

    name: str
    data_set: str
    kind: Kind
    metric: str
    read: Callable[[str, Row], LabelledSet]
    needs: str
    bands: tuple[Bands, ...]
    shares: tuple[float, float] = (0.64, 0.16)
    published_px: int = 0
    tile_px: int = 0
    max_dates: int = 24
    merges: tuple[bool, bool, bool] | None = None
    oriented: bool = False
    paper: str = ""

    @property
    def sensors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(bands.sensor for bands in self.bands))

    @property
    def heads(self) -> tuple[str, ...]:
        return HEADS[self.kind]

    def only(self, sensors: tuple[str, ...]) -> Row:
        """The same row with some of its sensors. Raises UsageError for one that it has not."""
        unknown = [name for name in sensors if name not in self.sensors]
        if unknown or not sensors:
            raise UsageError(
                f"--sensors: {self.name} has {', '.join(self.sensors)}, not {unknown[0] if unknown else 'none'}"
            )
        return replace(self, bands=tuple(bands for bands in self.bands if bands.sensor in sensors))


HEADS: dict[Kind, tuple[str, ...]] = {
    "class": ("knn", "logistic"), "labels": ("knn", "logistic"), "dense": ("linear", "upernet"), "pair": ("linear", "upernet"),
    "boxes": ("faster_rcnn",),
}  # fmt: skip

BEN = "metadata.parquet + BigEarthNet-S2/ (+ BigEarthNet-S1/), or v1: bigearthnet-{train,val,test}.csv + BigEarthNet-v1.0/"
DYN = "dynnet_training_splits/*.txt, planet/…/PF-SR/YYYY-MM-DD.tif, labels/…tif"
DIOR = "Annotations/{Horizontal,Oriented} Bounding Boxes, ImageSets/Main, JPEGImages-{trainval,test}"
NAMED = "ROOT/<Class>/<image>"

ROWS: tuple[Row, ...] = (
    # --- scenes
    Row("aid_20", "AID", "class", "accuracy", folders.class_folders, NAMED, (rgb(0.5, "0.5 to 8 m"),), (0.2, 0.05), 600, paper="AID 20 %"),
    Row("aid_50", "AID", "class", "accuracy", folders.class_folders, NAMED, (rgb(0.5, "0.5 to 8 m"),), (0.5, 0.05), 600, paper="AID 50 %"),
    Row("resisc45_10", "RESISC-45", "class", "accuracy", folders.class_folders, NAMED, (rgb(0.5, "0.2 to 30 m"),), (0.1, 0.05), 256, paper="RESISC-45 10 %"),
    Row("resisc45_20", "RESISC-45", "class", "accuracy", folders.class_folders, NAMED, (rgb(0.5, "0.2 to 30 m"),), (0.2, 0.05), 256, paper="RESISC-45 20 %"),
    Row("bigearthnet_s2", "BigEarthNet", "labels", "map", patches.bigearthnet, BEN, (BENV2_S2,), published_px=120, paper="BigEarthNet-S2"),
    Row("fmow_s2", "fMoW-Sentinel", "class", "accuracy", patches.fmow_s2, "{train,val,test_gt}.csv + fmow-sentinel/<split>/<category>/…tif", (Bands("s2", S2_13, REFLECTANCE, 10.0, note="90-day composites of L1C"),), paper="fMoW-S2"),
    Row("eurosat_rgb", "EuroSAT RGB", "class", "accuracy", folders.class_folders, "2750/<Class>/*.jpg", (rgb(10.0, "Sentinel-2 at 10 m read as hr"),), published_px=64),
    Row("ucmerced", "UC Merced", "class", "accuracy", folders.class_folders, NAMED, (rgb(0.3),), published_px=256),
    # --- segmentation
    Row("dynamic_earthnet", "Dynamic EarthNet", "dense", "miou", series.dynamic_earthnet, DYN, (PLANET,), published_px=1024, tile_px=256, paper="Dyna.-Planet"),
    Row("dynamic_earthnet_s2", "Dynamic EarthNet", "dense", "miou", series.dynamic_earthnet, DYN + ", sentinel2/…/YYYY-MM.tif", (Bands("s2", S2_TEN_FIRST, REFLECTANCE, 3.0, note="resampled to 3 m by its authors"),), published_px=1024, tile_px=64, paper="Dyna.-S2"),
    Row("isaid", "iSAID", "dense", "miou", aerial.isaid, "{train,val}/images + {train,val}/Semantic_masks/images", (rgb(0.3),), tile_px=256, paper="iSAID"),
    Row("potsdam", "ISPRS Potsdam", "dense", "mf1", aerial.potsdam, "4_Ortho_RGBIR/ + 5_Labels_all/", (rgb(0.05),), published_px=6000, tile_px=256, paper="Potsdam"),
    Row("flair2", "FLAIR #2 (GEO-Bench-2)", "dense", "miou", geobench.flair2, "*flair2*.tortilla", (Bands("hr", ("R", "G", "B", "N", "elevation"), "uint8", 0.2),), published_px=512, tile_px=256),
    Row("flair2_fine", "FLAIR #2 (GEO-Bench-2)", "dense", "miou", geobench.flair2, "*flair2*.tortilla", (Bands("hr", ("R", "G", "B", "N", "elevation"), "uint8", 0.2),), published_px=512, tile_px=128, merges=(False, False, False)),
    # --- detection
    Row("dior", "DIOR", "boxes", "map50", boxes.voc, DIOR, (rgb(0.5, "0.5 to 30 m"),), published_px=800, paper="DIOR"),
    Row("dior_r", "DIOR-R", "boxes", "map50_rotated", boxes.voc, DIOR, (rgb(0.5, "0.5 to 30 m"),), published_px=800, oriented=True, paper="DIOR-R"),
    Row("fair1m", "FAIR1M 1.0", "boxes", "map50_rotated", boxes.fair1m, "train/part*/{images,labelXml}, validation/{images,labelXml}", (rgb(0.5, "0.3 to 0.8 m"),), oriented=True, paper="FAIR1M"),
    Row("nwpu_vhr10", "NWPU VHR-10", "boxes", "map50", boxes.coco, "'positive image set'/, instances_{train,val}2017.json or annotations.json", (rgb(0.5, "0.5 to 2 m"),)),
    # --- change
    Row("levir_cd", "LEVIR-CD", "pair", "f1", change.levir_cd, "{train,val,test}/{A,B,label}, or {A,B,label} with list/", (rgb(0.5),), tile_px=256, paper="LEVIR-CD"),
    Row("oscd", "OSCD", "pair", "f1", change.oscd, "'Onera … - Images'/, 'Onera … - Train Labels'/", (Bands("s2", S2_13, REFLECTANCE, 10.0, note=TOA),), tile_px=64, paper="OSCD"),
    Row("dynamic_earthnet_scs", "Dynamic EarthNet", "dense", "scs", series.dynamic_earthnet, DYN + ", sentinel2/…/YYYY-MM.tif", (Bands("s2", S2_TEN_FIRST, REFLECTANCE, 3.0, note="resampled to 3 m by its authors"),), published_px=1024, tile_px=64, paper="Dyna.-S2 SCS"),
    # --- several sensors
    Row("dynamic_earthnet_mm", "Dynamic EarthNet", "dense", "miou", series.dynamic_earthnet, DYN + ", sentinel2/…/YYYY-MM.tif", (PLANET, Bands("s2", S2_TEN_FIRST, REFLECTANCE, 3.0, note="resampled to 3 m by its authors")), published_px=1024, tile_px=64, paper="Dyna.-MM"),
    Row("pastis_r", "PASTIS-R", "dense", "miou", series.pastis_r, "metadata.geojson, DATA_{S2,S1A,S1D}/, ANNOTATIONS/", (PASTIS_S2, PASTIS_S1), published_px=128, paper="PASTIS-MM"),
    Row("bigearthnet_mm", "BigEarthNet", "labels", "map", patches.bigearthnet, BEN, (BENV2_S2, BENV2_S1), published_px=120, paper="BigEarthNet-MM"),
    Row("benv2", "BigEarthNet v2 (GEO-Bench-2)", "labels", "map", geobench.benv2, "*benv2*.tortilla", (BENV2_S2, Bands("s1", ("VH", "VV"), "dB", 10.0)), published_px=120),
    Row("treesatai", "TreeSatAI (GEO-Bench-2)", "labels", "map", geobench.treesatai, "*treesatai*.tortilla", (Bands("hr", AERIAL_BANDS, "uint8", 0.2), Bands("s2", S2_TEN_FIRST, REFLECTANCE, 10.0), Bands("s1", ("VV", "VH", "VV/VH"), "dB", 10.0)), published_px=0),
    Row("pastis", "PASTIS-R (GEO-Bench-2)", "dense", "miou", geobench.pastis, "*pastis*.tortilla", (PASTIS_S2, PASTIS_S1), published_px=0),
    Row("dynamic_earthnet_geobench", "Dynamic EarthNet (GEO-Bench-2)", "dense", "miou", geobench.dynamic_earthnet, "*dynamic_earthnet*.tortilla", (PLANET, Bands("s2", S2_TEN_FIRST, REFLECTANCE, 3.0, note="resampled to 3 m by its authors")), published_px=0),
)  # fmt: skip


OWN = "folders"


def own_row(sensor: str, order: tuple[str, ...], unit: str, gsd_m: float) -> Row:
    """Images of one's own in folders named by class (EuroSAT's layout): what their numbers mean is declared, nothing is guessed.

    Raises:
        UsageError: a band, unit or sensor that `Bands` does not know.
    """
    bands = Bands(sensor, order, unit, gsd_m)  # type: ignore[arg-type]  # Bands checks the unit
    return Row(OWN, "own images", "class", "accuracy", folders.class_folders, NAMED, (bands,))


def row_named(name: str, where: str = "--task") -> Row:
    """Raises UsageError with the nearest names. where: who names it, for the message."""
    import difflib

    for row in ROWS:
        if row.name == name:
            return row
    near = difflib.get_close_matches(name, [row.name for row in ROWS], 3) or [row.name for row in ROWS]
    raise UsageError(f"{where} {name}: no such row; near it: {', '.join(near)} (evaluate --list shows all)")
