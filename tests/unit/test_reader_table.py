"""The index as columns: equal to reading it row by row, whatever the filters, and small."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UsageError
from data_prep import index
from data_prep.columns import EXTENSIONS, UNCHECKED
from data_prep.schema import MODALITIES
from data_prep.shards import ShardSet
from pipeline.config import DataConfig
from pipeline.reader import table as tables
from tests.sites import make_site, write_shard_set

ALL = ("hr", "s2", "s1")
LACKING = {1: ("s2",), 4: ("hr", "s1"), 6: ("hr",), 9: ("s2", "s1")}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """12 sites in shards of 3, of two splits; some lack a modality, the first two have no labels."""
    sites = [
        make_site(f"site_{i}", i, LACKING.get(i, ALL), dates=4, side_px=8, hr_px=16, place=(90.0 * i, 0), labels=i > 1)
        for i in range(12)
    ]
    folder = tmp_path_factory.mktemp("table") / "set"
    write_shard_set(str(folder), sites, ["train"] * 9 + ["val"] * 3, per_shard=3)
    return folder


def changed(source: Path, folder: Path, rows=None, group: int = 1000, drop_crc: bool = False) -> Path:
    """A copy of a set whose index rows went through `rows` (a function of the list), in row groups of `group`."""
    folder.mkdir(parents=True)
    table = index.read_parquet((source / "index.parquet").read_bytes())
    found, wanted = table.to_pylist(), table.schema
    if drop_crc:
        fields = [field for field in index.MEMBERS.value_type if field.name != "crc32c"]
        at = wanted.get_field_index("members")
        wanted = wanted.set(at, pa.field("members", pa.list_(pa.struct(fields))))
    found = found if rows is None else rows(found)
    arrays = [pa.array([row[field.name] for row in found], field.type) for field in wanted]
    pq.write_table(pa.table(arrays, wanted), folder / "index.parquet", row_group_size=group)
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["index"]["sha256"] = hashlib.sha256((folder / "index.parquet").read_bytes()).hexdigest()
    manifest["counts"]["samples"] = len(found)
    del manifest["columns"]  # as a set of an older build
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def plain(url: Path, data: DataConfig, modalities=ALL) -> list[dict]:
    """What a table must say of each sample, from the rows of the index as Python values."""
    taken = []
    for row in ShardSet.open(str(url)).index.to_pylist():
        box = row["bbox"]
        wanted = [
            set(row["modalities"]) & set(modalities),
            not data.split or row["split"] == data.split,
            set(data.require) <= set(row["modalities"]),
            data.max_cloud is None or (row["cloud"] or 0.0) <= data.max_cloud,
            data.date_range is None
            or (row["datetime_start"][:10] <= data.date_range[1] and row["datetime_end"][:10] >= data.date_range[0]),
            data.bbox is None
            or (
                box["xmin"] <= data.bbox[2]
                and box["xmax"] >= data.bbox[0]
                and box["ymin"] <= data.bbox[3]
                and box["ymax"] >= data.bbox[1]
            ),
        ]
        if all(wanted):
            taken.append(row)
    label = next((name for row in taken for name in row["rasters"]), None)
    stems = [stem for m in modalities for stem in (m, f"{m}.mask")] + ([f"label.{label}"] if label else [])
    return [_sample(row, stems, modalities) for row in taken]


def _sample(row: dict, stems: list[str], modalities) -> dict:
    members = {}
    for member in row["members"]:
        stem, kind = next(
            (
                (member["name"].removesuffix(f".{e}"), number)
                for number, e in enumerate(EXTENSIONS)
                if member["name"].endswith(f".{e}")
            ),
            ("", 0),
        )
        if stem in stems:
            crc = member.get("crc32c")
            kind += UNCHECKED if crc is None else 0
            members[stem] = (member["offset"], member["length"], crc or 0, kind)
    first = next(
        m for m in sorted({*modalities, *MODALITIES}, key=lambda m: (-MODALITIES[m].gsd_m, m)) if row[f"{m}_shape"]
    )
    shape, gsd = row[f"{first}_shape"], row[f"{first}_gsd_m"]
    dates = {}
    for m in modalities:
        clear = row[f"{m}_clear"] or []
        days = [
            datetime.date.fromisoformat(text[:10]).timetuple().tm_yday if text else 0
            for text in row[f"{m}_datetimes"] or []
        ]
        dates[m] = ([float(np.float32(0.999)) if c is None else c for c in clear], days, all(c == 1 for c in clear))
    box = row["bbox"]
    return {
        "key": row["key"], "shard": row["shard"], "members": members, "dates": dates,
        "span": (min(m[0] for m in members.values()), max(m[0] + m[1] for m in members.values())),
        "extent": (shape[3] * gsd, shape[2] * gsd),
        "lonlat": [(box["xmin"] + box["xmax"]) / 2, (box["ymin"] + box["ymax"]) / 2],
        "scene": -1 if row["label_scene"] is None else row["label_scene"],
    }  # fmt: skip


def samples(table: tables.Table, modalities=ALL) -> list[dict]:
    """The same of a table."""
    out = []
    for n in table.rows.all().tolist():
        dates = {}
        for m in modalities:
            its = table.dates[m]
            dates[m] = (its.clear_D[its.of(n)].tolist(), its.doy_D[its.of(n)].tolist(), its.whole_N[n])
        out.append({
            "key": table.keys[n], "shard": table.shard_urls[table.shard_N[n]].rpartition("/")[2],
            "members": {
                stem: (m.offset_N[n], m.length_N[n], m.crc_N[n], m.kind_N[n])
                for stem, m in table.members.items() if m.kind_N[n] >= 0
            },
            "dates": dates, "span": (table.start_N[n], table.stop_N[n]), "extent": (table.width_m_N[n], table.height_m_N[n]),
            "lonlat": list(table.lonlat(n)), "scene": table.scene_N[n],
        })  # fmt: skip
    return out


def bytes_of(table: tables.Table) -> dict[str, tuple[str, bytes]]:
    return {name: (column.dtype.str, column.tobytes()) for name, column in table.columns.items()}


FILTERS = [
    {}, {"split": ""}, {"split": "val"}, {"require": ("s2", "s1")}, {"max_cloud": 0.1}, {"max_cloud": 0.1, "split": ""},
    {"date_range": ("2021-03-01", "2021-03-31")}, {"bbox": (15.002, 46.0, 15.008, 48.0)},
]  # fmt: skip


@pytest.mark.parametrize("changes", FILTERS, ids=str)
@pytest.mark.parametrize("group", [1, 5, 1000])
def test_a_table_says_what_the_rows_say_whatever_their_groups(shards, tmp_path, changes, group):
    url = changed(shards, tmp_path / "set", group=group)
    assert pq.ParquetFile(url / "index.parquet").num_row_groups == -(-12 // group)
    data = DataConfig(url=str(url), **changes)
    table = tables.load(data, ALL)
    assert samples(table) == plain(url, data)
    assert sum(table.sizes[0]) == len(table)
    whole = tables.load(dataclasses.replace(data, url=str(shards)), ALL)
    assert bytes_of(table) == bytes_of(whole)
    assert (table.fingerprints, table.label, table.shard_hashes) == (
        whole.fingerprints,
        whole.label,
        whole.shard_hashes,
    )


def test_fewer_modalities_and_odd_rows(shards, tmp_path):
    """A date the index knows little of, no checksums, a sample without labels, modalities in another order."""

    def odd(rows):
        rows[0]["s2_clear"][1], rows[0]["s2_datetimes"][2] = None, None
        rows[2]["label_scene"] = None
        return rows

    url = changed(shards, tmp_path / "odd", odd)
    data = DataConfig(url=str(url))
    for modalities in (("s1", "s2"), ("s2",), ("hr",)):
        assert samples(tables.load(data, modalities), modalities) == plain(url, data, modalities)
    table = tables.load(data, ALL)
    assert table.dates["s2"].doy_D[2] == 0
    assert not table.dates["s2"].whole_N[0]
    old = changed(shards, tmp_path / "old", drop_crc=True)
    table = tables.load(dataclasses.replace(data, url=str(old)), ALL)
    assert samples(table) == plain(old, data)
    assert table.members["hr"].kind_N[0] & UNCHECKED
    with pytest.raises(IndexError):
        table.keys[len(table.keys)]


def test_several_sets_are_one_behind_the_other(shards, tmp_path):
    old = changed(shards, tmp_path / "old", group=2, drop_crc=True)
    data = DataConfig(url=(str(shards), str(old)))
    table = tables.load(data, ALL)
    assert samples(table) == plain(shards, data) + plain(old, data)
    assert [size.tolist() for size in table.sizes] == [[3, 3, 3], [3, 3, 3]]
    assert table.shard_urls[4] == f"{old}/train-000000.tar"
    one = tables.load(dataclasses.replace(data, url=str(shards)), ALL)
    assert table.fingerprints == one.fingerprints * 2


def test_a_filter_that_leaves_nothing_is_named_over_all_row_groups(shards, tmp_path):
    url = changed(shards, tmp_path / "set", group=5)
    data = DataConfig(url=str(url), require=("s2",), bbox=(0, 0, 1, 1))
    with pytest.raises(UsageError, match=r"no sample left after data.bbox=\[0, 0, 1, 1\] \(7 before it\)"):
        tables.load(data, ALL)
    with pytest.raises(UsageError, match=r"no sample left after data.split=probe \(12 before it\)"):
        tables.load(DataConfig(url=str(url), split="probe"), ALL)


def test_an_index_that_contradicts_itself_is_refused(shards, tmp_path):
    def short(rows):
        rows[3]["s2_datetimes"] = rows[3]["s2_datetimes"][:-1]
        return rows

    def far(rows):
        rows[3]["members"][1]["offset"] = 1 << 40
        return rows

    for number, (rows, why) in enumerate(
        ((short, "differ in length"), (far, "beyond its bound"), (lambda r: r[::-1], "not in order"))
    ):
        url = changed(shards, tmp_path / str(number), rows)
        with pytest.raises(UsageError, match=f"damaged.*{why}.*verify"):
            tables.load(DataConfig(url=str(url)), ALL)
    (url / "index.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match="cannot be read"):
        tables.load(DataConfig(url=str(url)), ALL)


def test_large_shards_get_wide_offsets(shards, tmp_path):
    def far(rows):
        for row in rows:
            for member in row["members"]:
                member["offset"] += 1 << 33
        return rows

    url = changed(shards, tmp_path / "set", far)
    manifest = json.loads((url / "manifest.json").read_text())
    for shard in manifest["shards"]:
        shard["bytes"] = 1 << 34
    (url / "manifest.json").write_text(json.dumps(manifest))
    data = DataConfig(url=str(url))
    assert samples(tables.load(data, ALL)) == plain(url, data)


def test_bytes_per_sample(shards, tmp_path):
    """The bound that ARCHITECTURE states: 65 and 50 dates, three modalities, a label, a key of 20 bytes: below 920 bytes."""

    def long(rows):
        full = next(row for row in rows if len(row["modalities"]) == 3 and row["rasters"])
        for m, count in (("s2", 65), ("s1", 50)):
            full |= {f"{m}_clear": [0.25] * count, f"{m}_datetimes": ["2021-03-01T10:00:00Z"] * count}
        return [{**full, "row": n, "key": f"433D_629L_{n:010d}"} for n in range(3000)]

    table = tables.load(DataConfig(url=str(changed(shards, tmp_path / "set", long))), ALL)
    assert len(table) == 3000
    assert table.num_bytes / 3000 <= 920
    dates = sum(table.dates[m].clear_D.nbytes + table.dates[m].doy_D.nbytes for m in ALL)
    assert (table.num_bytes - dates) / 3000 <= 225


@given(taken=st.sets(st.integers(0, 40), min_size=1), data=st.data())
def test_rows_are_the_taken_ones(taken, data):
    rows = tables.Rows(np.array(sorted(taken)))
    numbers = data.draw(st.lists(st.integers(0, len(taken) - 1)))
    assert rows.of(np.array(numbers, np.int64)).tolist() == [sorted(taken)[n] for n in numbers]
    assert rows.all().tolist() == sorted(taken)
