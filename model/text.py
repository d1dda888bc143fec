"""Class names as vectors: the file format of text embeddings, and the ITA projection that meets them.

A file holds `names` and `vectors` (one unit row per name). `.npz` without pickled objects, or `.safetensors` with the names as
JSON in the metadata. Made by `python -m pipeline text-embeddings`; never fetched at run time.

Legend: B sites · h, w fused tokens · F fused dim · C classes · E text dim.
"""

from __future__ import annotations

import io
import json
import math
import zipfile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from torch import Tensor, nn

from cluster import storage
from cluster.errors import UsageError
from model import initial
from model.losses.ita import IGNORE, alignment_cross_entropy


class TextAlignment(nn.Module):
    """Projection of fused tokens to the text space, and a learned temperature (init `temperature`)."""

    text_CE: Tensor

    def __init__(self, fused_dim: int, text_CE: Tensor, temperature: float) -> None:
        super().__init__()
        self.project = nn.Linear(fused_dim, text_CE.shape[1])
        initial.trunc_normal_(self.project.weight, std=0.02)
        initial.zeros_(self.project.bias)
        self.logit_scale = nn.Parameter(torch.empty(1))
        initial.constant_(self.logit_scale, math.log(1.0 / temperature))
        self.register_buffer("text_CE", text_CE, persistent=False)

    def forward(self, fused_BhwF: Tensor, class_Bhw: Tensor | None) -> Tensor:
        """Σ over labelled tokens of the cross-entropy; 0 (with a graph) where nothing is labelled."""
        if class_Bhw is None:
            class_Bhw = torch.full(fused_BhwF.shape[:3], IGNORE, dtype=torch.int64, device=fused_BhwF.device)
        class_N = class_Bhw.reshape(-1)
        x_NF = torch.where((class_N >= 0)[:, None], fused_BhwF.flatten(0, 2), 0).to(self.project.weight.dtype)
        return alignment_cross_entropy(self.project(x_NF), self.text_CE, self.logit_scale, class_N).sum()


def save_embeddings(url: str, names: list[str], vectors_CE: np.ndarray, provenance: dict[str, str]) -> None:
    """Writes the file, whole or not at all. `provenance`: encoder, version, prompt, kept in the file."""
    vectors = np.ascontiguousarray(vectors_CE, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(names):
        raise ValueError(f"{len(names)} names for vectors of shape {vectors.shape}")
    if url.endswith(".safetensors"):
        data = save_safetensors(
            {"vectors": vectors}, {"names": json.dumps(names), "provenance": json.dumps(provenance)}
        )
    elif url.endswith(".npz"):
        buffer = io.BytesIO()
        np.savez(buffer, names=np.array(names), vectors=vectors, provenance=np.array(json.dumps(provenance)))
        data = buffer.getvalue()
    else:
        raise UsageError(f"{url}: text embeddings are written as .safetensors or .npz; choose one of these endings")
    storage.write_atomic(url, data)


def read_embeddings(url: str) -> tuple[list[str], np.ndarray]:
    """(names, vectors float32 [C, E]). Raises UsageError naming the file and what is wrong with it."""
    try:
        data = storage.read_bytes(url)
    except OSError:
        raise UsageError(
            f"text embeddings {url} cannot be read; make them with `python -m pipeline text-embeddings`"
        ) from None
    try:
        if url.endswith(".npz"):
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                names, vectors = [str(n) for n in archive["names"]], archive["vectors"]
        else:
            vectors = load_safetensors(data)["vectors"]
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            names = json.loads(header["__metadata__"]["names"])
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise UsageError(
            f"text embeddings {url}: not a file of names and vectors ({' '.join(str(error).split())})"
        ) from None
    if vectors.ndim != 2 or len(names) != len(vectors) or not np.isfinite(vectors).all():
        raise UsageError(
            f"text embeddings {url}: {len(names)} names and vectors of shape {vectors.shape} do not fit, or are not finite"
        )
    return names, vectors.astype(np.float32)


def load_embeddings(url: str, classes: list[str]) -> Tensor:
    """text_CE in the order of `classes`. Raises UsageError if the shard set has no classes or the file misses one."""
    names, vectors = read_embeddings(url)
    if not classes:
        raise UsageError(
            "objective.ita_embeddings is set, but the shard set has no dense class labels; set objective.ita_weight=0"
        )
    missing = [name for name in classes if name not in names]
    if missing:
        raise UsageError(
            f"text embeddings {url} lack class {missing[0]!r} ({len(missing)} of {len(classes)} missing); make the file anew"
        )
    return torch.from_numpy(vectors[[names.index(name) for name in classes]])
