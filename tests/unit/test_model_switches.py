"""What each switch of the model promises: prompts, windowed attention, positions, separate backbones, drop-path, checkpointing,
construction on meta."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.config import from_dict
from cluster.errors import UsageError
from model.backbone import Backbone
from model.config import ModelConfig, MoEConfig
from model.droppath import image_seeds, keep_factors
from model.fusion import key_bias
from model.grids import axis_windows
from model.plan import MASKED, Bucket, ImageSet, Sequences, plan_trunk
from model.positions import rotary_table, rotate
from model.rows import take
from model.skysense import SkySense
from model.transformer import Block, FeedForward
from model.windows import window_cells
from tests.model_views import images_of, random_view, randomise

DEBUG = ModelConfig(size="debug", window=4)


def build(cfg: ModelConfig, seed: int = 0) -> SkySense:
    torch.manual_seed(seed)
    model = SkySense(cfg)
    randomise(model, seed, std=0.05)
    return model


def loss_of(model: SkySense, seed_B: Tensor | None = None, sites: int = 2) -> Tensor:
    features = model(random_view(sites), seed_B)
    return features.fused.square().sum() + sum(d.square().mean() for d in features.dense.values())


# --- prompts ------------------------------------------------------------------------------------------------------------


def test_prompts_get_gradients_and_leave_no_output_tokens() -> None:
    model = build(DEBUG)
    part = random_view(2).modalities["s2"]
    [tokens] = model.backbone([images_of(DEBUG, "s2", part)])
    assert tokens.feat_NhwD.shape == (2, 4, 4, DEBUG.dims[3])
    tokens.feat_NhwD.square().sum().backward()
    for stage in model.backbone.prompts:
        assert float(stage.tokens["s2"].grad.abs().sum()) > 0
        assert stage.tokens["hr"].grad is None
        assert stage.tokens["s1"].grad is None


def test_features_depend_on_their_own_prompts_and_on_no_others() -> None:
    model = build(DEBUG).eval()
    view = random_view(1)
    before = model(view)
    with torch.no_grad():
        for stage in model.backbone.prompts:
            stage.tokens["s2"].add_(1.0)
    after = model(view)
    assert torch.equal(before.dense["hr"], after.dense["hr"])
    assert torch.equal(before.dense["s1"], after.dense["s1"])
    assert not torch.allclose(before.dense["s2"], after.dense["s2"])


def test_prompts_off() -> None:
    model = build(replace(DEBUG, prompts=0))
    assert not [name for name, _ in model.named_parameters() if "prompts" in name]
    loss_of(model).backward()


# --- attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("prompts", [0, 3])
@pytest.mark.parametrize("grid", [(8, 8), (3, 4), (7, 10)])
def test_windowed_attention_sees_prompts_and_its_window(shift: int, prompts: int, grid: tuple[int, int]) -> None:
    """Image tokens see prompts and their window, prompts see everything; invalid tokens are seen by nobody."""
    cfg = replace(DEBUG, attention="window", prompts=prompts)
    valid = np.random.default_rng(0).random((2, *grid)) > 0.2
    plan = plan_trunk(cfg, [ImageSet("s2", valid, (False,) * 3)], torch.device("cpu"), torch.float64)
    stage = plan.stages[2]
    assert stage.sequences is not None
    at = 0
    for bucket in stage.sequences.buckets[shift > 0]:
        for n in range(bucket.count):
            image = int(stage.image_T[at])
            where = {int(row) - at: cell for cell, row in np.ndenumerate(stage.grids[0][image]) if row >= 0}
            at += bucket.length
            bias = torch.zeros(bucket.length, bucket.length) if bucket.bias_N1JJ is None else bucket.bias_N1JJ[n, 0]
            for i in [*range(prompts), *where]:
                for j in range(bucket.length):
                    is_key = j < prompts or j in where
                    together = i < prompts or j < prompts or (
                        is_key and all((where[i][a] - shift) // 4 == (where[j][a] - shift) // 4 for a in (0, 1))
                    )  # fmt: skip
                    assert float(bias[i, j]) == (0.0 if is_key and together else MASKED), (i, j)


def test_attention_switch_is_one_key_with_the_same_weights() -> None:
    whole, windowed = build(DEBUG).eval(), build(replace(DEBUG, attention="window", window=4)).eval()
    windowed.load_state_dict(whole.state_dict())
    view = random_view(1, series=24)
    a, b = whole(view), windowed(view)
    assert a.dense["s2"].shape == b.dense["s2"].shape
    assert not torch.allclose(a.dense["s2"], b.dense["s2"])


@pytest.mark.parametrize("length", range(1, 40))
@pytest.mark.parametrize(("window", "shift"), [(8, 0), (8, 4), (5, 2), (4, 2)])
def test_windows_depend_on_the_place_and_not_on_the_length(length: int, window: int, shift: int) -> None:
    """Two tokens share a window exactly if they do on a very long axis."""
    size, padded, roll = axis_windows(length, window, shift)
    assert padded % size == 0
    assert padded >= length

    def group(i: int) -> tuple[int, bool]:
        rolled = (i - roll) % padded
        return rolled // size, rolled >= padded - roll

    for i in range(length):
        for j in range(length):
            expected = (i - shift) // window == (j - shift) // window
            assert (group(i) == group(j)) == expected


def test_shape_tables_are_built_once() -> None:
    assert window_cells(9, 7, 4, 2) is window_cells(9, 7, 4, 2)


def test_tables_first_made_in_inference_mode_serve_training() -> None:
    model = build(replace(DEBUG, window=6))
    with torch.inference_mode():
        loss_of(model)
    loss_of(model).backward()


@pytest.mark.parametrize("rotary", [False, True])
def test_a_block_for_its_queries_equals_the_whole_block(rotary: bool) -> None:
    block = randomise(Block(16, 2, FeedForward(16)).double())
    x = torch.randn(5 * 7 + 2 * 4, 16, dtype=torch.float64)
    valid = torch.rand(5, 7) > 0.4
    valid[:, 0] = True
    buckets = (Bucket(5, 7, key_bias(valid, x.dtype)), Bucket(2, 4, None))
    table = rotary_table(torch.randn(len(x), 2), 8, 100.0, 10.0) if rotary else None
    sequences = Sequences((buckets, buckets))
    whole = block(x, sequences, table)[0]
    expected = torch.cat(
        [whole[:35].view(5, 7, 16)[:, :2].flatten(0, 1), whole[35:].view(2, 4, 16)[:, :2].flatten(0, 1)]
    )
    torch.testing.assert_close(block.of_queries(x, sequences, 2, table), expected, rtol=1e-12, atol=1e-12)


# --- positions ----------------------------------------------------------------------------------------------------------


def test_rotary_depends_on_metres_between_tokens_only() -> None:
    """The same ground offset gives the same score whether it is one 40 m token or four 10 m tokens, wherever it is."""
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(stride: int, gsd: float, a: int, b: int) -> Tensor:
        columns = (torch.arange(12) + 0.5) * stride * gsd
        cos, sin = rotary_table(torch.stack([torch.full((12,), 0.5 * stride * gsd), columns], 1), 16, 100.0, 10.0)
        turned = (rotate(x, (cos[i : i + 1], sin[i : i + 1])) for x, i in ((q, a), (k, b)))
        return torch.stack(list(turned)).prod(0).sum()

    torch.testing.assert_close(score(4, 10.0, 0, 1), score(4, 2.5, 3, 7), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(score(4, 10.0, 0, 1), score(4, 10.0, 9, 10), rtol=1e-5, atol=1e-5)  # angles in float32
    assert abs(float(score(4, 10.0, 0, 1) - score(4, 10.0, 0, 2))) > 1e-4


@pytest.mark.parametrize("position", ["rotary_m", "learned", "none"])
def test_position_kinds(position: str) -> None:
    """Without positions stage 3-4 cannot tell a permutation of the grid from the grid itself; with them they can."""
    cfg = replace(DEBUG, position=position, prompts=0, moe=MoEConfig(experts=0))
    model = build(cfg).backbone.double().eval()
    block_in = torch.randn(1, 4, 4, cfg.dims[2], dtype=torch.float64)
    everything = np.ones((1, 4, 4), bool)
    plan = plan_trunk(cfg, [ImageSet("s2", everything, (False,) * 3)], torch.device("cpu"), torch.float64)

    def stage(x: Tensor) -> Tensor:
        rows, _ = model._transform(2, x.flatten(0, 2), plan.stages[2], None, torch.tensor([10.0]), ["s2"])
        return take(rows, plan.dense(2)).view_as(x)

    same = torch.allclose(stage(block_in.flip(1)), stage(block_in).flip(1), atol=1e-10)
    assert same == (position == "none")


def test_gsd_moves_features_and_reference_cancels() -> None:
    cfg = replace(DEBUG, moe=MoEConfig(experts=0))
    backbone = build(cfg).backbone.eval()
    other = Backbone(replace(cfg, reference_m=20.0)).eval()
    other.load_state_dict(backbone.state_dict())
    images = images_of(cfg, "s2", random_view(1).modalities["s2"])
    far = images._replace(gsd_N=torch.tensor([20.0]))
    base = backbone([images])[0].feat_NhwD
    torch.testing.assert_close(other([far])[0].feat_NhwD, base, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(backbone([far])[0].feat_NhwD, base, atol=1e-5)


# --- separate backbones, pyramid ----------------------------------------------------------------------------------------


def test_separate_backbones_share_nothing() -> None:
    model = build(replace(DEBUG, separate=True))
    features = model(random_view(1))
    features.dense["s2"].square().sum().backward()
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad is not None) == name.startswith("each.s2."), name
    assert len(features.moe) == 3 * len(DEBUG.moe.placed(3))


def test_pyramid_gives_the_four_stages() -> None:
    backbone = build(DEBUG).backbone.eval()
    part = random_view(1).modalities["hr"]
    [tokens] = backbone([images_of(DEBUG, "hr", part)], pyramid=True)
    assert [(f.shape[1], f.shape[3]) for f, _ in tokens.pyramid] == list(zip((16, 8, 4, 2), DEBUG.dims))


# --- drop-path, checkpointing, precision, meta -------------------------------------------------------------------


def test_drop_path_belongs_to_the_sample() -> None:
    """Any split of the batch drops the same branches of the same samples; another seed drops others; eval drops none."""
    model = build(replace(DEBUG, drop_path=0.5)).train()
    view = random_view(4, s2_dates=2, s1_dates=1)
    seeds = torch.tensor([11, 2**40 + 5, -3, 11])
    whole = model(view, seeds)
    picked = torch.tensor([2, 1])
    parts = {n: replace(p, **{f: getattr(p, f)[picked] for f in vars(p)}) for n, p in view.modalities.items()}
    part = model(replace(view, modalities=parts, photometric_BP=None, side_m_B=view.side_m_B[picked]), seeds[picked])
    for name in whole.dense:
        torch.testing.assert_close(whole.dense[name][picked], part.dense[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.fused[picked], part.fused, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(view, seeds + 1).fused, whole.fused, atol=1e-4)
    model.eval()
    assert torch.equal(model(view, seeds).fused, model(view).fused)


def test_drop_path_rate_and_independence() -> None:
    seeds = image_seeds(torch.arange(4000).repeat_interleave(2), np.full(8000, 1), np.arange(8000) % 2)
    kept = keep_factors(seeds, [0.3] * 6).flatten(0, 1).T
    assert abs(float((kept == 0).float().mean()) - 0.3) < 0.01
    assert torch.equal(kept.unique(), torch.tensor([0.0, 1 / 0.7]))
    correlation = torch.corrcoef(kept.T) - torch.eye(12)
    assert float(correlation.abs().max()) < 0.06


@pytest.mark.parametrize("attention", ["global", "window"])
def test_activation_checkpointing_is_exact(attention: str) -> None:
    cfg = replace(DEBUG, drop_path=0.5, attention=attention)
    plain, saving = build(cfg).train(), build(replace(cfg, activation_checkpointing=True)).train()
    saving.load_state_dict(plain.state_dict())
    seeds = torch.tensor([1, 2])
    loss_of(plain, seeds).backward()
    loss_of(saving, seeds).backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_runs_and_stays_near_float32(autocast: bool) -> None:
    model = SkySense(replace(DEBUG, moe=MoEConfig(experts=4))).eval()
    view = random_view(1)
    exact = model(view).fused
    if not autocast:
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = model(view)
    assert features.moe[0].prob_ME.dtype == torch.float32
    error = (features.fused.float() - exact).square().mean() / exact.square().mean()
    assert float(error.detach()) < 0.02
    features.fused.float().square().sum().backward()


def test_model_made_on_meta_is_materialised_by_reset() -> None:
    with torch.device("meta"):
        model = SkySense(DEBUG)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(0)
    model.reset_parameters()
    for name, parameter in model.named_parameters():
        assert bool(parameter.isfinite().all()), name
    assert bool(loss_of(model).isfinite())
    experts = model.backbone.stages[3][0].ffn.experts.w1_EDF
    assert float((experts[0] - experts[1]).abs().mean().detach()) > 1e-3  # experts start distinct


@pytest.mark.parametrize(
    ("tree", "word"),
    [
        ({"moe": {"experts": 4, "top_k": 5}}, "top_k"),
        ({"moe": {"experts": 1}}, "experts"),
        ({"moe": {"placement": "list"}}, "indices"),
        ({"size": "debug", "moe": {"placement": "list", "indices": [3]}}, "indices"),
        ({"modalities": ["hr", "hr"]}, "modalities"),
        ({"merge": {"s3": [True, True, True]}}, "s3"),
        ({"fusion": {"dim": 100, "heads": 16}}, "fusion.heads"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_impossible_models_are_refused_by_name(tree: dict, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        from_dict(ModelConfig, tree)
