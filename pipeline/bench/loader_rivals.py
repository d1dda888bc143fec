"""What one would use instead: each rival's own format made from our tars, opened the way its documentation says.

All deliver the same content: batches of the arrays of hr, s2, s1 and their masks, stacked, with the keys. All decode members by
our codecs, so that the figures compare loaders and not decompressors. Rivals run in their own processes (`loader_worker`).
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_prep.codec import open_member
from pipeline.reader.stream import TarStream

Batch = tuple[list[str], dict[str, torch.Tensor]]
STEMS = ("hr", "hr.mask", "s2", "s2.mask", "s1", "s1.mask")  # of those, what the samples have
KINDS = ("npy", "b2nd", "zarr.zip")


def decode(data: bytes, kind: str) -> np.ndarray:
    member = open_member(data, kind)
    raw = getattr(member, "array_TCHW", None)
    return member.read_all() if raw is None else raw


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Samples with "key" and arrays by stem → one batch."""
    arrays = {stem: torch.from_numpy(np.stack([s[stem] for s in samples])) for stem in STEMS if stem in samples[0]}
    return [sample["key"] for sample in samples], arrays


def decoded(sample: dict[str, Any]) -> dict[str, Any]:
    """A grouped tar sample (webdataset's, or our stream's) → key and arrays by stem."""
    out = {"key": sample["__key__"]}
    for name, value in sample.items():
        stem, _, kind = name.rpartition(".") if not name.endswith("zarr.zip") else (name[:-9], "", "zarr.zip")
        if stem in STEMS:
            out[stem] = decode(value, kind)
    return out


def from_bytes(sample: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"key": sample["key"], **{stem: decode(sample[stem], kind) for stem in STEMS if stem in sample}}


def tars(data: str) -> list[str]:
    return sorted(str(path) for path in Path(data).glob("*.tar"))


def kind_of(data: str) -> str:
    sample = next(iter(TarStream(tars(data)[:1])))
    return next(kind for kind in KINDS if any(f"{stem}.{kind}" in sample for stem in STEMS))


def is_uniform(data: str) -> bool:
    """Whether all sites have the same modalities, shapes and dates: only then can a stock loader stack them."""
    from data_prep.shards import ShardSet

    index = ShardSet.open(data).index
    shapes = [index[name].to_pylist() for name in index.column_names if name.endswith("_shape")]
    return all(all(shape == column[0] for shape in column) for column in shapes)


# --- webdataset: the tars as they are


def open_webdataset(data: str, folder: str, batch: int, workers: int, forever: bool) -> Iterator[Batch]:
    import webdataset as wds

    files = wds.WebDataset(tars(data), shardshuffle=100, seed=0, empty_check=False, workersplitter=wds.split_by_worker)
    files = files.shuffle(128).map(decoded).batched(batch, collation_fn=collate, partial=True)
    if forever:
        files = files.repeat()
    loader = wds.WebLoader(files, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    yield from loader


# --- loose files and a plain DataLoader


def prepare_files(data: str, folder: str) -> None:
    for sample in TarStream(tars(data)):
        for name, value in sample.items():
            if not name.startswith("__"):
                (Path(folder) / f"{sample['__key__']}.{name}").write_bytes(value)


class LooseFiles(Dataset[dict[str, Any]]):
    """One file per member."""

    def __init__(self, folder: str, kind: str) -> None:
        self.keys = sorted(path.name.partition(".")[0] for path in Path(folder).glob("*.json"))
        self.folder, self.kind = folder, kind

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, sample = self.keys[index], {}
        for stem in STEMS:
            with open(f"{self.folder}/{key}.{stem}.{self.kind}", "rb") as file:
                sample[stem] = decode(file.read(), self.kind)
        return {"key": key, **sample}


def open_files(data: str, folder: str, batch: int, workers: int, forever: bool) -> Iterator[Batch]:
    dataset = LooseFiles(folder, kind_of(data))
    loader = DataLoader(
        dataset, batch, shuffle=True, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    yield from _again(loader, forever)


# --- mosaicml-streaming


def stub_torchvision() -> None:
    """mosaicml-streaming imports torchvision for data sets we do not use; any name in it is an empty class here."""

    class Anything(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    for name in ("torchvision", "torchvision.datasets", "torchvision.datasets.folder", "torchvision.transforms",
                 "torchvision.transforms.functional", "torchvision.io", "torchvision.datasets.vision"):  # fmt: skip
        module = Anything(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules.setdefault(name, module)


def prepare_mosaic(data: str, folder: str) -> None:
    stub_torchvision()
    from streaming import MDSWriter

    kind = kind_of(data)
    with MDSWriter(out=folder, columns={"key": "str", **dict.fromkeys(STEMS, "bytes")}, size_limit=1 << 26) as writer:
        for sample in TarStream(tars(data)):
            writer.write({"key": sample["__key__"], **{stem: sample[f"{stem}.{kind}"] for stem in STEMS}})


def mosaic_loader(data: str, folder: str, batch: int, workers: int) -> Any:
    stub_torchvision()
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    kind = kind_of(data)

    class Ours(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return from_bytes(super().__getitem__(at), kind)

    dataset = Ours(local=folder, shuffle=True, shuffle_seed=0, batch_size=batch, num_canonical_nodes=1)
    return StreamingDataLoader(
        dataset, batch_size=batch, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
    )


def open_mosaic(data: str, folder: str, batch: int, workers: int, forever: bool) -> Iterator[Batch]:
    yield from _again(mosaic_loader(data, folder, batch, workers), forever)


# --- litdata


def prepare_litdata(data: str, folder: str) -> None:
    from litdata import optimize

    optimize(
        fn=_litdata_samples, inputs=tars(data), output_dir=folder, chunk_bytes="64MB", num_workers=1, verbose=False,
        mode="overwrite",
    )  # fmt: skip


def _litdata_samples(tar: str) -> Iterator[dict[str, Any]]:
    for sample in TarStream([tar]):
        kind = next(kind for kind in KINDS if f"s2.{kind}" in sample)
        yield {"key": sample["__key__"], **{stem: sample[f"{stem}.{kind}"] for stem in STEMS}}


def litdata_loader(data: str, folder: str, batch: int, workers: int) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset

    kind = kind_of(data)

    class Ours(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return from_bytes(super().__getitem__(at), kind)

    return StreamingDataLoader(
        Ours(folder, shuffle=True, seed=0), batch_size=batch, num_workers=workers, collate_fn=collate,
        persistent_workers=workers > 0,
    )  # fmt: skip


def open_litdata(data: str, folder: str, batch: int, workers: int, forever: bool) -> Iterator[Batch]:
    yield from _again(litdata_loader(data, folder, batch, workers), forever)


# --- ours


def open_geoloom(data: str, folder: str, batch: int, workers: int, forever: bool) -> Iterator[Batch]:
    """`workers` threads; whole views of the site's own size, checksums on, as shipped."""
    with geoloom_reader(data, batch, workers, None if forever else 1) as reader:
        for found in reader:
            view = found.u.modalities
            arrays = {m: view[m].x_BTCHW for m in view} | {f"{m}.mask": view[m].valid_BTHW for m in view}
            yield [key for key in found.keys if key], arrays


def geoloom_reader(data: str, batch: int, threads: int, epochs: int | None, rank: int = 0, world: int = 1) -> Any:
    from data_prep.schema import MODALITIES
    from data_prep.shards import ShardSet
    from model.config import ModelConfig
    from pipeline.config import DataConfig, ViewConfig
    from pipeline.reader.reader import Reader

    first = ShardSet.open(data).index.slice(0, 1).to_pylist()[0]
    shapes = {name: first[f"{name}_shape"] for name in MODALITIES if first[f"{name}_shape"]}
    dates = {f"{name}_dates": shape[0] for name, shape in shapes.items() if MODALITIES[name].is_series}
    series_px = next((shape[2] for name, shape in shapes.items() if MODALITIES[name].is_series), 16)
    view = ViewConfig(hr_px=shapes.get("hr", (1, 3, 16))[2], series_px=series_px, **dates)
    config = DataConfig(url=data, views_global=view, threads=threads, split="")
    return Reader(
        config,
        ModelConfig(modalities=tuple(shapes)),
        seed=0,
        batch_per_rank=batch,
        rank=rank,
        world=world,
        epochs=epochs,
        views="whole",
    )


def _again(loader: Any, forever: bool) -> Iterator[Batch]:
    yield from loader
    while forever:
        yield from loader


OPEN: dict[str, Callable[[str, str, int, int, bool], Iterator[Batch]]] = {
    "geoloom": open_geoloom, "webdataset": open_webdataset, "mosaicml": open_mosaic, "litdata": open_litdata,
    "dataloader": open_files,
}  # fmt: skip
PREPARE: dict[str, Callable[[str, str], None]] = {
    "mosaicml": prepare_mosaic, "litdata": prepare_litdata, "dataloader": prepare_files,
}  # fmt: skip


def resumed(loader: str, data: str, folder: str, batch: int) -> dict[str, Any]:
    """Stops after two batches read with 2 workers and goes on with 3 in the way each loader offers.

    Returns {"state": whether it has one, "repeated": n, "skipped": n} over one epoch.
    """
    makers = {"mosaicml": mosaic_loader, "litdata": litdata_loader}
    if loader == "geoloom":
        first, second = geoloom_reader(data, batch, 2, 1), geoloom_reader(data, batch // 2, 3, 1)
        before = [key for _ in range(2) for key in next(first).keys]
        second.load_state_dict(first.state_dict())
        after = [key for found in second for key in found.keys if key]
    elif loader in makers:
        first = makers[loader](data, folder, batch, 2)
        stream = iter(first)
        before = [key for _ in range(2) for key in next(stream)[0]]
        state = first.state_dict()
        del stream, first
        second = makers[loader](data, folder, batch, 3)
        try:
            second.load_state_dict(state)
            after = [key for keys, _ in second for key in keys]
        except Exception as error:
            return {"state": True, "error": f"{type(error).__name__}: {error}"[:200]}
    else:
        return {"state": False}
    everything = {sample["__key__"] for sample in TarStream(tars(data))}
    return {
        "state": True, "repeated": len(before) + len(after) - len({*before, *after}),
        "skipped": len(everything - {*before, *after}),
    }  # fmt: skip


def packages_on_path(folder: str) -> None:
    """Makes the rivals' packages importable, here and in processes started from here."""
    if os.path.isdir(folder) and folder not in sys.path:
        sys.path.append(folder)
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), folder])
