"""Sinkhorn-Knopp: teacher centring over the global batch, and clustering of one image's features.

Legend: N rows (teacher features) · D bottleneck dim · K prototypes · G groups, each centred by itself · I images ·
P positions of an image · C clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.losses.reduce import Reduce

CHUNK_NUMBERS = 1 << 25  # rows × prototypes held at a time: 128 MiB in float32
TINY = 1e-30  # a prototype nobody is near: its scaling stays finite (reached only below temperature 0.03)


def prototype_scaling(
    z_ND: Tensor, prototypes_KD: Tensor, group_N: Tensor, valid_N: Tensor, num_groups: int, temperature: float,
    iterations: int, reduce: Reduce, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """log v_GK such that the centred target of row n in group g is softmax_k(z_n·w_k / τ + log v_gk).

    Sinkhorn-Knopp on exp(z·w/τ) as in DINOv2 (arXiv 2304.07193, section 4; SwAV, arXiv 2006.09882): each iteration
    first gives every prototype the same total over all valid rows of all ranks and micro-batches, then every row total 1.
    Kept as scaling vectors in the log domain: scores are recomputed in chunks of rows and never stored, so a step keeps
    D numbers per row, not K. z and prototypes are unit vectors, so |z·w/τ| <= 1/τ. `iterations` = 0: no centring.

    Args:
        valid_N: bool; invalid rows take no part.
        num_groups: G; rows of different groups never meet.
        chunk: rows at a time; None: as many as CHUNK_NUMBERS allows.
    """
    chunk = chunk or chunk_rows(prototypes_KD.shape[0])
    log_v_GK = torch.zeros(num_groups, prototypes_KD.shape[0], device=z_ND.device, dtype=work_dtype(z_ND))
    member_GN = memberships(group_N, num_groups, valid_N).to(log_v_GK.dtype)
    for iteration in range(iterations):
        total_GK = torch.zeros_like(log_v_GK)
        for start in range(0, z_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            score_nK = (z_ND[part] @ prototypes_KD.T).to(log_v_GK.dtype) / temperature
            if iteration == 0:
                mass_nK = torch.exp(score_nK - 1.0 / temperature)
            else:
                mass_nK = torch.softmax(score_nK + log_v_GK[group_N[part]], dim=-1)
            total_GK += member_GN[:, part] @ mass_nK
        log_v_GK = log_v_GK - torch.log(reduce.sum(total_GK).clamp_min(TINY))
        log_v_GK = log_v_GK - log_v_GK.mean(dim=-1, keepdim=True)  # a row's softmax does not see a constant
    return log_v_GK


def memberships(group_N: Tensor, num_groups: int, valid_N: Tensor) -> Tensor:
    """bool [G, N]: the row is of the group, and valid. (`one_hot` looks at the data, and the host waits.)"""
    return (group_N == torch.arange(num_groups, device=group_N.device)[:, None]) & valid_N


def chunk_rows(num_prototypes: int) -> int:
    """Rows of scores to hold at a time."""
    return max(CHUNK_NUMBERS // num_prototypes, 16)


def cluster_weights(
    x_IPD: Tensor, valid_IP: Tensor, clusters: int, iterations: int = 3, temperature: float = 0.05
) -> Tensor:
    """Soft Sinkhorn-Knopp clusters of each image's features: weight_IPC, Σ_p weight = 1 per cluster (0: image has none).

    The method says only "Sinkhorn-Knopp cluster centres of the pixel features of one image". Ours: seeds are the means
    of C runs of consecutive positions; then, `iterations` times, cosine scores / `temperature` are balanced (equal mass
    per cluster, total 1 per position, three Sinkhorn rounds) and centres move to the weighted means. Soft weights, because
    a hard choice can flip on rounding and would break equality between layouts. An image with fewer than C valid
    positions has no objects (all weights 0).
    """
    usable_I = valid_IP.sum(dim=-1) >= clusters
    valid_IP1 = (valid_IP & usable_I[:, None]).to(work_dtype(x_IPD))[..., None]
    x_IPD = F.normalize(torch.where(valid_IP[..., None], x_IPD, 0).to(valid_IP1.dtype), dim=-1)
    weight_IPC = _seeds(valid_IP1, clusters)
    for _ in range(iterations):
        centre_ICD = F.normalize(weight_IPC.transpose(1, 2) @ x_IPD, dim=-1)
        mass_IPC = torch.softmax(x_IPD @ centre_ICD.transpose(1, 2) / temperature, dim=-1) * valid_IP1
        for _ in range(3):
            mass_IPC = mass_IPC / mass_IPC.sum(dim=1, keepdim=True).clamp_min(TINY)
            mass_IPC = mass_IPC / mass_IPC.sum(dim=2, keepdim=True).clamp_min(TINY)
        weight_IPC = mass_IPC / mass_IPC.sum(dim=1, keepdim=True).clamp_min(TINY)
    return weight_IPC


def _seeds(valid_IP1: Tensor, clusters: int) -> Tensor:
    """weight_IPC of C runs of consecutive valid positions, of equal length to within one."""
    rank_IP1 = valid_IP1.cumsum(dim=1) - valid_IP1
    count_I11 = valid_IP1.sum(dim=1, keepdim=True).clamp_min(1)
    run_IP1 = torch.div(rank_IP1 * clusters, count_I11, rounding_mode="floor").clamp_max(clusters - 1)
    chosen_IPC = (run_IP1 == torch.arange(clusters, device=valid_IP1.device)).to(valid_IP1.dtype) * valid_IP1
    return chosen_IPC / chosen_IPC.sum(dim=1, keepdim=True).clamp_min(1)


def work_dtype(x: Tensor) -> torch.dtype:
    """Half precisions are lifted to float32; float64 stays (references in tests)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
