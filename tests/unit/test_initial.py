"""First weights: of the distributions that layers say, and the same numbers whoever draws which part of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model import initial
from model.initial import BLOCK, Law, draw, draw_all, law_of, on_meta
from model.moe.layer import MoELayer
from model.pretrain import Student
from model.pretrained import Pretrained
from pipeline.parallel.expert_parallel import localise
from pipeline.parallel.layout import Layout
from pipeline.parallel.zero import logical
from pipeline.probes.offline import untrained_twin
from tests.golden import ALL, CASES, CLASSES, EMBEDDINGS, FOLDER
from tests.synthetic_batch import STATISTICS

LAWS = [
    Law("normal", 0.02, 2.0),
    Law("normal", 1.0, 2.0),
    Law("normal", 0.5),
    Law("uniform", 0.3),
    Law("constant", 7.0),
]


def student(name: str) -> Student:
    objective = replace(ALL, ita_embeddings=str(FOLDER.parents[1] / EMBEDDINGS), geo_context=True)
    return Student(CASES[name][0], objective, STATISTICS, CLASSES)


def moments(law: Law) -> tuple[float, float, float]:
    """(mean, standard deviation, bound) of a law, in closed form."""
    if law.kind == "constant":
        return law.scale, 0.0, law.scale
    if law.kind == "uniform":
        return 0.0, law.scale / math.sqrt(3), law.scale
    a = law.cut / law.scale
    density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    kept = math.erf(a / math.sqrt(2))
    return 0.0, law.scale * math.sqrt(1 - (2 * a * density / kept if a < 40 else 0)), law.cut


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_starts_by_the_law_its_layer_draws_by(name: str) -> None:
    """Both ways of drawing, held against the closed form: ten standard errors of mean and deviation."""
    torch.manual_seed(0)
    eager = student(name)
    with on_meta():
        keyed = student(name)
    assert all(parameter.is_meta for parameter in keyed.parameters())
    draw_all(keyed, seed=3)
    layers = dict(eager.named_modules())
    for (key, a), (_, b) in zip(eager.named_parameters(), keyed.named_parameters(), strict=True):
        path, _, own = key.rpartition(".")
        mean, std, bound = moments(law_of(layers[path], own))
        for way, drawn in (("eager", a.detach()), ("keyed", b.detach())):
            assert drawn.shape == a.shape
            assert drawn.abs().max() <= bound * (1 + 1e-6), (key, way)
            assert abs(drawn.mean() - mean) <= 10 * std / drawn.numel() ** 0.5 + 1e-6, (key, way)
            if drawn.numel() > 1:
                assert abs(drawn.std() - std) <= 10 * std / (2 * drawn.numel() - 2) ** 0.5 + 1e-6, (key, way)
    for (key, a), (_, b) in zip(eager.named_buffers(), keyed.named_buffers(), strict=True):
        assert torch.equal(a, b), key


def test_the_drawn_distribution_is_normal_to_its_tails() -> None:
    """Quantiles of 2^22 numbers against the normal law's, and no two blocks alike."""
    x = torch.empty(1 << 22)
    draw(x, Law("normal", 0.02, 2.0), 0, "x", x.numel())
    shares = torch.tensor([1e-5, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-5], dtype=torch.float64)
    found = x.double().sort().values[(shares * x.numel()).long()] / 0.02
    below = torch.special.ndtr(found)
    assert torch.allclose(below, shares, rtol=0, atol=1e-3)
    assert (below - shares).abs()[[0, -1]].max() < 1e-5  # ten in a million, give or take as many
    blocks = x.view(-1, BLOCK)
    assert not any(torch.equal(blocks[0], other) for other in blocks[1:])


@given(
    law=st.sampled_from(LAWS), total=st.integers(1, 3 * BLOCK), cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 1 << 40), name=st.text(min_size=1),
)  # fmt: skip
def test_a_part_has_the_numbers_of_the_whole(
    law: Law, total: int, cut: tuple[float, float], seed: int, name: str
) -> None:
    first, last = sorted(int(share * total) for share in cut)
    whole, part = torch.empty(total), torch.empty(last - first)
    draw(whole, law, seed, name, total)
    draw(part, law, seed, name, total, first)
    assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_every_rank_s_network_is_its_part_of_the_whole_one(ep: int) -> None:
    """Dense parameters equal everywhere; experts, laid side by side over an expert-parallel group, those of one process."""
    with on_meta():
        whole = student("all_terms_experts")
    draw_all(whole, seed=5)
    found: dict[str, list[torch.Tensor]] = {}
    for rank in range(ep):
        layout = Layout(
            world=ep, rank=rank, ep=ep, zero_stage=2, micro_batch=1, accumulation=1, precision="fp32", offload=False
        )
        with on_meta():
            mine = student("all_terms_experts")
        for layer in mine.modules():
            if isinstance(layer, MoELayer):
                layer.experts = localise(layer.experts, layout, "group")
        draw_all(mine, seed=5, whole=logical)
        for name, parameter in mine.named_parameters():
            found.setdefault(name, []).append(parameter.detach())
    for name, parameter in whole.named_parameters():
        if ".experts." in name:
            assert torch.equal(torch.cat(found[name]), parameter), name
        else:
            assert all(torch.equal(one, parameter) for one in found[name]), name
    assert any(".experts." in name for name in found)


@pytest.mark.parametrize("name", CASES)
def test_the_untrained_row_of_probes_is_the_run_s_own_first_network(name: str) -> None:
    with on_meta():
        started = student(name)
    draw_all(started, seed=5)
    facts = {"run_config": {"train": {"seed": 5}}}
    twin = untrained_twin(Pretrained(CASES[name][0], STATISTICS, facts)).skysense.state_dict()
    ours = started.skysense.state_dict()
    assert list(twin) == list(ours)
    assert all(torch.equal(ours[key], value) for key, value in twin.items())


def test_names_seeds_and_types() -> None:
    def drawn(seed: int, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        out = torch.empty(1000, dtype=dtype)
        draw(out, Law("normal", 1.0), seed, name, 1000)
        return out

    assert torch.equal(drawn(1, "a"), drawn(1, "a"))
    assert not any(torch.equal(drawn(1, "a"), other) for other in (drawn(2, "a"), drawn(1, "b"), drawn(11, "a")))
    assert torch.equal(drawn(1, "a").bfloat16(), drawn(1, "a", torch.bfloat16))
    assert torch.equal(drawn(1, "a").double(), drawn(1, "a", torch.float64))


def test_a_layer_that_says_nothing_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match=r"Own\.scale does not say"):
        draw_all(Own(), 0)
    with on_meta():
        own = Own()
        initial.constant_(own.scale, 2.0)
    draw_all(own, 0)
    assert own.scale.tolist() == [2.0] * 3
    assert nn.Linear(2, 2).weight.device.type == "cpu"  # only inside the block
