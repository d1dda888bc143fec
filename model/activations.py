"""What autograd keeps between forward and backward, from closed formulas, without torch: what the planner sizes memory by.

A unit below is one tensor of [tokens, channels] in the compute precision. The formulas list the tensors that each block's
backward needs, in the order of its forward; tests hold them equal to what torch saves on a CPU. On an accelerator the fused
kernels keep less of SwinV2's biased attention (its probabilities are recomputed): that part is not validated here.

Symbols: T tokens · J tokens with prompts · C channels · S tokens per window · A heads · H head channels · E experts · k chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_prep.schema import MODALITIES
from model.config import ModelConfig, ObjectiveConfig
from model.counts import CPB_HIDDEN, ViewSize, canvas, cell_sizes
from model.grids import axis_windows, stage_sides
from model.objective_plan import head_dims

BYTES = {"fp32": 4, "bf16": 2}
FLOAT32 = 4


@dataclass
class Saved:
    """Bytes kept for the backward of one site's views.

    full: without checkpointing; checkpointed: with it; block: the largest single block, which checkpointing holds once more
    while it recomputes; fixed: per micro-batch, whatever its size (in_blocks: the part of it that checkpointing drops); by:
    `full` by part.
    """

    full: float = 0.0
    checkpointed: float = 0.0
    block: float = 0.0
    fixed: float = 0.0
    in_blocks: float = 0.0
    by: dict[str, float] = field(default_factory=dict)

    def add_block(self, part: str, everything: float, only_input: float) -> None:
        self.add(part, everything, only_input)
        self.block = max(self.block, everything)

    def add(self, part: str, everything: float, checkpointed: float | None = None) -> None:
        self.full += everything
        self.checkpointed += everything if checkpointed is None else checkpointed
        self.by[part] = self.by.get(part, 0.0) + everything


def table(cfg: Any, fused: bool) -> dict[str, Any]:
    """Activations of a `PretrainConfig`-like tree per sample, in bytes; `routed`: what expert parallelism exchanges.

    fused: attention with a bias by a fused kernel (accelerators), or by the CPU's plain one.
    """
    model, objective, data, size = cfg.model, cfg.objective, cfg.data, BYTES[cfg.train.precision]
    views = [data.views_global, *[data.views_local] * (data.local_views if objective.qsacl_weight else 0)]
    saved = Saved()
    for number, view in enumerate(views):
        _view(saved, model, view, size, fused)
        _decoder(saved, model, objective, view, size)
        if number == 0 and objective.mgcl_weight:
            _rows(saved, model, objective, view, size)
    _fixed(saved, model, size)
    _heads(saved, model, objective, size, queries=objective.queries * (2 if data.local_views else 1))
    return {
        "full": saved.full, "checkpointed": saved.checkpointed, "block": saved.block, "fixed": saved.fixed,
        "fixed_in_blocks": saved.in_blocks, "by": saved.by,
        "inputs": sum(_inputs(model, view) for view in [*views, data.views_global]),
    }  # fmt: skip


def routed(cfg: Any) -> dict[str, Any]:
    """What one forward of one sample's views sends to experts, over all MoE layers: `elements` (tokens x channels x k), `calls`
    of a layer, and the `flops` the experts spend on them."""
    model, objective, data = cfg.model, cfg.objective, cfg.data
    placed = model.moe.placed(model.depths[2] + model.depths[3])
    elements, calls, flops = 0, 0, 0
    for view in [data.views_global, *[data.views_local] * (data.local_views if objective.qsacl_weight else 0)]:
        for name in model.modalities:
            side_px, dates = canvas(view, name)
            sides = stage_sides(side_px, model.patch, model.merges(name))
            for place in placed:
                s = 2 if place < model.depths[2] else 3
                sent = dates * (sides[s] ** 2 + model.prompts) * model.dims[s] * model.moe.top_k
                elements, calls, flops = elements + sent, calls + 1, flops + 16 * sent * model.dims[s]
    return {"elements": elements, "calls": calls, "layers": len(placed), "flops": flops}


def _view(saved: Saved, cfg: ModelConfig, view: ViewSize, size: int, fused: bool) -> None:
    """Backbone and fusion of one view of one site."""
    for name in cfg.modalities:
        side_px, dates = canvas(view, name)
        _images(saved, cfg, name, side_px, dates, size, fused)
    _fusion(saved, cfg, view, size)


def _images(saved: Saved, cfg: ModelConfig, name: str, side_px: int, dates: int, size: int, fused: bool) -> None:
    sides = stage_sides(side_px, cfg.patch, cfg.merges(name))
    placed = cfg.moe.placed(cfg.depths[2] + cfg.depths[3])
    first = sides[0] ** 2
    pixels = (sides[0] * cfg.patch) ** 2 * len(MODALITIES[name].bands)
    saved.add("tokenizers", dates * size * (pixels + first * cfg.dims[0]))  # convolution's input, norm's input
    for s, (c, depth, side) in enumerate(zip(cfg.dims, cfg.depths, sides)):
        tokens = side * side + (cfg.prompts if s >= 2 else 0)
        for i in range(depth):
            if s < 2:
                block = _swin_block(cfg, c, side, i, size, fused)
            else:
                moe = (i if s == 2 else cfg.depths[2] + i) in placed
                experts = cfg.moe.experts if moe else 0
                block = _block(tokens, c, c // cfg.head_dim, size, cfg.position == "rotary_m", experts, cfg.moe.top_k)
            saved.add_block(f"stage_{s + 1}", dates * block, dates * size * tokens * c)
        if s >= 2 and cfg.position == "rotary_m":
            saved.add(
                f"stage_{s + 1}", dates * FLOAT32 * tokens * cfg.head_dim
            )  # cosines and sines, shared by the stage
        if s < 3:
            after = sides[s + 1] ** 2
            merged = cfg.merges(name)[s]
            saved.add(
                "merging", dates * size * after * ((4 if merged else 1) * c + 2 * c)
            )  # product's and norm's input
        elif s == 3:
            saved.add("stage_4", dates * size * (tokens + side * side) * c)  # norm's input; fusion's input


def _fixed(saved: Saved, cfg: ModelConfig, size: int) -> None:
    """What one call keeps whatever is in it: hidden layers of the position biases, averaged merge weights."""
    for c, depth in zip(cfg.dims[:2], cfg.depths[:2]):
        saved.in_blocks += depth * FLOAT32 * (2 * cfg.window - 1) ** 2 * (CPB_HIDDEN + c // cfg.head_dim)
    for s, c in enumerate(cfg.dims[:3]):
        if not all(cfg.merges(name)[s] for name in cfg.modalities):
            saved.fixed += size * 2 * c * c


def _swin_block(cfg: ModelConfig, c: int, side: int, i: int, size: int, fused: bool) -> float:
    """Bytes of a SwinV2 block on one image."""
    window, padded, roll = axis_windows(side, cfg.window, cfg.window // 2 if i % 2 else 0)
    tokens, in_windows, span = side * side, padded * padded, window * window
    heads = c // cfg.head_dim
    units = tokens * c * (1 + 1 + 1 + 1 + 4 + 4 + 1)  # x, projection's input, norm1's, x', fc1, gelu, norm2's input
    units += in_windows * c * (3 + 2)  # qkv; q and k normalised
    units += in_windows * heads * 4  # norms of q and k, twice
    total: float = size * units + 4 * FLOAT32 * tokens
    if fused:
        total += size * in_windows * c * 4 + FLOAT32 * in_windows * heads  # q, k, v, output, log-sum-exp
    else:
        total += FLOAT32 * in_windows * (3 * c + heads * span)  # q, k, v and the probabilities, in float32
    count = padded // window
    if i == 1 and roll:  # masks of the windows at the border, shared by the blocks
        total += (count**2 - (count - 1) ** 2) * span * span
    return total


def _block(tokens: int, c: int, heads: int, size: int, rotary: bool, experts: int, top_k: int) -> float:
    """Bytes of a transformer block on one image."""
    units = (
        1 + 1 + 3 + 1 + 1 + 1 + (2 if rotary else 0)
    )  # x, norm1(x), qkv, output, projection's input, x', rotated q and k
    if experts:
        units += 1 + 10 * top_k  # the router's rows; per choice: sorted rows, hidden x4 twice, output
    else:
        units += 1 + 4 + 4  # norm2(x'), fc1, gelu
    total: float = size * tokens * c * units
    total += tokens * FLOAT32 * (heads + 4)  # log-sum-exp, norms
    if experts:
        total += tokens * (2 * FLOAT32 * experts + 8 * 4 + (FLOAT32 * c if size < FLOAT32 else 0))  # router, in float32
    return total


def _fusion(saved: Saved, cfg: ModelConfig, view: ViewSize, size: int) -> None:
    if cfg.fuses_cells:
        cells = cell_sizes(cfg, view)
        queries, rows = sum(q for q, _ in cells), sum(q + t for q, t in cells)
        saved.add("fusion", FLOAT32 * (rows * (cfg.fusion_dim // cfg.fusion_heads) + queries * cfg.query_side**2))
        _fusion_blocks(saved, cfg, rows, queries, size, rotary=True)
        return
    frames, places, total = 0, 0, 0
    for name in cfg.modalities:
        side_px, dates = canvas(view, name)
        tokens = stage_sides(side_px, cfg.patch, cfg.merges(name))[3] ** 2
        if cfg.upscale(name) > 1:
            total += dates * tokens * cfg.fusion_dim  # the unfolding's input
        frames, places = frames + dates, max(places, tokens)
    saved.add("fusion", size * total)
    if cfg.fusion_depth:
        _fusion_blocks(saved, cfg, places * (frames + 1), places, size, rotary=False)


def _fusion_blocks(saved: Saved, cfg: ModelConfig, rows: int, queries: int, size: int, rotary: bool) -> None:
    f = cfg.fusion_dim
    block = _block(rows, f, cfg.fusion_heads, size, rotary, 0, 0)
    for _ in range(cfg.fusion_depth - 1):
        saved.add_block("fusion", block, size * rows * f)
    # x, norm1(x), keys and values (and keys as they were before they were turned); the queries' own
    last = size * (rows * f * (1 + 1 + 2 + rotary) + queries * f * 14)
    saved.add_block("fusion", last, size * rows * f)
    saved.add("fusion", size * queries * f)


def _rows(saved: Saved, cfg: ModelConfig, objective: ObjectiveConfig, view: ViewSize, size: int) -> None:
    """Pooled features of u and their way through the projection heads."""
    cells, per_row = 0, _head_row(objective, size)
    spaces = []
    for name in cfg.modalities:
        side_px, dates = canvas(view, name)
        tokens = stage_sides(side_px, cfg.patch, cfg.merges(name))[3] ** 2
        cells = max(cells, tokens)
        spaces.append((dates, tokens, cfg.dims[3]))
    for images, tokens, dim in [*spaces, (1, cells, cfg.fusion_dim)]:
        pairs = min(objective.pixel_pairs, tokens)
        counts = {"pixel": pairs, "object": objective.object_clusters, "image": 1}
        rows = sum(counts[level] for level in objective.mgcl_levels)
        saved.add("heads", images * (size * dim * (pairs + rows) + rows * per_row))


def _head_row(objective: ObjectiveConfig, size: int) -> float:
    """One row through a head: hidden layers before and after GELU, bottleneck as product, float32 and unit vector, its gradient."""
    return 4 * size * objective.head_hidden + objective.head_bottleneck * (size + 2 * FLOAT32)


def _heads(saved: Saved, cfg: ModelConfig, objective: ObjectiveConfig, size: int, queries: int) -> None:
    dims = head_dims(cfg, objective)
    if "query" in dims:
        saved.add("heads", queries * (size * cfg.fusion_dim + _head_row(objective, size)))
    # float32 copies of the prototypes (where they are not float32 already), and their gradient, made in the forward
    copies = 1 if size == FLOAT32 else 2
    saved.fixed += len(dims) * copies * FLOAT32 * objective.prototypes * objective.head_bottleneck


def _decoder(saved: Saved, cfg: ModelConfig, objective: ObjectiveConfig, view: ViewSize, size: int) -> None:
    if not objective.qsacl_weight:
        return
    f, m = cfg.fusion_dim, objective.queries
    cells = max(stage_sides(canvas(view, n)[0], cfg.patch, cfg.merges(n))[3] ** 2 for n in cfg.modalities)
    saved.add("heads", size * f * (cells * (1 + 1 + 2) + m * 28))


def _inputs(cfg: ModelConfig, view: ViewSize) -> float:
    """A view on the device, float32 pixels and one byte of validity each."""
    total = 0
    for name in cfg.modalities:
        side_px, dates = canvas(view, name)
        total += dates * side_px * side_px * (FLOAT32 * len(MODALITIES[name].bands) + 1)
    return total
