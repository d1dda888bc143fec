"""The reader of exported geoloom backbones: `pip install .` needs torch, numpy and safetensors, nothing else.

    import geoloom
    model = geoloom.load("moe.safetensors")
    vectors = geoloom.embed(model, {"s2": s2_TCHW, "s1": s1_TCHW}, doy={"s2": days})      # {"s2": [D], "s1": [D], "fused": [F]}
    encoder = geoloom.encoder("moe.safetensors", "s2")                                    # for a segmentation or detection head

In a checkout the same lies in `model.pretrained`; the installed package is a copy of just the modules that it needs (`setup.py`).
"""

from __future__ import annotations

from geoloom.model.encoder import Encoder, encoder
from geoloom.model.pretrained import Pretrained, embed
from geoloom.model.pretrained import load_backbone as load

__all__ = ["Encoder", "Pretrained", "embed", "encoder", "load"]
