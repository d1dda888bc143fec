"""`data_prep build` as users run it: workers, arrays, `kill -9`, a full disk, a real S3 server, real imagery."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from cluster import storage
from data_prep.codec import open_member
from data_prep.config import GridConfig
from data_prep.shards import ShardSet
from data_prep.sources import open_catalog, read_site
from tests.data_folder import REPOSITORY, real_data
from tests.patience import patience
from tests.require import require

pytestmark = pytest.mark.integration
DEMO = "data_prep/runs/demo.yaml"


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", *arguments], cwd=REPOSITORY, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*arguments: str, code: int = 0, **environment: str) -> tuple[dict, str]:
    """(JSON last line, stderr) of a command that ends with `code`; a traceback is never right."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=240 * patience())
    assert process.returncode == code, (out, err)
    assert "Traceback" not in err
    return (json.loads(out.splitlines()[-1]) if "--json" in arguments and code != 2 else {}), err


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("scenes") / "s"
    run("simulate", str(folder), "--sites", "18", "--seed", "3")
    return f"source.catalog=[{folder}/catalog.parquet]"


@pytest.fixture(scope="module")
def reference(scenes, tmp_path_factory) -> Path:
    """The set as one worker makes it."""
    folder = tmp_path_factory.mktemp("reference") / "set"
    run("build", DEMO, scenes, f"output.url={folder}", "shards.max_samples=2", "workers=1")
    return folder


def test_four_workers_and_a_killed_array_make_the_same_bytes(scenes, reference, tmp_path):
    common = ["build", DEMO, scenes, "shards.max_samples=2", "workers=4"]
    figures, _ = run(*common, f"output.url={tmp_path}/four", "--json")
    assert content(tmp_path / "four") == content(reference)
    assert figures["samples"] == 18
    assert figures["manifest_sha256"] == ShardSet.open(str(reference)).manifest_sha256

    url = tmp_path / "array"
    array = ["build", DEMO, scenes, "shards.max_samples=2", "workers=1", f"output.url={url}"]
    process = start(*array, "--task", "1", "--tasks", "3")
    while (
        process.poll() is None
        and len(list((url / "_build").glob("*-0*.json") if (url / "_build").exists() else [])) < 1
    ):
        pass  # the first shard is committed: the second is in the making
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (url / "manifest.json").exists()
    for name in (entry.name for entry in url.glob("*.tar")):  # what is visible is whole
        assert (url / name).read_bytes() == (reference / name).read_bytes()
    slurm = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "4"}
    for task in ("4", "6", "5"):
        run(*array, SLURM_ARRAY_TASK_ID=task, **slurm)
    assert content(url) == content(reference)
    assert run("verify", str(url), "--decode", "--json")[0]["faults"] == 0


def test_two_builders_at_once_make_one_sound_set(scenes, reference, tmp_path):
    command = ["build", DEMO, scenes, "shards.max_samples=2", "workers=1", f"output.url={tmp_path}/x"]
    both = [start(*command), start(*command)]
    for process in both:
        _, err = process.communicate(timeout=240 * patience())
        assert process.returncode == 0, err
    assert content(tmp_path / "x") == content(reference)


def test_a_killed_worker_is_noticed(scenes, tmp_path):
    process = start("build", DEMO, scenes, "shards.max_samples=2", "workers=2", f"output.url={tmp_path}/x")
    children: list[str] = []
    while process.poll() is None and not list((tmp_path / "x").glob("*.tmp")):
        pass
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = [c for c in listing.read_text().split() if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "a worker died while making" in err
    run("build", DEMO, scenes, "shards.max_samples=2", "workers=2", f"output.url={tmp_path}/x")
    assert run("verify", f"{tmp_path}/x", "--json")[0]["faults"] == 0


def test_corrupt_and_vanished_sources_are_quarantined(scenes, tmp_path):
    catalog = Path(scenes.split("[")[1].rstrip("]"))
    shutil.copytree(catalog.parent, tmp_path / "scenes")
    images = sorted((tmp_path / "scenes").rglob("*.tif"))
    images[0].write_bytes(images[0].read_bytes()[:2000])
    gone = next(path.parent for path in images if path.parent != images[0].parent)
    shutil.rmtree(gone)
    command = [
        "build",
        DEMO,
        f"source.catalog=[{tmp_path}/scenes/{catalog.name}]",
        f"output.url={tmp_path}/x",
        "--json",
    ]
    figures, err = run(*command, code=1)
    assert figures["faults"] == 1  # nothing of that site is left
    assert "past error_budget=0.0" in err
    (fault,) = [json.loads(line) for line in (tmp_path / "x" / "faults.jsonl").read_text().splitlines()]
    (loss,) = [json.loads(line) for line in (tmp_path / "x" / "losses.jsonl").read_text().splitlines()]
    assert fault["why"]
    assert fault["asset"]
    assert (loss["modality"], figures["losses"]) == ("hr", 1)  # the other keeps its series
    assert loss["site"] != fault["site"]
    assert run("verify", f"{tmp_path}/x", "--decode", "--json")[0]["samples"] == 17
    run(*command, "error_budget=0.2")


def test_bad_input_is_one_line(scenes, tmp_path):
    out = f"output.url={tmp_path}/x"
    for arguments, words in (
        (["build", "absent.yaml"], "absent.yaml does not exist"),
        (["build", DEMO, scenes, out, "grid.sidem=3"], "unknown key grid.sidem; nearest valid key is grid.side_m"),
        (["build", DEMO, scenes, out, "codecs.hr=jpeg"], "'jpeg' is not one of"),
        (["build", DEMO, out, f"source.catalog=[{tmp_path}/no.parquet]"], "no.parquet"),
        (["build", DEMO, scenes, "output.url=/proc/x"], "/proc/x"),
        (["verify", str(tmp_path)], "not a shard set"),
        (["show", str(tmp_path)], "not a shard set"),
        (["stats", str(tmp_path)], "not a shard set"),
        (["build", DEMO, scenes, out, "--task", "3", "--tasks", "2"], "--task 3"),
    ):
        _, err = run(*arguments, code=2)
        assert words in err, (arguments, err)
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_full_disk(scenes, reference, tmp_path):
    require(os.geteuid() == 0 and shutil.which("mount"), "root and mount (for a small file system)", "run as root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True)
    require(mounted.returncode == 0, "permission to mount a tmpfs", "run as root outside a restricted container")
    try:
        command = ["build", DEMO, scenes, "shards.max_samples=2", "workers=1", f"output.url={disk}/x"]
        _, err = run(*command, code=1)
        assert "no space left; finished shards are kept" in err
        assert not list(disk.rglob("*.tmp"))
        kept = list((disk / "x").glob("*.tar"))
        assert kept
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run(*command)
        assert content(disk / "x") == content(reference)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_real_imagery_round_trip(tmp_path):
    """terramind and treesatai in one set: pixels equal the harmonised source bit for bit; stock webdataset reads it."""
    catalogs = []
    for layout in ("terramind", "treesatai"):
        run("catalog", str(real_data(layout)), f"{tmp_path}/{layout}.parquet", "--layout", layout)
        catalogs.append(f"{tmp_path}/{layout}.parquet")
    url = f"{tmp_path}/set"
    run("build", DEMO, f"source.catalog=[{','.join(catalogs)}]", f"output.url={url}", "split.seed=2")
    assert run("verify", url, "--decode", "--json")[0]["samples"] == 4
    shards = ShardSet.open(url)
    rows = {key: row for row, key in enumerate(shards.index["key"].to_pylist())}
    for catalog in catalogs:
        for record in open_catalog(catalog):
            site, stored = read_site(record, GridConfig()), shards.read_sample(rows[record.key])
            assert set(stored.series) == set(site.series)
            for name, series in site.series.items():
                other = stored.series[name]
                assert other.pixels_TCHW.tobytes() == series.pixels_TCHW.tobytes()
                np.testing.assert_array_equal(other.mask_THW, series.mask_THW)
                assert (other.transform, other.datetimes) == (series.transform, series.datetimes)
                assert other.orbits == (series.orbits or [""] * len(series.datetimes))
    tars = [f"{url}/{shard['name']}" for shard in shards.manifest["shards"]]
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        for member, data in sample.items():
            if member.endswith(".b2nd"):
                open_member(data, "b2nd").read_all()
    run("show", url, "--out", f"{tmp_path}/sheet.png")
    assert (tmp_path / "sheet.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_s3_build_is_the_local_build(scenes, reference, s3_url, s3_server, tmp_path):
    command = ["build", DEMO, scenes, "shards.max_samples=2", f"output.url={s3_url}", "workers=2"]
    figures, _ = run(*command, "--json", **s3_server.environment)
    assert figures["manifest_sha256"] == ShardSet.open(str(reference)).manifest_sha256
    for name, data in content(reference).items():
        assert storage.read_bytes(f"{s3_url}/{name}") == data, name
    assert run("verify", s3_url, "--json", **s3_server.environment)[0]["faults"] == 0
    run("build", DEMO, scenes, "shards.max_samples=3", f"output.url={s3_url}", code=2, **s3_server.environment)
    storage.remove(f"{s3_url}/{figures and 'index.parquet'}")
    run("verify", s3_url, "--repair", **s3_server.environment)
    assert storage.read_bytes(f"{s3_url}/index.parquet") == (reference / "index.parquet").read_bytes()


KILLED_UPLOAD = """
import os, signal, sys
import s3fs
call = s3fs.S3FileSystem._call_s3
async def spoiled(self, method, *args, **kwargs):
    if method == "complete_multipart_upload":
        os.kill(os.getpid(), signal.SIGKILL)
    return await call(self, method, *args, **kwargs)
s3fs.S3FileSystem._call_s3 = spoiled
from cluster.cli import dispatch
from data_prep.__main__ import COMMANDS
dispatch("data_prep", "", COMMANDS)
"""


def test_a_killed_multipart_upload_shows_nothing(s3_url, s3_server, tmp_path):
    """A shard goes up in parts; the builder is killed (-9) when all parts are there and the object is not yet."""
    import boto3

    run("simulate", f"{tmp_path}/s", "--sites", "3", "--side-m", "640")
    large = ["shards.max_samples=3", "codecs.hr=npy", "split.fractions={train: 1}", "workers=1"]
    command = ["build", DEMO, f"source.catalog=[{tmp_path}/s/catalog.parquet]", *large]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_UPLOAD, *command, f"output.url={s3_url}"], cwd=REPOSITORY, timeout=240,
        env=os.environ | s3_server.environment, capture_output=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    client = boto3.client("s3", endpoint_url=s3_server.endpoint)
    bucket, prefix = s3_url.removeprefix("s3://").split("/", 1)
    (upload,) = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)["Uploads"]
    assert len(client.list_parts(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])["Parts"]) >= 2
    assert [name for name in storage.list_names(s3_url) if name.endswith(".tar")] == []
    run("verify", s3_url, code=2, **s3_server.environment)
    run(*command, f"output.url={s3_url}", **s3_server.environment)
    run(*command, f"output.url={tmp_path}/local")
    for name, data in content(tmp_path / "local").items():
        assert storage.read_bytes(f"{s3_url}/{name}") == data
