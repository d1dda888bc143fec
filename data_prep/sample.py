"""One site ↔ the members of one sample: `KEY.json` first, then the arrays of each modality, then label rasters.

A member is named by its suffix after the key: `json`, `hr.b2nd`, `hr.mask.b2nd`, `s2.b2nd`, … `label.landcover.b2nd`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from data_prep import codec
from data_prep.config import CodecsConfig
from data_prep.schema import CLEAR, CLOUD, MODALITIES, NODATA, SCHEMA_VERSION, Series, SiteArrays

KEY = re.compile(
    r"[A-Za-z0-9_-]{1,80}"
)  # no dots: stock webdataset splits a name at its first one; 80: fits a tar header
LABEL = re.compile(r"[A-Za-z0-9_-]{1,32}")


class SampleError(ValueError):
    """A site that may not become a sample: its arrays break the schema. Names the asset and the reason."""

    def __init__(self, asset: str, why: str) -> None:
        super().__init__(f"{asset}: {why}")
        self.asset, self.why = asset, why


def sample_json(site: SiteArrays, split: str) -> dict[str, Any]:
    """The content of `KEY.json`: everything about the sample but its pixels and (manifest) class names."""
    return {
        "key": site.key,
        "schema": SCHEMA_VERSION,
        "crs": site.crs,
        "bbox_wgs84": [float(v) for v in site.bbox_wgs84],
        "footprint": [float(v) for v in site.footprint],
        "cell": site.cell,
        "split": split,
        "scalars": {name: int(value) for name, value in sorted(site.scalars.items())},
        "modalities": {name: _modality_json(name, site.series[name]) for name in MODALITIES if name in site.series},
        "labels": {name: {"shape": list(raster.shape)} for name, raster in sorted(site.rasters.items())},
        **({"losses": site.losses} if site.losses else {}),
    }


def clear_fractions(mask_THW: np.ndarray) -> list[float]:
    """Share of CLEAR pixels per date, rounded so that it reads the same from JSON and from the index (float32).

    1.0 means that every pixel is clear, exactly: the reader then does not decode the mask.
    """
    shares = (mask_THW == CLEAR).mean(axis=(1, 2))
    return [1.0 if n == 1 else min(round(float(n), 6), 0.999999) for n in shares]


def encode_members(site: SiteArrays, split: str, codecs: CodecsConfig) -> Iterator[tuple[str, bytes]]:
    """(suffix, bytes) of every member of a sample, in tar order."""
    yield "json", dump_json(sample_json(site, split))
    tile = codecs.tile_px
    for name in MODALITIES:
        if name not in site.series:
            continue
        series, kind = site.series[name], codecs.of(name)
        yield f"{name}.{codec.extension(kind)}", codec.encode(series.pixels_TCHW, kind, tile)
        mask = series.mask_THW[:, None]
        yield f"{name}.mask.{codec.extension(codecs.mask)}", codec.encode(mask, codecs.mask, tile)
    for name, raster in sorted(site.rasters.items()):
        data = codec.encode(raster[None, None].astype(np.int16, copy=False), codecs.label, tile)
        yield f"label.{name}.{codec.extension(codecs.label)}", data


def decode_members(read: Callable[[str], bytes], suffixes: list[str]) -> tuple[SiteArrays, str]:
    """(site, split) from a sample's members. `read(suffix)` gives the bytes of one member.

    Raises codec.MemberError for bytes that do not decode or do not fit `KEY.json`.
    """
    info = load_json(read("json"))
    by_stem = {suffix.split(".b2nd")[0].split(".npy")[0].split(".zarr.zip")[0]: suffix for suffix in suffixes}

    def array(stem: str, shape: list[int]) -> np.ndarray:
        suffix = by_stem.get(stem)
        if suffix is None:
            raise codec.MemberError(f"member {stem}.* is missing")
        member = codec.open_member(read(suffix), suffix[len(stem) + 1 :])
        if list(member.shape) != shape:
            raise codec.MemberError(f"{suffix}: shape {list(member.shape)}, the sample's JSON says {shape}")
        return member.read_all()

    series = {}
    for name, entry in info["modalities"].items():
        t, _, h, w = entry["shape"]
        series[name] = Series(
            pixels_TCHW=array(name, entry["shape"]), mask_THW=array(f"{name}.mask", [t, 1, h, w])[:, 0],
            datetimes=entry["datetimes"], transform=tuple(entry["transform"]), gsd_m=entry["gsd_m"],
            product_ids=entry["product_ids"], orbits=entry["orbits"], decisions=entry["decisions"],
        )  # fmt: skip
    rasters = {name: array(f"label.{name}", [1, 1, *entry["shape"]])[0, 0] for name, entry in info["labels"].items()}
    site = SiteArrays(
        info["key"], info["crs"], tuple(info["bbox_wgs84"]), tuple(info["footprint"]), series, info["cell"],
        info["scalars"], rasters, losses=info.get("losses", []),
    )  # fmt: skip
    return site, info["split"]


def dump_json(value: Any) -> bytes:
    """Compact JSON, the same bytes for equal values; numbers that are not finite become null."""
    return json.dumps(_plain(value), separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def load_json(data: bytes) -> dict[str, Any]:
    """Raises codec.MemberError for anything but a JSON object."""
    try:
        value = json.loads(data)
    except (ValueError, UnicodeDecodeError) as error:
        raise codec.MemberError(f"not JSON: {error}") from None
    if not isinstance(value, dict) or "key" not in value or "modalities" not in value:
        raise codec.MemberError("not a sample's JSON: it names no key or no modalities")
    return value


def check_site(site: SiteArrays) -> None:
    """The schema's promises, checked before a site becomes a sample. Raises SampleError."""
    if not KEY.fullmatch(site.key):
        raise SampleError("key", f"{site.key!r} must be 1 to 80 of letters, digits, '-' and '_'")
    if not all(math.isfinite(v) for v in (*site.bbox_wgs84, *site.footprint)):
        raise SampleError("footprint", f"is not finite: {site.footprint}, {site.bbox_wgs84}")
    if not site.series:
        raise SampleError("site", "has no modality with a valid pixel")
    for name, series in site.series.items():
        _check_series(name, series)
    for name, raster in site.rasters.items():
        if not LABEL.fullmatch(name) or raster.ndim != 2 or raster.dtype != np.int16:
            raise SampleError(
                f"label {name}", f"must be int16 [H, W] with a plain name, found {raster.dtype} {raster.shape}"
            )
    for name in site.scalars:
        if not LABEL.fullmatch(name):
            raise SampleError(f"label {name}", "must be named by letters, digits, '-' and '_'")


def _check_series(name: str, series: Series) -> None:
    spec = MODALITIES.get(name)
    if spec is None:
        raise SampleError(name, f"is not a modality of the schema ({', '.join(MODALITIES)})")
    pixels, mask = series.pixels_TCHW, series.mask_THW
    if pixels.ndim != 4 or pixels.shape[1] != len(spec.bands):
        raise SampleError(
            name, f"has shape {pixels.shape}, wanted [T, {len(spec.bands)}, H, W] ({' '.join(spec.bands)})"
        )
    if pixels.dtype != np.dtype(spec.dtype):
        raise SampleError(name, f"has dtype {pixels.dtype}, wanted {spec.dtype}")
    if mask.shape != (pixels.shape[0], *pixels.shape[2:]) or mask.dtype != np.uint8:
        raise SampleError(name, f"has a mask {mask.dtype} {mask.shape} for pixels {pixels.shape}")
    if mask.max() > CLOUD:
        raise SampleError(name, f"has mask code {mask.max()}; codes are {NODATA} nodata, {CLEAR} clear, {CLOUD} cloud")
    num_dates = pixels.shape[0]
    for field in ("datetimes", "product_ids", "orbits", "decisions"):
        value = getattr(series, field)
        if len(value) != num_dates and (value or field == "datetimes"):
            raise SampleError(name, f"has {len(value)} {field} for {num_dates} dates")
    known = [text for text in series.datetimes if text]
    if known != sorted(known):
        raise SampleError(name, "has dates out of order")
    if not spec.is_series and num_dates != 1:
        raise SampleError(name, f"is one image per site, found {num_dates}")
    clear = (mask == CLEAR)[:, None]
    if np.issubdtype(pixels.dtype, np.floating):
        bad = clear & ~np.isfinite(pixels)
    elif spec.kind != "reflectance":  # black is a colour, and 0 m a height
        return
    else:
        bad = clear & (pixels == 0)
    if bad.any():
        raise SampleError(name, f"has {int(bad.any(axis=1).sum())} pixels that are marked clear and hold no value")


def _modality_json(name: str, series: Series) -> dict[str, Any]:
    spec, num_dates = MODALITIES[name], len(series.datetimes)
    return {
        "bands": list(spec.bands),
        "shape": list(series.pixels_TCHW.shape),
        "dtype": str(series.pixels_TCHW.dtype),
        "unit": spec.unit,
        "transform": [float(v) for v in series.transform],
        "gsd_m": float(series.gsd_m),
        "datetimes": list(series.datetimes),
        "product_ids": list(series.product_ids) or [""] * num_dates,
        "orbits": list(series.orbits) or [""] * num_dates,
        "decisions": list(series.decisions) or [{}] * num_dates,
        "clear_fraction": clear_fractions(series.mask_THW),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
