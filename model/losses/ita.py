"""ITA, dense image-text alignment (arXiv 2507.13812): fused tokens against text embeddings of class names.

Legend: B sites · H, W class canvas · h, w fused token grid · C classes · E embedding dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -1


def token_classes(classes_BHW: Tensor, hw: tuple[int, int]) -> Tensor:
    """Class of each fused token, int64 [B, h, w]: the majority of the labelled pixels under it, -1 if there are none.

    A token smaller than a pixel takes the pixel its centre lies in; where grid and canvas do not divide, a token takes
    every pixel it touches. Ties go to the lower class number.
    """
    (H, W), (h, w) = classes_BHW.shape[-2:], hw
    classes_BHW = classes_BHW.to(torch.int64)
    if h >= H and w >= W:
        row, col = (((torch.arange(n, device=classes_BHW.device) + 0.5) * N / n).long() for n, N in ((h, H), (w, W)))
        return classes_BHW[:, row][:, :, col]
    num_classes = int(classes_BHW.max().item()) + 1
    if num_classes <= 0:
        return torch.full((classes_BHW.shape[0], h, w), IGNORE, dtype=torch.int64, device=classes_BHW.device)
    count_BChw = F.one_hot(classes_BHW.clamp_min(0), num_classes).permute(0, 3, 1, 2).to(torch.float32)
    count_BChw = F.adaptive_avg_pool2d(count_BChw * (classes_BHW >= 0)[:, None], hw)
    most_Bhw, class_Bhw = count_BChw.max(dim=1)
    return torch.where(most_Bhw > 0, class_Bhw, IGNORE)


def alignment_cross_entropy(z_NE: Tensor, text_CE: Tensor, logit_scale: Tensor, class_N: Tensor) -> Tensor:
    """ce_N = −log softmax_c(s · cos(z_n, t_c))[class_n], 0 where class is -1; s = exp(logit_scale) clamped at 100, float32.

    The temperature τ of the method is 1/s (CLIP, arXiv 2103.00020: learned, clamped so that τ >= 0.01).
    """
    dtype = torch.float64 if z_NE.dtype == torch.float64 else torch.float32
    cosine_NC = F.normalize(z_NE.to(dtype), dim=-1) @ F.normalize(text_CE.to(dtype), dim=-1).T
    logits_NC = cosine_NC * logit_scale.to(dtype).exp().clamp_max(100.0)
    return F.cross_entropy(logits_NC, class_N, ignore_index=IGNORE, reduction="none")
