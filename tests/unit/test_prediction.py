"""Hiding, restoration, masked tokens and the site contrast, each against plain loops or its own definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.schema import MODALITIES
from model.config import ModelConfig, ObjectiveConfig, run_samples
from model.hiding import fused_sensors, hide, hide_view, uniforms
from model.inputs import normalise
from model.losses.reduce import SingleProcess
from model.losses.sites import gather_rows, koleo, site_cross_entropy
from model.restore import cell_statistics, cell_validity
from model.skysense import SkySense
from model.targets import remember
from model.token_decoder import patches, pixel_targets
from pipeline.schedules import growing_momentum, teacher_momentum
from tests.synthetic_batch import STATISTICS, make_batch
from tests.thread_ranks import run_ranks

MODEL = ModelConfig(size="debug")


def shares(valid: torch.Tensor, left: torch.Tensor) -> float:
    return 1.0 - float(left.sum()) / float(valid.sum())


# ---- hiding


@pytest.mark.parametrize(
    ("key", "name"), [("hide_tokens", "hr"), ("hide_tokens", "s2"), ("hide_dates", "s1"), ("hide_sensors", "s2")]
)
def test_the_asked_share_is_hidden(key: str, name: str) -> None:
    batch = make_batch(400, missing=0.0, dates={"s1": 6}, canvas={"hr": 128, "s2": 16, "s1": 16})
    left = hide(MODEL, ObjectiveConfig(**{key: 0.4}), batch).u.modalities[name].valid_BTHW
    assert shares(batch.u.modalities[name].valid_BTHW, left) == pytest.approx(0.4, abs=0.06)


def test_hiding_belongs_to_the_sample_and_takes_only_validity_away() -> None:
    objective = ObjectiveConfig(hide_tokens=0.3, hide_dates=0.3, hide_sensors=0.3)
    batch = make_batch(6)
    whole = hide(MODEL, objective, batch)
    for b in range(6):
        alone = hide(MODEL, objective, batch.part(b, b + 1))
        for name, part in alone.u.modalities.items():
            assert torch.equal(part.valid_BTHW[0], whole.u.modalities[name].valid_BTHW[b])
            assert not (part.valid_BTHW & ~batch.u.modalities[name].valid_BTHW[b : b + 1]).any()
            assert part.x_BTCHW is not None
            assert torch.equal(torch.nan_to_num(part.x_BTCHW[0]), torch.nan_to_num(batch.u.modalities[name].x_BTCHW[b]))
    assert hide(MODEL, ObjectiveConfig(), batch) is batch


@settings(max_examples=20, deadline=None)
@given(st.floats(0.0, 0.99), st.floats(0.0, 0.99), st.floats(0.0, 0.99), st.integers(0, 1000))
def test_something_always_stays(tokens: float, dates: float, sensors: float, seed: int) -> None:
    objective = ObjectiveConfig(hide_tokens=tokens, hide_dates=dates, hide_sensors=sensors)
    view = make_batch(3, seed=seed, missing=0.5).u
    left = hide_view(MODEL, objective, view, torch.arange(3) + seed)
    for b in range(3):
        there = [bool(part.valid_BTHW[b].any()) for part in view.modalities.values()]
        stays = [bool(part.valid_BTHW[b].any()) for part in left.modalities.values()]
        assert any(stays) == any(there)


def test_a_token_is_hidden_on_all_dates_together() -> None:
    view = make_batch(8, missing=0.0).u
    for part in view.modalities.values():
        part.valid_BTHW[:] = True
    left = hide_view(MODEL, ObjectiveConfig(hide_tokens=0.5), view, torch.arange(8))
    tokens = left.modalities["s2"].valid_BTHW.unflatten(2, (-1, 4)).unflatten(4, (-1, 4))
    assert torch.equal(tokens.any(3).any(4), tokens.all(3).all(4))
    assert torch.equal(tokens.any(1), tokens.all(1))


def test_draws_are_uniform_and_differ_by_salt() -> None:
    draw = uniforms(torch.arange(2000), 5, 10)
    assert float(draw.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(draw.std()) == pytest.approx(math.sqrt(1 / 12), abs=0.01)
    assert not torch.equal(draw, uniforms(torch.arange(2000), 6, 10))
    corr = torch.corrcoef(draw[:, :3].T)
    assert float((corr - torch.eye(3)).abs().max()) < 0.1


def test_modality_dropout_keeps_validity_and_one_sensor() -> None:
    torch.manual_seed(0)
    model = replace(MODEL, drop_path=0.0)
    network = SkySense(model).eval()
    view = normalise(make_batch(6, missing=0.3).u, STATISTICS)
    kept_BM = fused_sensors(model, 0.7, view, torch.arange(6))
    assert kept_BM is not None
    assert kept_BM.any(1).all()
    whole, less = network(view), network(view, fused_BM=kept_BM)
    assert torch.equal(whole.fused_valid, less.fused_valid)
    for name in model.modalities:
        assert torch.equal(whole.dense[name], less.dense[name])
    changed_B = (whole.fused - less.fused).flatten(1).abs().max(1).values > 0
    there_BM = torch.stack([view.modalities[m].valid_BTHW.flatten(1).any(1) for m in model.modalities], 1)
    assert torch.equal(changed_B, (there_BM & ~kept_BM).any(1))
    assert fused_sensors(model, 0.0, view, torch.arange(6)) is None


# ---- restoration


def test_cell_statistics_equal_loops() -> None:
    view = normalise(make_batch(2, seed=1).u, STATISTICS)
    for name in ("hr", "s2"):
        part, texture = view.modalities[name], name == "hr"
        found, ok = cell_statistics(part, (2, 2), texture), cell_validity(part.valid_BTHW, (2, 2))
        half, bands = part.valid_BTHW.shape[-1] // 2, len(MODALITIES[name].bands)
        for b, i, j in ((0, 0, 1), (1, 1, 0)):
            box = np_box(half, i, j)
            x, valid = part.x_BTCHW[b][..., box[0], box[1]], part.valid_BTHW[b][:, box[0], box[1]]
            values = x.permute(1, 0, 2, 3)[:, valid].double()
            assert bool(ok[b, i, j]) == bool(valid.any())
            expected = [values.mean(1), (values.var(1, correction=0) + 1e-4).sqrt()]
            torch.testing.assert_close(found[b, i, j, : 2 * bands].double(), torch.cat(expected), rtol=1e-3, atol=1e-3)
        assert found.shape[-1] == bands * (4 if texture else 2)


def np_box(half: int, i: int, j: int) -> tuple[slice, slice]:
    return slice(i * half, (i + 1) * half), slice(j * half, (j + 1) * half)


def test_texture_of_a_ramp_is_its_slope() -> None:
    view = make_batch(1, missing=0.0).u
    part = view.modalities["hr"]
    part.valid_BTHW[:] = True
    part.x_BTCHW = torch.arange(64.0).expand(1, 1, 3, 64, 64).clone()
    stats = cell_statistics(part, (4, 4), True)
    east, south = stats[..., 6:9], stats[..., 9:12]
    torch.testing.assert_close(east, torch.ones_like(east))
    torch.testing.assert_close(south, torch.zeros_like(south))


# ---- masked tokens


def test_patches_and_block_means_put_the_image_together_again() -> None:
    part = normalise(make_batch(2, seed=3, canvas={"s2": 10}).u, STATISTICS).modalities["s2"]
    x, valid = patches(part, 4)
    assert x.shape[2:4] == (3, 3)
    rows = x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)[..., :10, :10]
    assert torch.equal(rows, torch.where(part.valid_BTHW[:, :, None], part.x_BTCHW, 0))
    y, ok = pixel_targets(part, 4)  # blocks of one pixel: the pixels themselves, no deviations
    assert torch.equal(y, x.flatten(4))
    assert torch.equal(ok.unflatten(4, (-1, 16))[..., 0, :], valid.flatten(4))


def test_pixel_targets_of_large_tokens_are_means_and_deviations_of_blocks() -> None:
    part = normalise(make_batch(1, seed=4).u, STATISTICS).modalities["hr"]
    y, ok = pixel_targets(part, 32)
    block, valid = part.x_BTCHW[0, 0, 1, 8:16, 16:24], part.valid_BTHW[0, 0, 8:16, 16:24]
    values = block[valid].double()
    at = 1 * 16 + 1 * 4 + 2  # band 1, block row 1, block column 2 of token (0, 0)
    assert bool(ok[0, 0, 0, 0, at]) == bool(valid.any())
    assert float(y[0, 0, 0, 0, at]) == pytest.approx(float(values.mean()), abs=1e-5)
    assert float(y[0, 0, 0, 0, 48 + at]) == pytest.approx(math.sqrt(float(values.var(correction=0)) + 1e-4), abs=1e-4)


# ---- site contrast, KoLeo


def test_site_cross_entropy_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (3, 7))
    valid, own = torch.tensor([1, 1, 0, 1, 1, 0, 1], dtype=torch.bool), torch.tensor([1, 3, 6])
    found = site_cross_entropy(z, y, valid, own, 0.2)
    for b in range(3):
        scores = {s: float(torch.cosine_similarity(z[b], y[s], dim=0)) / 0.2 for s in range(7) if valid[s]}
        expected = math.log(sum(math.exp(v) for v in scores.values())) - scores[int(own[b])]
        assert float(found[b]) == pytest.approx(expected, rel=1e-9)


def test_koleo_looks_at_the_nearest_other_valid_site() -> None:
    y = torch.tensor([[1.0, 0], [0, 1.0], [-1.0, 0], [1.0, 0.001]], dtype=torch.float64)
    valid = torch.tensor([True, True, True, False])
    found = koleo(y[:1], y, valid, torch.tensor([0]))
    assert float(found[0]) == pytest.approx(-math.log(math.sqrt(2)))  # itself and the invalid near twin do not count
    assert float(koleo(y[:1], y[:1], valid[:1], torch.tensor([0]))[0]) == 0.0


def test_rows_of_all_ranks_are_gathered_in_order() -> None:
    rows = torch.arange(24.0).reshape(12, 2)

    def work(rank: int, reduce: object) -> tuple[torch.Tensor, list[int]]:
        mine = rows[rank * 4 : (rank + 1) * 4]
        return gather_rows([mine[:2], mine[2:]], reduce)  # type: ignore[arg-type]

    for rank, (found, first) in enumerate(run_ranks(3, work)):
        assert torch.equal(found, rows)
        assert first == [4 * rank, 4 * rank + 2]
    assert gather_rows([rows], SingleProcess())[1] == [0]


# ---- schedules and small groups


def test_half_life_of_the_teacher_follows_the_samples_seen() -> None:
    for batch in (8, 64, 1024):
        steps = 10_000 // batch
        decay = 1.0
        for _ in range(steps):  # over one half-life at constant length
            decay *= growing_momentum(100_000, batch, 0.1, (1.0, 1e9))
        assert decay == pytest.approx(0.5, rel=0.11)
    assert growing_momentum(10, 8, 0.1, (500.0, 1e9)) == 0.5 ** (8 / 500)
    assert growing_momentum(10**12, 8, 0.1, (500.0, 1e6)) == 0.5 ** (8 / 1e6)
    paper = ObjectiveConfig(ema_momentum=(0.9, 1.0))
    assert teacher_momentum(paper, 0, 100, 10) == pytest.approx(0.9)
    assert teacher_momentum(replace(paper, ema_half_life=0.1), 10_000, 100_000, 10) == 0.5 ** (10 / 1000)


def test_a_span_is_a_share_of_the_run_or_samples() -> None:
    assert run_samples(0.25, 8000) == 2000
    assert run_samples(640, 8000) == 640
    assert run_samples(0, 8000) == 0


def test_few_rows_use_the_running_scaling_and_many_their_own() -> None:
    memory = torch.zeros(2, 4)
    first, second = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    rows = torch.tensor([3.0, 100.0])
    torch.testing.assert_close(remember(first, memory, rows, 0.9), first)  # nothing to remember yet
    used = remember(second, memory, rows, 0.9)
    torch.testing.assert_close(used[1], second[1])
    torch.testing.assert_close(used[0], 0.9 * first[0] + 0.1 * second[0], rtol=1e-6, atol=1e-6)
    kept = memory.clone()
    remember(torch.zeros(2, 4, dtype=torch.float64), memory, torch.zeros(2), 0.9)  # a step without rows
    assert torch.equal(memory, kept)


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"hide_tokens": 1.0}, "nothing would be left"), ({"cross_weight": 1.0, "mgcl_weight": 0.0}, "mgcl_weight"),
        ({"masked_weight": 1.0, "masked_visible": 0.0}, "hide_tokens"), ({"site_weight": -1.0}, "site_weight"),
        ({"ema_samples": (5.0, 1.0)}, "ema_samples"), ({"site_temperature": 0.0}, "temperatures"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(keys: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ObjectiveConfig(**keys)  # type: ignore[arg-type]
