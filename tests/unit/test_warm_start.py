"""Warm starts: equal models take equal weights, a dense model becomes experts with the same output, what does not fit is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.errors import UsageError
from cluster.ranks import Ranks
from model.config import ModelConfig, MoEConfig
from model.initial import draw_all
from model.moe.layer import MoELayer
from model.pretrained import Pretrained, save_backbone
from model.warm_start import ROUTER, Filled, fill
from pipeline.config import InitConfig, PretrainConfig
from pipeline.first_weights import blank
from pipeline.parallel.expert_parallel import localise
from pipeline.parallel.layout import Layout
from pipeline.parallel.zero import logical
from pipeline.warm_start import BACKBONE, read_weights, refuse_gaps, start_warm

STATISTICS = {name: {"mean": [0.0] * bands, "std": [1.0] * bands} for name, bands in (("hr", 3), ("s2", 10), ("s1", 2))}
DENSE = ModelConfig(size="debug", drop_path=0.0, moe=MoEConfig(experts=0))


def built(cfg: ModelConfig, seed: int) -> Pretrained:
    torch.manual_seed(seed)
    model = Pretrained(cfg, STATISTICS).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: their part must come over as well
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def outputs(model: Pretrained) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = {
        "hr": torch.rand(2, 3, 128, 128, generator=generator),
        "s2": torch.rand(2, 2, 10, 8, 8, generator=generator),
    }
    with torch.no_grad():
        found = model(images)
    return [found.fused, *(found.dense[name] for name in images)]


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (3, 3)])
def test_an_upcycled_network_s_output_is_the_dense_one_s(experts: int, top_k: int) -> None:
    dense = built(DENSE, 0)
    sparse = built(replace(DENSE, moe=MoEConfig(experts=experts, blocks=2, top_k=top_k)), 5)
    drawn = [(a - b).abs().max() for a, b in zip(outputs(dense), outputs(sparse))]
    filled = fill(sparse.skysense, dict(dense.skysense.named_parameters()), top_k)
    assert not filled.missing
    assert len(filled.upcycled) == 5 * 2  # four tensors of experts and a router, in two blocks
    for a, b, before in zip(outputs(dense), outputs(sparse), drawn):
        assert before > 0.1
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), (a - b).abs().max()
    with torch.no_grad():
        stats = sparse({"hr": torch.randn(2, 3, 256, 256), "s2": torch.rand(2, 4, 10, 16, 16) * 9}).moe
    if top_k < experts:  # copies that all tokens agree on would stay copies
        assert any((one.load_ME.sum(0) > 0).sum() > top_k for one in stats)


def test_equal_models_are_copied_and_nothing_else_is_touched() -> None:
    cfg = replace(DENSE, moe=MoEConfig(experts=4, blocks=1))
    a, b = built(cfg, 0), built(cfg, 1)
    filled = fill(b.skysense, dict(a.skysense.named_parameters()), 1)
    assert (len(filled.upcycled), filled.missing) == (0, {})
    assert all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b)))


def test_what_does_not_fit_is_named_and_refused() -> None:
    one_sensor = built(replace(DENSE, modalities=("s2",)), 0)
    all_sensors = built(DENSE, 1)
    before = {name: value.clone() for name, value in all_sensors.skysense.named_parameters()}
    source = {f"{BACKBONE}{name}": value for name, value in one_sensor.skysense.named_parameters()}
    holder = torch.nn.Module()
    holder.skysense = all_sensors.skysense
    filled = fill(holder, source, 1)
    assert filled.missing
    assert all(
        torch.equal(before[name.removeprefix(BACKBONE)], dict(holder.named_parameters())[name])
        for name in filled.missing
    )
    with pytest.raises(UsageError, match=r"init\.partial=true"):
        refuse_gaps(filled, partial=False)
    refuse_gaps(filled, partial=True)
    refuse_gaps(Filled(("skysense.a",), (), {"heads.dense.x": "not there"}), partial=False)  # heads may always be new
    nothing = fill(holder, {}, 1)
    with pytest.raises(UsageError, match="same size and sensors"):
        refuse_gaps(nothing, partial=True)


def test_an_export_gives_names_and_lineage(tmp_path: Path) -> None:
    model, path = built(DENSE, 0), str(tmp_path / "dense.safetensors")
    facts = {"step": 7, "samples": 56, "fingerprint": "f", "run_id": None}
    save_backbone(path, model.skysense.state_dict(), DENSE, STATISTICS, facts)
    weights, told = read_weights(path, "teacher")
    assert told == {"weights": path, **facts}
    assert set(weights) == {f"{BACKBONE}{name}" for name, _ in model.skysense.named_parameters()}
    assert not any(name.endswith(ROUTER) for name in weights)


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("ep", [1, 2])
def test_a_start_fills_what_a_rank_keeps(tmp_path: Path, ep: int, experts: int) -> None:
    """Weights of a model without or with experts into experts: the rank's slice of what one process with all of them gets; nothing
    else is touched."""
    moe = MoEConfig(experts=4, blocks=2)
    its = replace(DENSE, moe=replace(moe, experts=experts))
    path = str(tmp_path / "source.safetensors")
    save_backbone(path, built(its, 0).skysense.state_dict(), its, STATISTICS, {"step": 7, "samples": 56})
    config = PretrainConfig(model=replace(DENSE, moe=moe), init=InitConfig(weights=path))
    students = [blank(config, STATISTICS, None) for _ in range(2)]
    layout = Layout(
        world=ep, rank=ep - 1, ep=ep, zero_stage=2, micro_batch=1, accumulation=1, precision="fp32", offload=False
    )
    for layer in students[1].modules():
        if isinstance(layer, MoELayer):
            layer.experts = localise(layer.experts, layout, "group")
    for student in students:
        draw_all(student, 3, whole=logical)
    before = {name: parameter.detach().clone() for name, parameter in students[1].named_parameters()}
    wanted = fill(students[0], read_weights(path, "teacher")[0], moe.top_k, config.train.seed)
    told = start_warm(students[1], config, Ranks(), torch.device("cpu"))
    assert told is not None
    assert (told["step"], told["filled"]) == (7, str(wanted))
    filled, whole = {*wanted.copied, *wanted.upcycled}, dict(students[0].named_parameters())
    for name, parameter in students[1].named_parameters():
        _, first = logical(parameter)
        same = whole[name].flatten()[first : first + parameter.numel()].view_as(parameter)
        assert torch.equal(parameter, same), name
        assert torch.equal(parameter, before[name]) != (name in filled), name
