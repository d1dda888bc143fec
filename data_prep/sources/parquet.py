"""Parquet files that hold other files' bytes in their cells."""

from __future__ import annotations

import functools

import pyarrow
import pyarrow.parquet as pq

from cluster.storage import is_local, local_path
from data_prep.sources.records import ReadFault
from data_prep.sources.remote import open_source, retrying

# A GeoTIFF of a Major-TOM cell has up to 3 MB; pages beyond this are no image.
MAX_CELL_BYTES = 256 << 20


@functools.lru_cache(maxsize=8)
def open_parquet(href: str) -> pq.ParquetFile:
    """Footer of a Parquet file on any fsspec URL. Raises ReadFault."""
    try:
        return retrying(
            lambda: pq.ParquetFile(local_path(href) if is_local(href) else open_source(href), pre_buffer=False), href
        )
    except (OSError, pyarrow.ArrowException, ValueError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReadFault(href, f"cannot be read as Parquet: {line}") from None


def cell_bytes(href: str, member: str) -> bytes | None:
    """The bytes in one cell, "row group:row:column". Raises pyarrow.ArrowException, IndexError, KeyError, OSError."""
    group, row, column = member.split(":", 2)
    source = open_parquet(href)
    metadata = source.metadata.row_group(int(group))
    index = source.schema_arrow.names.index(column) if column in source.schema_arrow.names else -1
    if index < 0:
        raise KeyError(f"no column {column}")
    if metadata.column(index).total_uncompressed_size > MAX_CELL_BYTES * max(metadata.num_rows, 1):
        raise ValueError(f"column {column} claims {metadata.column(index).total_uncompressed_size} bytes")
    table = retrying(lambda: source.read_row_group(int(group), columns=[column], use_threads=False), href)
    return table.column(0)[int(row)].as_py()
