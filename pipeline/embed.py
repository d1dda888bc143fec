"""Features of one multi-modal site, with everything needed to place them on the ground and in time."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import torch

from cluster import storage
from cluster.errors import UsageError
from data_prep.config import GridConfig
from data_prep.schema import SiteArrays
from data_prep.shards import MANIFEST, ShardSet
from data_prep.sources import open_catalog, read_site
from model.inputs import normalise
from model.pretrained import Pretrained
from pipeline.config import ViewConfig
from pipeline.probes.features import FUSED, date_mean, tokens_of
from pipeline.probes.sites import chosen_dates, view_of_sites
from pipeline.reader.geometry import GRID_M

MAX_SIDE_M = 1280.0


def find_site(url: str, key: str | None) -> SiteArrays:
    """One site of a shard set or a STAC catalog: the one of that key, or the only one.

    Raises:
        UsageError: several sites and no key, or no site of that key.
    """
    if storage.exists(storage.join(url, MANIFEST)):
        shardset = ShardSet.open(url)
        keys = shardset.read_index(["key"])["key"].to_pylist()
        return shardset.read_sample(_position(url, keys, key))
    records = open_catalog(url)
    return read_site(records[_position(url, [record.key for record in records], key)], GridConfig())


def _position(url: str, keys: list[str], key: str | None) -> int:
    if key is None:
        if len(keys) == 1:
            return 0
        raise UsageError(f"{url} holds {len(keys)} sites; choose one with --key, such as --key {keys[0]}")
    if key not in keys:
        raise UsageError(f"{url} holds no site {key}; it has {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}")
    return keys.index(key)


def embed(model: Pretrained, site: SiteArrays) -> dict[str, np.ndarray]:
    """Arrays by name.

    `fused` [y, x, F], `fused_valid`; per present modality m `m` [T, h, w, D] with `m_valid`, `m_dates` (ISO texts), `m_mean`
    [D] over valid tokens and dates; `fused_mean` [F]; `side_m`, `west_m`, `north_m`, `crs`: the ground square the grids cover.

    Raises:
        UsageError: the site has none of the model's modalities, or is larger than MAX_SIDE_M (cut it first).
    """
    view = whole_view(site)
    present = [name for name in model.cfg.modalities if name in site.series]
    if not present:
        raise UsageError(
            f"site {site.key} has {', '.join(site.series) or 'nothing'}; the model reads {', '.join(model.cfg.modalities)}"
        )
    raw = view_of_sites([site], view, model.cfg.modalities, min_clear=0.0)
    with torch.no_grad():
        features = model.skysense(normalise(raw, model.statistics))
    out: dict[str, np.ndarray] = {}
    for name in (*present, FUSED):
        feat, valid = tokens_of(features, name)
        mean, any_date = date_mean(feat.flatten(2, 3)[:, :, :, None], valid.flatten(2, 3)[..., None])
        weight = any_date.float()[..., None]
        out[name], out[f"{name}_valid"] = feat[0].float().numpy(), valid[0].numpy()
        out[f"{name}_mean"] = ((mean * weight).sum((0, 1, 2)) / weight.sum().clamp_min(1)).numpy()
        if name != FUSED:
            series = site.series[name]
            out[f"{name}_dates"] = np.array([series.datetimes[date] for date in chosen_dates(site, name, view, 0.0)])
    out[FUSED], out[f"{FUSED}_valid"] = out[FUSED][0], out[f"{FUSED}_valid"][0]
    west, south, east, north = site.footprint
    side = view.series_px * GRID_M
    x0, y0 = (float(np.floor((room - side) / 2 / GRID_M) * GRID_M) for room in (east - west, north - south))
    out |= {
        "side_m": np.array(side),
        "west_m": np.array(west + x0),
        "north_m": np.array(north - y0),
        "crs": np.array(site.crs),
    }
    return out


def whole_view(site: SiteArrays) -> ViewConfig:
    """The largest centred square on the 10 m grid, native hr resolution, every date."""
    west, south, east, north = site.footprint
    side = np.floor(min(east - west, north - south) / GRID_M + 1e-6) * GRID_M
    if side < GRID_M or side > MAX_SIDE_M:
        raise UsageError(
            f"site {site.key} is {side:.0f} m wide; embed takes 10 to {MAX_SIDE_M:.0f} m (cut it with grid.side_m)"
        )
    hr = site.series.get("hr")
    pixels = round(side / hr.transform[0]) if hr is not None else 32
    dates = {name: len(series.datetimes) for name, series in site.series.items()}
    return ViewConfig(pixels, int(side / GRID_M), dates.get("s2", 1), dates.get("s1", 1))


def write_features(out: str, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> int:
    """Writes `.npz` (numpy, no pickle) or `.safetensors`, atomically; returns its bytes."""
    if out.endswith(".npz"):
        stream = io.BytesIO()
        np.savez_compressed(stream, facts=np.array(json.dumps(facts)), allow_pickle=False, **arrays)
        data = stream.getvalue()
    elif out.endswith(".safetensors"):
        from safetensors.numpy import save

        texts = {name: json.dumps(value.tolist()) for name, value in arrays.items() if value.dtype.kind == "U"}
        numbers = {name: np.atleast_1d(value) for name, value in arrays.items() if value.dtype.kind != "U"}
        data = save(numbers, {"facts": json.dumps(facts), **texts})
    else:
        raise UsageError(f"--out {out} must end in .npz or .safetensors")
    storage.write_atomic(out, data)
    return len(data)
