"""Codecs: lossless for every dtype and shape, partial decode ≡ slicing, the same bytes each time, nothing dangerous opened."""

from __future__ import annotations

import io
import pickle
import threading
import zipfile

import blosc2
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import codec

ALL = sorted(codec.EXTENSIONS)


def sample(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "float16":
        values = rng.normal(-15, 4, shape).astype(dtype)
        values[rng.random(shape) < 0.1] = np.nan
        return values
    return rng.integers(0, 200, shape).astype(dtype)


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(ALL), dtype=st.sampled_from(["uint8", "uint16", "float16", "int16", "float32"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40)),
    window=st.tuples(*[st.floats(0, 1)] * 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_round_trip_and_windows(name, dtype, shape, window, seed):
    array = sample(shape, dtype, seed)
    data = codec.encode(array, name, tile_px=16)
    assert data == codec.encode(array.copy(), name, tile_px=16)
    member = codec.open_member(data, codec.extension(name))
    assert (member.shape, member.dtype) == (shape, array.dtype)
    assert equal(member.read_all(), array)
    (y0, y1), (x0, x1) = (
        sorted((int(a * n), int(b * n))) for n, a, b in ((shape[2], *window[:2]), (shape[3], *window[2:]))
    )
    y1, x1 = max(y1, y0 + 1), max(x1, x0 + 1)
    y0, x0 = min(y0, shape[2] - 1), min(x0, shape[3] - 1)
    y1, x1 = min(y1, shape[2]), min(x1, shape[3])
    t = seed % shape[0]
    assert equal(member.read_window(t, y0, y1, x0, x1), array[t, :, y0:y1, x0:x1])
    out = np.empty(shape[1:], dtype)
    assert member.read_date(t, out) is out
    assert equal(out, array[t])


@pytest.mark.parametrize("name", ["b2nd-lz4", "b2nd-zstd", "zarr.zip"])
def test_only_touched_chunks_are_decoded(name, monkeypatch):
    member = codec.open_member(codec.encode(sample((4, 3, 64, 64), "uint16"), name, tile_px=32), codec.extension(name))
    seen: list[int] = []
    decode = member._decode
    monkeypatch.setattr(member, "_decode", lambda number, out: (seen.append(number), decode(number, out)))
    member.read_window(2, 0, 32, 32, 64)
    assert seen == [2 * 4 + 1]
    seen.clear()
    member.read_window(1, 30, 34, 0, 10)
    assert seen == [4, 6]


@pytest.mark.parametrize("name", ALL)
def test_out_of_another_shape_or_dtype_is_refused(name):
    member = codec.open_member(codec.encode(sample((1, 2, 8, 8), "uint16"), name), codec.extension(name))
    for out in (np.empty((2, 8, 7), "uint16"), np.empty((2, 8, 8), "int16")):
        with pytest.raises(ValueError):
            member.read_date(0, out)
    for window in ((1, 0, 8, 0, 8), (0, 0, 9, 0, 8), (0, 4, 4, 0, 8), (0, -1, 4, 0, 8)):
        with pytest.raises(IndexError):
            member.read_window(*window)


def test_read_into_a_slice_of_a_batch_buffer():
    array = sample((3, 2, 64, 64), "uint8")
    member = codec.open_member(codec.encode(array, "b2nd-lz4", tile_px=32), "b2nd")
    batch = np.zeros((2, 2, 50, 50), "uint8")
    member.read_window(1, 5, 55, 6, 56, batch[1])
    assert equal(batch[1], array[1, :, 5:55, 6:56])
    wide = np.zeros((2, 64, 80), "uint8")
    member.read_window(0, 0, 64, 0, 64, wide[:, :, 8:72])
    assert equal(wide[:, :, 8:72].copy(), array[0])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("keep", [0, 3, 40, 0.5, 0.95])
def test_cut_short_is_an_error_not_pixels(name, keep):
    data = codec.encode(sample((2, 2, 32, 32), "uint16"), name)
    cut = data[: keep if isinstance(keep, int) else int(len(data) * keep)]
    with pytest.raises(codec.MemberError):
        codec.open_member(cut, codec.extension(name)).read_all()


def test_pickles_and_object_arrays_are_refused():
    with pytest.raises(ValueError, match="object"):
        codec.encode(np.array([[[["a"]]]], dtype=object), "npy")
    stream = io.BytesIO()
    np.save(stream, np.array([[[["a"]]]], dtype=object), allow_pickle=True)
    for data in (stream.getvalue(), pickle.dumps([1])):
        for kind in ("npy", "b2nd", "zarr.zip", "pkl"):
            with pytest.raises(codec.MemberError):
                codec.open_member(data, kind)


def test_public_libraries_open_the_members():
    array = sample((3, 2, 20, 30), "uint16")
    assert equal(blosc2.ndarray_from_cframe(codec.encode(array, "b2nd-lz4", 16))[:], array)
    assert equal(np.load(io.BytesIO(codec.encode(array, "npy")), allow_pickle=False), array)
    data = codec.encode(array, "zarr.zip", 16)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        store = {
            name: zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(archive.read(name))
            for name in archive.namelist()
        }
    group = zarr.open_group(zarr.storage.MemoryStore(store), mode="r", zarr_format=2)
    assert equal(np.asarray(group["data"][:]), array)
    assert group["data"].chunks == (1, 2, 10, 15)


def test_threads_share_a_member():
    array = sample((8, 4, 64, 64), "uint16")
    member = codec.open_member(codec.encode(array, "b2nd-zstd"), "b2nd")
    wrong: list[int] = []

    def work(seed: int) -> None:
        for t in np.random.default_rng(seed).integers(0, 8, 200):
            if not equal(member.read_date(int(t)), array[t]):
                wrong.append(int(t))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tiles_are_even():
    assert codec.chunk_shape((1, 3, 304, 304), 256) == (1, 3, 152, 152)
    assert codec.chunk_shape((1, 3, 2048, 512), 256) == (1, 3, 256, 256)
    assert codec.chunk_shape((9, 10, 64, 64), 256) == (1, 10, 64, 64)
