"""The reader's other faces: DataLoader workers, and sequential streams of tars without an index."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from torch.utils.data import DataLoader

from cluster.errors import RunFailure, UsageError
from data_prep.codec import MemberError
from model.config import ModelConfig
from pipeline.reader.reader import Reader
from pipeline.reader.stream import TarStream, decoded, expand
from pipeline.reader.torch_face import ReaderDataset
from tests.sites import make_site, write_shard_set
from tests.unit.test_reader import delivered, row_hash, settings_of

COUNT = 14


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shard_set(str(folder), [make_site(f"site_{i}", i, side_px=12, hr_px=48) for i in range(COUNT)], per_shard=3)
    return folder


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_dataloader_delivers_the_readers_order_and_resumes(shards, workers):
    data, options = settings_of(shards), {"seed": 7, "batch_per_rank": 3, "epochs": 1}
    with Reader(data, ModelConfig(), **options) as reader:
        wanted = [row[1:] for part in delivered(reader) for row in part]
    dataset = ReaderDataset(data, ModelConfig(), **options)

    def rows(batches):
        return [(key, row_hash(b, i)) for b in batches for i, key in enumerate(b.keys) if key]

    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    assert [row for batch in loader for row in rows([batch])] == wanted
    state = dataset.state_after(2)
    again = ReaderDataset(data, ModelConfig(), **options)
    again.load_state_dict(state)
    assert [row for b in DataLoader(again, batch_size=None, num_workers=workers) for row in rows([b])] == wanted[6:]
    assert again.state_after(1)["samples"] == 9


def test_a_stream_groups_like_webdataset(shards):
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    ours = list(TarStream(urls))
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in ours] == [s["__key__"] for s in theirs] == [f"site_{i}" for i in range(COUNT)]
    for mine, reference in zip(ours, theirs):
        assert {k: v for k, v in mine.items() if not k.startswith("__")} == {
            k: v for k, v in reference.items() if not k.startswith("__")
        }
    site = decoded(ours[3])
    assert site["json"]["key"] == "site_3"
    assert site["s2.b2nd"].shape == (3, 10, 12, 12)


def test_a_stream_is_dealt_to_ranks_shuffled_and_resumed(shards):
    urls = str(shards / "train-{000000..000004}.tar")
    keys = [[s["__key__"] for s in TarStream(urls, rank=rank, world=2, seed=3, shuffle=4)] for rank in range(2)]
    assert sorted(keys[0] + keys[1]) == sorted(f"site_{i}" for i in range(COUNT))
    assert keys[0] == [s["__key__"] for s in TarStream(urls, rank=0, world=2, seed=3, shuffle=4)]
    assert keys[0] != [s["__key__"] for s in TarStream(urls, rank=0, world=2, seed=4, shuffle=4)]
    whole = [s["__key__"] for s in TarStream(urls, seed=3, epochs=2)]
    for stop in range(1, 2 * COUNT):
        stream = TarStream(urls, seed=3, epochs=2)
        first = [s["__key__"] for _, s in zip(range(stop), stream)]
        rest = TarStream(urls, seed=3, epochs=2)
        rest.load_state_dict(stream.state_dict())
        assert first + [s["__key__"] for s in rest] == whole
    with pytest.raises(UsageError, match="own rank"):
        TarStream(urls, rank=1, world=2).load_state_dict(stream.state_dict())


def test_a_damaged_tar_is_named_not_skipped(shards, tmp_path):
    good = sorted(shards.glob("*.tar"))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(good[0].read_bytes()[:30_000])
    with pytest.raises(RunFailure, match=r"cut\.tar"):
        list(TarStream([str(cut), str(good[1])]))
    stream = TarStream([str(cut), str(tmp_path / "none.tar"), str(good[1])], budget=2)
    assert [s["__key__"] for s in stream][-3:] == ["site_3", "site_4", "site_5"]
    assert list(stream.faults.quarantined) == [str(cut), str(tmp_path / "none.tar")]


def test_pickles_are_refused_and_nonsense_is_named():
    for name in ("pyd", "s2.pth", "pickle"):
        with pytest.raises(UsageError, match="refused"):
            decoded({"__key__": "a", name: b"x"})
    with pytest.raises(MemberError):
        decoded({"__key__": "a", "s2.npy": b"nonsense"})


def test_urls_are_expanded():
    assert expand("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand(["x.tar", "{0..1}/{1..2}.tar"]) == ["x.tar", "0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]
    with pytest.raises(UsageError, match="empty"):
        expand([])
    with pytest.raises(UsageError, match="cannot feed"):
        TarStream(["a.tar"], world=2)


def test_names_with_folders_and_other_files(tmp_path):
    import io

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("x/a.b.npy", b"1"),
            ("x/a.JSON", b"{}"),
            ("y/a.json", b"{}"),
            ("readme", b"-"),
            ("__m.json", b"1"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = list(TarStream(str(tmp_path / "a.tar")))
    assert [sorted(s) for s in found] == [["__key__", "__url__", "b.npy", "json"], ["__key__", "__url__", "json"]]
    assert [s["__key__"] for s in found] == ["x/a", "y/a"]
    assert np.array_equal(list(found[0].values())[2:], [b"1", b"{}"])
