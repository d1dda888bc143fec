"""Several training runs as one job array, each task a run of its own: its config, attempts, signals and requeues as `submit` has
them for one run; the code is frozen once for all. A last job compares what is finished.

```
ROOT/jobs/001/job.sbatch, report.sbatch, code/, plan.json, job.json      {"kind": "array", "tasks": [{"name", "run_dir"}], …}
ROOT/jobs/001/00003/config.json, resolved.json, job.json, attempts.json   of task 3: a folder as `submit train` makes it
```
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.slurm import freeze, script
from cluster.slurm.submit import (
    after_owners,
    jobs_dir,
    logs_dir,
    missing_parents,
    one_at_a_time,
    owners,
    send_script,
    taken_back,
    write_record,
)


@dataclasses.dataclass(frozen=True)
class ArrayTask:
    """One run: its name, its directory as the job sees it (absolute), its whole config."""

    name: str
    run_dir: str
    resolved: Mapping[str, Any]
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class ArraySubmission:
    """root: folder of all runs; job: how each task looks (folders are filled in here); plan: what the report job reads; parallel:
    tasks at a time; max_requeues, dependency, follow: as in `submit.Submission`."""

    job: script.Job
    root: str
    tasks: Sequence[ArrayTask]
    plan: Mapping[str, Any]
    parallel: int | None = None
    max_requeues: int | None = None
    dependency: str | None = None
    follow: bool = False


def preview(submission: ArraySubmission) -> dict[str, str]:
    """The scripts that `submit_array` would send, by file name. Writes nothing."""
    return _scripts(submission, freeze.next_folder(jobs_dir(submission.root, "train")))


def submit_array(submission: ArraySubmission) -> dict[str, Any]:
    """Writes the job folder, sends array and report; returns {"jobs": [array, report], "job_dir", "run_dir", "runs": [url, …]}.

    Raises:
        UsageError: another job works on one of the runs. RunFailure: SLURM refuses; nothing is left in the queue or on disk.
    """
    parent = jobs_dir(submission.root, "train")
    new_parents = missing_parents(parent)
    with one_at_a_time(parent):
        dependency = submission.dependency
        for task in submission.tasks:
            found = [
                owner for owner in owners(task.run_dir, parent) if f"afterany:{owner[0]}" not in (dependency or "")
            ]
            dependency = after_owners(task.run_dir, found, submission.follow, dependency)
        return _submit(submission, parent, new_parents, dependency)


def _submit(submission: ArraySubmission, parent: str, new_parents: list[str], dependency: str | None) -> dict[str, Any]:
    folder = freeze.new_folder(parent)
    with taken_back(folder, new_parents) as sent:
        for name, text in _scripts(submission, str(folder)).items():
            (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        (folder / "plan.json").write_text(json.dumps(submission.plan, indent=1) + "\n")
        record = {
            "kind": "array", "run_dir": submission.root, "logs_dir": _report_logs(str(folder)),
            "command": submission.job.command, "code": freeze.freeze_code(folder), "submitted": time.time(), "jobs": sent,
            "tasks": [{"name": task.name, "run_dir": task.run_dir} for task in submission.tasks],
        }  # fmt: skip
        write_record(folder, record)  # before the jobs exist: the first may start at once
        _write_tasks(submission, folder, record, None)
        sent.append(send_script(folder / "job.sbatch", [f"--dependency={dependency}"] if dependency else []))
        _write_tasks(submission, folder, record, sent[0])
        sent.append(send_script(folder / "report.sbatch", [f"--dependency=afterany:{sent[0]}"]))
        write_record(folder, record)
    runs = [task.run_dir for task in submission.tasks]
    return {"jobs": sent, "job_dir": str(folder), "run_dir": submission.root, "runs": runs}


def _write_tasks(submission: ArraySubmission, folder: Path, record: Mapping[str, Any], job: str | None) -> None:
    for number, task in enumerate(submission.tasks):
        place = Path(script.task_folder(str(folder), number))
        if not place.exists():
            place.mkdir()
            freeze.write_config(place, dict(task.resolved), task.fingerprint)
        own = {
            "kind": "train", "run_dir": task.run_dir, "logs_dir": logs_dir(task.run_dir, str(place)),
            "fingerprint": task.fingerprint, "max_requeues": submission.max_requeues,
            "jobs": [f"{job}_{number}"] if job else [],
        }  # fmt: skip
        write_record(place, {**{key: record[key] for key in ("command", "code", "submitted")}, **own})


def _scripts(submission: ArraySubmission, folder: str) -> dict[str, str]:
    job = dataclasses.replace(submission.job, job_dir=folder, logs_dir=_report_logs(folder))
    logs = [logs_dir(task.run_dir, script.task_folder(folder, i)) for i, task in enumerate(submission.tasks)]
    return {
        "job.sbatch": script.array_script(job, logs, submission.parallel),
        "report.sbatch": script.report_script(job, storage.join(folder, "plan.json")),
    }


def _report_logs(folder: str) -> str:
    return os.path.join(folder, "logs")
