"""The safetensors format, streamed: written straight to any URL while its sha256 is taken, read by memory map.

Format: 8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, raw tensors. The library's own
writer needs the whole file in memory or a local path.
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster import storage
from cluster.errors import RunFailure

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TORCH = {name: dtype for dtype, name in DTYPES.items()}
BLOCK_BYTES = 16 << 20


def write_tensors(url: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes CPU tensors to `url` atomically; returns {"bytes", "sha256"}."""
    header: dict[str, Any] = {}
    position = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with storage.open_atomic(url) as stream:
        for block in (struct.pack("<Q", len(text)), text):
            digest.update(block)
            stream.write(block)
        for tensor in tensors.values():
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(raw), BLOCK_BYTES):
                digest.update(raw[start : start + BLOCK_BYTES])
                stream.write(raw[start : start + BLOCK_BYTES])
    return {"bytes": 8 + len(text) + position, "sha256": digest.hexdigest()}


def file_digest(path: str) -> str:
    """sha256 of a local file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class TensorFile:
    """A local safetensors file, memory-mapped. Tensors returned share the map: copy before writing.

    Raises:
        RunFailure: the file is no safetensors file.
    """

    def __init__(self, path: str) -> None:
        try:
            self._map = np.memmap(path, dtype=np.uint8, mode="r")
            length = int.from_bytes(self._map[:8].tobytes(), "little")
            self._header: dict[str, Any] = dict(json.loads(self._map[8 : 8 + length].tobytes()))
        except (ValueError, TypeError, RecursionError) as error:
            raise RunFailure(f"{path} is no safetensors file: {error}") from None
        self._header.pop("__metadata__", None)
        self._data = 8 + length

    def names(self) -> list[str]:
        return list(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Elements [start, end) of the flattened tensor (all: in its shape), as a copy."""
        entry = self._header[name]
        dtype = TORCH[entry["dtype"]]
        a, b = entry["data_offsets"]
        if end is not None:
            a, b = a + start * dtype.itemsize, a + end * dtype.itemsize
        raw = torch.from_numpy(np.array(self._map[self._data + a : self._data + b]))
        tensor = raw.view(dtype) if b > a else torch.empty(0, dtype=dtype)
        return tensor if end is not None else tensor.reshape(entry["shape"])
