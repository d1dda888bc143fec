"""The order of samples is a pure function: every sample once per epoch, whatever the world, and the same from anywhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.reader.keyed import bits, permutation, uniforms
from pipeline.reader.order import MIX_PERIOD, EpochOrder, Stream, quotas, rank_part, shuffle_quality

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0).map(np.array)
BLOCK, LANES = st.integers(1, 20), st.integers(1, 9)


@given(SIZES, BLOCK, LANES, st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_holds_every_sample_once(sizes, block, lanes, seed, epoch):
    order = EpochOrder(sizes, seed, epoch, block, lanes)
    assert sorted(order.samples(0, order.count)) == list(range(sizes.sum()))


@given(SIZES, BLOCK, LANES, st.data())
def test_any_part_is_the_part_of_the_whole(sizes, block, lanes, data):
    order = EpochOrder(sizes, 1, 2, block, lanes)
    start = data.draw(st.integers(0, order.count))
    stop = data.draw(st.integers(start, order.count))
    fresh = EpochOrder(sizes, 1, 2, block, lanes).samples(start, stop)
    assert np.array_equal(fresh, order.samples(0, order.count)[start:stop])


@given(SIZES, BLOCK, LANES)
def test_only_a_bounded_window_is_open(sizes, block, lanes):
    """Every group of positions touches at most `lanes` runs of neighbours of at most `block` samples."""
    order = EpochOrder(sizes, 0, 0, block, lanes)
    begin = 0
    for end in order._group_ends:
        group = np.sort(order.samples(begin, int(end)))
        assert len(group) <= block * lanes
        assert 1 + np.count_nonzero(np.diff(group) != 1) <= lanes
        begin = int(end)


def test_epochs_and_seeds_differ():
    sizes = np.full(10, 30)
    first = EpochOrder(sizes, 0, 0, 8, 4).samples(0, 300)
    assert not np.array_equal(first, EpochOrder(sizes, 0, 1, 8, 4).samples(0, 300))
    assert not np.array_equal(first, EpochOrder(sizes, 1, 0, 8, 4).samples(0, 300))


@settings(max_examples=60)
@given(
    SIZES,
    st.integers(1, 8),
    st.integers(1, 5),
    st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=6),
    st.data(),
)
def test_stopping_anywhere_and_going_on_at_another_world_size(sizes, block, batch, worlds, data):
    """The union over ranks and restarts is the uninterrupted stream, in order: nothing repeated, nothing skipped."""
    stream = Stream([sizes], [], 5, block, 3)
    number, seen = 0, []
    for world in worlds:
        for _ in range(data.draw(st.integers(0, 4))):
            ranks = [rank_part(number, batch * world, rank, world) for rank in range(world)]
            assert ranks[0][0] == number
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ranks))
            assert {stop - start for start, stop in ranks} == {batch}
            seen += [
                sample for start, stop in ranks for sample in Stream([sizes], [], 5, block, 3).at(start, stop).sample
            ]
            number = ranks[-1][1]
    whole = stream.at(0, number)
    assert seen == whole.sample.tolist()
    count = int(sizes.sum())
    for epoch in range(number // count):
        assert sorted(whole.sample[epoch * count : (epoch + 1) * count]) == list(range(count))
        assert (whole.epoch[epoch * count : (epoch + 1) * count] == epoch).all()
        assert whole.position[epoch * count : (epoch + 1) * count].tolist() == list(range(count))


@given(st.integers(0, 1000), st.integers(0, 500), st.integers(1, 64))
def test_a_ragged_batch_is_split_as_evenly_as_can_be(start, count, world):
    parts = [rank_part(start, count, rank, world) for rank in range(world)]
    lengths = [stop - begin for begin, stop in parts]
    assert sum(lengths) == count
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3))
def test_quotas_are_exact(weights):
    counts = quotas(weights)
    assert counts.sum() == MIX_PERIOD
    share = np.array(weights) / sum(weights)
    assert (counts[share > 0] >= 1).all()
    assert (counts[share == 0] == 0).all()
    if (share[share > 0] * MIX_PERIOD >= 1).all():
        assert np.abs(counts - share * MIX_PERIOD).max() < 1


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        quotas(weights)


@settings(max_examples=30)
@given(st.integers(0, 5000), st.integers(0, 700))
def test_a_mixture_is_exact_and_starts_anywhere(start, length):
    parts, weights = [np.array([30, 20]), np.array([7]), np.array([100])], [0.5, 0.2, 0.3]
    stream = Stream(parts, weights, 3, 4, 2)
    drawn = stream.at(start, start + length)
    whole = Stream(parts, weights, 3, 4, 2).at(0, start + length)
    for field in ("sample", "epoch", "position", "part"):
        assert np.array_equal(getattr(drawn, field), getattr(whole, field)[start:])
    assert stream.drawn(start + length) == np.bincount(whole.part, minlength=3).tolist()
    full = (start + length) // MIX_PERIOD * MIX_PERIOD
    assert np.bincount(whole.part[:full], minlength=3).tolist() == [full * w for w in weights]
    for part, (first, count) in enumerate([(0, 50), (50, 7), (57, 100)]):
        own = whole.sample[whole.part == part]
        assert ((own >= first) & (own < first + count)).all()
        for epoch in range(len(own) // count):
            assert len(set(own[epoch * count : (epoch + 1) * count])) == count


def test_shuffle_quality_knows_good_from_bad():
    sizes = np.full(20, 500)
    stored, full = np.arange(10_000), permutation(10_000, "full")
    ours = EpochOrder(sizes, 0, 0, 16, 8).samples(0, 10_000)
    good, bad, mine = (shuffle_quality(samples, sizes) for samples in (full, stored, ours))
    assert bad["shards_per_batch"] < 0.1 < 0.5 < mine["shards_per_batch"] <= good["shards_per_batch"] + 0.02
    assert abs(good["spread"] - 1) < 0.02
    assert mine["same_shard_neighbours"] < 0.25 < bad["same_shard_neighbours"]


def test_numbers_of_a_key_never_change():
    """Golden values: the order of runs already started depends on them."""
    assert bits(2, "a", 1).tolist() == GOLDEN_BITS
    assert uniforms(2, 0, 1, "key").tolist() == GOLDEN_UNIFORMS
    assert EpochOrder(np.array([5, 4, 6]), 0, 0, 2, 2).samples(0, 15).tolist() == GOLDEN_ORDER


GOLDEN_BITS = [14381270494605704865, 10403607487745416269]
GOLDEN_UNIFORMS = [0.8427928393006734, 0.09659528881869028]
GOLDEN_ORDER = [14, 5, 6, 12, 13, 9, 4, 7, 8, 3, 11, 10, 2, 0, 1]
