"""Sequential reading of WebDataset tars that have no index, as stock `webdataset` groups them.

A tar without an index can only be read from front to back, so: shards are dealt to ranks, samples come in shard order through
a shuffle buffer, and a state is exact for the same world size only. For everything else build an index (`data_prep build`),
and use `pipeline.reader.Reader`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

from cluster import storage
from cluster.errors import UsageError
from data_prep.codec import open_member
from pipeline.reader.faults import FaultLog
from pipeline.reader.keyed import bits, permutation

Sample = dict[str, Any]
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_REFUSED = ("pyd", "pickle", "pkl", "pth", "pt")


@dataclasses.dataclass
class Place:
    """How far a rank is: `shards` of its shards of `epoch` are done, and `samples` of the next one."""

    epoch: int = 0
    shards: int = 0
    samples: int = 0


class TarStream:
    """Samples of tars, `{"__key__": …, "__url__": …, extension: bytes}`, like webdataset's `tar_file_to_samples`.

    Args:
        urls: tars, with `{000000..000123}` expanded; any fsspec URL.
        seed: of the shard order and the shuffle buffer; None reads in the order given, unshuffled.
        shuffle: samples held in the shuffle buffer.
        epochs: None = endless.
        budget: how many shards may be damaged. The rest of a damaged shard is lost, and it is named in `faults`.
    """

    def __init__(
        self, urls: str | Sequence[str], *, rank: int = 0, world: int = 1, seed: int | None = None, shuffle: int = 0,
        epochs: int | None = 1, budget: int = 0,
    ) -> None:  # fmt: skip
        self.urls = expand(urls)
        if world > len(self.urls):
            raise UsageError(
                f"{len(self.urls)} tars cannot feed {world} ranks: without an index a tar goes to one rank whole"
            )
        self._rank, self._world, self._seed, self._epochs = rank, world, seed, epochs
        self._shuffle = shuffle if seed is not None else 0
        self.faults, self.place = FaultLog(budget), Place()

    def state_dict(self) -> dict[str, int]:
        """Exact on the same rank and world size when nothing is shuffled; else the buffer's samples come again."""
        return {**dataclasses.asdict(self.place), "rank": self._rank, "world": self._world}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if (state["rank"], state["world"]) != (self._rank, self._world):
            raise UsageError(
                f"a stream without an index resumes on its own rank only (state of rank {state['rank']} of {state['world']}, "
                f"this is {self._rank} of {self._world}); build an index for elastic resume"
            )
        self.place = Place(state["epoch"], state["shards"], state["samples"])

    def __iter__(self) -> Iterator[Sample]:
        held: list[Sample] = []
        for number, sample in enumerate(self._in_order()):
            if len(held) < self._shuffle:
                held.append(sample)
                continue
            if held:
                at = int(bits(1, self._seed or 0, "buffer", self._rank, number)[0] % len(held))
                sample, held[at] = held[at], sample
            yield sample
        order = permutation(len(held), self._seed or 0, "rest", self._rank) if held else ()
        yield from (held[i] for i in order)

    def _in_order(self) -> Iterator[Sample]:
        place = self.place
        while self._epochs is None or place.epoch < self._epochs:
            own = self._shards(place.epoch)
            while place.shards < len(own):
                url, skip = own[place.shards], place.samples
                try:
                    for number, sample in enumerate(read_tar(url)):
                        if number >= skip:
                            place.samples = number + 1
                            yield sample
                except (OSError, tarfile.TarError, EOFError) as error:
                    self.faults.quarantine(url, f"{type(error).__name__}: {error} (after {place.samples} samples)")
                place.shards, place.samples = place.shards + 1, 0
            place.epoch, place.shards = place.epoch + 1, 0

    def _shards(self, epoch: int) -> list[str]:
        order = (
            range(len(self.urls)) if self._seed is None else permutation(len(self.urls), self._seed, epoch, "shards")
        )
        return [self.urls[i] for i in order][self._rank :: self._world]


def expand(urls: str | Sequence[str]) -> list[str]:
    """`set-{000..011}.tar` → twelve URLs. Raises UsageError for an empty list."""
    found: list[str] = []
    for url in [urls] if isinstance(urls, str) else urls:
        match = _BRACES.search(url)
        if match is None:
            found.append(url)
            continue
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        found += expand([f"{url[: match.start()]}{n:0{width}d}{url[match.end() :]}" for n in range(first, last + 1)])
    if not found:
        raise UsageError("no tars to stream: the list of URLs is empty")
    return found


def read_tar(url: str) -> Iterator[Sample]:
    """Samples of one tar: adjacent files with the same name up to the first dot of the last path component.

    Raises OSError, tarfile.TarError or EOFError for a tar that is missing, cut short or damaged.
    """
    with storage.open_read(url) as stream:
        yield from _samples(stream, url)


def _samples(stream: IO[bytes], url: str) -> Iterator[Sample]:
    sample: Sample = {}
    with tarfile.open(fileobj=stream, mode="r|", ignore_zeros=False) as tar:
        for entry in tar:
            folder, _, name = entry.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            if not entry.isreg() or not dot or name.startswith("__"):
                continue
            key = f"{folder}/{stem}" if folder else stem
            if sample and sample["__key__"] != key:
                yield sample
                sample = {}
            file = tar.extractfile(entry)
            assert file is not None
            data = file.read()
            if len(data) != entry.size:
                raise EOFError(f"{entry.name} is cut short")
            sample = sample or {"__key__": key, "__url__": url}
            sample[extension.lower()] = data
    if sample:
        yield sample


def decoded(sample: Sample) -> Sample:
    """The sample with arrays (`npy`, `b2nd`, `zarr.zip`: [T, C, H, W]) and JSON decoded; other bytes stay bytes.

    Raises MemberError for bytes that do not decode and UsageError for pickles, which are refused.
    """
    out: Sample = {}
    for name, value in sample.items():
        kind = next((e for e in ("npy", "b2nd", "zarr.zip") if name == e or name.endswith(f".{e}")), None)
        if name.rpartition(".")[2] in _REFUSED:
            raise UsageError(f"{sample['__key__']}.{name}: pickled members are refused; convert them to npy or b2nd")
        if kind is not None:
            out[name] = open_member(value, kind).read_all()
        elif name == "json" or name.endswith(".json"):
            out[name] = json.loads(value)
        else:
            out[name] = value
    return out
