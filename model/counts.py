"""Parameters and FLOPs from closed formulas, without torch: what `pipeline train --dry-run` and the planner print.

A FLOP is one multiplication or addition of a matrix product or convolution (2 per multiply-accumulate); element-wise work is not
counted. Tests hold the parameters equal to the model built on the meta device, and the FLOPs to torch's own counter.

Symbols: C channels · L tokens · J tokens with prompts · P prompts · F fusion channels · E experts · k experts per token.
"""

from __future__ import annotations

from typing import Any, Protocol

from data_prep.schema import MODALITIES
from model.config import ModelConfig, ObjectiveConfig
from model.grids import TokenGrid, axis_windows, coarsest, finest, stage_sides, tokens_under
from model.objective_plan import count_parameters, head_dims, prediction_flops

CPB_HIDDEN = 512
NUM_DAYS = 367


class ViewSize(Protocol):
    """Canvas sides in pixels and dates per view (`pipeline.config.ViewConfig`)."""

    @property
    def hr_px(self) -> int: ...
    @property
    def series_px(self) -> int: ...
    @property
    def s2_dates(self) -> int: ...
    @property
    def s1_dates(self) -> int: ...


def canvas(view: ViewSize, modality: str) -> tuple[int, int]:
    """(side in pixels, dates) of one modality in a view."""
    if MODALITIES[modality].is_series:
        return view.series_px, getattr(view, f"{modality}_dates")
    return view.hr_px, 1


# --- parameters ---------------------------------------------------------------------------------------------------------


def parameters(cfg: ModelConfig, objective: ObjectiveConfig | None = None) -> dict[str, int]:
    """Parameters by part (of the student; the teacher is a copy). `backbone` is dense and without position terms, `position` holds
    those, `moe_increment` is what experts and routers add, `active` is what one token passes through.
    """
    copies = len(cfg.modalities) if cfg.separate else 1
    patch_area = cfg.patch**2
    part = {
        "tokenizers": sum((len(MODALITIES[m].bands) * patch_area + 1) * cfg.dims[0] for m in cfg.modalities),
        "backbone": copies * _backbone(cfg),
        "position": copies * _position(cfg),
        "moe_increment": copies * sum(_moe_layer(cfg, c) for c in _moe_dims(cfg)),
        "prompts": len(cfg.modalities) * cfg.prompts * (cfg.dims[2] + cfg.dims[3]),
        "fusion": _fusion(cfg),
        "heads": sum(count_parameters(cfg, objective).values()) if objective else 0,
    }
    idle = copies * sum((cfg.moe.experts - cfg.moe.top_k) * _ffn(c) for c in _moe_dims(cfg))
    part["total"] = sum(part.values())
    part["active"] = part["total"] - idle
    return part


def _ffn(c: int) -> int:
    return 8 * c * c + 5 * c


def _moe_dims(cfg: ModelConfig) -> list[int]:
    third = cfg.depths[2]
    return [cfg.dims[2] if i < third else cfg.dims[3] for i in sorted(cfg.moe.placed(third + cfg.depths[3]))]


def _moe_layer(cfg: ModelConfig, c: int) -> int:
    return (cfg.moe.experts - 1) * _ffn(c) + cfg.moe.experts * c


def _backbone(cfg: ModelConfig) -> int:
    total = 2 * cfg.dims[0] + 2 * cfg.dims[3]  # norms after the tokenizers and at the end
    for s, (c, depth) in enumerate(zip(cfg.dims, cfg.depths)):
        # qkv and projection, FFN, two norms; biases: SwinV2's keys have none; a logit scale per SwinV2 head
        attention = 4 * c * c + (3 * c + c // cfg.head_dim if s < 2 else 4 * c)
        total += depth * (attention + _ffn(c) + 4 * c)
        if s < 3:
            total += 8 * c * c + 4 * c  # merge and its norm
    return total


def _position(cfg: ModelConfig) -> int:
    total = 0
    for c, depth in zip(cfg.dims[:2], cfg.depths[:2]):
        total += depth * (3 * CPB_HIDDEN + CPB_HIDDEN * (c // cfg.head_dim))
    if cfg.position == "learned":
        total += cfg.learned_grid**2 * (cfg.dims[2] + cfg.dims[3])
    return total


def _fusion(cfg: ModelConfig) -> int:
    f, depth = cfg.fusion_dim, cfg.fusion_depth
    total = cfg.dims[3] * f + f + 2 * f
    if cfg.fuses_cells:
        total += cfg.query_side**2 * f + (len(cfg.modalities) * (cfg.dims[3] + 1) * f if cfg.fusion.skip else 0)
    else:
        total += sum((f + 1) * f * r * r for r in map(cfg.upscale, cfg.modalities) if r > 1) + (f if depth else 0)
    if depth:
        total += depth * (4 * f * f + 4 * f + _ffn(f) + 4 * f) + NUM_DAYS * f
    return total


# --- FLOPs --------------------------------------------------------------------------------------------------------------


def forward_flops(cfg: ModelConfig, view: ViewSize) -> dict[str, int]:
    """One forward of one site's view, everything present and valid, by part."""
    part = dict.fromkeys(("tokenizers", "stage_1", "stage_2", "stage_3", "stage_4", "merging", "fusion"), 0)
    for name in cfg.modalities:
        side_px, dates = canvas(view, name)
        for key, value in image_flops(cfg, name, side_px).items():
            part[key] += dates * value
    part["fusion"] = fusion_flops(cfg, view)
    return part


def image_flops(cfg: ModelConfig, modality: str, side_px: int) -> dict[str, int]:
    """Backbone forward of one image, by part."""
    sides = stage_sides(side_px, cfg.patch, cfg.merges(modality))
    part = {
        "tokenizers": 2 * sides[0] ** 2 * cfg.patch**2 * len(MODALITIES[modality].bands) * cfg.dims[0],
        "merging": 0,
    }
    experts = cfg.moe.placed(cfg.depths[2] + cfg.depths[3])
    for s, (c, depth, side) in enumerate(zip(cfg.dims, cfg.depths, sides)):
        part[f"stage_{s + 1}"] = 0
        for i in range(depth):
            place = i + (0 if s == 2 else cfg.depths[2])
            part[f"stage_{s + 1}"] += _block(cfg, s, i, c, side, s >= 2 and place in experts)
        if s < 3:
            part["merging"] += 2 * sides[s + 1] ** 2 * (4 * c if cfg.merges(modality)[s] else c) * 2 * c
    return part


def _block(cfg: ModelConfig, s: int, i: int, c: int, side: int, moe: bool) -> int:
    p = cfg.prompts if s >= 2 else 0
    tokens = side * side + p
    ffn = 16 * tokens * c * c
    if moe:
        ffn = cfg.moe.top_k * ffn + 2 * tokens * c * cfg.moe.experts
    if s >= 2:  # windows, an ablation of stages 3-4, are a mask over the same scores
        scores = 4 * tokens * tokens * c
    else:
        window, padded, _ = axis_windows(side, cfg.window, cfg.window // 2 if i % 2 else 0)
        scores = 4 * padded**2 * window**2 * c
    return 8 * tokens * c * c + scores + ffn


def fusion_flops(cfg: ModelConfig, view: ViewSize) -> int:
    """Fusion forward of one site. The last block is computed for the queries only."""
    if cfg.fuses_cells:
        return _cell_fusion_flops(cfg, view)
    f, depth = cfg.fusion_dim, cfg.fusion_depth
    total, frames, cells = 0, 0, 0
    for name in cfg.modalities:
        side_px, dates = canvas(view, name)
        tokens = stage_sides(side_px, cfg.patch, cfg.merges(name))[3] ** 2
        r = cfg.upscale(name)
        total += 2 * dates * tokens * (cfg.dims[3] * f + (f * f * r * r if r > 1 else 0))
        frames, cells = frames + dates, max(cells, tokens)
    j = frames + 1
    if depth:
        total += cells * (depth - 1) * (24 * j * f * f + 4 * j * j * f)
        total += cells * (20 * f * f + 4 * j * f * f + 4 * j * f)
    return total


def _cell_fusion_flops(cfg: ModelConfig, view: ViewSize) -> int:
    f, depth = cfg.fusion_dim, cfg.fusion_depth
    cells = cell_sizes(cfg, view)
    queries, tokens = sum(q for q, _ in cells), sum(t for _, t in cells)
    slots, squares = queries + tokens, sum((q + t) ** 2 for q, t in cells)
    total = 2 * tokens * cfg.dims[3] * f + 2 * queries * cfg.query_side**2 * f
    if cfg.fusion.skip:
        for name in cfg.modalities:
            total += 2 * stage_sides(canvas(view, name)[0], cfg.patch, cfg.merges(name))[3] ** 2 * cfg.dims[3] * f
    total += (depth - 1) * (24 * slots * f * f + 4 * squares * f)
    return total + 20 * queries * f * f + 4 * slots * f * f + 4 * sum(q * (q + t) for q, t in cells) * f


def cell_sizes(cfg: ModelConfig, view: ViewSize) -> list[tuple[int, int]]:
    """(queries, tokens of all sensors and dates) of every cell of a view, everything present and valid."""
    grids, dates = {}, {}
    for name in cfg.modalities:
        side_px, dates[name] = canvas(view, name)
        side = stage_sides(side_px, cfg.patch, cfg.merges(name))[3]
        grids[name] = TokenGrid((side, side), (side_px, side_px), cfg.stride(name))
    coarse = grids[coarsest(grids)]

    def along(grid: TokenGrid) -> list[int]:
        under = tokens_under(grid, coarse, 0)
        return [under.count(cell) for cell in range(coarse.hw[0])]

    counts = {name: along(grid) for name, grid in grids.items()}
    lead, cells = counts[finest(grids)], range(coarse.hw[0])
    return [
        (lead[a] * lead[b], sum(dates[name] * n[a] * n[b] for name, n in counts.items())) for a in cells for b in cells
    ]


def head_flops(cfg: ModelConfig, objective: ObjectiveConfig, view: ViewSize) -> int:
    """Projection heads, prototypes, decoder and prediction terms on one view of one site, forward; an upper bound (pairs only where
    views overlap)."""
    hidden, bottleneck = objective.head_hidden, objective.head_bottleneck
    dims = head_dims(cfg, objective)
    rows = {"dense": 0, "fused": 0, "query": objective.queries}
    per_image = {"object": objective.object_clusters, "image": 1}
    cells, sizes = 0, {}
    for name in cfg.modalities:
        side_px, dates = canvas(view, name)
        tokens = stage_sides(side_px, cfg.patch, cfg.merges(name))[3] ** 2
        cells, sizes[name] = max(cells, tokens), (dates, tokens)
        rows["dense"] += dates * _level_rows(objective, per_image, tokens)
    rows["fused"] = _level_rows(objective, per_image, cells)
    total = prediction_flops(cfg, objective, sizes, cells)
    for space, dim in (("dense", cfg.dims[3]), ("fused", cfg.fusion_dim), ("query", cfg.fusion_dim)):
        if any(head == space or head.startswith(f"{space}_") for head in dims):
            row = dim * hidden + hidden * hidden + hidden * bottleneck + bottleneck * objective.prototypes
            total += 2 * rows[space] * row
    if objective.qsacl_weight:
        m, f = objective.queries, cfg.fusion_dim
        total += 2 * f * f * (4 * m + 2 * m + 2 * cells + 8 * m) + 4 * f * (m * m + m * cells)
    return total


def _level_rows(objective: ObjectiveConfig, per_image: dict[str, int], tokens: int) -> int:
    return sum(per_image.get(level, min(objective.pixel_pairs, tokens)) for level in objective.mgcl_levels)


def table(cfg: Any) -> dict[str, Any]:
    """Parameters and FLOPs per sample of a `PretrainConfig`-like tree (`.model`, `.objective`, `.data`).

    FLOPs: by part for one forward of a global view; `forward` their sum with the heads; `local_forward` the same of one local view;
    `train`: student forward and backward (3 forwards) and teacher forward on the global and all local views, without recomputation.
    """
    model, objective, data = cfg.model, cfg.objective, cfg.data
    part = forward_flops(model, data.views_global)
    by_modality = {}
    for name in model.modalities:
        side_px, dates = canvas(data.views_global, name)
        by_modality[name] = dates * sum(image_flops(model, name, side_px).values())
    heads = head_flops(model, objective, data.views_global)
    forward = sum(part.values()) + heads
    local = sum(forward_flops(model, data.views_local).values()) + head_flops(model, objective, data.views_local)
    flops = {
        **part,
        "heads": heads,
        "forward": forward,
        "local_forward": local if data.local_views else 0,
        "train": 4 * (forward + data.local_views * local),
        "backbone_by_modality": by_modality,
        "fusion_share": part["fusion"] / forward,
    }
    return {"parameters": parameters(model, objective), "flops_per_sample": flops}
