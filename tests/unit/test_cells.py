"""Fusion by cells against its definition, cell by cell, for token sizes in any ratio, with holes; and what it may not depend on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.config import from_dict
from cluster.errors import UsageError
from model.batch import View
from model.cell_fusion import CellFusion
from model.cells import Seen, plan_cells
from model.config import FusionConfig, ModelConfig
from model.grids import TokenGrid, coarsest, finest
from model.plan import Sequences
from model.positions import rotary_table
from model.skysense import SkySense
from tests.model_views import random_view
from tests.unit.test_masking import build, random_validity

CFG = ModelConfig(size="debug", window=4, fusion=FusionConfig(depth=2))


def by_hand(model: SkySense, view: View) -> tuple[Tensor, Tensor]:
    """One cell after the other, from the definition: queries of the places that any valid token covers, then all valid tokens."""
    fusion, features = model.fusion, model(view)
    assert isinstance(fusion, CellFusion)
    cfg = model.cfg
    names = list(features.dense)
    grids = {
        n: TokenGrid(tuple(features.dense[n].shape[2:4]), tuple(view.modalities[n].valid_BTHW.shape[2:]), features.stride[n])
        for n in names
    }  # fmt: skip
    lead, coarse = grids[finest(grids)], grids[coarsest(grids)]

    def under(grid: TokenGrid, other: TokenGrid, i: int, axis: int) -> int:
        """Token of `other` under the centre of token i of `grid`, as shares of the canvas."""
        share = (i + 0.5) * grid.stride / grid.canvas[axis]
        return min(int(share * other.canvas[axis] / other.stride + 1e-9), other.hw[axis] - 1)

    out = torch.zeros(2, *lead.hw, cfg.fusion_dim, dtype=features.fused.dtype)
    valid = torch.zeros(2, *lead.hw, dtype=torch.bool)
    for b in range(2):
        widths = [
            float(view.modalities[n].gsd_B[b]) * grids[n].canvas[1] for n in names if features.dense_valid[n][b].any()
        ]
        ground = widths[0] if widths else 1.0
        for cell in np.ndindex(*coarse.hw):
            rows, metres, places = [], [], []
            for y, x in np.ndindex(*lead.hw):
                if (under(lead, coarse, y, 0), under(lead, coarse, x, 1)) != cell:
                    continue
                if not any(
                    bool(features.dense_valid[n][b, :, under(lead, grids[n], y, 0), under(lead, grids[n], x, 1)].any())
                    for n in names
                ):
                    continue
                places.append((y, x))
                weight = torch.ones(1, 1)
                for axis, i in enumerate((y, x)):
                    centre = (i + 0.5) * lead.stride / lead.canvas[axis] * coarse.canvas[axis] / coarse.stride - cell[
                        axis
                    ]
                    at = min(max(centre * cfg.query_side - 0.5, 0), cfg.query_side - 1)
                    line = torch.tensor([max(0.0, 1 - abs(at - r)) for r in range(cfg.query_side)])
                    weight = (weight[..., None] * line).flatten(1)
                rows.append((weight.to(out.dtype) @ fusion.query_RF)[0])
                metres.append([(i + 0.5) * lead.stride / lead.canvas[1] * ground for i in (y, x)])
            for n in names:
                for t, i, j in np.argwhere(features.dense_valid[n][b].numpy()):
                    if (under(grids[n], coarse, i, 0), under(grids[n], coarse, j, 1)) == cell:
                        day = fusion.day(view.modalities[n].doy_BT[b, t].long())
                        rows.append(fusion.project(features.dense[n][b, t, i, j]) + day)
                        metres.append([(k + 0.5) * grids[n].stride / grids[n].canvas[1] * ground for k in (i, j)])
            if not places:
                continue
            table = rotary_table(
                torch.tensor(metres), cfg.fusion_dim // cfg.fusion_heads, cfg.rotary_base, cfg.reference_m
            )
            x_TF, sequence = torch.stack(rows), Sequences.dense(1, len(rows))
            for block in fusion.blocks:
                x_TF, _ = block(x_TF, sequence, table)
            for place, row in zip(places, x_TF):
                for n in names:  # the short way
                    i, j = (under(lead, grids[n], place[axis], axis) for axis in (0, 1))
                    seen = features.dense_valid[n][b, :, i, j]
                    if seen.any():
                        row = row + fusion.skip[n](features.dense[n][b, seen, i, j].mean(0))
                out[b, place[0], place[1]] = fusion.norm(row)
                valid[b, place[0], place[1]] = True
    return out, valid


@pytest.mark.parametrize(("hr", "series"), [(64, 8), (72, 18), (100, 10), (32, 4)])
@pytest.mark.parametrize("absent", [(), ("hr",), ("s2", "s1")])
def test_fusion_equals_its_definition(hr: int, series: int, absent: tuple[str, ...]) -> None:
    """Ratios of token sizes from 1 : 3 to 3 : 1, whole and not; with clouds, missing dates and sensors."""
    model = build(CFG).double()
    view = random_view(2, hr=hr, series=series, seed=hr, dtype=torch.float64)
    view = random_validity(view, hr + len(absent), frozenset(absent))
    with torch.no_grad():
        features, (expected, valid) = model(view), by_hand(model, view)
    assert torch.equal(features.fused_valid, valid)
    torch.testing.assert_close(features.fused, expected, rtol=1e-6, atol=1e-6)


def test_a_hidden_sensor_changes_nothing_in_the_fusion_and_a_cell_without_others_keeps_it() -> None:
    model = build(CFG).eval()
    view = random_view(2, hr=64, series=8)
    view.modalities["hr"].valid_BTHW[1] = False
    view.modalities["s1"].valid_BTHW[1] = False
    shown = torch.tensor([[True, False, True], [True, False, True]])
    with torch.no_grad():
        before = model(view, fused_BM=shown)
        view.modalities["s2"].x_BTCHW[0] += 1.0
        after = model(view, fused_BM=shown)
        seen = model(view)
    assert not torch.equal(before.dense["s2"][0], after.dense["s2"][0])
    torch.testing.assert_close(before.fused[0], after.fused[0])
    torch.testing.assert_close(after.fused[1], seen.fused[1])  # only s2 is there: it is fused all the same
    assert not torch.allclose(after.fused[0], seen.fused[0], atol=1e-4)
    assert torch.equal(before.fused_valid, seen.fused_valid)


def test_every_valid_token_is_in_one_sequence_and_every_valid_place_has_one_answer() -> None:
    rng = np.random.default_rng(0)
    grids = {"hr": TokenGrid((7, 7), (200, 200), 32), "s2": TokenGrid((2, 2), (7, 7), 4)}
    views = [
        {n: Seen(rng.random((3, 2 if n == "s2" else 1, *g.hw)) > 0.4, g, None) for n, g in grids.items()}
        for _ in range(2)
    ]
    plan = plan_cells(views, 4, torch.device("cpu"), torch.float32)
    tokens = np.concatenate([item.valid_BThw.reshape(-1) for view in views for item in view.values()])
    places = np.concatenate([valid.reshape(-1) for valid in plan.valid])
    used = (
        np.ones(len(plan.enter.inverse_R), bool) if plan.enter.unused_R is None else ~plan.enter.unused_R[:, 0].numpy()
    )
    assert np.array_equal(used, np.concatenate([tokens, places]))
    blank = np.zeros(len(places), bool) if plan.leave.blank_T is None else plan.leave.blank_T[:, 0].numpy()
    assert np.array_equal(~blank, places)
    assert len(np.unique(plan.leave.index_T.numpy()[~blank])) == places.sum()


def test_the_former_fusion_is_one_key_away() -> None:
    cell, frames = SkySense(CFG), SkySense(replace(CFG, fusion=FusionConfig(kind="frames")))
    view = random_view(1)
    assert cell(view).fused.shape == frames(view).fused.shape
    assert [n for n, _ in frames.fusion.named_parameters() if n.startswith("unfold.")]
    with pytest.raises(UsageError, match=r"fusion\.dim / fusion\.heads must be divisible by 4"):
        from_dict(ModelConfig, {"fusion": {"dim": 12, "heads": 2}})
