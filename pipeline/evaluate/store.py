"""Features of a set on disk, made once. One folder per (weights, row, split digest, layer); committed by its `index.json`.

`level-K.f16` (maps) and `pooled.f32` are flat arrays, item after item; the index says where each begins and of what shape it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from cluster import storage

FORMAT = 2  # counted up whenever features of the same inputs change


class FeatureStore:
    """Read side. `pooled[view]` float32 [N, D]; `maps(i)` per view the float32 maps [D, h, w] of item i."""

    def __init__(self, folder: str) -> None:
        index = json.loads(storage.read_bytes(storage.join(folder, "index.json")))
        self.keys: list[str] = index["keys"]
        self.views: int = index["views"]
        self._entries = index["maps"]
        path = storage.local_path(folder)
        pooled = np.fromfile(os.path.join(path, "pooled.f32"), np.float32)
        self.pooled = list(np.moveaxis(pooled.reshape(len(self.keys), self.views, -1), 1, 0))
        names = [f"level-{level}.f16" for level in range(index["levels"])]
        self._levels = [np.memmap(os.path.join(path, name), np.float16, "r") for name in names]

    def maps(self, i: int) -> list[list[np.ndarray]]:
        return [
            [
                self._levels[level][at : at + int(np.prod(shape))].reshape(shape).astype(np.float32)
                for level, at, shape in view
            ]
            for view in self._entries[i]
        ]


class FeatureWriter:
    """Write side: `add` in order, then `close` commits."""

    def __init__(self, folder: str) -> None:
        self.folder = storage.local_path(folder)
        os.makedirs(self.folder, exist_ok=True)
        self._files: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._keys: list[str] = []
        self._maps: list[list[list[Any]]] = []
        self._views = 0

    def add(self, key: str, pooled: Sequence[np.ndarray], maps: Sequence[Sequence[np.ndarray]]) -> None:
        self._keys.append(key)
        self._views = len(pooled)
        for vector in pooled:
            self._append("pooled.f32", vector.astype(np.float32))
        entry = []
        for view in maps:
            clipped = (np.clip(m, -65504, 65504).astype(np.float16) for m in view)
            entry.append(
                [[level, self._append(f"level-{level}.f16", m), list(m.shape)] for level, m in enumerate(clipped)]
            )
        self._maps.append(entry)

    def close(self) -> FeatureStore:
        for file in self._files.values():
            file.close()
        levels = sum(name.startswith("level-") for name in self._files)
        index = {"format": FORMAT, "keys": self._keys, "views": self._views, "levels": levels, "maps": self._maps}
        storage.write_atomic(os.path.join(self.folder, "index.json"), json.dumps(index).encode())
        return FeatureStore(self.folder)

    def _append(self, name: str, values: np.ndarray) -> int:
        if name not in self._files:
            self._files[name] = open(os.path.join(self.folder, name), "wb")  # noqa: SIM115  (closed by `close`)
        at = self._sizes.get(name, 0)
        self._files[name].write(np.ascontiguousarray(values).tobytes())
        self._sizes[name] = at + values.size
        return at


def is_complete(folder: str, keys: Sequence[str]) -> bool:
    """Whether features of exactly these items lie there."""
    url = storage.join(folder, "index.json")
    if not storage.exists(url):
        return False
    index = json.loads(storage.read_bytes(url))
    return index.get("format") == FORMAT and index["keys"] == list(keys)


def weights_digest(module: nn.Module) -> str:
    """sha256 over all weights, names included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()[:16]


def name_of(facts: Mapping[str, Any]) -> str:
    """Folder name of one set of features."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:20]
