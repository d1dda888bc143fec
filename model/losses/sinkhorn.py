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
MASKED = -1e4  # added to log weights that shall be zero
TINY = 1e-30  # a prototype nobody is near: its scaling stays finite (reached only below temperature 0.03)
LARGE = 80.0  # exp of it is finite in float32


def prototype_scaling(
    z_ND: Tensor, prototypes_KD: Tensor, group_N: Tensor, valid_N: Tensor, num_groups: int, temperature: float,
    iterations: int, reduce: Reduce, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """log v_GK such that the centred target of row n in group g is softmax_k(z_n·w_k / τ + log v_gk).

    Sinkhorn-Knopp on exp(z·w/τ) as in DINOv2 (arXiv 2304.07193, section 4; SwAV, arXiv 2006.09882): each iteration
    first gives every prototype the same total over all valid rows of all ranks and micro-batches, then every row total 1.
    Only scaling vectors are kept: scores are made again in chunks of rows where they do not fit one (CHUNK_NUMBERS), so a step
    keeps D numbers per row, not K. z and prototypes are unit vectors, so |z·w/τ| <= 1/τ. `iterations` = 0: no centring.

    Args:
        valid_N: bool; invalid rows take no part.
        num_groups: G; rows of different groups never meet.
        chunk: rows at a time; None: as many as CHUNK_NUMBERS allows.
    """
    chunk = chunk or chunk_rows(prototypes_KD.shape[0])
    dtype = work_dtype(z_ND)
    log_v_GK = torch.zeros(num_groups, prototypes_KD.shape[0], device=z_ND.device, dtype=dtype)
    if not iterations:
        return log_v_GK
    member_GN = memberships(group_N, num_groups, valid_N).to(dtype)
    sharp_ND, group_1N = z_ND / temperature, group_N[None]
    parts = [slice(start, start + chunk) for start in range(0, z_ND.shape[0], chunk)]

    def kernel(part: slice) -> Tensor:
        return (sharp_ND[part] @ prototypes_KD.T).to(dtype).sub_(1.0 / temperature).exp_()

    kept_nK = kernel(parts[0]) if len(parts) == 1 else None
    for iteration in range(iterations):
        total_GK = torch.zeros_like(log_v_GK) if len(parts) != 1 else None
        v_GK = log_v_GK.clamp_max(LARGE).exp()
        for part in parts:
            # Sinkhorn's scaling form: two thin products over the rows' kernel, no matrix of its size is written again
            kernel_nK = kernel(part) if kept_nK is None else kept_nK
            weight_Gn = member_GN[:, part]
            if iteration:
                row_1n = (v_GK @ kernel_nK.T).gather(0, group_1N[:, part])
                weight_Gn = weight_Gn / row_1n.clamp_min(TINY)
            column_GK = weight_Gn @ kernel_nK
            total_GK = column_GK if total_GK is None else total_GK.add_(column_GK)
        assert total_GK is not None
        log_v_GK = -torch.log(reduce.sum(total_GK).clamp_min(TINY))
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
    positions has no objects (all weights 0). x must be finite also where it is not valid.
    """
    usable_I = valid_IP.sum(dim=-1) >= clusters
    valid_IP1 = (valid_IP & usable_I[:, None]).to(work_dtype(x_IPD))[..., None]
    bias_IP1 = (1 - valid_IP1) * MASKED
    x_IPD = F.normalize(x_IPD.to(valid_IP1.dtype), dim=-1)
    sharp_IPD = x_IPD / temperature
    weight_IPC = _seeds(valid_IP1, clusters)
    for _ in range(iterations):
        centre_ICD = F.normalize(weight_IPC.transpose(1, 2) @ x_IPD, dim=-1)
        # in the log domain one kernel is a balancing; rows that do not count are put out of the clusters' sums each time
        score_IPC = torch.log_softmax(sharp_IPD @ centre_ICD.transpose(1, 2), dim=2)
        for _ in range(3):
            score_IPC = torch.log_softmax(torch.log_softmax(score_IPC + bias_IP1, dim=1), dim=2)
        weight_IPC = torch.softmax(score_IPC + bias_IP1, dim=1) * valid_IP1
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
