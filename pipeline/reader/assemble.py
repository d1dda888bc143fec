"""Member bytes of one sample → its row in every view of a batch: only the dates and tiles that some view shows are decoded."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping

import numpy as np

from data_prep.codec import Member
from data_prep.schema import CLEAR, MODALITIES
from pipeline.reader.buffers import ModalityArrays, ViewArrays, blank_modality
from pipeline.reader.geometry import GRID_M, Crop, Window, affine, aligned_window, copy_turned, turned_box, unturned
from pipeline.reader.resample import nearest, resample, taps
from pipeline.reader.views import ViewPlan


@dataclasses.dataclass(frozen=True)
class SiteMembers:
    """Members of a sample by stem (`s2`, `s2.mask`, `label.landcover`), opened when looked up, and what the index says of it.

    doy, clear: per modality the day of year and the share of clear pixels of every stored date; 1.0 is all, exactly; None
        in place of an array is 1.0 for every date.
    width_m: ground extent of the site.
    """

    members: Mapping[str, Member]
    doy: Mapping[str, np.ndarray]
    clear: Mapping[str, np.ndarray | None]
    width_m: float


_thread = threading.local()


def _scratch(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Re-used memory of this thread; what it held before is garbage."""
    size = int(np.prod(shape)) * dtype.itemsize
    held = getattr(_thread, name, None)
    if held is None or len(held) < size:
        held = np.empty(size, np.uint8)
        setattr(_thread, name, held)
    return held[:size].view(dtype).reshape(shape)


def fill_site(site: SiteMembers, plans: list[ViewPlan], views: list[ViewArrays], i: int) -> None:
    """Writes row i of every view."""
    for plan, view in zip(plans, views):
        view.photometric_BP[i], view.side_m_B[i] = plan.photometric_P, plan.crop.side_m
    for name in views[0].modalities:
        canvases = [(plan, view.modalities[name]) for plan, view in zip(plans, views)]
        present = name in site.members
        if present:
            _fill_modality(site, name, canvases, i)
        for plan, out in canvases:
            if not present:
                blank_modality(out, i)
            side = out.x_BTCHW.shape[-1]
            gsd = _canvas_gsd(name, plan.crop, side)
            out.gsd_B[i], out.affine_B23[i] = gsd, affine(plan.crop, side, gsd)
    if views[0].classes_BHW is not None:
        stem = next((stem for stem in site.members if stem.startswith("label.")), None)
        label = None if stem is None else site.members[stem]
        for plan, view in zip(plans, views):
            assert view.classes_BHW is not None
            _fill_classes(label, site.width_m, plan.crop, view.classes_BHW[i])


def _canvas_gsd(name: str, crop: Crop, side_px: int) -> float:
    """hr is stretched to its canvas; a series keeps its 10 m pixels and leaves the canvas's rest empty."""
    return GRID_M if MODALITIES[name].is_series else crop.side_m / side_px


def _fill_modality(site: SiteMembers, name: str, canvases: list[tuple[ViewPlan, ModalityArrays]], i: int) -> None:
    member = site.members[name]
    _, _, height, width = member.shape
    gsd = site.width_m / width
    wanted = []  # (window of source pixels, aligned?) per view
    for plan, out in canvases:
        side = out.x_BTCHW.shape[-1]
        canvas_gsd = _canvas_gsd(name, plan.crop, side)
        window = aligned_window(plan.crop, height, width, gsd, side) if abs(canvas_gsd - gsd) < 0.002 * gsd else None
        wanted.append((window or _covering(plan.crop, height, width, gsd), window is not None))
    shared: Window | None = wanted[0][0]
    dates = canvases[0][0].dates[name]
    if len(canvases) > 1:
        shared = _union([window for window, _ in wanted])
        dates = np.unique(np.concatenate([plan.dates[name] for plan, _ in canvases]))
    source = None if shared is None or shared.empty else _read(site, name, member, dates, shared)
    for (plan, out), (window, aligned) in zip(canvases, wanted):
        chosen = plan.dates[name]
        _fill_dates(out, i, chosen, plan, name, site.doy[name])
        if window.empty or len(chosen) == 0:
            out.x_BTCHW[i], out.valid_BTHW[i] = 0, False
            continue
        if source is None or shared is None:
            pixels, clear = _read(site, name, member, chosen, window)
        else:
            pixels, clear = _part(source, shared, dates, window, chosen)
        if aligned:
            _place(pixels, clear, window, plan.crop.turn, out, i)
        else:
            canvas_gsd = _canvas_gsd(name, plan.crop, out.x_BTCHW.shape[-1])
            _place_resampled(pixels, clear, window, plan.crop, gsd, canvas_gsd, out, i)


Pixels = tuple[np.ndarray, np.ndarray | None]  # [n, C, h, w] and where they are clear, [n, h, w]; None: everywhere


def _part(source: Pixels, shared: Window, dates: np.ndarray, window: Window, chosen: np.ndarray) -> Pixels:
    """A view's window and dates out of what was read for all views."""
    pixels, clear = source
    if (window.y0, window.y1, window.x0, window.x1) != (shared.y0, shared.y1, shared.x0, shared.x1):
        rows = slice(window.y0 - shared.y0, window.y1 - shared.y0)
        columns = slice(window.x0 - shared.x0, window.x1 - shared.x0)
        pixels, clear = pixels[..., rows, columns], None if clear is None else clear[..., rows, columns]
    if len(chosen) < len(dates):
        at = np.searchsorted(dates, chosen)
        pixels, clear = pixels[at], None if clear is None else clear[at]
    return pixels, clear


def _union(windows: list[Window]) -> Window | None:
    """One window around all, if reading it once is less than reading each."""
    full = [w for w in windows if not w.empty]
    if not full:
        return None
    y0, x0, y1, x1 = min(w.y0 for w in full), min(w.x0 for w in full), max(w.y1 for w in full), max(w.x1 for w in full)
    if (y1 - y0) * (x1 - x0) > sum((w.y1 - w.y0) * (w.x1 - w.x0) for w in full):
        return None
    return Window(y0, y1, x0, x1, 0, 0)


def _covering(crop: Crop, height: int, width: int, gsd: float) -> Window:
    """Source pixels under a crop that is not aligned with them, and one more on each side for interpolation."""
    x, y, n = crop.x0_m / gsd, crop.y0_m / gsd, crop.side_m / gsd
    x0, y0 = max(int(np.floor(x)) - 1, 0), max(int(np.floor(y)) - 1, 0)
    return Window(
        y0, max(min(int(np.ceil(y + n)) + 1, height), y0), x0, max(min(int(np.ceil(x + n)) + 1, width), x0), 0, 0
    )


def _read(site: SiteMembers, name: str, member: Member, dates: np.ndarray, window: Window) -> Pixels:
    """Some dates of a window, in scratch memory or as a view of the member's bytes.

    Masks of dates that the index knows to be clear all over are not decoded. A number that is none is missing, whatever the
    mask says.
    """
    pixels = _decode(member, dates, window, "pixels")
    clear = None
    shares = site.clear[name]
    masked = () if shares is None else np.flatnonzero(shares[dates] < 1)
    if len(masked):
        clear = np.ones((len(dates), *pixels.shape[2:]), bool)
        clear[masked] = _decode(site.members[f"{name}.mask"], dates[masked], window, "codes")[:, 0] == CLEAR
    if pixels.dtype.kind == "f":
        finite = np.isfinite(pixels).all(axis=1)
        clear = finite if clear is None else clear & finite
    return pixels, clear


def _decode(member: Member, dates: np.ndarray, window: Window, name: str) -> np.ndarray:
    rows, columns = slice(window.y0, window.y1), slice(window.x0, window.x1)
    raw = getattr(member, "array_TCHW", None)
    if raw is not None:
        return raw[..., rows, columns] if len(dates) == len(raw) else raw[dates, :, rows, columns]
    if not member.is_tiled:
        out = _scratch(name, (len(dates), *member.shape[1:]), member.dtype)
        member.read_dates(dates.tolist(), out)
        return out[..., rows, columns]
    out = _scratch(name, (len(dates), member.shape[1], window.y1 - window.y0, window.x1 - window.x0), member.dtype)
    for n, t in enumerate(dates.tolist()):
        member.read_window(t, window.y0, window.y1, window.x0, window.x1, out[n])
    return out


def _fill_dates(out: ModalityArrays, i: int, chosen: np.ndarray, plan: ViewPlan, name: str, doy: np.ndarray) -> None:
    day = doy[chosen]
    if plan.jitter_days is not None:
        day = np.where(day > 0, (day - 1 + plan.jitter_days[name]) % 366 + 1, 0)
    out.doy_BT[i, : len(chosen)], out.doy_BT[i, len(chosen) :] = day, 0


def _place(
    pixels: np.ndarray, clear: np.ndarray | None, window: Window, turn: int, out: ModalityArrays, i: int
) -> None:
    """Copies aligned pixels to their place on the turned canvas and empties the rest."""
    x, valid, count = out.x_BTCHW[i], out.valid_BTHW[i], len(pixels)
    if pixels.shape[-2:] != x.shape[-2:]:
        x[...], valid[...] = 0, False
    elif count < len(x):
        x[count:], valid[count:] = 0, False
    rows, columns = (window.row, window.row + pixels.shape[-2]), (window.column, window.column + pixels.shape[-1])
    box = turned_box(rows, columns, x.shape[-1], turn)
    copy_turned(pixels, x[:count, ..., *box], turn)
    if clear is None:
        valid[:count, *box] = True
    else:
        copy_turned(clear, valid[:count, *box], turn)


def _place_resampled(
    pixels: np.ndarray,
    clear: np.ndarray | None,
    window: Window,
    crop: Crop,
    gsd: float,
    canvas_gsd: float,
    out: ModalityArrays,
    i: int,
) -> None:
    """`_place` for pixels of another size or phase: resampled onto the crop's part of the canvas."""
    count, side = round(crop.side_m / canvas_gsd), out.x_BTCHW.shape[-1]
    rows = taps(crop.y0_m / gsd - window.y0, canvas_gsd / gsd, min(count, side), pixels.shape[-2])
    columns = taps(crop.x0_m / gsd - window.x0, canvas_gsd / gsd, min(count, side), pixels.shape[-1])
    clear = np.ones((len(pixels), *pixels.shape[2:]), bool) if clear is None else clear
    values, inside = resample(pixels, clear, rows, columns)
    x, mask = unturned(out.x_BTCHW[i], crop.turn), unturned(out.valid_BTHW[i], crop.turn)
    x[...], mask[...] = 0, False
    part = np.s_[: len(values), ..., : values.shape[-2], : values.shape[-1]]
    x[part], mask[part] = values, inside


def _fill_classes(label: Member | None, width_m: float, crop: Crop, out_HW: np.ndarray) -> None:
    """Labels on the view's 10 m canvas; -1 outside the raster and where there is none."""
    out_HW[...] = -1
    if label is None:
        return
    _, _, height, width = label.shape
    step, side = GRID_M / (width_m / width), min(round(crop.side_m / GRID_M), out_HW.shape[-1])
    rows = nearest(crop.y0_m / GRID_M * step, step, side, height)
    columns = nearest(crop.x0_m / GRID_M * step, step, side, width)
    inside_rows, inside_columns = np.flatnonzero(rows >= 0), np.flatnonzero(columns >= 0)
    if len(inside_rows) == 0 or len(inside_columns) == 0:
        return
    raster = label.read_date(0)[0]
    values = raster[np.ix_(rows[inside_rows], columns[inside_columns])]
    unturned(out_HW, crop.turn)[np.ix_(inside_rows, inside_columns)] = values
