"""The reader of exported geoloom backbones, as `pip install .` installs it: it needs torch, numpy and safetensors, nothing else.

    import geoloom
    model = geoloom.load("moe.safetensors")
    vectors = geoloom.embed(model, {"s2": s2_TCHW, "s1": s1_TCHW}, doy={"s2": days})      # {"s2": [D], "s1": [D], "fused": [F]}
    encoder = geoloom.encoder("moe.safetensors", "s2")                                    # for a segmentation or detection head

This file becomes `geoloom/__init__.py`; the package holds copies of just the modules that it imports (`setup.py`).
"""

from __future__ import annotations

from model.encoder import Encoder, encoder
from model.pretrained import Pretrained, embed
from model.pretrained import load_backbone as load

__all__ = ["Encoder", "Pretrained", "embed", "encoder", "load"]
