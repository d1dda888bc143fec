"""Loaders side by side on the same samples: samples/s, CPU per sample of the process tree, memory, first batch, coverage, resume.

  python -m pipeline bench loader                            # generated samples, raw and compressed, against every rival
  python -m pipeline bench loader --data demo_out/shards     # your local set, against webdataset and a plain DataLoader
  python -m pipeline bench loader --data s3://bucket/set --step-ms 400 --batch 32     # what that storage can feed
  python -m pipeline bench loader --data s3://bucket/set --against /data/set          # and what it costs beside local files

Each loader runs in its own process; rounds are interleaved and the median counts. Rivals that are not installed are named and
left out: .venv/bin/pip install --no-deps --target .venv-bench -r pipeline/bench/requirements.txt
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROUNDS, SAMPLES, BATCH = 5, 1024, 16
LOADERS = (
    "geoloom", "geoloom_w1", "webdataset_w0", "webdataset_w2", "mosaicml_w0", "mosaicml_w2", "litdata_w0", "litdata_w2",
    "dataloader_w0", "dataloader_w2",
)  # fmt: skip
TARGETS = {"npy": 1 / 5, "b2nd-lz4": 1 / 2.5}  # CPU per sample against webdataset with 2 workers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", nargs="?", help="same as --data")
    parser.add_argument("--data", help="a shard set (any URL); without it samples are generated")
    parser.add_argument("--against", metavar="FOLDER", help="the same set as local files: CPU per sample side by side")
    parser.add_argument("--loaders", default=",".join(LOADERS), help="comma-separated, of: " + ", ".join(LOADERS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="measured per loader and round (after the first batch)"
    )
    parser.add_argument("--sites", type=int, default=256, help="samples in the generated set")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--threads", type=int, default=2, help="decoding threads of 'geoloom'; geoloom_w1 has one")
    parser.add_argument(
        "--step-ms", type=float, default=500.0, help="time of one training step of one GPU on --batch samples"
    )
    parser.add_argument("--folder", default="bench_out/loader", help="where generated and converted samples lie (kept)")
    parser.add_argument("--packages", default=".venv-bench", help="folder with the rivals' packages")
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    from cluster import storage
    from cluster.cli import print_json
    from pipeline.bench import loader_rivals, loader_storage

    url = args.data or args.set
    report: dict[str, Any]
    if url:
        report = loader_storage.feed(url, args.batch, args.threads, args.samples, args.step_ms)
        if args.against:
            report["against"] = _against(url, args)
        elif storage.is_local(url) and not loader_rivals.is_uniform(url):
            print("sites differ in modalities or shapes, so stock loaders cannot stack them: no comparison")
        elif storage.is_local(url):
            names = [name for name in _wanted(args) if name.partition("_")[0] in ("geoloom", "webdataset")]
            report["loaders"] = _compare(url, "yours", names, args)
    else:
        report = _generated(args)
    path = Path(args.folder) / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")
    if args.json:
        print_json(report)
    return 0


def _wanted(args: argparse.Namespace) -> list[str]:
    from cluster.errors import UsageError

    names = args.loaders.split(",")
    unknown = [name for name in names if name not in LOADERS]
    if unknown:
        raise UsageError(f"no loader {unknown[0]!r}; there are {', '.join(LOADERS)}")
    return names


def _generated(args: argparse.Namespace) -> dict[str, Any]:
    """The standard comparison: raw and compressed members, every rival, and partial decode."""
    from pipeline.bench import loader_data, loader_storage

    report: dict[str, Any] = {"targets": {}}
    for codec, name in (("npy", "loaders"), ("b2nd-lz4", "compressed")):
        data = Path(args.folder) / f"set-{codec}-{args.sites}"
        if not loader_data.is_set(data):
            print(f"generating {args.sites} samples in {data}", flush=True)
            loader_data.make_set(str(data), args.sites, codec)
        report[name] = _compare(str(data), codec, _wanted(args), args)
        theirs = report[name].get("webdataset_w2", {}).get("cpu_us_per_sample")
        for loader, threads in (("geoloom_w1", 1), ("geoloom", args.threads)):
            ours = report[name].get(loader, {}).get("cpu_us_per_sample")
            if ours and theirs:
                ratio = {"ratio": round(ours / theirs, 3), "wanted": round(TARGETS[codec], 3)}
                report["targets"].setdefault(codec, {})[loader] = ratio
                print(
                    f"{codec}, {threads} decoding threads: {ours / theirs:.2f} of webdataset_w2's CPU per sample (wanted: at "
                    f"most {TARGETS[codec]:.2f})"
                )
        print()
    report["partial_decode"] = loader_storage.partial_decode()
    print(
        "20 of 65 dates and a 512² crop of a 2048² tile: {share:.2f} of decoding everything".format(
            **report["partial_decode"]
        )
    )
    return report


def _compare(data: str, codec: str, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Runs every loader `rounds` times in turn and prints the table of medians."""
    ready: dict[str, dict[str, Any]] = {}
    for name in names:
        spec = _spec(name, data, args)
        why = _prepare(spec)
        if why is None:
            ready[name] = spec
        else:
            print(f"{name} is left out: {why}", flush=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ready}
    for number in range(args.rounds):
        for name, spec in ready.items():
            found[name].append(_measure(spec))
        print(f"{codec}: round {number + 1} of {args.rounds}", flush=True)
    table: dict[str, dict[str, Any]] = {}
    for name, rounds in found.items():
        table[name] = {key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0]}
        table[name]["cpu_us_low"], table[name]["cpu_us_high"] = (
            round(f(one["cpu_us_per_sample"] for one in rounds), 1) for f in (min, max)
        )
        table[name] |= _run({**ready[name], "mode": "coverage"})
        table[name]["resume"] = _run({**ready[name], "mode": "resume"})
    _print(codec, table)
    return table


def _against(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """CPU per sample of pretraining batches from `url` and from the same set as local files, in interleaved rounds: in the
    default order, whose ranges are about one sample long, and in storage order, whose ranges are `data.range_mb` long."""
    from cluster.errors import UsageError
    from data_prep.schema import MODALITIES
    from data_prep.shards import ShardSet

    sets = [ShardSet.open(place) for place in (url, args.against)]
    if sets[0].manifest_sha256 != sets[1].manifest_sha256:
        raise UsageError(f"{args.against} is not the set in {url}: their manifests differ")
    held = {name for names in sets[1].read_index(["modalities"])["modalities"].to_pylist() for name in names}
    common = {
        "loader": "views", "workers": args.threads, "batch": args.batch, "samples": args.samples, "packages": args.packages,
        "folder": "", "mode": "measure", "modalities": [name for name in MODALITIES if name in held],
    }  # fmt: skip
    report = {}
    print(f"{'order':<12}{'local, CPU µs/sample':>22}{'storage':>10}{'ratio':>8}   low-high of {args.rounds} rounds")
    for order, interleave in (("default", 8), ("storage", 1)):
        pairs = []
        for _ in range(args.rounds):
            local, remote = (
                _measure({**common, "data": place, "interleave": interleave})["cpu_us_per_sample"]
                for place in (args.against, url)
            )
            pairs.append((local, remote, remote / local))
        middle = [statistics.median(column) for column in zip(*pairs)]
        ratios = [ratio for _, _, ratio in pairs]
        report[order] = {"local_us": middle[0], "storage_us": middle[1], "ratio": middle[2], "ratios": ratios}
        print(
            f"{order:<12}{middle[0]:>22.0f}{middle[1]:>10.0f}{middle[2]:>8.2f}   {min(ratios):.2f}-{max(ratios):.2f}",
            flush=True,
        )
    return report


def _spec(name: str, data: str, args: argparse.Namespace) -> dict[str, Any]:
    loader, _, workers = name.partition("_w")
    return {
        "loader": loader, "workers": int(workers) if workers else args.threads, "data": data, "batch": args.batch,
        "folder": str(Path(args.folder) / f"{loader}-{Path(data).name}"), "samples": args.samples, "packages": args.packages,
        "mode": "measure",
    }  # fmt: skip


def _prepare(spec: dict[str, Any]) -> str | None:
    """Converts the samples into the loader's own format, once; says why it cannot be used."""
    if spec["loader"] in ("geoloom", "webdataset") or Path(spec["folder"], "prepared").exists():
        return None
    done = subprocess.run(_command({**spec, "mode": "prepare"}), capture_output=True, text=True, timeout=900)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["failed"])[-1][:200]
    Path(spec["folder"], "prepared").touch()
    return None


def _command(spec: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "pipeline.bench.loader_worker", json.dumps(spec)]


def _run(spec: dict[str, Any]) -> dict[str, Any]:
    """Facts of a worker that only says `done`."""
    try:
        done = subprocess.run(_command(spec), capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return {"error": "no answer within 300 s"}
    for line in done.stdout.splitlines():
        if line.startswith("done "):
            return json.loads(line[5:])
    return {"error": (done.stderr.strip().splitlines() or ["no answer"])[-1][:200]}


def _measure(spec: dict[str, Any]) -> dict[str, float]:
    """One round of one loader: its process tree's CPU time between the first batch and the last, and its peak memory."""
    import psutil

    from cluster.errors import RunFailure

    with subprocess.Popen(
        _command(spec), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        tree = psutil.Process(process.pid)
        first = _line(process.stdout, "ready")
        if first is None:
            raise RunFailure(f"{spec['loader']} did not start: {process.stderr.read().strip().splitlines()[-1:]}")
        before = _cpu_s(tree)
        process.stdin.write("\n")
        process.stdin.flush()
        sampler = _PeakMemory(tree)
        done = _line(process.stdout, "done")
        after, peak = _cpu_s(tree), sampler.stop()
        if done is None:
            raise RunFailure(f"{spec['loader']} stopped: {process.stderr.read().strip().splitlines()[-1:]}")
        process.stdin.write("\n")
        process.stdin.close()
        process.stdin = None
        process.wait(60)
    return {
        "samples_per_s": done["samples"] / done["wall_s"], "cpu_us_per_sample": 1e6 * (after - before) / done["samples"],
        "rss_mb": peak / 1e6, "first_batch_s": first["first_batch_s"], "sample_kb": first["bytes"] / 1e3,
    }  # fmt: skip


def _line(stream: Any, word: str) -> dict[str, Any] | None:
    for line in stream:
        if line.startswith(f"{word} "):
            return json.loads(line[len(word) + 1 :])
    return None


def _cpu_s(tree: Any) -> float:
    """User and system seconds of a process, its living descendants and its dead children."""
    import psutil

    total = 0.0
    for process in [tree, *tree.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


class _PeakMemory:
    """Greatest proportional set size (shared pages counted once) of a process tree while it runs."""

    def __init__(self, tree: Any) -> None:
        import threading

        self._tree, self._peak, self._stop = tree, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self._peak = max(self._peak, self._now())

    def _now(self) -> int:
        import psutil

        try:
            pids = [self._tree.pid, *(child.pid for child in self._tree.children(recursive=True))]
        except psutil.Error:
            return 0
        total = 0
        for pid in pids:
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total

    def stop(self) -> int:
        self._peak = max(self._peak, self._now())
        self._stop.set()
        self._thread.join()
        return self._peak


def _print(codec: str, table: dict[str, Any]) -> None:
    size = max((row.get("sample_kb", 0) for row in table.values()), default=0)
    print(f"\n{codec} members, {size:.0f} kB per sample as delivered")
    print(
        f"{'loader':<15}{'samples/s':>10}{'CPU µs/sample':>15}{'low-high':>15}{'peak MB':>9}{'first s':>9}{'once':>6}  resume"
    )
    for name, row in sorted(table.items(), key=lambda item: item[1]["cpu_us_per_sample"]):
        span = f"{row['cpu_us_low']:.0f}-{row['cpu_us_high']:.0f}"
        print(
            f"{name:<15}{row['samples_per_s']:>10.0f}{row['cpu_us_per_sample']:>15.0f}{span:>15}{row['rss_mb']:>9.0f}"
            f"{row['first_batch_s']:>9.2f}{'yes' if row.get('exactly_once') else 'NO':>6}  {_resume(row['resume'])}"
        )
    print(flush=True)


def _resume(facts: dict[str, Any]) -> str:
    if "error" in facts:
        return f"fails: {facts['error']}"
    if not facts["state"]:
        return "no state"
    if facts["repeated"] or facts["skipped"]:
        return f"{facts['repeated']} repeated, {facts['skipped']} skipped"
    return "exact"
