"""Bytes from outside: whatever they are, every parser ends soon with a value or with one of its own errors, and runs nothing.

Each is given noise and, more telling, good bytes with some changed, cut or put in twice. `make properties` draws others each time.
"""

from __future__ import annotations

import io
import json
import pickle
import tracemalloc
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import config, storage
from cluster.errors import RunFailure, UsageError
from cluster.lease import history
from cluster.rundir import RunDir
from data_prep.codec import MemberError, open_member
from data_prep.shards import ShardSet
from data_prep.sources import open_catalog
from pipeline.checkpoint import store
from pipeline.checkpoint.tensors import TensorFile
from pipeline.config import PretrainConfig
from pipeline.probes.outcomes import Outcomes, read_outcomes, write_outcomes
from pipeline.reader.stream import read_tar
from tests.sites import make_site, write_shard_set

EXPECTED = (UsageError, RunFailure, OSError)
MOST_BYTES = 64 << 20
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 255)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("twice"), st.floats(0, 1), st.integers(1, 64)),
        st.tuples(st.just("drop"), st.floats(0, 1), st.integers(1, 64)),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


def edited(data: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    for kind, where, value in edits:
        at = int(where * max(len(data) - 1, 0))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ value]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "twice":
            data = data[:at] + data[at : at + value] * 2 + data[at + value :]
        elif kind == "drop":
            data = data[:at] + data[at + value :]
    return data


def survives(parse: Callable[[], object], expected: tuple[type[Exception], ...] = EXPECTED) -> None:
    """The parser returns or raises what it says it raises, in one line, without taking much memory."""
    tracemalloc.start()
    try:
        parse()
    except expected:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MOST_BYTES, f"{peak >> 20} MiB for a few kB"


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sites = [make_site(f"site_{i}", i, dates=2, side_px=8, hr_px=16) for i in range(3)]
    return Path(write_shard_set(str(tmp_path_factory.mktemp("set")), sites, per_shard=3))


def in_memory(name: str, data: bytes) -> str:
    folder = f"memory://{uuid.uuid4().hex}"
    storage.write_atomic(f"{folder}/{name}", data)
    return folder


@given(EDITS)
def test_manifest_and_index(shard_set: Path, edits: list[tuple[str, float, int]]) -> None:
    for name in ("manifest.json", "index.parquet"):
        folder = in_memory(name, edited((shard_set / name).read_bytes(), edits))
        other = "index.parquet" if name == "manifest.json" else "manifest.json"
        storage.write_atomic(f"{folder}/{other}", (shard_set / other).read_bytes())
        survives(lambda: ShardSet.open(folder).read_index(["key"]))  # noqa: B023


@given(EDITS)
def test_tar(shard_set: Path, edits: list[tuple[str, float, int]]) -> None:
    import tarfile

    tar = next(shard_set.glob("*.tar")).read_bytes()
    url = f"{in_memory('x.tar', edited(tar, edits))}/x.tar"
    survives(lambda: [len(sample) for sample in read_tar(url)], (*EXPECTED, tarfile.TarError, EOFError))


@given(EDITS, st.sampled_from(["npy", "b2nd", "zarr.zip"]))
def test_members(shard_set: Path, edits: list[tuple[str, float, int]], kind: str) -> None:
    good = io.BytesIO()
    np.save(good, np.arange(120, dtype=np.uint16).reshape(2, 3, 4, 5))
    if kind == "b2nd":
        tar = next(shard_set.glob("*.tar"))
        member = next(value for sample in read_tar(str(tar)) for name, value in sample.items() if name.endswith("b2nd"))
        good = io.BytesIO(member)
    survives(lambda: open_member(edited(good.getvalue(), edits), kind).read_all(), (MemberError, *EXPECTED))


@given(st.binary(max_size=400), st.sampled_from(["npy", "b2nd", "zarr.zip"]))
def test_members_of_noise(data: bytes, kind: str) -> None:
    survives(lambda: open_member(data, kind).read_all(), (MemberError, *EXPECTED))


class Bomb:
    """Were it unpickled, the file it names would be made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (_touch, (str(self.path),))


def _touch(path: str) -> None:
    Path(path).write_text("executed")


def test_nothing_is_executed(tmp_path: Path) -> None:
    path = tmp_path / "executed"
    data = pickle.dumps(Bomb(path))
    array = io.BytesIO()
    np.save(array, np.array([Bomb(path)], dtype=object), allow_pickle=True)
    for kind in ("npy", "b2nd", "zarr.zip"):
        for content in (data, array.getvalue()):
            with pytest.raises((MemberError, UsageError)):
                open_member(content, kind).read_all()
    text = f"run: !!python/object/apply:{__name__}._touch ['{path}']\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match="not valid YAML"):
        config.load(PretrainConfig, str(tmp_path / "config.yaml"))
    (tmp_path / "outcomes.npz").write_bytes(array.getvalue())
    with pytest.raises(UsageError):
        read_outcomes(str(tmp_path / "outcomes.npz"))
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(EXPECTED):
        TensorFile(str(tmp_path / "x.safetensors"))
    assert not path.exists()
    pickle.loads(data)  # noqa: S301  (the bomb itself works)
    assert path.exists()


@given(st.one_of(st.binary(max_size=300), st.text(max_size=200).map(str.encode)))
def test_config_of_noise(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.yaml"
    path.write_bytes(data)
    survives(lambda: config.load(PretrainConfig, str(path)))


@given(EDITS)
def test_config_edited(tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[str, float, int]]) -> None:
    path = tmp_path_factory.getbasetemp() / "edited.yaml"
    path.write_bytes(edited(Path("pipeline/runs/demo.yaml").read_bytes(), edits))
    survives(lambda: config.load(PretrainConfig, str(path)))


def test_aliases_of_aliases_take_no_memory(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join(rows))
    survives(lambda: config.load(PretrainConfig, str(tmp_path / "c.yaml")))


@given(EDITS)
def test_what_stands_in_a_run_directory(edits: list[tuple[str, float, int]]) -> None:
    texts = {
        "resolved.json": {"fingerprint": "f", "config": {"train": {"steps": 3}}}, "writer.json": {"pid": 3, "host": "h"},
        "tracking.json": {"run_id": "abc"}, "lease/00000001.json": {"epoch": 1, "token": "t"},
    }  # fmt: skip
    url = f"memory://{uuid.uuid4().hex}"
    for name, tree in texts.items():
        storage.write_atomic(f"{url}/{name}", edited(json.dumps(tree).encode(), edits))
    lines = b"".join(json.dumps({"step": step, "loss": 1.0}).encode() + b"\n" for step in range(1, 9))
    storage.write_atomic(f"{url}/metrics.jsonl", edited(lines, edits))
    run = RunDir(url)
    for parse in (
        run.read_resolved,
        run.read_writer,
        lambda: run.run_id,
        run.read_metrics,
        run.last_step,
        lambda: history(url),
    ):
        survives(parse)


@given(EDITS)
def test_checkpoint_manifest(edits: list[tuple[str, float, int]]) -> None:
    manifest = {
        "format": store.FORMAT, "step": 5, "samples": 40, "files": {"a": {"bytes": 1, "sha256": "0"}},
        "parameters": {"w": {"shape": [4, 2], "pieces": [[0, 4, "a"], [4, 4, "a"]]}},
    }  # fmt: skip
    url = in_memory("manifest.json", edited(json.dumps(manifest).encode(), edits))
    survives(lambda: store.open_checkpoint(url), (RunFailure,))


@given(st.one_of(st.binary(max_size=200), st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little") + b"{}")))
def test_tensor_files_of_noise(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(data)
    survives(lambda: TensorFile(str(path)).names())


@given(EDITS)
def test_outcomes(edits: list[tuple[str, float, int]]) -> None:
    url = f"{in_memory('x', b'')}/o.npz"
    write_outcomes(url, Outcomes("ab" * 8, ("a", "b"), {}))
    storage.write_atomic(url, edited(storage.read_bytes(url), edits))
    survives(lambda: read_outcomes(url))


@settings(max_examples=40)
@given(EDITS)
def test_catalog(tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[str, float, int]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"], "assets": ["{}"]}), good)
    path = tmp_path_factory.getbasetemp() / "catalog.parquet"
    path.write_bytes(edited(good.getvalue(), edits))
    survives(lambda: list(open_catalog(str(path))))
