"""The safetensors format, streamed: written straight to any URL while its sha256 is taken, read by memory map.

Format: 8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, raw tensors. The library's own
writer needs the whole file in memory or a local path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from typing import Any

import google_crc32c
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
CHECK_BYTES = 1 << 20


def write_tensors(url: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes CPU tensors to `url` atomically; returns {"bytes", "sha256", "header_bytes", "header_sha256"}.

    The header holds the CRC-32C of every CHECK_BYTES of each tensor, so that a part of the file proves itself.
    """
    header: dict[str, Any] = {}
    position = 0
    raws = {name: _bytes(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    sums = {name: block_sums(raw) for name, raw in raws.items()}
    about = {"check_bytes": str(CHECK_BYTES), "crc32c": json.dumps(sums, separators=(",", ":"))}
    text = json.dumps({"__metadata__": about, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    digest = hashlib.sha256(head)
    with storage.open_atomic(url) as stream:
        stream.write(head)
        for raw in raws.values():
            for start in range(0, len(raw), BLOCK_BYTES):
                block = raw[start : start + BLOCK_BYTES].data
                digest.update(block)
                stream.write(block)
    return {
        "bytes": len(head) + position, "sha256": digest.hexdigest(), "header_bytes": len(head),
        "header_sha256": hashlib.sha256(head).hexdigest(),
    }  # fmt: skip


def block_sums(raw: np.ndarray) -> list[int]:
    """CRC-32C of every CHECK_BYTES of some bytes (a read-only uint8 array)."""
    return [google_crc32c.value(raw[start : start + CHECK_BYTES]) for start in range(0, len(raw), CHECK_BYTES)]


def _bytes(tensor: Tensor) -> np.ndarray:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    raw = raw.view()
    raw.flags.writeable = False
    return raw


def file_digest(path: str) -> str:
    """sha256 of a local file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class Header:
    """Where a file's tensors lie. data: offset of the first tensor's bytes; entries: name → dtype, shape, data_offsets.

    sums: per tensor the CRC-32C of every `check_bytes`; empty for a file of an older version.
    """

    data: int
    entries: dict[str, Any]
    sums: dict[str, list[int]]
    check_bytes: int

    @staticmethod
    def parse(head: bytes) -> Header:
        """From the first bytes of a file, all of its header at least. Raises ValueError, KeyError, TypeError."""
        length = int.from_bytes(head[:8], "little")
        entries = json.loads(head[8 : 8 + length])
        about = entries.pop("__metadata__", {})
        return Header(8 + length, entries, json.loads(about.get("crc32c", "{}")), int(about.get("check_bytes", 0)))

    def span(self, name: str, start: int, end: int) -> tuple[int, int]:
        """Bytes [a, b) of the file that hold the elements [start, end) of a tensor, widened to whole checked blocks."""
        low, high = self.entries[name]["data_offsets"]
        size = TORCH[self.entries[name]["dtype"]].itemsize
        a = start * size // self.check_bytes * self.check_bytes
        b = min(-(-end * size // self.check_bytes) * self.check_bytes, high - low)
        return self.data + low + a, self.data + low + b

    def proves(self, data: np.ndarray, name: str, start: int, end: int) -> bool:
        """Whether the blocks of those elements are what their checksums say. data: the file, read-only uint8."""
        a, b = self.span(name, start, end)
        first = (a - self.data - self.entries[name]["data_offsets"][0]) // self.check_bytes
        found = [google_crc32c.value(data[at : min(at + self.check_bytes, b)]) for at in range(a, b, self.check_bytes)]
        return found == self.sums[name][first : first + len(found)]


class TensorFile:
    """A local safetensors file, memory-mapped. Tensors returned share the map: copy before writing.

    Raises:
        RunFailure: the file is no safetensors file.
    """

    def __init__(self, path: str) -> None:
        try:
            self.data = np.memmap(path, dtype=np.uint8, mode="r").view(
                np.ndarray
            )  # slices of a memmap cost ten times more
            length = int.from_bytes(self.data[:8].tobytes(), "little")
            self.header = Header.parse(self.data[: 8 + length].tobytes())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunFailure(f"{path} is no safetensors file: {error}") from None

    def names(self) -> list[str]:
        return list(self.header.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.header.entries[name]["shape"])

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Elements [start, end) of the flattened tensor (all: in its shape), as a copy."""
        entry = self.header.entries[name]
        dtype = TORCH[entry["dtype"]]
        a, b = entry["data_offsets"]
        if end is not None:
            a, b = a + start * dtype.itemsize, a + end * dtype.itemsize
        raw = torch.from_numpy(np.array(self.data[self.header.data + a : self.header.data + b]))
        tensor = raw.view(dtype) if b > a else torch.empty(0, dtype=dtype)
        return tensor if end is not None else tensor.reshape(entry["shape"])
