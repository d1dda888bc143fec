"""`python -m pipeline sync RUN_DIR`: brings MLflow level with a run directory, each step once.

Of a run on an object store it also makes `metrics.jsonl` from the segments that the run wrote.
For compute nodes without network, and after an outage that outlasted the run. Running it again changes nothing.
A run whose process is gone without a word ends as FAILED (it left a failure record) or KILLED, and other runs of the same
directory that MLflow shows as RUNNING are closed. What MLflow cannot take back: steps redone after a resume with another
loss keep their first figures there; they are named in the tag geoloom.redone_steps, and --check counts them as different.
"""

from __future__ import annotations

import argparse

EXAMPLE = "example:\n  python -m pipeline sync runs_out/first --uri http://mlflow:5000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory (any fsspec URL)")
    parser.add_argument("--uri", help="tracking store; default: the run's tracking.uri, else MLFLOW_TRACKING_URI")
    parser.add_argument("--check", action="store_true", help="only compare: exit 1 if MLflow is not level")
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON last line")


def main(args: argparse.Namespace) -> int:
    from cluster import metrics
    from cluster.cli import print_json
    from cluster.errors import RunFailure
    from cluster.rundir import RunDir
    from cluster.secrets import redacted
    from pipeline.tracking.mirror import Mirror, ranges, status_now
    from pipeline.tracking.mlflow_store import MlflowStore
    from pipeline.tracking.store import StoreUnavailable

    rundir = RunDir(args.run_dir)
    uri = _uri(args.uri, rundir)
    mirror, stale, status = Mirror(rundir, MlflowStore(uri)), list[str](), status_now(rundir)
    try:
        if args.check:
            sent = 0
        else:
            sent = mirror.send(rundir.read_metrics())
            metrics.write_merged(rundir.url)
            mirror.send_files()
            mirror.note_redone()
            stale = mirror.close_stale()
            mirror.end(status)
        faults, redone = mirror.differences(), mirror.redone()
    except StoreUnavailable as error:
        raise RunFailure(f"{redacted(uri)} does not answer ({error}); nothing is lost, try again later") from None
    for fault in faults[:20]:
        print(fault)
    for run_id in stale:
        print(f"MLflow run {run_id} of the same directory was still RUNNING: closed as KILLED")
    state = "level" if not faults else f"{len(faults)} values differ"
    if redone:
        state += f"; steps {ranges(redone)} were redone after a resume, MLflow keeps their first figures"
    print(f"MLflow run {rundir.run_id}: {sent} steps sent, {state}, {status}")
    if args.json:
        print_json({"run_id": rundir.run_id, "steps_sent": sent, "differences": len(faults), "redone": redone,
                    "closed": stale, "status": status, "uri": uri})  # fmt: skip
    return 1 if faults else 0


def _uri(given: str | None, rundir: object) -> str:
    """The store to sync to. Raises UsageError without one, or for a folder that holds no run."""
    import os

    from cluster.errors import UsageError
    from cluster.rundir import RunDir
    from pipeline.tracking.uri import VARIABLES, tracking_uri

    assert isinstance(rundir, RunDir)
    resolved = rundir.read_resolved()
    if resolved is None:
        raise UsageError(f"{rundir.url} holds no run (no resolved.json); give the run.dir of a training run")
    configured = resolved["config"].get("tracking", {}).get("uri", "none")
    uri = given or (tracking_uri(configured) if configured != "none" else None)
    uri = uri or next((os.environ[name] for name in VARIABLES if os.environ.get(name)), None)
    if not uri:
        raise UsageError(
            f"{rundir.url} was run with tracking.uri=none; say where to: --uri sqlite:///mlflow.db or http://…"
        )
    return uri
