"""`python -m pipeline bench loader` as a user runs it: the table, the JSON line, a set of one's own, a bucket."""

import json
import os
import subprocess
import sys

import pytest

from tests.data_folder import REPOSITORY
from tests.sites import make_site, write_shard_set

pytestmark = pytest.mark.integration


def bench(*arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pipeline", "bench", "loader", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == code, done.stderr
    return done


def test_loaders_side_by_side(tmp_path):
    done = bench(
        "--sites", "16", "--samples", "16", "--rounds", "1", "--batch", "4", "--folder", str(tmp_path), "--json",
        "--loaders", "geoloom,webdataset_w2",
    )  # fmt: skip
    report = json.loads(done.stdout.splitlines()[-1])
    for part in ("loaders", "compressed"):
        assert set(report[part]) == {"geoloom", "webdataset_w2"}
        for row in report[part].values():
            assert row["exactly_once"]
            assert {"samples_per_s", "cpu_us_per_sample", "rss_mb", "first_batch_s"} <= set(row)
        assert report[part]["geoloom"]["resume"] == {"state": True, "repeated": 0, "skipped": 0}
        assert report[part]["webdataset_w2"]["resume"] == {"state": False}
    assert report["partial_decode"]["share"] < 0.5
    assert "CPU µs/sample" in done.stdout


def test_a_set_of_ones_own_and_nonsense(tmp_path):
    sites = [make_site(f"site_{i}", i, ("s2", "s1") if i % 3 else ("hr", "s2"), hr_px=64) for i in range(9)]
    options = ("--samples", "8", "--batch", "2", "--rounds", "1", "--json", "--folder", str(tmp_path / "out"))
    mixed = write_shard_set(str(tmp_path / "mixed"), sites)
    done = bench("--data", mixed, *options)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["storage"]["url"] == mixed
    assert all(row["samples_per_s"] > 0 for row in report["storage"]["threads"].values())
    assert "GPUs fed" in done.stdout
    assert "cannot stack" in done.stdout
    uniform = write_shard_set(str(tmp_path / "uniform"), [make_site(f"site_{i}", i, ("s2",)) for i in range(6)])
    report = json.loads(bench(uniform, *options, "--loaders", "geoloom").stdout.splitlines()[-1])
    assert report["loaders"]["geoloom"]["exactly_once"]
    assert "not a shard set" in bench("--data", str(tmp_path), code=2).stderr
    assert "mosaicml_w0" in bench("--loaders", "nonsense", code=2).stderr


def test_what_a_bucket_can_feed(s3_url, tmp_path):
    write_shard_set(s3_url, [make_site(f"site_{i}", i, hr_px=64) for i in range(6)])
    done = bench(
        "--data", s3_url, "--samples", "8", "--batch", "2", "--step-ms", "100", "--json", "--folder", str(tmp_path)
    )
    report = json.loads(done.stdout.splitlines()[-1])
    best = report["storage"]["threads"][str(report["storage"]["best_threads"])]
    assert best["gpus_fed"] == pytest.approx(best["samples_per_s"] / 20)


def test_a_bucket_beside_local_files(s3_url, tmp_path):
    sites = [make_site(f"site_{i}", i, hr_px=64) for i in range(6)]
    options = ("--samples", "8", "--batch", "2", "--rounds", "1", "--folder", str(tmp_path / "out"))
    write_shard_set(s3_url, sites)
    local, other = write_shard_set(str(tmp_path / "same"), sites), write_shard_set(str(tmp_path / "other"), sites[:3])
    done = bench("--data", s3_url, "--against", local, "--json", *options)
    for row in json.loads(done.stdout.splitlines()[-1])["against"].values():
        assert row["ratio"] == pytest.approx(row["storage_us"] / row["local_us"])
    assert "their manifests differ" in bench("--data", s3_url, "--against", other, *options, code=2).stderr
