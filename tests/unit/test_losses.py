"""Every loss against a slow reference written from its formula, in float64, with plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.config import LEAST_CENTRED, ModelConfig, MoEConfig, ObjectiveConfig
from model.decoder import QueryDecoder
from model.losses import qsacl
from model.losses.dino import prototype_cross_entropy, target_log_probabilities, teacher_temperature
from model.losses.ita import alignment_cross_entropy, token_classes
from model.losses.reduce import SingleProcess
from model.losses.router import router_terms
from model.losses.sinkhorn import cluster_weights, prototype_scaling
from model.moe.balance import MoEStats
from model.pretrain import Student
from model.teacher import make_teacher
from model.view_tokens import view_affine
from tests.synthetic_batch import STATISTICS, make_batch
from tests.thread_ranks import run_ranks

DOUBLE = torch.float64


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE), dim=-1)


# ---- Sinkhorn-Knopp


def sinkhorn_by_the_book(score: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """DINOv2's algorithm on the full matrix: prototypes first, then rows, total 1 per row at the end."""
    q = np.exp(score / temperature).T
    q /= q.sum()
    num_prototypes, rows = q.shape
    for _ in range(iterations):
        q = q / q.sum(axis=1, keepdims=True) / num_prototypes
        q = q / q.sum(axis=0, keepdims=True) / rows
    return (q * rows).T


def test_float32_centres_down_to_the_least_temperature() -> None:
    """The hardest rows: all in one narrow cone, and prototypes on every side of it, half of them opposite."""
    centre = unit(1, 4)
    z = F.normalize(centre + 0.025 * unit(256, 4, seed=1), dim=-1)
    prototypes = torch.cat([unit(128, 4, seed=2), F.normalize(0.025 * unit(128, 4, seed=3) - centre, dim=-1)])
    group, valid = torch.zeros(256, dtype=torch.int64), torch.ones(256, dtype=torch.bool)

    def targets(z: torch.Tensor, prototypes: torch.Tensor, temperature: float) -> torch.Tensor:
        log_v = prototype_scaling(z, prototypes, group, valid, 1, temperature, 3, SingleProcess())
        return target_log_probabilities(z, prototypes, log_v, group, temperature).exp()

    def error(temperature: float) -> float:
        exact = torch.from_numpy(sinkhorn_by_the_book((z @ prototypes.T).numpy(), temperature, 3))
        return float((targets(z.float(), prototypes.float(), temperature) - exact).abs().max())

    assert error(LEAST_CENTRED) < 1e-4
    assert error(0.6 * LEAST_CENTRED) > 0.1  # what the limit is there for


def test_a_temperature_that_sinkhorn_cannot_hold_is_refused() -> None:
    for limits in ((0.02, 0.07), (0.07, 0.02)):
        with pytest.raises(
            ValueError, match=r"teacher_temperature=.* must not go below 0\.025 with centering=sinkhorn"
        ):
            ObjectiveConfig(teacher_temperature=limits)
        ObjectiveConfig(teacher_temperature=limits, centering="softmax")
        ObjectiveConfig(teacher_temperature=limits, sinkhorn_iterations=0)
    ObjectiveConfig(teacher_temperature=(LEAST_CENTRED, LEAST_CENTRED))


@pytest.mark.parametrize("iterations", [1, 3])
def test_centred_targets_equal_sinkhorn_on_the_full_matrix(iterations: int) -> None:
    z, prototypes = unit(30, 6), unit(9, 6, seed=1)
    group = torch.arange(30) % 2
    valid = torch.rand(30, generator=torch.Generator().manual_seed(2)) > 0.3
    log_v = prototype_scaling(z, prototypes, group, valid, 2, 0.05, iterations, SingleProcess(), chunk=7)
    got = target_log_probabilities(z, prototypes, log_v, group, 0.05).exp()
    for g in range(2):
        rows = (group == g) & valid
        expected = sinkhorn_by_the_book((z[rows] @ prototypes.T).numpy(), 0.05, iterations)
        np.testing.assert_allclose(got[rows].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_centring_over_ranks_equals_centring_of_all_rows() -> None:
    z, prototypes, group = unit(24, 6), unit(9, 6, seed=1), torch.arange(24) % 3
    valid = torch.ones(24, dtype=torch.bool)
    whole = prototype_scaling(z, prototypes, group, valid, 3, 0.05, 3, SingleProcess())

    def work(rank, reduce):
        rows = slice(6 * rank, 6 * rank + 6)
        return prototype_scaling(z[rows], prototypes, group[rows], valid[rows], 3, 0.05, 3, reduce)

    for part in run_ranks(4, work):
        torch.testing.assert_close(part, whole, rtol=1e-10, atol=1e-10)


def test_centring_balances_prototypes_where_sharpening_alone_collapses() -> None:
    z = F.normalize(unit(200, 8) + 3 * unit(1, 8, seed=5), dim=-1).float()  # nearly the same direction
    prototypes = unit(10, 8, seed=1).float()
    group, valid = torch.zeros(200, dtype=torch.int64), torch.ones(200, dtype=torch.bool)
    usage = []
    for iterations in (0, 20):
        log_v = prototype_scaling(z, prototypes, group, valid, 1, 0.05, iterations, SingleProcess())
        usage.append(target_log_probabilities(z, prototypes, log_v, group, 0.05).exp().mean(0))
    assert float(usage[0].max()) > 0.5
    assert float(usage[1].max()) < 0.12  # uniform is 0.1


def test_an_extreme_temperature_stays_finite() -> None:
    z, prototypes = unit(8, 4).float(), unit(5, 4, seed=1).float()
    prototypes[0] = -z[0]
    log_v = prototype_scaling(
        z[:1].expand(8, 4), prototypes, torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.bool), 1, 0.01, 3, SingleProcess()
    )  # fmt: skip
    assert torch.isfinite(log_v).all()


def clusters_by_the_book(
    x: np.ndarray, valid: np.ndarray, clusters: int, iterations: int, temperature: float
) -> np.ndarray:
    weight = np.zeros((len(x), clusters))
    rows = [i for i in range(len(x)) if valid[i]]
    if len(rows) < clusters:
        return weight
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    for order, i in enumerate(rows):
        weight[i, min(order * clusters // len(rows), clusters - 1)] = 1
    weight /= weight.sum(0)
    for _ in range(iterations):
        centre = weight.T @ x
        centre /= np.linalg.norm(centre, axis=1, keepdims=True)
        mass = np.zeros_like(weight)
        for i in rows:
            e = np.exp((centre @ x[i] - (centre @ x[i]).max()) / temperature)
            mass[i] = e / e.sum()
        for _ in range(3):
            mass = mass / mass.sum(0)
            mass[rows] = mass[rows] / mass[rows].sum(1, keepdims=True)
        weight = mass / mass.sum(0)
    return weight


def test_clusters_equal_the_slow_reference_and_images_do_not_meet() -> None:
    x = torch.randn(3, 11, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    valid = torch.rand(3, 11, generator=torch.Generator().manual_seed(4)) > 0.2
    valid[2] = False
    valid[2, :2] = True  # fewer than three clusters' worth
    got = cluster_weights(x, valid, 3, 2)
    for i in range(3):
        expected = clusters_by_the_book(x[i].numpy(), valid[i].numpy(), 3, 2, 0.05)
        np.testing.assert_allclose(got[i].numpy(), expected, rtol=1e-9, atol=1e-12)
    assert float(got[2].abs().sum()) == 0


def test_clusters_find_planted_objects() -> None:
    directions = unit(4, 16, seed=7)
    label = torch.randperm(40, generator=torch.Generator().manual_seed(0)) % 4
    x = directions[label] + 0.05 * torch.randn(40, 16, dtype=DOUBLE, generator=torch.Generator().manual_seed(8))
    weight = cluster_weights(x[None], torch.ones(1, 40, dtype=torch.bool), 4, 8)[0]
    share = torch.stack([weight[label == c].sum(0) for c in range(4)])  # true object × found cluster
    assert float(share.max(0).values.min()) > 0.9


# ---- cross-entropy between prototype scores


def test_cross_entropy_equals_loops_and_its_gradients_are_right() -> None:
    student, prototypes = unit(7, 5).requires_grad_(), unit(6, 5, seed=1).requires_grad_()
    teacher, teacher_prototypes = unit(7, 5, seed=2), unit(6, 5, seed=3)
    log_v = torch.randn(2, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(4))
    group = torch.tensor([0, 1, 0, 1, 0, 0, 1])
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 3.0], dtype=DOUBLE)

    def loss(s, w):
        return prototype_cross_entropy(s, w, teacher, teacher_prototypes, log_v, group, weight, 0.1, 0.05, chunk=3)[0]

    total, ce, entropy, best = prototype_cross_entropy(
        student, prototypes, teacher, teacher_prototypes, log_v, group, weight, 0.1, 0.05, chunk=3
    )
    expected = 0.0
    for n in range(7):
        a = [float(teacher[n].detach() @ teacher_prototypes[k]) / 0.05 + float(log_v[group[n], k]) for k in range(6)]
        b = [float(student[n].detach() @ prototypes[k].detach()) / 0.1 for k in range(6)]
        log_a, log_b = math.log(sum(math.exp(i) for i in a)), math.log(sum(math.exp(i) for i in b))
        value = -sum(math.exp(a[k] - log_a) * (b[k] - log_b) for k in range(6))
        assert float(ce[n]) == pytest.approx(value, rel=1e-10)
        plogp = sum(math.exp(i - log_a) * (i - log_a) for i in a)
        assert float(entropy[n]) == pytest.approx(-plogp, rel=1e-10)
        assert int(best[n]) == max(range(6), key=lambda k: b[k])
        expected += float(weight[n]) * value
    assert float(total) == pytest.approx(expected, rel=1e-10)
    assert torch.autograd.gradcheck(loss, (student, prototypes))
    grad = torch.autograd.grad(loss(student, prototypes), student)[0]
    assert float(grad[2].abs().sum()) == 0.0  # weight 0


def test_teacher_temperature_is_a_function_of_samples() -> None:
    assert [teacher_temperature(s, (0.04, 0.07), 100) for s in (0, 50, 100, 10**9)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07]
    )
    assert teacher_temperature(0, (0.04, 0.07), 0) == 0.07


# ---- the terms of the objective, from features to number

MODEL = ModelConfig(size="debug", drop_path=0.0, moe=MoEConfig(experts=0))
OBJECTIVE = ObjectiveConfig(
    mgcl_weight=1.0, prototypes=12, head_hidden=8, head_bottleneck=4, pixel_pairs=1000, object_clusters=2, queries=3,
    teacher_warmup=0,
)  # fmt: skip


def reference_ce(student: Student, teacher: Student, head: str, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean over rows (student feature, teacher feature) of the centred cross-entropy of one group."""
    if not rows:
        return 0.0
    objective = student.objective
    tau = objective.teacher_temperature[1]
    ys = torch.stack([student.heads[head].project(s[None])[0] for s, _ in rows])
    yt = torch.stack([teacher.heads[head].project(t[None])[0] for _, t in rows])
    mean = yt.mean(0) if objective.center_bottleneck else 0
    least = 1e-4 * float(yt.mean(0).norm()) if objective.center_bottleneck else 0.0
    zs, zt = ((y - mean) / (y - mean).norm(dim=1, keepdim=True).clamp_min(least) for y in (ys, yt))
    ws, wt = (F.normalize(m.heads[head].prototypes.weight, dim=-1) for m in (student, teacher))
    q = sinkhorn_by_the_book((zt @ wt.T).detach().numpy(), tau, objective.sinkhorn_iterations)
    logits = (zs @ ws.T).detach().numpy() / objective.student_temperature
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(np.mean([-(q[n] * logp[n]).sum() for n in range(len(rows))]))


def slow_rows(fu, vu, du, au, cu, fv, vv, dv, av, cv, stride, clusters, iterations):
    """Pixel, object and image rows of one modality, by loops. f: [B,T,h,w,D], v: valid, d: doy, a: affine, c: canvas (H, W)."""
    pixel, objects, image = [], [], []
    for b in range(len(fu)):
        for t in range(fu.shape[1]):
            if not vu[b, t].any():
                continue
            dates = [s for s in range(fv.shape[1]) if vv[b, s].any()]
            if not dates:
                continue

            def gap(s, b=b, t=t):
                if int(du[b, t]) == 0 or int(dv[b, s]) == 0:
                    return 400 + abs(t - s)
                days = abs(int(du[b, t]) - int(dv[b, s])) % 365
                return min(days, 365 - days)

            s = min(dates, key=lambda s: (gap(s), s))
            image.append((fu[b, t][vu[b, t]].mean(0), fv[b, s][vv[b, s]].mean(0)))
            pairs, order = [], []
            inverse = np.linalg.inv(np.vstack([av[b].numpy(), [0, 0, 1]]))
            for i in range(fu.shape[2]):
                for j in range(fu.shape[3]):
                    order.append(False)
                    if not vu[b, t, i, j]:
                        continue
                    place = inverse @ np.append(au[b].numpy() @ [(j + 0.5) * stride, (i + 0.5) * stride, 1], 1)
                    if not (0 <= place[0] <= cv[1] and 0 <= place[1] <= cv[0]):
                        continue
                    x, y = place[0] / stride - 0.5, place[1] / stride - 0.5
                    total, feature = 0.0, torch.zeros(fu.shape[-1], dtype=DOUBLE)
                    for row in range(fv.shape[2]):
                        for column in range(fv.shape[3]):
                            xc, yc = min(max(x, 0), fv.shape[3] - 1), min(max(y, 0), fv.shape[2] - 1)
                            weight = max(0, 1 - abs(xc - column)) * max(0, 1 - abs(yc - row))
                            if vv[b, s, row, column]:
                                total += weight
                                feature += weight * fv[b, s, row, column]
                    if total >= 0.5:
                        pairs.append((fu[b, t, i, j], feature / total))
                        order[-1] = True
            pixel += pairs
            if len(pairs) >= clusters:
                v_side = np.stack([v.detach().numpy() for _, v in pairs])
                weight = torch.from_numpy(
                    clusters_by_the_book(v_side, np.ones(len(pairs), bool), clusters, iterations, 0.05)
                )
                u_side, v_side = torch.stack([u for u, _ in pairs]), torch.stack([v for _, v in pairs])
                objects += [(weight[:, c] @ u_side, weight[:, c] @ v_side) for c in range(clusters)]
    return {"pixel": pixel, "object": objects, "image": image}


@pytest.fixture(scope="module")
def twins() -> tuple[Student, Student]:
    torch.manual_seed(1)
    student = Student(MODEL, OBJECTIVE, STATISTICS).double().eval()
    torch.manual_seed(2)
    return student, make_teacher(
        Student(MODEL, OBJECTIVE, STATISTICS).double()
    )  # another network: u and v sides differ


@pytest.mark.parametrize("seed", [0, 1])
def test_mgcl_and_qsacl_equal_the_formula(twins, seed: int) -> None:
    student, teacher = twins
    batch = make_batch(3, seed=seed, local_views=2, missing=0.3)
    target = teacher.center([teacher.teacher_forward(batch)], 10, SingleProcess())[0]
    _, metrics = student(batch, target)
    [u], [v] = student.features([batch.u], [None]), teacher.features([batch.v], [None])
    for space in ("hr", "s2", "s1", "fused"):
        name = u.fused_like if space == "fused" else space
        fu, vu, fv, vv = (
            (u.fused[:, None], u.fused_valid[:, None], v.fused[:, None], v.fused_valid[:, None])
            if space == "fused"
            else (u.dense[space], u.dense_valid[space], v.dense[space], v.dense_valid[space])
        )
        mu, mv = batch.u.modalities[name], batch.v.modalities[name]
        du, dv = (torch.zeros(3, 1) if space == "fused" else m.doy_BT for m in (mu, mv))
        rows = slow_rows(
            fu, vu, du, view_affine(batch.u, name), mu.x_BTCHW.shape[-2:], fv, vv, dv, view_affine(batch.v, name),
            mv.x_BTCHW.shape[-2:], u.stride[name], OBJECTIVE.object_clusters, OBJECTIVE.sinkhorn_iterations,
        )  # fmt: skip
        head = "fused" if space == "fused" else "dense"
        expected = sum(reference_ce(student, teacher, head, rows[level]) for level in ("pixel", "object", "image"))
        assert rows["pixel"]
        assert rows["object"]
        assert float(metrics[f"loss/mgcl_{space}"]) == pytest.approx(expected, rel=1e-8), space

    # L = 1/(2m) Σ_i [L_CL(z_i^g, z_i^l') + L_CL(z_i^l, z_i^g')], per local view, over sites
    def queries(twin: Student, features) -> torch.Tensor:
        assert twin.decoder is not None
        return twin.decoder(features.fused, features.fused_valid)

    lu, lv = (m.features(batch.local, [None] * len(batch.local)) for m in (student, teacher))
    rows = []
    for j in range(2):
        for a, fa, b, fb in (
            (u, queries(student, u), lv[j], queries(teacher, lv[j])),
            (lu[j], queries(student, lu[j]), v, queries(teacher, v)),
        ):
            for site in range(3):
                if a.fused_valid[site].any() and b.fused_valid[site].any():
                    rows += [(fa[site, i], fb[site, i]) for i in range(3)]
    assert float(metrics["loss/qsacl"]) == pytest.approx(reference_ce(student, teacher, "query", rows), rel=1e-8)


def test_query_rows_without_local_views_pair_u_with_v() -> None:
    a, b = torch.arange(4.0).reshape(2, 2, 1), torch.arange(4.0).reshape(2, 2, 1) + 10
    assert qsacl.student_rows(a, []).flatten().tolist() == [0, 1, 2, 3]
    assert qsacl.teacher_rows(b, []).flatten().tolist() == [10, 11, 12, 13]
    yes_no = torch.tensor([True, False])
    assert qsacl.valid_rows(torch.tensor([True, True]), yes_no, [], 2).tolist() == [True, True, False, False]


# ---- image-text alignment


def test_alignment_equals_the_formula() -> None:
    z, text = torch.randn(6, 4, dtype=DOUBLE), torch.randn(3, 4, dtype=DOUBLE)
    classes = torch.tensor([0, 2, -1, 1, 1, 2])
    ce = alignment_cross_entropy(z, text, torch.tensor([math.log(1 / 0.07)], dtype=DOUBLE), classes)
    for n, c in enumerate(classes.tolist()):
        cosine = [float(z[n] @ t / z[n].norm() / t.norm()) / 0.07 for t in text]
        expected = 0.0 if c < 0 else -cosine[c] + math.log(sum(math.exp(x) for x in cosine))
        assert float(ce[n]) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_temperature_is_held_at_a_hundredth() -> None:
    z, text = unit(1, 4), unit(2, 4, seed=1)
    hot = alignment_cross_entropy(z, text, torch.tensor([50.0], dtype=DOUBLE), torch.tensor([0]))
    limit = alignment_cross_entropy(z, text, torch.tensor([math.log(100.0)], dtype=DOUBLE), torch.tensor([0]))
    torch.testing.assert_close(hot, limit)


def test_token_class_is_the_majority_of_labelled_pixels() -> None:
    classes = torch.randint(-1, 4, (2, 12, 8), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    classes[0, :4, :4] = -1
    got = token_classes(classes, (3, 2))
    for b in range(2):
        for i in range(3):
            for j in range(2):
                block = classes[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten()
                labelled = block[block >= 0]
                expected = int(torch.bincount(labelled.long(), minlength=4).argmax()) if len(labelled) else -1
                assert int(got[b, i, j]) == expected
    assert torch.equal(token_classes(classes, (12, 8)), classes.long())
    assert torch.equal(token_classes(classes, (24, 16)), classes.long().repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert (token_classes(torch.full((1, 4, 4), -1, dtype=torch.int16), (2, 2)) == -1).all()


# ---- router


def test_router_terms_with_the_step_s_own_loads_are_switch_s_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 4, generator=generator, dtype=DOUBLE)
    prob, load = logits.softmax(-1), torch.bincount(logits.argmax(-1), minlength=4).to(DOUBLE)
    zero = torch.zeros((), dtype=DOUBLE)
    z = logits.logsumexp(-1).square().sum()
    stats = MoEStats(
        *(torch.stack([x, 0 * x]) for x in (load, prob.sum(0), z, zero, torch.full((), 20.0, dtype=DOUBLE)))
    )
    expected = 4 * sum(float(load[e]) / 20 * float(prob[:, e].mean()) for e in range(4))
    tokens = torch.tensor([60.0], dtype=DOUBLE)  # of the step's three parts
    balance, z_term = router_terms([stats], load[None], tokens, 3, None)
    assert float(balance) == pytest.approx(expected)
    assert float(z_term) == pytest.approx(float(logits.logsumexp(-1).square().mean()))
    batch_balance, batch_z = router_terms([stats], torch.zeros(1, 4), tokens, 3, SingleProcess())
    assert float(batch_balance) == pytest.approx(expected)
    assert float(batch_z) == pytest.approx(float(z_term))
    first, _ = router_terms([stats], torch.zeros(1, 4), tokens, 3, None)
    assert float(first) == pytest.approx(1.0)  # no loads yet: as if uniform, no pull on the router


# ---- the query decoder


def test_queries_see_valid_tokens_only_and_a_site_without_any_stays_finite() -> None:
    torch.manual_seed(0)
    decoder = QueryDecoder(8, queries=3, heads=2).double()
    fused = torch.randn(3, 2, 4, 8, dtype=DOUBLE)
    valid = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(1)) > 0.4
    valid[2] = False
    expected = decoder(fused, valid)
    assert torch.equal(decoder(torch.where(valid[..., None], fused, float("nan")), valid), expected)
    assert torch.isfinite(expected).all()
    alone = decoder(fused[:1][:, valid[0].any(1)], valid[:1][:, valid[0].any(1)])
    torch.testing.assert_close(alone, expected[:1])
    assert float((expected[0, 0] - expected[0, 1]).detach().abs().max()) > 0.1  # queries differ
