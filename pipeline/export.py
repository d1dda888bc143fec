"""From a checkpoint (any layout), a run directory or an exported file to a plain model."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from torch import Tensor

from cluster import storage
from cluster.config import from_dict
from cluster.secrets import redact
from model.config import ModelConfig
from model.pretrained import Pretrained, load_backbone, save_backbone

PREFIX = "skysense."


def load_weights(
    url: str, owner: str = "teacher"
) -> tuple[dict[str, Tensor], ModelConfig, dict[str, Any], dict[str, Any]]:
    """(weights of the SkySense, its config, statistics, facts) of a checkpoint or run directory; owner: teacher or student."""
    from pipeline.checkpoint import consolidated  # here: an exported file is read without DeepSpeed

    weights, checkpoint = consolidated(url, owner)
    manifest = checkpoint.manifest
    cfg = from_dict(ModelConfig, manifest["config"]["model"], checkpoint.url)
    facts = {
        "checkpoint": checkpoint.url, "step": checkpoint.step, "samples": checkpoint.samples, "weights": owner,
        "run_id": manifest.get("run_id"), "manifest_sha256": manifest["data"]["manifest_sha256"],
        "fingerprint": manifest["fingerprint"], "run_config": redact(manifest["config"]),
    }  # fmt: skip
    kept = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    return kept, cfg, dict(manifest["statistics"]), facts


def load_model(url: str, owner: str = "teacher") -> Pretrained:
    """A plain model from an exported `.safetensors`, a checkpoint folder, or a run directory (its newest checkpoint)."""
    if url.endswith(".safetensors"):
        return _load_file(url)
    weights, cfg, statistics, facts = load_weights(url, owner)
    model = Pretrained(cfg, statistics, facts)
    model.skysense.load_state_dict(weights)
    return model.eval()


def export(url: str, out: str, owner: str = "teacher") -> dict[str, Any]:
    """Writes `out` (any fsspec URL) atomically; returns its facts, with `parameters` and `bytes`."""
    weights, cfg, statistics, facts = load_weights(url, owner)
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "backbone.safetensors")
        save_backbone(path, weights, cfg, statistics, facts)
        load_backbone(path)  # what cannot be read back is not written
        storage.upload(path, out)
        size = os.path.getsize(path)
    return {**facts, "parameters": sum(value.numel() for value in weights.values()), "bytes": size}


def _load_file(url: str) -> Pretrained:
    if storage.is_local(url):
        return load_backbone(storage.local_path(url))
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "backbone.safetensors")
        with open(path, "wb") as stream:
            stream.write(storage.read_bytes(url))
        return load_backbone(path)
