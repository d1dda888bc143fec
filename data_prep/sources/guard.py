"""Files are strangers' bytes: what they claim is checked before memory is taken for it, and nothing beside them is opened.

The bounds are far above anything published (a Sentinel-2 band whole is 240 MB) and far below what stops a machine.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from typing import Any

# What one decode may allocate: a TIFF block, a Zarr or HDF5 chunk.
CHUNK_BYTES = 512 << 20
# What a small file is read into memory whole for (a patch's HDF5 data set, a zipped Zarr sample).
WHOLE_BYTES = 2 << 30
# Zip members of one archive, unpacked; and how much smaller than that the archive may be (deflate reaches 1032 on zeros).
RATIO = 200
RATIO_FREE_BYTES = 64 << 20


class Hostile(ValueError):
    """A file that claims, or would unpack to, more than it can honestly hold, or that points outside itself."""


def check_chunk(what: str, shape: Iterable[int], itemsize: int) -> None:
    """Raises Hostile where one block of this shape would take more than CHUNK_BYTES."""
    sides = [int(n) for n in shape]
    size = math.prod(sides) * itemsize
    if size > CHUNK_BYTES or min(sides, default=1) < 0:
        raise Hostile(
            f"{what} claims blocks of {'x'.join(map(str, sides))} ({size / 1e9:.3g} GB); at most {CHUNK_BYTES >> 20} MiB are read"
        )


def check_whole(what: str, shape: Iterable[int], itemsize: int) -> None:
    """Raises Hostile where an array that is read whole would take more than WHOLE_BYTES."""
    size = math.prod(int(n) for n in shape) * itemsize
    if size > WHOLE_BYTES:
        raise Hostile(f"{what} claims {size / 1e9:.3g} GB; at most {WHOLE_BYTES >> 30} GiB are read whole")


def check_zip(archive: zipfile.ZipFile, packed_bytes: int) -> None:
    """Raises Hostile for an archive whose members together unpack to far more than it has bytes."""
    total = sum(entry.file_size for entry in archive.infolist())
    if total > WHOLE_BYTES or total > RATIO_FREE_BYTES + RATIO * packed_bytes:
        raise Hostile(f"zip of {packed_bytes} bytes claims to unpack to {total / 1e9:.3g} GB")


def read_zip_member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """A member's bytes, at most `most` of them whatever its header says. Raises Hostile for more, zipfile.BadZipFile for damage."""
    with archive.open(name) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise Hostile(f"zip member {name} unpacks to more than {most} bytes")
    return data


def check_blosc(chunk: bytes | memoryview, expected_bytes: int) -> None:
    """Raises Hostile for a Blosc frame that would decode to another size than its chunk has, ValueError for one that is cut short.

    Blosc 1 frames: 16 bytes of header, of which 4…8 is the decoded size and 12…16 the frame's own.
    """
    header = bytes(chunk[:16])
    decoded, framed = int.from_bytes(header[4:8], "little"), int.from_bytes(header[12:16], "little")
    if len(header) < 16 or len(chunk) < framed:
        raise ValueError(f"chunk has {len(chunk)} of {framed} bytes")
    if decoded != expected_bytes:
        raise Hostile(f"chunk decodes to {decoded} bytes, its array's chunks have {expected_bytes}")


def check_zstd(chunk: bytes | memoryview, expected_bytes: int) -> None:
    """Raises Hostile for a Zstandard frame that says it decodes to more than its chunk has."""
    size = zstd_content_size(bytes(chunk[:18]))
    if size is not None and size > expected_bytes:
        raise Hostile(f"chunk decodes to {size} bytes, its array's chunks have {expected_bytes}")


def zstd_content_size(header: bytes) -> int | None:
    """Decoded size by a Zstandard frame header (RFC 8878, 3.1.1.1); None where it does not say or is no frame."""
    if len(header) < 6 or header[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = header[4]
    flag, single = descriptor >> 6, bool(descriptor & 0x20)
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    width = (1 if single else 0, 2, 4, 8)[flag]
    if width == 0 or len(header) < at + width:
        return None
    return int.from_bytes(header[at : at + width], "little") + (256 if width == 2 else 0)


def check_hdf5(dataset: Any, name: str, whole: bool = True) -> Any:
    """The HDF5 data set, if its bytes lie in the file itself and are no more than it can honestly hold. Raises Hostile.

    whole: all of it will be read; else parts, so that only its chunks are asked how large they are.
    """
    if dataset.external:
        raise Hostile(f"{name} keeps its bytes in another file ({dataset.external[0][0]})")
    if dataset.is_virtual:
        raise Hostile(f"{name} is made of other files' data sets")
    if whole:
        check_whole(name, dataset.shape, dataset.dtype.itemsize)
    if dataset.chunks:
        check_chunk(name, dataset.chunks, dataset.dtype.itemsize)
    return dataset


def hdf5_dataset(group: Any, name: str, whole: bool = True) -> Any:
    """`group[name]` where that is a data set in this very file. Raises KeyError if absent, Hostile for links that lead outside, and
    as `check_hdf5`."""
    import h5py

    node, path = group, [part for part in name.split("/") if part]
    for part in path:
        link = node.get(part, getlink=True)
        if link is None:
            raise KeyError(f"no {name}")
        if isinstance(link, h5py.ExternalLink):
            raise Hostile(f"{name} is a link to another file ({link.filename})")
        node = node[part]
        if node.file.filename != group.file.filename:  # a soft link whose path leads through an external one
            raise Hostile(f"{name} lies in another file ({node.file.filename})")
    if not isinstance(node, h5py.Dataset):
        raise KeyError(f"{name} is no data set")
    return check_hdf5(node, name, whole)
