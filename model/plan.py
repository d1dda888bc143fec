"""Where every token of a packed trunk call stands, from validity alone: made on the host before the network runs, so that nothing in
the forward has to ask the device anything.

A call holds sets of images (one modality of one view each, one size). Only valid tokens are packed: absent images, cloudy tokens
and padding are not computed. Stages 1-2 keep tokens as rows, gathered into windows for attention; stages 3-4 keep them as
sequences [prompts, tokens], in buckets of equal length (the few shorter ones are padded and masked).

Dimension legend: N images of a set · h, w tokens · T rows of a stage · X windows of a bucket · S slots of a window · J slots of a
sequence · P prompts · M modalities.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.rows import Take, plan_take, to_device
from model.windows import offset_index, window_cells

# Added to the logits of masked keys. exp(MASKED + any logit here) is exactly 0 in every float format, and a row whose keys
# are all masked stays finite, forward and backward, where -inf would give NaN.
MASKED = -3.0e4
# A bucket costs some twenty kernels forward and backward: it is worth so many slots of padding, scores of windows in a frame too large,
# scores with a mask that they do not need.
PADDED_SLOTS, PADDED_SCORES, MASKED_SCORES, MAX_BUCKETS = 32, 1 << 11, 1 << 15, 6


class ImageSet(NamedTuple):
    """Images of one modality: validity of their first-stage tokens, and whether the grid is halved at each transition."""

    modality: str
    valid_Nhw: np.ndarray
    merges: tuple[bool, bool, bool]


@dataclass(frozen=True)
class Windows:
    """One bucket of windows: `bias_index_SS` into the table of position biases; see_X1SS: who sees whom, None: all see all."""

    count: int
    span: int
    bias_index_SS: Tensor
    see_X1SS: Tensor | None


class WindowPlan(NamedTuple):
    """Rows to windows, bucket by bucket, and back."""

    enter: Take
    leave: Take
    buckets: tuple[Windows, ...]


@dataclass(frozen=True)
class Bucket:
    """`count` sequences of `length` slots, consecutive in the packed rows; bias_N1JJ: 0 or MASKED (J or 1 queries), None: no mask."""

    count: int
    length: int
    bias_N1JJ: Tensor | None


class Routed(NamedTuple):
    """Rows that experts see, and back (the others are zero); member_TM: float32 one-hot of their modality."""

    enter: Take
    leave: Take
    member_TM: Tensor


@dataclass(frozen=True)
class Sequences:
    """Packed rows of sequences. buckets: for unshifted and for shifted blocks (they differ in windowed attention only)."""

    buckets: tuple[tuple[Bucket, ...], tuple[Bucket, ...]]
    routed: Routed | None = None

    @staticmethod
    def dense(count: int, length: int, bias_N1JJ: Tensor | None = None) -> Sequences:
        bucket = (Bucket(count, length, bias_N1JJ),)
        return Sequences((bucket, bucket))


@dataclass(frozen=True)
class Stage:
    """One stage of a call.

    Attributes:
        grids: per set, row of every token in the stage's arrangement, -1 where it is not computed: [N, h, w].
        image_T: index of each row's image among all images of the call (drop-path, ground sampling distance).
        windows: of unshifted and shifted blocks (stages 1-2).
        sequences, enter, prompt_KM, centre_T2, entry_centre_E2, entry_image_E: stages 3-4. enter: rows, then the prompts of the K
            computed images, to sequences; prompt_KM: one-hot modality of these images (of those `present`); centres: (row, column) in pixels of the canvas.
    """

    grids: list[np.ndarray]
    image_T: Tensor
    windows: tuple[WindowPlan, WindowPlan] | None = None
    sequences: Sequences | None = None
    enter: Take | None = None
    prompt_KM: Tensor | None = None
    centre_T2: Tensor | None = None
    entry_centre_E2: Tensor | None = None
    entry_image_E: Tensor | None = None


class Transition(NamedTuple):
    """Rows of one stage to rows of the next: `take`, then per part (merged or kept, rows after `take`)."""

    take: Take
    parts: tuple[tuple[bool, int], ...]


@dataclass(frozen=True)
class TrunkPlan:
    """Per set: kept, which images are computed; members, which first-stage tokens of these (None: all); valid, per stage, bool [N, h, w]."""

    sets: list[ImageSet]
    kept: list[Tensor | None]
    members: list[Tensor | None]
    stages: list[Stage]
    transitions: list[Transition]
    valid: list[list[np.ndarray]]
    device: torch.device

    def dense(self, stage: int) -> Take:
        """From the stage's rows to all tokens of all sets, grid by grid; zero where not valid."""
        grids = [np.where(v[stage], g, -1) for v, g in zip(self.valid, self.stages[stage].grids)]
        flat = np.concatenate([g.reshape(-1) for g in grids])
        return plan_take(flat, self.stages[stage].image_T.shape[0], self.device)


def present(cfg: ModelConfig, sets: list[ImageSet]) -> list[str]:
    """Modalities of a call, in the configuration's order."""
    return [name for name in cfg.modalities if any(images.modality == name for images in sets)]


def halve(grid_Nhw: np.ndarray) -> np.ndarray:
    """bool [N, ⌈h/2⌉, ⌈w/2⌉]: any of the four."""
    corners = _corners(grid_Nhw, False)
    return np.asarray(corners.any(-1))


def _corners(grid_Nhw: np.ndarray, blank: int | bool) -> np.ndarray:
    """[N, ⌈h/2⌉, ⌈w/2⌉, 4]: top-left, bottom-left, top-right, bottom-right."""
    _, h, w = grid_Nhw.shape
    padded = np.pad(grid_Nhw, ((0, 0), (0, h % 2), (0, w % 2)), constant_values=blank)
    return np.stack([padded[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1)


def stage_grids(valid_Nhw: np.ndarray, merges: tuple[bool, bool, bool]) -> list[np.ndarray]:
    """Validity in each of the four stages."""
    stages = [valid_Nhw]
    for merge in merges:
        stages.append(halve(stages[-1]) if merge else stages[-1])
    return stages


def plan_trunk(cfg: ModelConfig, sets: list[ImageSet], device: torch.device, dtype: torch.dtype) -> TrunkPlan:
    """The plan of one call. Every modality has at least one computed image (its first, where none is valid), so that all parameters
    are part of every graph; what is computed for it is read by nobody.
    """
    names = [images.modality for images in sets]
    if any(a != b and a in names[i + 1 :] for i, (a, b) in enumerate(itertools.pairwise(names))):
        raise ValueError(f"sets of one modality must be neighbours, found {names}")
    valid = [stage_grids(s.valid_Nhw, s.merges) for s in sets]
    computed = [list(grids) for grids in valid]
    for name in {s.modality for s in sets}:
        mine = [i for i, s in enumerate(sets) if s.modality == name]
        if not any(valid[i][0].any() for i in mine) and valid[mine[0]][0].size:
            computed[mine[0]] = [np.concatenate([np.ones_like(g[:1]), g[1:]]) for g in valid[mine[0]]]
    kept, members = [], []
    for grids in computed:
        images = grids[0].any((1, 2))
        part = grids[0][images]
        kept.append(None if images.all() else to_device(np.flatnonzero(images), device))
        members.append(None if part.all() else to_device(np.flatnonzero(part), device))
    first = np.cumsum([0, *(len(s.valid_Nhw) for s in sets)])
    stages: list[Stage] = []
    transitions = []
    for s in range(4):
        grids = number_rows([found[s] for found in computed])
        image = np.concatenate([at + np.nonzero(grids_[s])[0] for at, grids_ in zip(first, computed)])
        if s:
            merges = [images.merges[s - 1] for images in sets]
            transitions.append(plan_transition(merges, stages[s - 1].grids, grids, len(stages[s - 1].image_T), device))
        if s < 2:
            plans = [plan_windows(cfg.window, grids, shift, device) for shift in (0, cfg.window // 2)]
            stages.append(Stage(grids, to_device(image, device), (plans[0], plans[1])))
        else:
            stages.append(_sequence_stage(cfg, sets, valid, grids, image, first, s, device, dtype))
    return TrunkPlan(sets, kept, members, stages, transitions, valid, device)


def number_rows(computed: list[np.ndarray]) -> list[np.ndarray]:
    """Computed tokens of a stage numbered set by set, image by image, row by row; -1 elsewhere."""
    found, at = [], 0
    for grid in computed:
        number = np.cumsum(grid.reshape(-1)).reshape(grid.shape) - 1 + at
        at += int(grid.sum())
        found.append(np.where(grid, number, -1))
    return found


def plan_transition(
    merges: list[bool], before: list[np.ndarray], after: list[np.ndarray], num_before: int, device: torch.device
) -> Transition:
    """before, after: per set, row of every token ([N, h, w], -1 for none) in the two stages."""
    sources: list[np.ndarray] = []
    parts: list[tuple[bool, int]] = []
    for merge, old, new in zip(merges, before, after):
        source = _corners(old, -1)[new >= 0].reshape(-1) if merge else old[new >= 0]
        sources.append(source)
        if parts and parts[-1][0] == merge:
            parts[-1] = (merge, parts[-1][1] + len(source))
        else:
            parts.append((merge, len(source)))
    return Transition(plan_take(np.concatenate(sources), num_before, device), tuple(parts))


def plan_windows(window: int, grids: list[np.ndarray], shift: int, device: torch.device) -> WindowPlan:
    """Windows of all sets by the size of their frame; those without a computed token are left out."""
    by_frame: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    num_rows = 0
    for grid in grids:
        num_rows += int((grid >= 0).sum())
        cells = window_cells(grid.shape[1], grid.shape[2], window, shift)
        flat = grid.reshape(len(grid), -1)
        row_NKS = np.where(cells.cell_KS >= 0, flat[:, np.maximum(cells.cell_KS, 0)], -1)
        region_NKS = np.broadcast_to(cells.region_KS, row_NKS.shape)
        row_XS, region_XS = (a.reshape(-1, row_NKS.shape[-1]) for a in (row_NKS, region_NKS))
        used = (row_XS >= 0).any(1)
        if used.any():
            by_frame.setdefault(cells.frame, []).append((row_XS[used], region_XS[used]))
    groups = {frame: tuple(map(np.concatenate, zip(*found))) for frame, found in by_frame.items()}
    rows, buckets = [], []
    for frame, (row_XS, region_XS) in _merge_frames(groups).items():
        plain = (row_XS >= 0).all(1) & (region_XS == region_XS[:, :1]).all(1)
        apart = int(plain.sum()) * row_XS.shape[1] ** 2 > MASKED_SCORES and not plain.all()
        for chosen in [plain, ~plain] if apart else [np.ones(len(plain), bool)]:
            row, region = row_XS[chosen], region_XS[chosen]
            see = (row >= 0)[:, None, :]
            if (region != region[:, :1]).any():
                see = see & (region[:, :, None] == region[:, None, :])
            rows.append(row.reshape(-1))
            index = offset_index(frame, window).reshape(-1)
            mask = None if see.all() else to_device(see[:, None], device)
            buckets.append(Windows(len(row), row.shape[1], to_device(index, device), mask))
    slots = np.concatenate(rows)
    back = np.empty(num_rows, np.int64)
    back[slots[slots >= 0]] = np.flatnonzero(slots >= 0)
    enter = plan_take(slots, num_rows, device, blanks_matter=False)
    return WindowPlan(enter, plan_take(back, len(slots), device), tuple(buckets))


Frames = dict[tuple[int, int], tuple[np.ndarray, ...]]


def _merge_frames(groups: Frames) -> Frames:
    """A few small windows ride in a larger frame where that is cheaper than kernels of their own."""
    merged: Frames = {}
    for frame in sorted(groups, key=lambda f: f[0] * f[1], reverse=True):
        row_XS, region_XS = groups[frame]
        host = next((f for f in merged if f[0] >= frame[0] and f[1] >= frame[1]), None)
        span = 0 if host is None else host[0] * host[1]
        if host is None or len(row_XS) * (span**2 - row_XS.shape[1] ** 2) > PADDED_SCORES:
            merged[frame] = (row_XS, region_XS)
            continue
        pad = ((0, 0), (0, host[0] - frame[0]), (0, host[1] - frame[1]))
        wide = [
            np.pad(a.reshape(-1, *frame), pad, constant_values=blank).reshape(-1, span)
            for a, blank in ((row_XS, -1), (region_XS, 0))
        ]
        merged[host] = tuple(np.concatenate([a, b]) for a, b in zip(merged[host], wide))
    return merged


def lengths_to_buckets(length_K: np.ndarray) -> list[np.ndarray]:
    """Sequences by length, ascending; neighbours share a bucket where the padding is cheaper than a bucket of its own."""
    order = np.argsort(length_K, kind="stable")
    groups = [order[length_K[order] == n] for n in np.unique(length_K)]

    while len(groups) > 1:
        extra = [int((length_K[groups[i + 1]].max() - length_K[groups[i]]).sum()) for i in range(len(groups) - 1)]
        least = int(np.argmin(extra))
        if extra[least] > PADDED_SLOTS and len(groups) <= MAX_BUCKETS:
            break
        groups[least : least + 2] = [np.concatenate(groups[least : least + 2])]
    return groups


def _sequence_stage(
    cfg: ModelConfig, sets: list[ImageSet], valid: list[list[np.ndarray]], rows: list[np.ndarray], image_E: np.ndarray,
    first: np.ndarray, s: int, device: torch.device, dtype: torch.dtype,
) -> Stage:  # fmt: skip
    num_prompts, num_entries = cfg.prompts, len(image_E)
    image_K, start_K, count_K = np.unique(image_E, return_index=True, return_counts=True)
    where = [np.nonzero(g >= 0) for g in rows]
    stride = [cfg.patch * 2 ** sum(images.merges[:s]) for images in sets]
    cell_E2 = np.concatenate([np.stack(w[1:], -1) for w in where]).reshape(-1, 2)
    stride_E = np.repeat(stride, [len(w[0]) for w in where])
    modality_K = np.array([cfg.modalities.index(images.modality) for images in sets])[
        np.searchsorted(first, image_K, side="right") - 1
    ]
    good_E = np.concatenate([v[s][g >= 0] for v, g in zip(valid, rows)])
    good_K = np.add.reduceat(good_E, start_K) > 0 if num_entries else np.zeros(0, bool)
    slot: list[np.ndarray] = []
    slot_image: list[np.ndarray] = []
    slot_modality: list[np.ndarray] = []
    slot_good: list[np.ndarray] = []
    buckets: tuple[list[Bucket], list[Bucket]] = ([], [])
    for group in lengths_to_buckets(count_K + num_prompts):
        longest = int(count_K[group].max())
        prompt_NP = num_entries + group[:, None] * num_prompts + np.arange(num_prompts)
        step_NL = np.broadcast_to(np.arange(longest), (len(group), longest))
        token_NL = np.where(step_NL < count_K[group, None], start_K[group, None] + step_NL, -1)
        slot_NJ = np.concatenate([prompt_NP, token_NL], 1)
        slot.append(slot_NJ.reshape(-1))
        for arr, of_K in ((slot_image, image_K), (slot_modality, modality_K)):
            arr.append(np.repeat(of_K[group], slot_NJ.shape[1]))
        good_NL = np.where(token_NL >= 0, good_E[np.maximum(token_NL, 0)], False) if num_entries else token_NL >= 0
        good_NP = np.broadcast_to(good_K[group, None], prompt_NP.shape)
        slot_good.append(np.concatenate([good_NP, good_NL], 1).reshape(-1))
        for shifted in (0, 1):
            see = _see(cfg, slot_NJ, token_NL, cell_E2, cfg.window // 2 * shifted)
            bias = None if see.all() else to_device(np.where(see, np.float32(0), np.float32(MASKED)), device).to(dtype)
            buckets[shifted].append(Bucket(len(group), slot_NJ.shape[1], bias))
    slot_T, good_T = np.concatenate(slot), np.concatenate(slot_good)
    place_E = np.empty(num_entries + len(image_K) * num_prompts, np.int64)
    place_E[slot_T[slot_T >= 0]] = np.flatnonzero(slot_T >= 0)
    is_token = (slot_T >= 0) & (slot_T < num_entries)
    centre_E2 = ((cell_E2 + 0.5) * stride_E[:, None]).astype(np.float32)
    centre_T2 = np.where(is_token[:, None], centre_E2[np.where(is_token, slot_T, 0)], 0).astype(np.float32)
    grids = [np.where(g >= 0, place_E[np.maximum(g, 0)], -1) for g in rows]
    sequences = Sequences(
        (tuple(buckets[0]), tuple(buckets[1])), _routed(cfg, good_T, np.concatenate(slot_modality), device)
    )
    return Stage(
        grids, to_device(np.concatenate(slot_image), device), None, sequences,
        plan_take(slot_T, len(place_E), device, blanks_matter=False),
        to_device(_one_hot(cfg, modality_K)[:, [cfg.modalities.index(name) for name in present(cfg, sets)]], device),
        to_device(centre_T2, device), to_device(centre_E2, device), to_device(image_E, device),
    )  # fmt: skip


def _see(cfg: ModelConfig, slot_NJ: np.ndarray, token_NL: np.ndarray, cell_E2: np.ndarray, shift: int) -> np.ndarray:
    """bool [N, 1, 1 or J, J]. Windowed attention: an image token sees the prompts and its (shifted) window; a prompt sees all."""
    key = (slot_NJ >= 0)[:, None, None, :]
    if cfg.attention == "global":
        return key
    window_NL2 = (cell_E2[np.maximum(token_NL, 0)] - shift) // cfg.window
    same_NLL = (window_NL2[:, :, None] == window_NL2[:, None, :]).all(-1)
    p = slot_NJ.shape[1] - token_NL.shape[1]
    return key & np.pad(same_NLL, ((0, 0), (p, 0), (p, 0)), constant_values=True)[:, None]


def _routed(cfg: ModelConfig, good_T: np.ndarray, modality_T: np.ndarray, device: torch.device) -> Routed:
    chosen = np.flatnonzero(good_T)
    back = np.where(good_T, np.cumsum(good_T) - 1, -1)
    return Routed(
        plan_take(chosen, len(good_T), device), plan_take(back, len(chosen), device),
        to_device(_one_hot(cfg, modality_T[chosen]), device),
    )  # fmt: skip


def _one_hot(cfg: ModelConfig, modality: np.ndarray) -> np.ndarray:
    """float32 [len(modality), M]."""
    return (modality[:, None] == np.arange(len(cfg.modalities))).astype(np.float32)
