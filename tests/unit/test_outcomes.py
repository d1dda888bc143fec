"""Paired differences of probe scores, and the files that hold what each test site got."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UsageError
from cluster.rundir import RunDir
from pipeline.config import PretrainConfig
from pipeline.probes.offline import ProbeResult, keep_beside
from pipeline.probes.outcomes import (
    Outcomes,
    differences,
    keep_round,
    list_offline,
    pixels_url,
    read_outcomes,
    split_number,
    stored_pixels,
    url_of,
    write_outcomes,
)
from pipeline.probes.scores import DRAWS, Outcome, accuracy, difference, mean_iou, score_of, total_score

EVERYWHERE = np.ones(40, bool)


def _right(seed: int, sites: int = 40, share: float = 0.5) -> np.ndarray:
    return (np.random.default_rng(seed).random(sites) < share).astype(np.uint8)


def _confusions(seed: int, sites: int = 40, classes: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 9, (sites, classes, classes))


def _outcomes(seed: int = 0, split: str = "00aa11bb22cc33dd") -> Outcomes:
    tested = np.arange(40) % 3 > 0
    return Outcomes(
        split, tuple(f"site-{i}" for i in range(40)),
        {"knn/fused": Outcome(EVERYWHERE, _right(seed)), "knn/s1": Outcome(tested, _right(seed + 1) * tested),
         "segment/fused": Outcome(EVERYWHERE, _confusions(seed))},
    )  # fmt: skip


def _brute_score(sites: list[np.ndarray]) -> float:
    """By the definitions, site by site and class by class."""
    if sites[0].ndim == 0:
        return sum(int(site) for site in sites) / len(sites)
    whole = sum(site.astype(int) for site in sites)
    shares = []
    for k in range(len(whole)):
        if whole[k].sum():
            shares.append(whole[k, k] / (whole[k].sum() + whole[:, k].sum() - whole[k, k]))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("make", [_right, _confusions])
def test_the_difference_equals_a_bootstrap_done_by_hand(make: Callable[[int], np.ndarray]) -> None:
    a, b = make(1), make(2)
    rng = np.random.default_rng(0)
    drawn = []
    for pick in rng.integers(0, 40, (DRAWS, 40)):
        drawn.append(_brute_score([a[i] for i in pick]) - _brute_score([b[i] for i in pick]))
    found = difference(Outcome(EVERYWHERE, a), Outcome(EVERYWHERE, b))
    assert found is not None
    assert found.value == pytest.approx(_brute_score(list(a)) - _brute_score(list(b)))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))


def test_scores_and_differences_agree_on_the_value() -> None:
    truth = np.random.default_rng(3).integers(0, 2, 40)
    said = [np.where(_right(seed), truth, 1 - truth) for seed in (1, 2)]
    a, b = (accuracy(one, truth, truth) for one in said)
    found = difference(*(Outcome(EVERYWHERE, (one == truth).astype(np.uint8)) for one in said))
    assert found is not None
    assert found.value == pytest.approx(a.value - b.value)
    a, b = mean_iou(_confusions(1), 0), mean_iou(_confusions(2), 0)
    found = difference(Outcome(EVERYWHERE, _confusions(1)), Outcome(EVERYWHERE, _confusions(2)))
    assert found is not None
    assert found.value == pytest.approx(a.value - b.value)


def test_a_score_of_outcomes_is_the_accuracy_and_takes_means_over_draws() -> None:
    truth = np.ones(40, np.int64)
    rounds = [_right(seed) for seed in (1, 2)]
    one = accuracy(rounds[0].astype(np.int64), truth, truth)
    assert score_of(Outcome(EVERYWHERE, rounds[0]), one.chance) == one
    mean = score_of(Outcome(EVERYWHERE, np.mean(rounds, axis=0)), 0.1)
    assert mean.value == pytest.approx(np.mean([r.mean() for r in rounds]))
    assert mean.low < mean.value < mean.high


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), sites=st.integers(1, 60), is_dense=st.booleans())
def test_a_difference_is_antisymmetric_and_nothing_with_itself(seed: int, sites: int, is_dense: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = (sites, 2, 2) if is_dense else (sites,)
    a, b = (Outcome(rng.random(sites) < 0.8, rng.integers(0, 2, shape)) for _ in range(2))
    there, back = difference(a, b), difference(b, a)
    if there is None:
        assert not (a.tested & b.tested).any()
        return
    assert back is not None
    assert there.value == -back.value
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    same = difference(a, a)
    assert same is not None
    assert (same.value, same.low, same.high, same.is_clear) == (0, 0, 0, False)
    assert str(same) == "+0.000 [+0.00, +0.00]"


def test_pairing_sees_what_two_intervals_hide() -> None:
    """The better run names 12 more sites of 200 rightly and loses none: clear in pairs, not by the runs' own intervals."""
    rng = np.random.default_rng(5)
    worse = (rng.random(200) < 0.5).astype(np.uint8)
    better = worse.copy()
    better[np.flatnonzero(worse == 0)[:12]] = 1
    everywhere = np.ones(200, bool)
    found = difference(Outcome(everywhere, better), Outcome(everywhere, worse))
    truth = np.ones(200, np.int64)
    a, b = (accuracy(right.astype(np.int64), truth, truth) for right in (better, worse))
    assert found is not None
    assert found.is_clear
    assert not (a.low > b.high)
    unpaired = (a.high - a.low) + (b.high - b.low)
    assert found.high - found.low < 0.5 * unpaired


def test_only_sites_that_both_tested_count() -> None:
    a, b = _right(1), _right(2)
    tested = np.arange(40) >= 10
    spoilt = np.where(tested, a, 1 - a)
    assert difference(Outcome(tested, spoilt), Outcome(EVERYWHERE, b)) == difference(
        Outcome(EVERYWHERE[10:], a[10:]), Outcome(EVERYWHERE[10:], b[10:])
    )
    assert difference(Outcome(tested, a), Outcome(~tested, b)) is None
    assert difference(Outcome(EVERYWHERE, a), Outcome(EVERYWHERE, _confusions(1))) is None


@pytest.mark.parametrize("where", ["local", "memory"])
def test_what_is_written_is_read_and_a_redone_step_replaces_it(tmp_path: Path, where: str) -> None:
    root = str(tmp_path) if where == "local" else f"memory://outcomes/{tmp_path.name}"
    url = url_of(root, 200)
    assert url.endswith("/probes/step-00000200.npz")
    for seed in (0, 7):
        outcomes = _outcomes(seed)
        write_outcomes(url, outcomes)
        found = read_outcomes(url)
        assert (found.split, found.keys, list(found.by_name)) == (
            outcomes.split,
            outcomes.keys,
            list(outcomes.by_name),
        )
        for name, outcome in outcomes.by_name.items():
            np.testing.assert_array_equal(found.by_name[name].tested, outcome.tested)
            np.testing.assert_array_equal(found.by_name[name].counts, outcome.counts)
            assert found.by_name[name].counts.dtype == np.uint8
    if where == "local":
        assert [path.name for path in (tmp_path / "probes").iterdir()] == ["step-00000200.npz"]


def test_a_file_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    everywhere, keys = np.ones(512, bool), tuple(f"{value:032x}" for value in rng.integers(0, 2**62, 512))
    names = ("hr", "s1", "s2", "fused")
    knn = {f"knn/{name}": Outcome(everywhere, rng.integers(0, 2, 512)) for name in names}
    dense = {f"segment/{name}": Outcome(everywhere, rng.multinomial(576, np.full(100, 0.01), 512).reshape(512, 10, 10)) for name in names}  # fmt: skip
    sizes = []
    for i, by_name in enumerate((knn, dense)):
        url = url_of(str(tmp_path), i)
        write_outcomes(url, Outcomes("ab" * 8, keys, by_name))
        sizes.append(Path(url).stat().st_size)
    assert sizes[0] < 20_000
    assert sizes[1] < 400_000


def test_no_outcomes_at_all_are_a_file_too(tmp_path: Path) -> None:
    write_outcomes(url_of(str(tmp_path), 1), Outcomes("ab" * 8, ("a", "b"), {}))
    assert read_outcomes(url_of(str(tmp_path), 1)).by_name == {}


def _object_array() -> bytes:
    arrays = {"split": np.array("00"), "keys": np.array(["a"]), "names": np.array(["knn/fused"]), "tested": np.ones((1, 1), bool)}  # fmt: skip
    stream = io.BytesIO()
    np.savez(stream, counts_0=np.array([_Trap()], dtype=object), **arrays)
    return stream.getvalue()


class _Trap:
    """Fails the test if anyone unpickles it."""

    def __reduce__(self) -> tuple:
        return pytest.fail, ("a pickle was loaded",)


def _plain_array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


def _other_sites(url: str) -> bytes:
    """One key too few for what is counted."""
    whole = _outcomes()
    only = {"segment/fused": whole.by_name["segment/fused"]}
    write_outcomes(url, Outcomes(whole.split, whole.keys, only))
    with np.load(url) as file:
        arrays = {name: file[name] for name in file.files}
    stream = io.BytesIO()
    np.savez(stream, **{**arrays, "keys": arrays["keys"][1:], "tested": arrays["tested"][:, 1:]})
    return stream.getvalue()


def test_broken_files_are_named_and_never_unpickled(tmp_path: Path) -> None:
    url = url_of(str(tmp_path), 3)
    other = _other_sites(url)
    write_outcomes(url, _outcomes())
    whole = Path(url).read_bytes()
    cut = [whole[:size] for size in (0, 1, 30, len(whole) // 2, len(whole) - 1)]
    for data in (*cut, _object_array(), _plain_array(), b"\x80\x04K\x01.", other):
        Path(url).write_bytes(data)
        with pytest.raises(
            UsageError, match=r"step-00000003\.npz holds no readable probe outcomes \(.*\); probe again"
        ):
            read_outcomes(url)
    for at in np.random.default_rng(0).integers(0, len(whole), 200):
        Path(url).write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(UsageError):  # a byte of a date or an attribute in the archive harms nothing
            assert read_outcomes(url).keys == _outcomes().keys
    with pytest.raises(FileNotFoundError):
        read_outcomes(url_of(str(tmp_path), 4))


def test_both_rows_are_metrics_with_the_interval_of_the_difference(tmp_path: Path) -> None:
    root, base, last, pixels = str(tmp_path), _outcomes(0), _outcomes(5), _outcomes(9)
    keep_round(base, pixels, root, 0)
    figures = keep_round(last, pixels, root, 20)
    ends = ("", "/low", "/high")
    assert set(figures) == {
        f"probe/{name}/{what}"
        for name in base.by_name
        for row in ("untrained", "pixels")
        for what in (row, *(f"over_{row}{end}" for end in ends))
    }
    for row, other in (("untrained", base), ("pixels", pixels)):
        wanted = differences(last, other)["knn/fused"]
        assert [figures[f"probe/knn/fused/over_{row}{end}"] for end in ends] == [wanted.value, wanted.low, wanted.high]
        assert figures[f"probe/segment/fused/{row}"] == total_score(other.by_name["segment/fused"])
    assert read_outcomes(url_of(root, 20)).split == last.split
    kept = stored_pixels(root, pixels.split, ["knn", "segment"])
    assert kept is not None
    assert kept.keys == pixels.keys
    assert stored_pixels(root, pixels.split, ["knn", "linear"]) is None  # a task was added since
    assert stored_pixels(root, "ff" * 8, ["knn"]) is None
    Path(pixels_url(root, pixels.split)).write_bytes(b"PK")
    assert stored_pixels(root, pixels.split, ["knn"]) is None


def test_a_store_that_fails_is_a_warning_and_pixels_are_still_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder, spoil in (("later", None), ("torn", b"PK"), ("other", b"")):
        root, pixels = str(tmp_path / folder), _outcomes(9)
        if folder == "torn":
            write_outcomes(url_of(root, 0), _outcomes())
            Path(url_of(root, 0)).write_bytes(spoil or b"")
        if folder == "other":
            keep_round(_outcomes(split="ff" * 8), _outcomes(split="ff" * 8), root, 0)
        caplog.clear()
        figures = keep_round(_outcomes(), pixels, root, 20)
        assert "probe/knn/fused/pixels" in figures
        assert not any("untrained" in key for key in figures)
        assert "step 20" in caplog.text
    (tmp_path / "file").write_text("no folder")
    caplog.clear()
    assert "probe/knn/fused/over_pixels" in keep_round(_outcomes(), _outcomes(9), str(tmp_path / "file"), 20)
    assert "step 20: probe outcomes" in caplog.text


def test_other_splits_are_never_paired() -> None:
    a = _outcomes(0)
    assert differences(_outcomes(1, split="ff" * 8), a) == {}
    moved = Outcomes(a.split, tuple(reversed(a.keys)), a.by_name)
    assert differences(moved, a) == {}
    assert set(differences(_outcomes(1), a)) == set(a.by_name)


def test_offline_outcomes_lie_beside_the_run_they_score(tmp_path: Path) -> None:
    outcomes, rundir = _outcomes(), RunDir(str(tmp_path / "run"))
    results = [ProbeResult("knn", {}, {}, outcomes), ProbeResult("linear", {}, {}, outcomes)]
    facts = {"checkpoint": f"{rundir.url}/checkpoints/step-00000020", "step": 20, "weights": "teacher"}
    model = SimpleNamespace(facts=facts)
    assert keep_beside(model, results) == []  # type: ignore[arg-type]  # the run is gone
    rundir.write_resolved(PretrainConfig())
    assert keep_beside(SimpleNamespace(facts={**facts, "weights": "student"}), results) == []  # type: ignore[arg-type]
    assert keep_beside(SimpleNamespace(facts={}), results) == []  # type: ignore[arg-type]
    kinds = [f"{task}-{outcomes.split}" for task in ("knn", "linear")]
    assert keep_beside(model, results) == [url_of(rundir.url, 20, kind) for kind in kinds]  # type: ignore[arg-type]
    keep_round(outcomes, outcomes, rundir.url, 20)
    assert list_offline(rundir.url) == [(20, kind) for kind in kinds]
    assert split_number(outcomes.split) == int(outcomes.split[:12], 16)
